"""``enable(model, tables="model")``: queries and keys are bit for bit those of vLLM's rotary kernel."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from helpers.model_families import model_of
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rope_dist

START = 65536
pytestmark = pytest.mark.usefixtures("one_thread", "stock_again")


def vllm_cache(inv_freq, scaling, tokens, dtype):
    """vLLM's ``_compute_cos_sin_cache``, then ``.to(dtype)``."""
    freqs = torch.einsum("i,j -> ij", torch.arange(tokens, dtype=torch.float), inv_freq)
    return torch.cat((freqs.cos() * scaling, freqs.sin() * scaling), dim=-1).to(dtype)


def vllm_rotary(x, positions, cache, neox):
    """vLLM's ``apply_token_rotary_embedding`` of ``x`` ``[B, S, H, D]``: float32 from 16-bit values, rounded once."""
    cos, sin = (t.float()[:, None] for t in cache[positions].chunk(2, dim=-1))
    wide = x.float()
    first, second = wide.chunk(2, dim=-1) if neox else (wide[..., ::2], wide[..., 1::2])
    out = first * cos - second * sin, second * cos + first * sin
    return (torch.cat(out, -1) if neox else torch.stack(out, -1).flatten(-2)).to(x.dtype)


@pytest.fixture
def attended(monkeypatch):
    """Hidden states, rotated queries and rotated keys ``[B, S, H, D]`` of each layer that a model has run."""
    seen = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, *args, **kwargs):
        seen[-1] += (query.transpose(1, 2), key.transpose(1, 2))
        return sdpa(module, query, key, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)

    def run(model, **inputs):
        seen.clear()
        modules = [layer.self_attn for layer in model.model.layers]
        before = [
            m.register_forward_pre_hook(
                lambda _, __, kw: seen.append([kw["hidden_states"]]), with_kwargs=True
            )
            for m in modules
        ]
        model(**inputs)
        for hook in before:
            hook.remove()
        return list(zip(modules, map(tuple, seen), strict=True))

    return run


def projected(attention, hidden, norms):
    """Queries and keys as the modules of the model make them."""
    heads = []
    for name in ("q", "k"):
        x = torch.nn.functional.linear(hidden, *getattr(attention, f"{name}_proj").parameters())
        x = x.unflatten(-1, (-1, attention.head_dim))
        heads.append(getattr(attention, f"{name}_norm")(x) if norms else x)
    return heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Glm"])
@torch.no_grad()
def test_bit_equal_to_vllm(backend, device, attended, name, dtype):
    changes = {} if name != "Glm" else {"partial_rotary_factor": 1.0}
    model = model_of(name, dtype=dtype, max_position_embeddings=2 * START, **changes).to(device)
    base, head_dim = model.config.rope_parameters["rope_theta"], model.model.layers[0].self_attn.head_dim
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    cache = vllm_cache(inv_freq, 1.0, START + 8, dtype).to(device)
    rope_dist.enable(model, tables="model")
    ids = torch.arange(8, device=device)[None] + 3
    for start in (0, START):
        positions = torch.arange(start, start + 8, device=device)
        layers = attended(model, input_ids=ids, position_ids=positions[None], use_cache=False)
        for attention, (hidden, *rotated) in layers:
            for x, found in zip(projected(attention, hidden, name == "Qwen3"), rotated, strict=True):
                assert torch.equal(found, vllm_rotary(x, positions, cache, neox=name != "Glm"))
    rope_dist.enable(model)
    layers = attended(model, input_ids=ids, position_ids=positions[None], use_cache=False)
    attention, (hidden, q, _) = layers[0]
    x, _ = projected(attention, hidden, name == "Qwen3")
    assert not torch.equal(q, vllm_rotary(x, positions, cache, neox=name != "Glm"))


