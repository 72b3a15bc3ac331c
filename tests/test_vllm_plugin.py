"""The plugin of vLLM: in the rotary package of its wheel, and on a package with the same names."""

import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rope_dist.integrations import vllm as plugin

ROOT = Path(__file__).parents[1]


def test_in_vllms_own_package(tmp_path):
    folder = os.environ.get("ROPE_DIST_ENGINES")
    wheels = sorted(Path(folder).glob("vllm-*.whl")) if folder else []
    if not wheels:
        pytest.skip("ROPE_DIST_ENGINES names no folder with a wheel of vLLM")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(tmp_path, [n for n in wheel.namelist() if "/layers/rotary_embedding/" in n])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "helpers/vllm_plugin.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for name in ("two sets", "two scalings"):
        assert results.pop(name) == {"class": plugin.NAME, "plain": False}
    assert len(results) == 5
    for name, result in results.items():
        rows = 64 if name == "within the trained length" else 128
        expected = {"plain": True, "equal": True, "bytes": rows / 192, "same rotation": True}
        # The class of longrope rotates by tables in the dtype of the queries only where they have it.
        if name == "bfloat16":
            result.pop("same rotation"), expected.pop("same rotation")
        assert result == {"class": "RotaryEmbedding", **expected}, name


class Plain(nn.Module):
    """Signature and attributes of vLLM 0.33's ``RotaryEmbedding``."""

    def __init__(
        self, head_size, rotary_dim, max_position_embeddings, base, is_neox_style, dtype, init_cache=True
    ):
        super().__init__()
        shape = (max_position_embeddings, rotary_dim)
        self.register_buffer("cos_sin_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.cos_sin_cache_bf16 = None


class Long(nn.Module):
    """Of its ``Phi3LongRoPEScaledRotaryEmbedding``."""

    def __init__(
        self, head_size, rotary_dim, max_position_embeddings, original_max_position_embeddings, base,
        is_neox_style, dtype, short_factor, long_factor, short_mscale=None, long_mscale=None,
    ):  # fmt: skip
        super().__init__()
        self.use_long_rope = True
        self.short_mscale, self.long_mscale = short_mscale or 1.0, long_mscale or 1.0
        rows = original_max_position_embeddings + max_position_embeddings
        table = torch.arange(rows * rotary_dim, dtype=dtype).view(rows, rotary_dim)
        self.register_buffer("long_short_cos_sin_cache", table, persistent=False)


@pytest.fixture
def rotary(monkeypatch):
    module = types.ModuleType(plugin.ROTARY)
    module.RotaryEmbedding, module.Phi3LongRoPEScaledRotaryEmbedding = Plain, Long
    monkeypatch.setitem(sys.modules, plugin.ROTARY, module)
    monkeypatch.delenv("ROPE_DIST_VLLM", raising=False)
    return module


def make(rotary, short=(1.0, 2.0), long=(1.0, 2.0), **more):
    return rotary.Phi3LongRoPEScaledRotaryEmbedding(
        4, 4, 16, 8, 1e4, True, torch.float32, short, long, **more
    )


def test_one_set_of_factors_is_the_plain_class(rotary, caplog):
    with caplog.at_level("INFO"):
        plugin.register()
        plugin.register()
    assert len(caplog.records) == 1
    module = make(rotary)
    assert type(module) is Plain
    assert torch.equal(module.cos_sin_cache, make_long().long_short_cos_sin_cache[8:24])
    assert "cos_sin_cache" in dict(module.named_buffers())
    assert type(make(rotary, short=(1.0, 1.0))) is Long
    assert type(make(rotary, long_mscale=1.5)) is Long
    assert type(make(rotary, short_mscale=1.5, long_mscale=1.5)) is Plain


def make_long():
    return Long(4, 4, 16, 8, 1e4, True, torch.float32, (1.0, 2.0), (1.0, 2.0))


def test_off(rotary, monkeypatch):
    monkeypatch.setenv("ROPE_DIST_VLLM", "0")
    plugin.register()
    assert rotary.Phi3LongRoPEScaledRotaryEmbedding is Long


def test_other_versions_are_left_alone(rotary, caplog):
    class Other(Long):
        def __init__(self, head_size, rope, dtype):
            pass

    for name, cls in ((plugin.NAME, Other), ("RotaryEmbedding", Other), (plugin.NAME, len)):
        before = getattr(rotary, name)
        setattr(rotary, name, cls)
        longrope = rotary.Phi3LongRoPEScaledRotaryEmbedding
        plugin.register()
        assert rotary.Phi3LongRoPEScaledRotaryEmbedding is longrope
        assert "left as it is" in caplog.text
        setattr(rotary, name, before)


def test_a_platforms_own_class_and_surprises_fall_back(rotary, monkeypatch, caplog):
    plugin.register()
    monkeypatch.setattr(
        Plain, "__new__", lambda cls, *a, **k: nn.Module.__new__(type("Ascend", (Plain,), {}))
    )
    assert type(make(rotary)) is Long
    monkeypatch.undo()

    def raises(self, *args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setitem(sys.modules, plugin.ROTARY, rotary)
    monkeypatch.setattr(Plain, "__init__", raises)
    assert type(make(rotary)) is Long
    assert "vLLM's own longrope runs" in caplog.text


def test_the_entry_points_are_declared():
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["vllm.general_plugins"] == {"rope-dist": "rope_dist.integrations.vllm:register"}
    assert points["axolotl.plugins"] == {"rope-dist": "rope_dist.integrations.axolotl:RopeDistPlugin"}
