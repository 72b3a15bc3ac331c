"""Exported directories of every family: stock transformers reads them as the enabled model."""

import pytest
import torch
import transformers
from helpers.model_families import FAMILIES, model_of

import rope_dist
from rope_dist import export
from rope_dist.layer_types import extended_layers

IDS = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_read_by_stock_transformers(name, tmp_path):
    model = model_of(name)
    if name == "Olmo3" and "full_attention" not in model.config.rope_parameters:
        pytest.skip(f"transformers {transformers.__version__} scales all layers of olmo3")
    model.save_pretrained(tmp_path / "source")
    plan = rope_dist.plan(tmp_path / "source", factor=2, strategy="dprope")
    export.hf(tmp_path / "source", plan, tmp_path / "out")
    layers = extended_layers(model.config)
    with rope_dist.enable(model, plan=plan):
        extended = model(IDS).logits
    loaded = type(model).from_pretrained(tmp_path / "out")
    rotary = loaded.model.rotary_emb
    assert torch.equal(getattr(rotary, f"{layers}_inv_freq" if layers else "inv_freq"), plan.inv_freq)
    torch.testing.assert_close(loaded(IDS).logits, extended, rtol=1e-5, atol=1e-5)
