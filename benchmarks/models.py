"""LLaMA-shaped models with random weights, stock and enabled, that share their parameters; and their cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import rope_dist

from .baselines import COMPILED
from .benchmark import Options, Size
from .harness import Case, Implementation
from .shapes import DTYPES

STOCK, ENABLED = "huggingface, sdpa", "rope_dist.enable"


class Pair:
    """A model, the same one enabled, and tokens ``ids`` ``[1, S]``."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        self.model = build(size, layers, device)
        self.enabled = enabled(self.model)
        generator = torch.Generator(device).manual_seed(0)
        self.ids = torch.randint(
            0, size.shape.vocabulary, (1, size.tokens), device=device, generator=generator
        )


def case(
    size: Size,
    options: Options,
    run: Callable[[Any, nn.Module], Callable[[], list[torch.Tensor]]],
    *,
    layers: dict[str, int],
    need: Callable[[int, int], int],
    pair: Callable[[Size, int, torch.device], Any] = Pair,
    step: str = "",
    passes: tuple[int, int] | None = None,
    compiled: int = 0,
    **more: Any,
) -> Case:
    """The case of one size: ``run(pair, model)`` of the stock and the enabled model, and their products alone.

    Args:
        run: from the pair and one of its models (or that compiled) to the call that is timed.
        layers: by device type how many layers are built at most, unless asked otherwise.
        need: bytes beyond the weights', from the layers and the weights' bytes.
        pair: makes the models; both copies of the inputs are the same, since two of them may not fit.
        step: of the case's name.
        passes: how often the layers' products are computed, and of how many tokens; None: once, of all.
        compiled: 1: the stock model is compiled too, 2: also the enabled one.
    """
    device = options.device
    count = options.layers or min(layers.get(device.type, size.shape.layers), size.shape.layers)
    weights, (times, tokens) = parameters_bytes(size, count), passes or (1, size.tokens)

    def products(x: Any) -> Callable[[], None]:
        matrices = [m.weight.detach() for m in x.model.model.layers.modules() if isinstance(m, nn.Linear)]
        inputs = {
            width: matrices[0].new_empty(tokens, width).normal_() for width in {w.shape[1] for w in matrices}
        }

        def call() -> None:
            for weight in matrices * times:
                functional.linear(inputs[weight.shape[1]], weight)

        return call

    def implementations(x: Any) -> list[Implementation]:
        found = [
            Implementation(STOCK, lambda x: run(x, x.model), "reference"),
            Implementation(ENABLED, lambda x: run(x, x.enabled), "ours"),
            Implementation("products alone", products, "roofline"),
        ]
        kinds = (COMPILED, x.model, "baseline"), (f"{COMPILED} of {ENABLED}", x.enabled, "ours")
        for name, model, kind in kinds[:compiled]:
            if device.type == "cuda" and options.wants(COMPILED):
                fast = torch.compile(model, dynamic=False)
                found.append(Implementation(name, lambda x, m=fast: run(x, m), kind, late=True))
        return found

    return Case(
        name=f"{size}, {count} layer{'s' * (count > 1)}{step}",
        inputs=cache(lambda: pair(size, count, device)),
        implementations=implementations,
        # Both are right or wrong together with the stock model in its own type.
        exact=lambda x: [y.double() for y in run(x, x.model)()],
        # Softmax and rounding are between the rotation and what is compared.
        tolerance=0.1,
        need=weights + need(count, weights),
        kernel=False,
        labels=size.labels | {"layers": count},
        **more,
    )


def build(size: Size, layers: int, device: torch.device) -> LlamaForCausalLM:
    """A stock model with random weights, made on the device, of that shape and trained to the length it reads."""
    shape = size.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.k_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=size.tokens,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[size.dtype])
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    # Frequencies as a checkpoint's model has them: float32, whatever its weights are.
    rotary = model.model.rotary_emb
    rotary.inv_freq = shape.inv_freq(device)
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
