"""The rotary classes of vLLM and SGLang give the plan's cos and sin from an exported directory."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.model_families import config_of

import rope_dist
from rope_dist import export
from rope_dist.export.architectures import reading
from rope_dist.export.forms import ROUNDING
from rope_dist.export.stock import StockModel

WHEELS = {"vllm": "vllm==0.33.0", "sglang": "sglang==0.5.23"}


@pytest.fixture(scope="session", params=WHEELS)
def engine(request, tmp_path_factory):
    """The engine's name and a folder with its Python files, from a wheel that pip fetches once."""
    cache = os.environ.get("ROPE_DIST_ENGINES")
    if not cache:
        pytest.skip("ROPE_DIST_ENGINES names no folder to keep the wheels of vLLM and SGLang (375 MB) in")
    name, folder = request.param, Path(cache)
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-q", "-d", str(folder)]
    if not list(folder.glob(f"{name}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", *options, WHEELS[name]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{WHEELS[name]} is not to be had: {done.stderr.strip().splitlines()[-1]}")
    tree = tmp_path_factory.mktemp(name)
    with zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))) as wheel:
        wheel.extractall(tree, [n for n in wheel.namelist() if "/layers/rotary_embedding/" in n])
    return name, tree


def tables(engine, directory, tmp_path, *tokens):
    name, tree = engine
    script = Path(__file__).parent / "helpers/engine_rotary.py"
    out = tmp_path / "out.pt"
    command = [sys.executable, script, name, tree, directory, out, *tokens]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def planned(plan, tokens=None):
    angles = torch.arange(tokens or plan.target_length, dtype=torch.float32)[:, None] * plan.inv_freq
    return angles.cos() * plan.attention_scaling, angles.sin() * plan.attention_scaling


FORMS = [
    ("dprope", "longrope"),
    ("yarn", "longrope"),
    ("yarn", "native"),
    ("pi", "native"),
    ("ntk", "native"),
]
FORMS += [("llama3", "native"), ("auto-yarn", "native")]


def assert_planned(got, plan, form):
    """Bit for bit from a longrope; from a native form, angles to the rounding of a frequency."""
    angle = 0 if form == "longrope" else plan.target_length * ROUNDING
    for found, expected in zip((got["cos"], got["sin"]), planned(plan), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=angle * plan.attention_scaling)


@pytest.mark.parametrize(("strategy", "form"), FORMS)
def test_the_class_follows_the_plan(engine, llama, tmp_path, strategy, form):
    plan = rope_dist.plan(llama, factor=2, strategy=strategy)
    got = tables(engine, export.hf(llama, plan, tmp_path / "out", config_only=True, form=form), tmp_path)
    assert_planned(got, plan, form)


@pytest.mark.parametrize("form", ["native", "longrope"])
@pytest.mark.parametrize("kind", ["Mistral", "Granite", "Qwen2", "Qwen3", "Gemma2", "Qwen3Moe"])
def test_models_that_the_table_has(engine, tmp_path, kind, form):
    """Where the model file hands over the config's parameters, its class gives the plan's cos and sin."""
    config = config_of(kind, head_dim=16)
    how = reading(engine[0], StockModel(config), "yarn" if form == "native" else form).how
    config.save_pretrained(tmp_path / "source")
    plan = rope_dist.plan(tmp_path / "source", factor=2, strategy="yarn")
    out = export.hf(tmp_path / "source", plan, tmp_path / "out", config_only=True, form=form)
    state = next(check.state for check in export.verify(out, plan).checks if check.engine == engine[0])
    assert (state == "as planned") == (how == "yes")
    if how == "yes":
        assert_planned(tables(engine, out, tmp_path), plan, form)


def test_the_class_does_not_follow_a_naive_export(engine, llama, tmp_path):
    """transformers would run this config by the plan: its attention_factor is 1, but these classes do not read it."""
    plan = rope_dist.plan(llama, factor=2, strategy="dprope")
    out = export.hf(llama, plan, tmp_path / "out", config_only=True)
    config = json.loads((out / "config.json").read_text())
    rope = {**config["rope_parameters"], "factor": 2.0, "original_max_position_embeddings": 64}
    del config["rope_scaling"]
    (out / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    got = tables(engine, out, tmp_path)
    assert not torch.allclose(got["cos"], planned(plan)[0], atol=0.05)
    reasons = {check.engine: check.reason for check in export.verify(out, plan).checks}
    assert reasons["transformers"] is None
    assert "scaled by 1.08012" in reasons[engine[0]]


def test_vllm_takes_one_stage_of_a_dynamic_plan_and_sglang_misreads_it(engine, llama, tmp_path):
    """vLLM by its --max-model-len, SGLang by the largest position: the token at the trained length gets position 0."""
    plan = rope_dist.dynamic_plan(llama, factor=2, strategy="pi")
    out = export.hf(llama, plan, tmp_path / "out", config_only=True)
    name, _ = engine
    for tokens in (64, 65, 128):
        cos, sin = planned(plan.at(tokens) if tokens == 64 else plan.stages[-1], tokens)
        got = tables(engine, out, tmp_path, tokens)
        if name == "sglang" and tokens == 65:
            cos, sin = planned(plan.stages[0], tokens)
            cos[64], sin[64] = 1, 0
        assert torch.equal(got["cos"], cos)
        assert torch.equal(got["sin"], sin)
    reason = next(check.reason for check in export.verify(out, plan).checks if check.engine == name)
    assert reason is None if name == "vllm" else "the factors of a whole batch" in reason
