"""Every rotary model type of transformers: planned, exported and read by stock, or refused for one reason."""

import copy
import json
import re

import pytest
import torch
import transformers
from helpers.tiny_models import (
    MULTIMODAL,
    NOT_BUILT,
    ROTARY_TYPES,
    tiny_config,
    tiny_model,
    tiny_multimodal,
)

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.forms import ROUNDING
from rope_dist.layer_types import extended_layers

VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])
WINDOWS = r"there is nothing to extend: {} rotates only the layers that see 16 tokens \({}\)"
NO_POSITIONS = "there is nothing to extend: the full attention of {} has no positions"
BASES = r"layers of {} have RoPE bases of their own \(layer_rope_theta: 5000, 10000\)"
REFUSED = {
    "afmoe": WINDOWS.format("afmoe", "sliding_window"),
    "beam": NO_POSITIONS.format("BeamConfig"),
    "blt": "BltConfig has several transformers with rotary embeddings of their own",
    "codegen": r"CodeGenConfig has no rotary embedding that a plan can extend \(no rope_parameters\)",
    "cohere2": WINDOWS.format("cohere2", "sliding_window"),
    "cohere2_moe": WINDOWS.format("cohere2_moe", "sliding_window"),
    "cohere_compass_text": NO_POSITIONS.format("CohereCompassTextConfig"),
    "exaone4": WINDOWS.format("exaone4", "sliding_window"),
    "exaone_moe": WINDOWS.format("exaone_moe", "sliding_window"),
    "flint": WINDOWS.format("flint", "sliding_window"),
    "gptj": r"GPTJConfig has no rotary embedding that a plan can extend \(no rope_parameters\)",
    "granite_swa": BASES.format("GraniteSWAConfig"),
    "granitemoe_swa": BASES.format("GraniteMoeSWAConfig"),
    "kolibri1": WINDOWS.format("kolibri1", "sliding_window"),
    "lara_mini": WINDOWS.format("lara_mini", "sliding_window"),
    "llama4": WINDOWS.format("llama4_text", "attention_chunk_size"),
    "llama4_text": WINDOWS.format("llama4_text", "attention_chunk_size"),
    "recurrent_gemma": WINDOWS.format("recurrent_gemma", "attention_window_size"),
    # Composite models, by their language model.
    "aya_vision": WINDOWS.format("cohere2", "sliding_window"),
    "cohere2_vision": WINDOWS.format("cohere2", "sliding_window"),
    "cohere_compass": NO_POSITIONS.format("CohereCompassTextConfig"),
    "exaone4_5": WINDOWS.format("exaone4", "sliding_window"),
}
if VERSION < (5, 15):
    HEADS = "this version of transformers computes a longrope of gemma4_text by the head_dim of its sliding layers"
    REFUSED |= {"gemma4": HEADS, "gemma4_text": HEADS}
if VERSION < (5, 13):
    REFUSED["olmo3"] = "this version of transformers would scale the sliding layers of olmo3 too"
    REFUSED["bamba"] = (
        "stock transformers cannot run this plan in BambaConfig"  # its config is always read as partial
    )


def text_of(config):
    return config.get_text_config(decoder=True)


def numbers_plan():
    """As a user may have it for a model that plan() refuses."""
    return rope_dist.plan(theta=10000.0, head_dim=16, original_length=64, factor=2)


def frequencies(model, layers):
    """Of the language model's rotary embeddings: the towers' have "Vision", "Audio", ... in their names."""
    name = "inv_freq" if layers is None else f"{layers}_inv_freq"
    modules = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    found = [
        m
        for m in modules
        if getattr(m, "config", None) is not None and m.config.model_type == text_of(model.config).model_type
    ]
    return [getattr(m, name) for m in found]


def extended(model, plan):
    """Stock with the plan's entries and the weights of ``model``."""
    config = copy.deepcopy(model.config)
    text_of(config).__dict__.update(plan.config_overrides(config))
    torch.manual_seed(0)
    new = type(model)(config)
    new.load_state_dict(model.state_dict())
    return new.eval()


