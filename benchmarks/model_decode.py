"""Decoding with a whole model: 32 tokens, one at a time, after a prompt of that length is in the cache.

The cache is transformers' own default, which grows with every token. The roofline is the layers' matrix products of
one token, 32 times: what reading the weights takes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache

from rope_dist.evaluation.models import cache_option

from . import models
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import Case
from .shapes import DTYPES

LAYERS = {"cpu": 2}
STEPS = 32


class Conversation(models.Pair):
    """Also the tokens that follow the prompt, ``[1, STEPS]``, and for each model its cache of the prompt."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        super().__init__(size, layers, device)
        self.next = self.ids[:, :1].expand(1, STEPS).contiguous()
        self.caches: dict[int, DynamicCache] = {}

    def decode(self, model: torch.nn.Module) -> Callable[[], list[torch.Tensor]]:
        """The call that reads those tokens one at a time and gives the last one's logits."""
        if id(model) not in self.caches:
            cache = self.caches[id(model)] = DynamicCache(config=model.config)
            model(self.ids, **cache_option(model, cache), logits_to_keep=1)
        cache = self.caches[id(model)]

        def call() -> list[torch.Tensor]:
            for step in range(STEPS):
                ids = self.next[:, step : step + 1]
                logits = model(ids, **cache_option(model, cache), logits_to_keep=1).logits
            cache.crop(-STEPS)
            return [logits]

        return call


def cases(size: Size, options: Options) -> list[Case]:
    def cache(layers: int) -> int:
        return 2 * layers * size.tokens * size.shape.widths[1] * DTYPES[size.dtype].itemsize

    # Each model's cache, and a layer of it while it grows; the prompt's intermediate results.
    def need(layers: int, weights: int) -> int:
        return 2 * cache(layers) + 2 * cache(1) + 24 * size.tokens * size.shape.intermediate

    return [
        models.case(
            size,
            options,
            lambda conversation, model: conversation.decode(model),
            pair=Conversation,
            layers=LAYERS,
            step=f", {STEPS} tokens",
            passes=(STEPS, 1),
            need=need,
        )
    ]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Decoding with a whole model",
    cases=cases,
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k 4k"],
        "cuda": ["LLaMA2-7B Llama-3-8B: 8k 16k"],
        "quick": ["tiny-256: 256"],
    },
    share={"cuda": 7},
    layers=True,
    sources=MODELS,
)
