"""Each engine's formula against an independent reference: transformers' functions, and the engines' own from wheels."""

import json
import math
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from rope_dist.export.engines import ENGINES, transformers_5

ORIGINAL = {"original_max_position_embeddings": 64}
TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, **ORIGINAL},
    "truncate": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 10.0, "truncate": False, **ORIGINAL},
    "attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **ORIGINAL},
    "mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.5, "mscale_all_dim": 0.5, **ORIGINAL},
    "every": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.3,
        "mscale": 0.3 / (0.1 * math.log(4.0)),
        "mscale_all_dim": 0,
        **ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.5 + i / 8 for i in range(8)],
        "long_factor": [1.5 + i / 8 for i in range(8)],
        **ORIGINAL,
    },
}
ULP = 1.2e-7


def config(name, theta=10000.0, length=256):
    rope = dict(TYPES[name])
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": length,
        "rope_theta": theta,
        "rope_scaling": None if name == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }


def reference(name, theta=10000.0):
    """transformers' own function."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = config(name, theta)
    rope = dict(own["rope_parameters"])
    made = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope
    )
    if rope["rope_type"] == "default":
        return LlamaRotaryEmbedding(made).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](made, torch.device("cpu"))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", TYPES)
def test_transformers(name, theta):
    inv_freq, scaling = reference(name, theta)
    for read in (transformers_5, ENGINES["transformers-4"]):
        own = config(name, theta)
        if name == "longrope" and read is not transformers_5:
            own["original_max_position_embeddings"] = 64  # transformers 4 reads it there
        found = read(own)
        assert torch.equal(found.inv_freq, inv_freq)
        assert found.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn", "betas", "every", "longrope"])
@pytest.mark.parametrize("engine", ENGINES)
def test_where_engines_agree(engine, name):
    inv_freq, scaling = reference(name)
    own = config(name)
    if (engine, name) == ("transformers-4", "longrope"):
        own["original_max_position_embeddings"] = 64
    found = ENGINES[engine](own)
    torch.testing.assert_close(found.inv_freq, inv_freq, rtol=2 * ULP, atol=0)
    assert found.attention_scaling == pytest.approx(scaling, rel=1e-9)


def test_what_engines_do_not_read():
    """By hand: 0.1 ln 4 + 1 where attention_factor is not read; ramps that are rounded where truncate is not."""
    for engine, scaling in (
        ("vllm", 1.3),
        ("exllamav3", 1.3),
        ("sglang", 1.1386294),
        ("mlx", 1.1386294),
        ("tensorrt-llm", 1.1386294),
    ):
        assert ENGINES[engine](config("attention")).attention_scaling == pytest.approx(scaling)
    for engine in ("mlx", "tensorrt-llm"):
        own = config("truncate")
        rounded = {**own, "rope_scaling": {**own["rope_scaling"], "truncate": True}}
        assert torch.equal(ENGINES[engine](own).inv_freq, ENGINES[engine](rounded).inv_freq)
    # ExLlamaV3's factor is the ratio of the lengths.
    assert torch.equal(ENGINES["exllamav3"](config("yarn", length=64)).inv_freq, reference("default")[0])
    unknown = {**config("linear"), "rope_scaling": {"rope_type": "abc", "factor": 2.0}}
    for read in ENGINES.values():
        with pytest.raises(ValueError, match="knows no rope_type 'abc'"):
            read(unknown)


def test_dynamic():
    """transformers and mlx by the text, vLLM never, SGLang always by the largest length."""
    own = {**config("linear"), "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    plain = reference("default")[0]
    base = 10000.0 * (2.0 * 2 - 1) ** (16 / 14)
    grown = 1 / base ** (torch.arange(0, 16, 2).double() / 16)
    for engine in ("transformers-4", "mlx"):
        with pytest.raises(ValueError, match="change with the length"):
            ENGINES[engine](own)
        torch.testing.assert_close(ENGINES[engine](own, tokens=100).inv_freq, plain, rtol=ULP, atol=0)
        found = ENGINES[engine](own, tokens=512).inv_freq.double()
        torch.testing.assert_close(found, grown, rtol=5e-7, atol=0)
    assert torch.equal(ENGINES["vllm"](own).inv_freq, plain)
    assert (ENGINES["vllm"](own).length, ENGINES["vllm"](own).table_length) == (512, 256)
    torch.testing.assert_close(ENGINES["sglang"](own).inv_freq.double(), grown, rtol=5e-7, atol=0)


def source_of(name, path):
    """A file of an engine's wheel."""
    folder = os.environ.get("ROPE_DIST_ENGINES")
    wheels = list(Path(folder).glob(f"{name}-*.whl")) if folder else []
    if not wheels:
        pytest.skip(f"ROPE_DIST_ENGINES names no folder with a wheel of {name}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(path).decode()


@pytest.mark.parametrize("name", TYPES)
def test_exllamav3_itself(name):
    code = source_of("exllamav3", "exllamav3/util/rope.py").replace(
        "from ..ext import exllamav3_ext as ext", ""
    )
    module = types.ModuleType("exllamav3_rope")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(code, module.__dict__)
    own = config(name)
    settings = module.RopeSettings(
        head_dim=16, rope_theta=10000.0, rope_scaling=own["rope_scaling"], max_position_embeddings=256
    )
    engine = module.RoPE("cpu", settings)
    found = ENGINES["exllamav3"](own)
    torch.testing.assert_close(found.inv_freq, engine.inv_freq, rtol=ULP, atol=0)
    assert found.attention_scaling == pytest.approx(engine.attn_factor, rel=1e-12)


def mlx_stand_in():
    """mlx.core's few functions by torch, and mlx.nn's classes."""
    core, nn = types.ModuleType("mlx.core"), types.ModuleType("mlx.nn")
    core.float32, core.pi, core.array, core.inf = torch.float32, math.pi, torch.tensor, math.inf
    core.arange = lambda *a, dtype=torch.int64: torch.arange(*a, dtype=dtype)
    core.where, core.clip = torch.where, torch.clamp
    nn.Module = object

    class RoPE:
        def __init__(self, dims, traditional, base, scale=1.0):
            self._freqs = (base ** (torch.arange(0, dims, 2).float() / dims)) / scale

    nn.RoPE = RoPE
    return {"mlx": types.ModuleType("mlx"), "mlx.core": core, "mlx.nn": nn}


@pytest.mark.parametrize("name", TYPES)
def test_mlx_itself(name, monkeypatch):
    code = source_of("mlx_lm", "mlx_lm/models/rope_utils.py")
    for key, module in mlx_stand_in().items():
        monkeypatch.setitem(sys.modules, key, module)
    monkeypatch.setattr(sys.modules["mlx"], "core", sys.modules["mlx.core"], raising=False)
    monkeypatch.setattr(sys.modules["mlx"], "nn", sys.modules["mlx.nn"], raising=False)
    module = types.ModuleType("mlx_rope")
    exec(code, module.__dict__)
    own = config(name)
    engine = module.initialize_rope(16, 10000.0, False, own["rope_scaling"], 256)
    found = ENGINES["mlx"](own)
    torch.testing.assert_close(found.inv_freq, 1.0 / engine._freqs, rtol=2 * ULP, atol=0)
    scaling = getattr(engine, "mscale", getattr(engine, "_scale", 1.0))
    assert found.attention_scaling == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_rotary_class_itself(engine, tmp_path):
    """cos and sin of the class's own table; longrope's are in test_export_engines.py."""
    folder = os.environ.get("ROPE_DIST_ENGINES")
    wheels = list(Path(folder).glob(f"{engine}-*.whl")) if folder else []
    if not wheels:
        pytest.skip(f"ROPE_DIST_ENGINES names no folder with a wheel of {engine}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(tmp_path, [n for n in wheel.namelist() if "/layers/rotary_embedding/" in n])
    script = Path(__file__).parent / "helpers/engine_rotary.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for name in ("linear", "llama3", "truncate", "mscale"):
        model, out = tmp_path / name, tmp_path / f"{name}.pt"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config(name)))
        command = [sys.executable, script, engine, tmp_path, model, out]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        got, found = torch.load(out), ENGINES[engine](config(name))
        angles = torch.arange(256, dtype=torch.float32)[:, None] * found.inv_freq
        # One ulp of an angle of 256 is 3e-5.
        torch.testing.assert_close(got["cos"], angles.cos() * found.attention_scaling, rtol=0, atol=6e-5)
        torch.testing.assert_close(got["sin"], angles.sin() * found.attention_scaling, rtol=0, atol=6e-5)
        # At position 1 the angle is the frequency.
        first = torch.atan2(got["sin"][1], got["cos"][1])
        torch.testing.assert_close(first, found.inv_freq, rtol=1e-6, atol=1e-8)