@torch.no_grad()
def test_attention_scaling_is_in_the_rounded_value(backend, device, attended):
    model = model_of("Llama", dtype=torch.bfloat16).to(device)
    plan = rope_dist.plan(model, factor=2, strategy="yarn")
    assert plan.attention_scaling != 1
    rope_dist.enable(model, plan=plan, tables="model")
    base, head_dim = model.config.rope_parameters["rope_theta"], model.model.layers[0].self_attn.head_dim
    factors = torch.tensor(plan.factors, dtype=torch.float32)
    inv_freq = 1.0 / (factors * base ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    cache = vllm_cache(inv_freq, plan.attention_scaling, 128, torch.bfloat16).to(device)
    ids = torch.randint(3, 90, (1, 128), generator=torch.Generator().manual_seed(1)).to(device)
    for attention, (hidden, *rotated) in attended(model, input_ids=ids, use_cache=False):
        for x, found in zip(projected(attention, hidden, False), rotated, strict=True):
            assert torch.equal(found, vllm_rotary(x, torch.arange(128, device=device), cache, True))


@torch.no_grad()
def test_autocast_rounds_to_its_dtype(device, attended):
    model = model_of("Llama").to(device)
    rope_dist.enable(model, tables="model")
    ids = torch.arange(8, device=device)[None] + 3
    rotary = model.model.rotary_emb
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cos, _ = rotary(torch.zeros(1, device=device), ids)
    assert cos.dtype == torch.float32
    assert torch.equal(cos, cos.bfloat16().float())
    cos, _ = rotary(torch.zeros(1, device=device), ids)
    assert not torch.equal(cos, cos.bfloat16().float())


@torch.no_grad()
def test_float32_models_are_the_same_by_both(device):
    model, ids = model_of("Qwen3").to(device), torch.arange(40, device=device)[None] + 3
    rope_dist.enable(model)
    expected = model(ids).logits
    rope_dist.enable(model, tables="model")
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_disable_and_contexts_restore(device):
    model, ids = model_of("Llama", dtype=torch.bfloat16).to(device), torch.arange(40, device=device)[None] + 3
    stock = model(ids).logits
    with rope_dist.enable(model):
        exact = model(ids).logits
        with rope_dist.enable(model, tables="model"):
            rounded = model(ids).logits
            assert torch.equal(copy.deepcopy(model)(ids).logits, rounded)
        assert not torch.equal(rounded, exact)
        assert torch.equal(model(ids).logits, exact)
    rope_dist.enable(model, tables="model")
    with rope_dist.enable(model):
        assert torch.equal(model(ids).logits, exact)
    assert torch.equal(model(ids).logits, rounded)
    rope_dist.disable(model)
    assert torch.equal(model(ids).logits, stock)
    assert not any("rope_dist" in name for m in model.modules() for name in m.__dict__)


def test_globally_and_in_the_report(triton_backend, device, tmp_path):
    model = model_of("Qwen3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with rope_dist.enable(tables="model"):
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
        paths = {(layer.path, layer.reason) for layer in rope_dist.report(loaded)}
    ((path, reason),) = paths
    assert path == "rotary"
    assert "tables='model'" in reason
    with rope_dist.enable(loaded):
        assert {layer.path for layer in rope_dist.report(loaded)} == {"projection + norm + rotary"}


@pytest.mark.parametrize("tables", ["bfloat16", None, torch.bfloat16, ["model"]])
def test_others_are_refused(tables):
    model = model_of("Llama")
    with pytest.raises(ValueError, match="tables must be 'float32' or 'model'"):
        rope_dist.enable(model, tables=tables)
    assert not hasattr(model.model.layers[0].self_attn, "_rope_dist_rounded")


@torch.no_grad()
def test_cached_keys_are_corrected_by_the_rounded_tables(device, attended):
    """Past the trained length: a key of the first stage becomes that of the second, up to one rounding."""
    model = model_of("Llama", dtype=torch.bfloat16).to(device)
    plan = rope_dist.dynamic_plan(model, factor=2, strategy="yarn", stages=[128])
    rope_dist.enable(model, plan=plan, tables="model")
    ids = torch.randint(3, 90, (1, 80), generator=torch.Generator().manual_seed(1)).to(device)
    cache = DynamicCache(config=model.config)
    _, (hidden, *_) = attended(model, input_ids=ids[:, :60], past_key_values=cache)[0]
    model(ids[:, 60:], past_key_values=cache)
    base, head_dim = model.config.rope_parameters["rope_theta"], model.model.layers[0].self_attn.head_dim
    factors = torch.tensor(plan.stages[-1].factors, dtype=torch.float32)
    inv_freq = 1.0 / (factors * base ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    tables = vllm_cache(inv_freq, plan.stages[-1].attention_scaling, 60, torch.bfloat16).to(device)
    _, k = projected(model.model.layers[0].self_attn, hidden, False)
    expected = vllm_rotary(k, torch.arange(60, device=device), tables, True)[0].transpose(0, 1)
    found = cache.layers[0].keys[0, :, :60]
    # Pairs, which a rotation mixes: two roundings of at most 2^-9 of the pair each, and float32's.
    length = torch.linalg.vector_norm(torch.stack(expected.float().chunk(2, -1)), dim=0)
    far = torch.linalg.vector_norm(torch.stack((found.float() - expected.float()).chunk(2, -1)), dim=0)
    share = (far / length).max().item()
    assert share < 2.1 * 2**-8
    # By tables that are not rounded it would miss what cos and sin were rounded by too.
    assert (far == 0).float().mean() > 0.4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of torch, about what it compiles
@pytest.mark.parametrize("name", ["Llama", "Llama4Text"])
def test_compiled(device, name):
    if name == "Llama":
        model = model_of(name, dtype=torch.bfloat16)
    else:
        from helpers.tiny_models import tiny_model

        model = tiny_model("llama4_text").bfloat16()
    model = model.to(device)
    rope_dist.enable(model, tables="model")
    ids = torch.arange(24, device=device)[None] + 3
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    rope_dist.enable(model)
    assert not torch.equal(compiled(ids, use_cache=False).logits, expected)
