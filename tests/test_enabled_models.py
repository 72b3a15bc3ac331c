"""Enabled models travel: copied, pickled into a process that enabled nothing, compiled, exported."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.stock import assert_stock, classes
from helpers.tiny_models import tiny_model

import rope_dist
from rope_dist.hf import enabled_modules, projecting, reporting

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.usefixtures("stock_again", "one_thread")


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


SCRIPT = """
import sys
import torch
saved = torch.load(sys.argv[1], weights_only=False)
import rope_dist
from rope_dist.hf import enabled_modules
equal = {"rtol": 0, "atol": 1e-6}
for model, ids, stock, expected, count in saved:
    assert len(list(enabled_modules(model))) == count > 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **equal)
        rope_dist.disable(model)
        assert not list(enabled_modules(model))
        assert model.config.max_position_embeddings == 64
        torch.testing.assert_close(model(ids, use_cache=False).logits, stock, **equal)
        with rope_dist.enable(model, factor=4, dynamic=False):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **equal)
print(len(saved))
"""


def skip_unless_stock_pickles(model):
    try:
        pickle.dumps(model)
    except (AttributeError, pickle.PicklingError) as error:
        pytest.skip(f"stock's model cannot be pickled (the kernels library is installed): {error}")


def test_pickled_into_another_process(tmp_path):
    saved = []
    skip_unless_stock_pickles(tiny_model("llama"))
    for name in ("llama", "glm4", "deepseek_v3"):
        model = tiny_model(name)
        stock = logits(model)
        rope_dist.enable(model, factor=4, dynamic=False)
        saved.append((model, IDS, stock, logits(model), len(list(enabled_modules(model)))))
        assert not torch.allclose(stock, saved[-1][3], atol=1e-3)
    torch.save(saved, tmp_path / "models.pt")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "models.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "llama4_text"])
def test_a_copy_is_a_model_of_its_own(name, copied):
    model = tiny_model(name)
    if copied is not copy.deepcopy:
        skip_unless_stock_pickles(model)
    stock = logits(model)
    rope_dist.enable(model)
    twin = copied(model)
    assert classes(twin) == classes(model)
    assert torch.equal(logits(twin), logits(model))
    rope_dist.disable(model)
    assert list(enabled_modules(twin))
    rope_dist.disable(twin)
    assert_stock(twin, model)
    assert torch.equal(logits(twin), stock)


FUSED, ROTARY = "projection + rotary", "rotary"
TRACED = [
    ("gpt_oss", ROTARY),
    ("gpt_oss", FUSED),
    ("glm4", FUSED),  # interleaved
    ("deepseek_v3", ROTARY),  # latent
    ("llama4_text", ROTARY),  # complex
    ("gemma4_text", ROTARY),  # tables for each layer type
]


@pytest.mark.filterwarnings("ignore")  # of torch, about what it compiles
@pytest.mark.parametrize(("name", "path"), TRACED)
class TestTraced:
    @pytest.fixture
    def model(self, name, path, monkeypatch):
        if path == FUSED:
            for module in (projecting, reporting):
                monkeypatch.setattr(module, "why_not_fused", lambda attention, x: None)
        model = tiny_model(name)
        rope_dist.enable(model)
        assert path in {layer.path for layer in rope_dist.report(model)}
        return model

    def test_compiled(self, name, path, model):
        torch.compiler.reset()
        expected = logits(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)

    def test_exported(self, name, path, model):
        try:
            torch.export.export(tiny_model(name), (IDS,), {"use_cache": False})
        except Exception as error:
            pytest.skip(f"torch does not export stock: {error}")
        exported = torch.export.export(model, (IDS,), {"use_cache": False})
        with torch.no_grad():
            found = exported.module()(IDS, use_cache=False).logits
        torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
