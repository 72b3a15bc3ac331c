"""Whole models, enabled, with what only a GPU or another package brings; on a CPU what of it runs there.

A LLaMA2-7B's prefill at 8k and 16k and 32 tokens after it are compared with stock, and timed, by
``benchmarks/model_prefill.py`` and ``benchmarks/model_decode.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import transformers

import rope_dist
from rope_dist import ops
from rope_dist.evaluation.models import cache_option


@pytest.fixture
def exact(device):
    """A small LLaMA in float64: what the same model in bfloat16 is off by is rounding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=2,
        intermediate_size=256,
        vocab_size=96,
        initializer_range=0.1,  # at the default attention is near uniform, and no rotation is seen
    )
    return transformers.LlamaForCausalLM(config).to(device).double().eval()


@pytest.fixture
def ids(device):
    return torch.randint(0, 96, (1, 80), generator=torch.Generator().manual_seed(1)).to(device)


def in_bfloat16(model, implementation: str = "sdpa"):
    """Stock and enabled, with float32 frequencies as a checkpoint's model has them."""
    stock = copy.deepcopy(model)
    frequencies = model.model.rotary_emb.inv_freq.float()
    stock.bfloat16()
    for name in ("inv_freq", "original_inv_freq"):
        setattr(stock.model.rotary_emb, name, frequencies.clone())
    stock.set_attn_implementation(implementation)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    return stock, enabled


def assert_no_farther(enabled: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor) -> None:
    """Of the exact logits than stock is, but for the noise of rounding in another order."""
    far, near = ((x.double() - exact).norm() / exact.norm() for x in (stock, enabled))
    assert near <= 1.2 * far + 1e-3
    assert far < 0.1


def attention_package(implementation: str) -> str | None:
    """Why that implementation cannot run, or None."""
    if implementation == "sdpa":
        return None
    if not torch.cuda.is_available():
        return "needs a GPU"
    number = implementation[-1]
    there = getattr(transformers.utils, f"is_flash_attn_{number}_available", lambda: False)
    return None if there() else f"flash-attention {number} is not installed"


@pytest.mark.parametrize(
    "implementation", ["sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
)
@torch.no_grad()
def test_packed_sequences(exact, ids, implementation):
    """By flash-attention's varlen kernels: a token sees its own sequence only."""
    if reason := attention_package(implementation):
        pytest.skip(reason)
    parts = ids.split([25, 40, 15], dim=1)
    positions = torch.cat([torch.arange(part.shape[1], device=ids.device) for part in parts])[None]
    want = torch.cat([exact(part).logits for part in parts], dim=1)
    stock, enabled = (
        model(ids, position_ids=positions, use_cache=False).logits
        for model in in_bfloat16(exact, implementation)
    )
    assert_no_farther(enabled, stock, want)


def recorded(
    call: Callable[[], torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, Callable[[], object]]:
    """The result of ``call``, and what makes it anew in place: on a GPU a CUDA graph of it."""
    if device.type != "cuda":
        out = call()
        return out, lambda: out.copy_(call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return out, graph.replay


def decoded(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the tokens after the prompt, one at a time from a static cache, by one graph."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1])
    token, position = ids[:, :1].clone(), torch.zeros(1, 1, dtype=torch.long, device=ids.device)

    def read_prompt() -> None:
        cache.reset()
        model(ids[:, :prompt], **cache_option(model, cache))

    def step() -> torch.Tensor:
        return model(token, position_ids=position, **cache_option(model, cache)).logits

    model(ids[:, :prompt], **cache_option(model, cache))
    out, again = recorded(step, ids.device)
    read_prompt()
    rows = []
    for at in range(prompt, ids.shape[1]):
        token.copy_(ids[:, at : at + 1])
        position.fill_(at)
        again()
        rows.append(out.clone())
    return torch.cat(rows, dim=1)


@torch.no_grad()
def test_decoding_from_a_static_cache_in_a_cuda_graph(exact, ids):
    stock, enabled = in_bfloat16(exact)
    want = exact(ids).logits[:, 70:]
    try:
        of_stock = decoded(stock, ids, 70)
    except RuntimeError as error:
        pytest.skip(f"the stock model cannot be captured in a graph: {str(error).splitlines()[0]}")
    assert_no_farther(decoded(enabled, ids, 70), of_stock, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_four_bit_weights_of_bitsandbytes(exact, ids, tmp_path):
    """They keep their own product; the rotation after it is this package's."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    exact.bfloat16().save_pretrained(tmp_path / "model")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=four_bits, device_map={"": 0}, dtype=torch.bfloat16
    )
    want = model(ids).logits
    with rope_dist.enable(model), mock.patch.object(ops, "qkv_rotary", wraps=ops.qkv_rotary) as fused:
        got = model(ids).logits
    assert fused.call_count == 0
    assert (got - want).float().norm() < 0.03 * want.float().norm()
    assert torch.equal(model(ids).logits, want)
