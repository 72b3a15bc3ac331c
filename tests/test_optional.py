"""Without the packages of the extra ``hf``: the operators work, and everything else says what to install."""

import os
import subprocess
import sys

import pytest

BLOCK = """
import sys
for name in {names!r}:
    sys.modules[name] = None  # as if it were not installed
"""
HF = ("transformers", "tabulate", "tqdm", "typer")


def python(code, tmp_path, blocked=HF, arguments=()):
    """What a process prints in which ``blocked`` cannot be imported, and its exit code."""
    # Triton's interpreter of the tests is no part of this.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(names=blocked) + code, *arguments],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


OPERATORS = """
import torch, rope_dist, rope_dist.ops as ops
q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8)
angles = torch.arange(5.)[:, None] * torch.tensor([1, 0.1, 0.01, 0.001])
turned, _ = ops.rotary(q, k, angles.cos()[None], angles.sin()[None])
a, b = q.double().chunk(2, -1)
cos, sin = (f(angles.double())[:, None] for f in (torch.cos, torch.sin))
assert torch.allclose(turned.double(), torch.cat([a * cos - b * sin, b * cos + a * sin], -1), atol=1e-6)
assert rope_dist.rotary is ops.rotary
"""

NAMES = """
import importlib, rope_dist
for name in rope_dist.__all__:
    try:
        getattr(rope_dist, name)
    except ImportError as error:
        print(f"rope_dist.{name}: {error}")
for name in ("hf", "export", "evaluation"):
    try:
        importlib.import_module(f"rope_dist.{name}")
    except ImportError as error:
        print(f"rope_dist.{name}: {error}")
"""


def test_the_operators_need_torch_alone(tmp_path):
    done = python(OPERATORS, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["transformers", "tabulate", "tqdm"])
def test_what_needs_the_extra_names_it(tmp_path, missing):
    import rope_dist

    done = python(NAMES, tmp_path, (missing,))
    assert done.returncode == 0, done.stderr
    without = {"rotary", "qkv_rotary", "__version__"}
    names = [*(name for name in rope_dist.__all__ if name not in without), "hf", "export", "evaluation"]
    assert done.stdout.splitlines() == [
        f"rope_dist.{name}: rope_dist.{name} needs {missing}, which is not installed: pip install 'rope-dist[hf]'"
        for name in names
    ]


@pytest.mark.parametrize("missing", HF)
def test_the_command_line_says_so_in_one_line(tmp_path, missing):
    run = "import runpy; sys.argv[0] = 'rope-dist'; runpy.run_module('rope_dist', run_name='__main__')"
    done = python(run, tmp_path, (missing,), ["plan", "llama2-7b", "--factor", "2"])
    expected = (
        f"rope-dist: error: rope-dist needs {missing}, which is not installed: pip install 'rope-dist[hf]'\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_the_installed_command_is_the_one_that_says_so():
    import tomllib
    from pathlib import Path

    metadata = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["project"]["scripts"]["rope-dist"] == "rope_dist.__main__:main"
