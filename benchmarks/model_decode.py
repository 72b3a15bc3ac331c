"""Decoding with a whole model: 32 tokens, one at a time, after a prompt of that length is in the cache.

The cache is transformers' own default, which grows with every token. The limit is the layers' matrix products of
one token, 32 times: what reading the weights takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import DynamicCache

from rope_dist.evaluation.models import cache_option

from . import models
from .harness import Case, Provider
from .model_prefill import LAYERS, STOCK, Prompt, add_layers, layers_of
from .question import Options, Question, Size
from .shapes import DTYPES

STEPS = 32


class Conversation(Prompt):
    """Also the tokens that follow the prompt, ``[1, STEPS]``, and for each model its cache of the prompt."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        super().__init__(size, layers, device)
        self.next = self.ids[:, :1].expand(1, STEPS).contiguous()
        self.caches: dict[int, DynamicCache] = {}

    def decode(self, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        """The call that reads those tokens one at a time and gives the last one's logits."""
        if id(model) not in self.caches:
            cache = self.caches[id(model)] = DynamicCache(config=model.config)
            model(self.ids, **cache_option(model, cache), logits_to_keep=1)
        cache = self.caches[id(model)]

        def call() -> torch.Tensor:
            for step in range(STEPS):
                ids = self.next[:, step : step + 1]
                logits = model(ids, **cache_option(model, cache), logits_to_keep=1).logits
            cache.crop(-STEPS)
            return logits

        return call


def cases(size: Size, options: Options) -> list[Case]:
    """The case of a prompt of that length."""
    layers, device = layers_of(size, options, LAYERS), options.device
    weights = models.parameters_bytes(size, layers)
    cache = 2 * layers * size.tokens * size.shape.widths[1] * DTYPES[size.dtype].itemsize
    shared: list[Conversation] = []

    def inputs() -> Conversation:
        if not shared:
            shared.append(Conversation(size, layers, device))
        return shared[0]

    def products(conversation: Conversation) -> Callable[[], None]:
        one = models.products(conversation.model, 1)

        def call() -> None:
            for _ in range(STEPS):
                one()

        return call

    case = Case(
        name=f"{size}, {layers} layers, {STEPS} tokens",
        inputs=inputs,
        providers=lambda _: [
            Provider(STOCK, lambda c: c.decode(c.model), kind="stock"),
            Provider("rope_dist.enable", lambda c: c.decode(c.enabled), kind="ours"),
            Provider("products alone", products, kind="limit"),
        ],
        # Both are right or wrong together with the stock model in its own type.
        exact=lambda c: [c.decode(c.model)().double()],
        pick=lambda logits: [logits],
        tolerance=0.1,
        bytes=STEPS * (weights + cache),
        flops=STEPS * (models.linear_flops(size, layers) // size.tokens),
        # Each model's cache, and a layer of it while it grows; the prompt's intermediate results.
        need=weights + 2 * cache + 2 * cache // layers + 12 * size.tokens * size.shape.intermediate * 2,
        kernel=False,
        labels={"model": size.shape.name, "layers": layers, "tokens": size.tokens, "dtype": size.dtype},
    )
    return [case]


QUESTION = Question(
    name="model_decode",
    doc=__doc__,
    cases=cases,
    sizes={
        "cpu": [(("four heads",), (8192, 16384, 1024, 4096), ("bf16",))],
        "cuda": [(("LLaMA2-7B", "Llama-3-8B"), (8192, 16384), ("bf16",))],
    },
    quick={
        "cpu": [(("four heads",), (256,), ("bf16",))],
        "cuda": [(("TinyLlama-1.1B",), (1024,), ("bf16",))],
    },
    sources=(
        "rope_dist/ops/**/*.py",
        "rope_dist/hf/**/*.py",
        "csrc/*.h",
        "csrc/*.cpp",
        "csrc/*.cu",
        "benchmarks/models.py",
        "benchmarks/model_decode.py",
    ),
    seconds=75.0,
    add=add_layers,
)

if __name__ == "__main__":
    sys.exit(QUESTION.main())
