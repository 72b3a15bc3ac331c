"""``rope-dist run``: a script as Python runs it, with every model enabled."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import llama_config
from transformers import PreTrainedModel

import rope_dist
from rope_dist.cli import main

ROOT = Path(__file__).parents[1]

TRAIN = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from rope_dist.hf import enabled_modules

config = LlamaConfig.from_pretrained(sys.argv[1])
models = [AutoModelForCausalLM.from_config(config), LlamaForCausalLM(config)]
found = [[m.config.max_position_embeddings, len(list(enabled_modules(m)))] for m in models]
torch.manual_seed(0)
logits = models[1](torch.arange(8)[None]).logits
logits.sum().backward()
found.append(sum(bool(p.grad is not None) for p in models[1].parameters()) > 0)
rank = os.environ.get("RANK", "0")
with open(os.path.join(sys.argv[2], f"rank{rank}.json"), "w") as file:
    json.dump({"argv": sys.argv, "found": found}, file)
"""

# What a script sees of the way it is run.
LOOK = """
import json, sys, os
import beside
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "main": main.__dict__ is globals(),
    "spec": None if __spec__ is None else __spec__.name, "package": __package__ or "", "beside": beside.__file__,
    "cached": globals().get("__cached__"), "doc": __doc__,
}))
sys.exit(int(sys.argv[1]) if sys.argv[1:] else None)
"""


def python(*arguments, cwd=None, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False
    )


RUN = ("-m", "rope_dist", "run")


@pytest.fixture
def config(tmp_path):
    llama_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def train(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    return script


def results(folder, rank=0):
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.mark.parametrize(
    ("options", "length"),
    [
        (("--factor", "2", "--strategy", "yarn", "--set", "beta_fast=16", "--static"), 128),
        (("--plan", "PLAN", "--tables=model"), 192),
        ((), 64),
    ],
    ids=["factor", "plan", "kernels alone"],
)
def test_models_are_enabled(config, train, tmp_path, options, length):
    rope_dist.plan(str(config), factor=3, strategy="pi").save(plan := tmp_path / "plan.json")
    options = [str(plan) if option == "PLAN" else option for option in options]
    done = python(*RUN, *options, train, config, tmp_path, "--factor", "9")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rope-dist: ") == 1
    found = results(tmp_path)
    assert found["argv"] == [str(train), str(config), str(tmp_path), "--factor", "9"]
    assert found["found"] == [[length, 3], [length, 3], True]


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
NO_ACCELERATE = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param(TORCHRUN, 2, id="torchrun"),
        pytest.param(ACCELERATE, 1, id="accelerate", marks=NO_ACCELERATE),
    ],
)
def test_launchers(config, train, tmp_path, launcher, processes):
    done = python(*launcher, *RUN, "--factor", "2", train, config, tmp_path, "--lr", "1")
    assert done.returncode == 0, done.stderr
    for rank in range(processes):
        assert results(tmp_path, rank)["found"] == [[128, 3], [128, 3], True]
        assert results(tmp_path, rank)["argv"][1:] == [str(config), str(tmp_path), "--lr", "1"]
    assert done.stderr.count("rope-dist: ") == 1  # of the first process


@pytest.fixture
def scripts(tmp_path):
    """A script, a link to it, a module of a package, and a directory with a ``__main__``."""
    for folder in ("one", "one/package", "linked"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "beside.py").write_text("")
    (tmp_path / "one/look.py").write_text(LOOK)
    (tmp_path / "one/package/__init__.py").write_text("")
    (tmp_path / "one/package/look.py").write_text(LOOK)
    (tmp_path / "one/package/__main__.py").write_text(LOOK)
    (tmp_path / "linked/look.py").symlink_to(tmp_path / "one/look.py")
    return tmp_path


# Runs a script as the verb does, without the models.
DRIVER = """
import sys
from rope_dist.cli.script import Script

module = sys.argv[1] == "-m"
target, *arguments = sys.argv[1 + module :]
raise SystemExit(Script(target, arguments, module)())
"""


@pytest.fixture
def both(tmp_path):
    """What a command does by Python, and by :class:`Script`."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def run(*command, cwd=None):
        return python(*command, cwd=cwd), python(driver, *command, cwd=cwd)

    return run


@pytest.mark.parametrize(
    ("cwd", "command"),
    [
        (".", ("one/look.py", "3", "--help", "-m", "--")),
        (".", ("linked/look.py",)),
        ("one", ("-m", "package.look", "5", "--set")),
        ("one", ("-m", "package")),
        (".", ("one/package", "0")),
    ],
    ids=str,
)
def test_a_script_sees_what_python_shows_it(scripts, both, cwd, command):
    expected, done = both(*command, cwd=scripts / cwd)
    assert done.returncode == expected.returncode, done.stderr
    assert expected.stdout
    seen = json.loads(done.stdout)
    seen["path"] = os.path.normpath(scripts / cwd / seen["path"])  # runpy keeps that of a directory relative
    assert seen == json.loads(expected.stdout)


FAILING = """
import sys
def deep():
    {statement}
deep()
"""


@pytest.mark.parametrize(
    "statement",
    [
        "raise ValueError('mine')",
        "open('/no/such/file')",
        "import no_such_module_at_all",
        "raise KeyboardInterrupt",
        "sys.exit('a message')",
        "print(1); raise SystemExit",
        "sys.excepthook = lambda *a: print('hooked', a[0].__name__); 1 / 0",
        "import atexit; atexit.register(lambda: print(sys.modules['__main__'].deep is deep))",
        "x = = 1",
    ],
)
def test_errors_are_the_scripts_own(tmp_path, both, statement):
    (tmp_path / "failing.py").write_text(FAILING.format(statement=statement))
    expected, done = both("failing.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )


def test_errors_of_the_verb(tmp_path):
    """An error that would be one line if it were the command line's own."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(statement="raise ValueError('mine')"))
    expected, done = python(script), python(*RUN, script)
    assert done.returncode == expected.returncode == 1
    assert done.stderr == f"rope-dist: enables every model that {script} builds\n{expected.stderr}"


@pytest.mark.parametrize(
    "options",
    [("--plan", "PLAN"), ("--dynamic",), ("--stages", "128", "--static"), ("--factor", "x")],
    ids=str,
)
def test_bad_options_are_one_line(tmp_path, options, capsys):
    script, plan = tmp_path / "never.py", tmp_path / "plan.json"
    script.write_text("print('ran')")
    plan.write_text("{}")
    options = [str(plan) if option == "PLAN" else option for option in options]
    assert main(["run", *options, str(script)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "error: " in printed.err
    assert PreTrainedModel.post_init.__qualname__ == "PreTrainedModel.post_init"
    assert not hasattr(PreTrainedModel.post_init, "__wrapped__")
