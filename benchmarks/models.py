"""LLaMA-shaped models with random weights, stock and enabled, that share their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import rope_dist

from .question import Size
from .shapes import DTYPES


def config(size: Size, layers: int, attention: str = "sdpa") -> LlamaConfig:
    """Of that shape with ``layers`` layers, trained to the length it reads."""
    shape = size.shape
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.k_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=size.tokens,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        attn_implementation=attention,
    )


def build(size: Size, layers: int, device: torch.device) -> LlamaForCausalLM:
    """A stock model with random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[size.dtype])
    try:
        with device:
            model = LlamaForCausalLM(config(size, layers))
    finally:
        torch.set_default_dtype(before)
    # Frequencies as a checkpoint's model has them: float32, whatever its weights are.
    rotary = model.model.rotary_emb
    rotary.inv_freq = size.shape.inv_freq(device)
    rotary.original_inv_freq = rotary.inv_freq.clone()
    return model.eval()


def enabled(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with this package's attention; parameters are shared, not copied."""
    second = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    rope_dist.enable(second)
    return second


def with_attention(model: LlamaForCausalLM, implementation: str) -> LlamaForCausalLM:
    """The same model with another attention implementation; parameters are shared."""
    second = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    second.config._attn_implementation = implementation
    return second


def parameters_bytes(size: Size, layers: int) -> int:
    """Bytes of all weights."""
    shape = size.shape
    layer = shape.hidden * (sum(shape.widths) + shape.widths[0] + 3 * shape.intermediate)
    return (layers * layer + 2 * shape.vocabulary * shape.hidden) * DTYPES[size.dtype].itemsize


def linear_flops(size: Size, layers: int) -> int:
    """Operations of the layers' matrix products on every token."""
    shape = size.shape
    layer = shape.hidden * (sum(shape.widths) + shape.widths[0] + 3 * shape.intermediate)
    return 2 * size.tokens * layers * layer


def attention_flops(size: Size, layers: int) -> int:
    """Operations of causal attention."""
    return 2 * layers * size.tokens**2 * size.shape.widths[0]


def products(model: LlamaForCausalLM, tokens: int) -> Callable[[], None]:
    """Every matrix product of the layers on random input, and nothing else: what no model can be faster than."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach() for m in linears]
    inputs = {
        width: torch.randn(tokens, width, dtype=weights[0].dtype, device=weights[0].device)
        for width in {w.shape[1] for w in weights}
    }

    def call() -> None:
        for weight in weights:
            functional.linear(inputs[weight.shape[1]], weight)

    return call
