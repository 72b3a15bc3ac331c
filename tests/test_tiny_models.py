"""The tiny models against stock alone: every rotary type is built, runs, and depends on its rotation."""

import functools

import pytest
import torch
import transformers
from helpers.tiny_models import (
    MULTIMODAL,
    NOT_BUILT,
    PER_LAYER,
    ROTARY_TYPES,
    config_class,
    tiny_config,
    tiny_model,
    tiny_multimodal,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BUILT = [kind for kind in ROTARY_TYPES if kind not in NOT_BUILT]
IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@functools.lru_cache(maxsize=1)
def model_of(kind):
    return tiny_model(kind)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def rotary_modules(model):
    return [m for m in model.modules() if "Rotary" in type(m).__name__ and "Vision" not in type(m).__name__]


def turn_faster(model):
    """Every frequency of every rotary embedding times 1.5; returns how many tables were changed."""
    changed = 0
    for module in rotary_modules(model):
        for name, table in module.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                table.mul_(1.5)
                changed += 1
            elif name == "embed_positions":  # GPT-J and CodeGen keep the sines and cosines of every position
                table.copy_(table[(torch.arange(len(table)) * 2) % len(table)])
                changed += 1
        if "phimoe" in type(module).__module__:  # computes its frequencies anew from the config at every call
            module.config.rope_parameters["rope_theta"] /= 10
    return changed


def test_list_of_types():
    """The list is read from source files: that of this release is complete, and nothing is listed that is not there."""
    assert len(ROTARY_TYPES) >= 95  # transformers 5.6
    assert {"llama", "gemma4_text", "gpt_oss", "deepseek_v3", "qwen3_5_text", "llama4_text"} <= set(
        ROTARY_TYPES
    )
    assert not {"gpt2", "bloom", "mamba", "t5", "xglm"} & set(ROTARY_TYPES)  # no rotation
    assert set(NOT_BUILT) <= {*ROTARY_TYPES, *transformers.CONFIG_MAPPING}


@pytest.mark.parametrize("kind", BUILT)
def test_every_kind_of_layer(kind):
    """A default (full-size) config has no kind of layer that the tiny one lacks."""
    tiny, default = tiny_config(kind).get_text_config(), config_class(kind)().get_text_config()
    for key in PER_LAYER:
        assert set(getattr(tiny, key, None) or []) >= set(getattr(default, key, None) or [])
    assert tiny.vocab_size <= 128
    assert all(0 <= getattr(tiny, f"{name}_token_id", 0) < tiny.vocab_size for name in ("pad", "bos", "eos"))


@pytest.mark.parametrize("kind", BUILT)
def test_forward(kind):
    model = model_of(kind)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    logits = logits_of(model)
    assert logits.shape[:2] == IDS.shape
    assert logits.isfinite().all()
    assert (logits.std(dim=1).mean() > 0.01).all()  # from token to token


@pytest.mark.parametrize("kind", BUILT)
def test_no_parameter_is_constant(kind):
    for name, parameter in model_of(kind).named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.numel() == 1 or parameter.std() > 1e-3, name


@pytest.mark.parametrize("kind", BUILT)
def test_generate_with_left_padding(kind):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :5], mask[0, :5] = 0, 0
    made = model_of(kind).generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True
    )
    assert made.shape == (2, 28)
    assert torch.equal(made[:, :24], ids)


@pytest.mark.parametrize("kind", BUILT)
def test_rotation_matters(kind):
    model = tiny_model(kind)
    before = logits_of(model)
    assert torch.equal(before, logits_of(model_of(kind)))  # the same model again
    assert turn_faster(model)
    assert (logits_of(model) - before).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["llama", "gemma4_text", "deepseek_v3"])
def test_dtype(kind):
    """Frequencies stay float32, as they do in a model that stock loads in bfloat16."""
    model = tiny_model(kind, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {table.dtype for module in rotary_modules(model) for table in module.buffers()} == {torch.float32}
    assert logits_of(model).isfinite().all()


def test_changes():
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_model("llama", attn_implementation="eager", rope_parameters=scaling, vocab_size=96)
    assert model.config._attn_implementation == "eager"
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert logits_of(model).shape[-1] == 96


def test_number_of_multimodal_models():
    assert len(MULTIMODAL) >= 20


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_multimodal(kind):
    model = tiny_multimodal(kind)
    text = [
        m
        for m in rotary_modules(model)
        if any(m.config is c for c in (model.config.get_text_config(), m.config))
    ]
    assert text
    assert len(list(model.parameters())) > len(
        list(model.get_decoder().parameters())
    )  # a tower beside the text
    before = logits_of(model)
    assert before.isfinite().all()
    turn_faster(model)
    assert (logits_of(model) - before).abs().max() > 0.02
