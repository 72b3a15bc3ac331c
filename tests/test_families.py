"""Families of Llama's kind: an enabled model computes what stock computes, in whatever way models are run.

The others are in test_every_model.py, without what takes long.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers.model_families import FAMILIES, TIER_A, TIER_B, model_of
from packaging.version import Version

import rope_dist
from rope_dist import ops
from rope_dist.hf import enabled_modules

TOKENS = 40  # past the sliding windows of 16


pytestmark = pytest.mark.usefixtures("stock_again")


@pytest.fixture(params=FAMILIES)
def both(request):
    """A stock model and the same one enabled."""
    stock = model_of(request.param)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    return stock, enabled


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def skip_unless_extended(name):
    if name == "Olmo3" and Version(transformers.__version__) < Version("5.13"):
        pytest.skip("before transformers 5.13 all layers of OLMo 3 have one set of frequencies")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_prefill(both, ids, attention):
    stock, enabled = both
    if attention == "sdpa" and not stock._supports_sdpa:
        pytest.skip(f"{type(stock).__name__} has no scaled_dot_product_attention")
    expected = stock(ids).logits
    for model in both:
        model.set_attn_implementation(attention)
    # Compiled for a CPU, torch's flex_attention gives wrong numbers on some processors; the test after this one
    # asks for it. As it is, it is the definition.
    with torch.compiler.set_stance("force_eager"):
        close(stock(ids).logits, expected)
        close(enabled(ids).logits, expected)


@torch.no_grad()
def test_compiled_flex_attention(ids):
    stock = model_of("Llama")
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    eager = stock(ids).logits
    for model in (stock, enabled):
        model.set_attn_implementation("flex_attention")

    def check_the_reference():
        # Without AVX-512 it reads memory that nobody wrote (torch 2.13), and differs from call to call.
        try:
            for _ in range(2):
                close(stock(ids).logits, eager)
        except (AssertionError, RuntimeError) as error:  # or its code does not compile
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f"torch's own compiled flex_attention is wrong on this processor: {reason}")

    check_the_reference()
    logits = enabled(ids).logits
    check_the_reference()
    close(logits, eager)


def test_loss_and_gradients(both, ids):
    losses = []
    for model in both:
        model.train()
        torch.manual_seed(5)  # Seed-OSS drops some of its residuals out
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    close(losses[1], losses[0])
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in both), strict=True):
        if a.grad is None:
            assert b.grad is None, name
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(both, ids, use_reentrant):
    gradients = []
    for model in both:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    close(gradients[1], gradients[0])


@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_with_left_padding(both, ids, cache):
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    stock, enabled = (model.generate(ids, **options) for model in both)
    assert torch.equal(enabled.sequences, stock.sequences)
    for a, b in zip(enabled.logits, stock.logits, strict=True):
        close(a, b)


def test_packed_sequences(both, ids):
    """Positions that start again: stock makes a block-diagonal mask of them, and rotates by them."""
    position_ids = torch.cat((torch.arange(25), torch.arange(15)))[None]
    stock, enabled = (model(ids[:1], position_ids=position_ids, use_cache=False).logits for model in both)
    close(enabled, stock)
    alone = both[1](ids[:1, 25:], use_cache=False).logits
    torch.testing.assert_close(enabled[:, 25:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_no_farther_from_float64_than_stock(name, ids):
    # torch has no float64 kernel for experts on a CPU; float32 is as good a measure of bfloat16's errors.
    wide = torch.float32 if name in ("Mixtral", "Qwen3Moe") else torch.float64
    exact = model_of(name, dtype=torch.bfloat16).to(wide)(ids).logits
    errors = []
    narrow = model_of(name, dtype=torch.bfloat16)
    for enable in (False, True):
        if enable:
            rope_dist.enable(narrow)
        logits = narrow(ids).logits.to(wide)
        errors.append((logits - exact).square().mean().sqrt().item())
    # Rounding elsewhere is the greater part, and its draw differs: 5 % is noise of this many elements.
    assert errors[1] <= 1.05 * errors[0]


@pytest.mark.parametrize(
    "name", ["Llama", "Mistral", "Qwen2", "Gemma2", "Qwen3", "Olmo2", "SmolLM3", "Gemma3"]
)
def test_compiles_whole(name, ids):
    stock = model_of(name)
    expected = stock.model(ids, use_cache=False).last_hidden_state
    rope_dist.enable(stock)
    torch.compiler.reset()
    compiled = torch.compile(stock.model, fullgraph=True, backend="aot_eager")
    close(compiled(ids, use_cache=False).last_hidden_state, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_extended_saved_and_read_by_stock(name, ids, tmp_path):
    skip_unless_extended(name)
    model = model_of(name)
    own = model(ids).logits
    with rope_dist.enable(model, factor=4, dynamic=False) as enabled:
        assert enabled.plan.target_length == 256
        extended = model(ids).logits
        assert not torch.allclose(extended, own, atol=1e-4)
        model.save_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, own)
    assert not list(enabled_modules(model))
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 256
    close(loaded(ids).logits, extended)


@pytest.mark.parametrize("name", ["Gemma3", "Olmo3"])
def test_only_full_layers_are_extended(name):
    skip_unless_extended(name)
    model = model_of(name)
    rotary = model.model.rotary_emb
    local = rotary.sliding_attention_inv_freq.clone()
    plan = rope_dist.enable(model, factor=4, dynamic=False).plan
    assert torch.equal(rotary.sliding_attention_inv_freq, local)
    assert torch.equal(rotary.full_attention_inv_freq, plan.inv_freq)
    model.to(torch.bfloat16)
    assert rotary.full_attention_inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_pickles(name, ids, tmp_path):
    skip_unless_extended(name)
    model = model_of(name)
    rope_dist.enable(model, factor=2)
    expected = model(ids).logits
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in copies:
        assert torch.equal(twin(ids).logits, expected)
        assert len(list(enabled_modules(twin))) == len(list(enabled_modules(model)))
        rope_dist.disable(twin)
        assert not list(enabled_modules(twin))


@pytest.mark.parametrize("name", FAMILIES)
def test_report(name):
    model, x = model_of(name, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)
    assert {layer.path for layer in rope_dist.report(model)} == {"untouched"}
    enabled = rope_dist.enable(model)
    layers = enabled.report()
    assert [layer.name for layer in layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert layers[0].path == (
        "rotary" if name in TIER_A or ops.backend_for(x) == "reference" else "norm + rotary"
    )
    with ops.use_backend("triton"):
        layers = enabled.report()
    if name.startswith("Olmo"):
        assert layers[0].path == "norm + rotary"
        assert layers[0].reason == "all heads of a token are normalised together, after the projections"
    elif name in TIER_B:
        assert (layers[0].path, layers[0].reason) == ("projection + norm + rotary", "")
    else:
        assert (layers[0].path, layers[0].reason) == ("projection + rotary", "")
    if name == "SmolLM3":
        assert layers[1].path == "untouched"
        assert layers[1].reason == "the layer has no rotary embedding"
    else:
        assert layers[1] == type(layers[1])(layers[1].name, layers[0].path, layers[0].reason)
    with ops.use_backend("triton"):
        assert layers[0].path in str(enabled)


def test_a_family_split_over_the_tiers():
    assert not set(TIER_A) & set(TIER_B)
