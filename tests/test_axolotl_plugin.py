"""The plugin of axolotl: by the real PluginManager of its wheel, and on a package with the same protocol."""

import inspect
import os
import subprocess
import sys
import types
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import llama_config
from transformers import AutoModelForCausalLM

import rope_dist
from rope_dist.hf import enabled_modules

pydantic = pytest.importorskip("pydantic")
pytestmark = pytest.mark.usefixtures("stock_again")
ROOT = Path(__file__).parents[1]


class BasePlugin:
    """The methods of axolotl 0.21's that the plugin has, with its parameters."""

    def get_input_args(self) -> str | None: ...

    def post_model_build(self, cfg, model): ...


def module(monkeypatch, name, **attributes):
    made = types.ModuleType(name)
    vars(made).update(attributes)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module."""
    module(monkeypatch, "axolotl", __path__=[])
    module(monkeypatch, "axolotl.integrations", __path__=[])
    module(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    name = "rope_dist.integrations.axolotl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield EntryPoint("rope-dist", f"{name}:RopeDistPlugin", "axolotl.plugins").load()
    sys.modules.pop(name, None)


def test_the_protocol(plugin):
    assert issubclass(plugin, BasePlugin)
    for name in ("get_input_args", "post_model_build"):
        own, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (plugin, BasePlugin))
        assert list(own) == list(theirs)
    where, _, cls = plugin().get_input_args().rpartition(".")
    assert issubclass(getattr(sys.modules[where], cls), pydantic.BaseModel)


@pytest.mark.parametrize(
    ("chosen", "length", "enabled"),
    [
        ({"factor": 2, "strategy": "yarn", "settings": {"beta_fast": 16}, "dynamic": False}, 128, 3),
        ({"target_length": 256, "tables": "model"}, 256, 3),
        ({"plan": "PLAN"}, 192, 3),
        (True, 64, 3),
        ({}, 64, 3),
        (False, 64, 0),
        (None, 64, 0),
    ],
    ids=str,
)
def test_models_are_enabled(plugin, tmp_path, chosen, length, enabled):
    model = AutoModelForCausalLM.from_config(llama_config())
    if chosen == {"plan": "PLAN"}:
        rope_dist.plan(model, factor=3, strategy="pi").save(tmp_path / "plan.json")
        chosen = {"plan": str(tmp_path / "plan.json")}
    cfg = {"base_model": "x"} if chosen is None else {"base_model": "x", "rope_dist": chosen}
    plugin().post_model_build(cfg, model)
    assert model.config.max_position_embeddings == length
    assert len(list(enabled_modules(model))) == enabled


@pytest.mark.parametrize("chosen", [{"factr": 2}, {"tables": "bf16"}, {"factor": "two"}, 3])
def test_bad_keys_are_refused_when_the_configuration_is_read(plugin, chosen):
    where, _, cls = plugin().get_input_args().rpartition(".")
    with pytest.raises(pydantic.ValidationError):
        getattr(sys.modules[where], cls)(rope_dist=chosen)


MANAGER = """
import importlib, importlib.metadata, sys
import engine_stubs
tree = sys.argv[1]
engine_stubs.install("axolotl", "axolotl.integrations.base", tree)
engine_stubs.install("peft", "-", tree)
point = importlib.metadata.EntryPoint("rope-dist", "rope_dist.integrations.axolotl:RopeDistPlugin", "axolotl.plugins")
real = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **k: [point] if k.get("group") == "axolotl.plugins" else real(**k)
base = importlib.import_module("axolotl.integrations.base")
base.BUILTIN_PLUGINS = ()
manager = base.PluginManager.get_instance()
assert list(manager.plugins) == ["rope_dist.integrations.axolotl.RopeDistPlugin"], manager.plugins
assert manager.get_input_args() == ["rope_dist.integrations.axolotl.RopeDistArgs"]
from transformers import LlamaConfig, LlamaForCausalLM
small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=32)
for chosen, length in (({"factor": 2}, 128), (None, 64)):
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **small))
    cfg = {"rope_dist": chosen} if chosen else {}
    manager.pre_model_load(cfg)
    manager.post_model_build(cfg, model)
    assert model.config.max_position_embeddings == length
    print(type(model.model.layers[0].self_attn).__name__, length)
"""


def test_by_axolotls_own_manager(tmp_path):
    folder = os.environ.get("ROPE_DIST_ENGINES")
    wheels = sorted(Path(folder).glob("axolotl-*.whl")) if folder else []
    if not wheels:
        pytest.skip("ROPE_DIST_ENGINES names no folder with a wheel of axolotl")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extract("axolotl/integrations/base.py", tmp_path)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    done = subprocess.run(
        [sys.executable, "-c", MANAGER, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["EnabledLlamaAttention", "128", "LlamaAttention", "64"]