@pytest.mark.parametrize("model_type", [t for t in ROTARY_TYPES if t not in NOT_BUILT])
@torch.no_grad()
def test_planned_exported_and_read_by_stock(model_type, tmp_path):
    config = tiny_config(model_type)
    source, out = tmp_path / "source", tmp_path / "out"
    config.save_pretrained(source)
    if model_type in REFUSED:
        check_refused(source, config, REFUSED[model_type])
        return
    model = tiny_model(model_type)
    layers = extended_layers(text_of(config))
    trained = rope_dist.plan(source, factor=1, strategy="extrapolation")
    assert frequencies(model, layers)
    for inv_freq in frequencies(model, layers):
        torch.testing.assert_close(inv_freq, trained.inv_freq, rtol=1e-6, atol=0.0)
    plan = rope_dist.plan(source, factor=2, strategy="yarn", beta_fast=8)
    export.hf(source, plan, out, config_only=True)
    verification = export.verify(out, plan, source=source)
    assert verification.checks[0] == export.Check("transformers", None)
    longrope = export.hf(source, plan, tmp_path / "longrope", config_only=True, form="longrope")
    again, exact = (type(model)(type(config).from_pretrained(d)) for d in (out, longrope))
    for new, rounding in ((extended(model, plan), 0), (exact, 0), (again, ROUNDING)):
        found = frequencies(new, layers)
        assert found
        for inv_freq in found:
            torch.testing.assert_close(inv_freq, plan.inv_freq, rtol=rounding, atol=0)
    # Other types of layers keep theirs.
    others = [] if layers is None else [k for k in set(text_of(config).layer_types) if k != layers]
    for kind in others:
        if isinstance(text_of(config).rope_parameters.get(kind), dict):
            for before, after in zip(frequencies(model, kind), frequencies(again, kind), strict=True):
                assert torch.equal(before, after)
    # vLLM may be unable to run it: for the same reason in both.
    reason = next(check.reason for check in verification.checks if check.engine == "vllm")
    if reason is None:
        written = text_of(again.config).rope_parameters
        assert written.get(layers, written)["rope_type"] in export.vllm_arguments(plan, config)
    else:
        with pytest.raises(ValueError, match=re.escape(f"{config.model_type} by a plan: {reason}")):
            export.vllm_arguments(plan, config)


def check_refused(source, config, reason):
    """By plan(), every export and verify(), for one reason."""
    plan = numbers_plan()
    for call in (
        lambda: rope_dist.plan(source, factor=2),
        lambda: rope_dist.plan(config, factor=2),
        lambda: plan.config_overrides(config),
        lambda: export.hf(source, plan, source.parent / "out", config_only=True),
        lambda: export.vllm_arguments(plan, config),
        *([] if "stock" in reason else [lambda: export.verify(source, plan).raise_for_failure()]),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    assert not (source.parent / "out").exists()
    assert main(["plan", str(source), "--factor", "2"]) == 2


@pytest.mark.parametrize("model_type", MULTIMODAL)
@torch.no_grad()
def test_the_language_model_of_a_multimodal_model(model_type, tmp_path):
    model = tiny_multimodal(model_type)
    source, out = tmp_path / "source", tmp_path / "out"
    if model_type in REFUSED:
        model.config.save_pretrained(source)
        check_refused(source, model.config, REFUSED[model_type])
        return
    model.save_pretrained(source)
    plan = rope_dist.plan(source, factor=2, strategy="yarn", beta_fast=8)
    export.hf(source, plan, out)
    assert export.verify(out, plan, source=source).checks[0] == export.Check("transformers", None)
    loaded = type(model).from_pretrained(out).eval()
    layers = extended_layers(text_of(model.config))
    assert frequencies(loaded, layers)
    for inv_freq in frequencies(loaded, layers):
        torch.testing.assert_close(inv_freq, plan.inv_freq, rtol=ROUNDING, atol=0)
    # The rest of the config is the source's.
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, out))
    part = next(k for k in after if after[k] != before.get(k))
    assert {**before, part: None} == {**after, part: None}
    ids = torch.randint(3, 100, (1, 100), generator=torch.Generator().manual_seed(1))
    logits = loaded(input_ids=ids).logits
    torch.testing.assert_close(logits, extended(model, plan)(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert (logits - model(input_ids=ids).logits).abs().max() > 1e-3


def test_what_is_refused_is_there():
    """A type that every version drops leaves the list too."""
    assert set(REFUSED) <= {*ROTARY_TYPES, *MULTIMODAL} or VERSION < (5, 24)
