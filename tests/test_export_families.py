"""Exported directories of every family: stock transformers reads them as the enabled model."""

import pytest
import torch
from helpers.model_families import FAMILIES, model_of

import rope_dist
from rope_dist import export

LAYER_TYPED = {"Olmo3", "Gemma3"}
IDS = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LAYER_TYPED])
@torch.no_grad()
def test_read_by_stock_transformers(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path / "source")
    plan = rope_dist.plan(tmp_path / "source", factor=2, strategy="dprope")
    export.hf(tmp_path / "source", plan, tmp_path / "out")
    with rope_dist.enable(model, plan=plan):
        extended = model(IDS).logits
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.rotary_emb.inv_freq, plan.inv_freq)
    torch.testing.assert_close(loaded(IDS).logits, extended, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LAYER_TYPED))
def test_frequencies_per_layer_type_are_refused(name, tmp_path):
    model_of(name).save_pretrained(tmp_path / "source")
    plan = rope_dist.plan(tmp_path / "source", factor=2, strategy="dprope")
    with pytest.raises(ValueError, match=r"per layer type.*save_pretrained"):
        export.hf(tmp_path / "source", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
