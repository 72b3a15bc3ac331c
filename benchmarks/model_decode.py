"""Decoding with a whole model: 32 tokens, one at a time, after a prompt of that length is in the cache.

The cache is transformers' own default, which grows with every token. The roofline is the layers' matrix products of
one token, 32 times: what reading the weights takes.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from transformers import DynamicCache

from rope_dist.evaluation.models import cache_option

from . import models
from .benchmark import Size
from .shapes import DTYPES

STEPS = 32


class Conversation(models.Pair):
    """Also for each model its cache of the prompt."""

    most_layers: ClassVar = {"cpu": 2}
    step = f", {STEPS} tokens"
    passes = (STEPS, 1)

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.caches: dict[int, DynamicCache] = {}

    def run(self, model) -> Callable[[], list[torch.Tensor]]:
        """The call that reads the same token :data:`STEPS` times after the prompt, and gives the last one's logits."""
        if id(model) not in self.caches:
            cache = self.caches[id(model)] = DynamicCache(config=model.config)
            model(self.ids, **cache_option(model, cache), logits_to_keep=1)
        cache, ids = self.caches[id(model)], self.ids[:, :1].contiguous()

        def call() -> list[torch.Tensor]:
            for _ in range(STEPS):
                logits = model(ids, **cache_option(model, cache), logits_to_keep=1).logits
            cache.crop(-STEPS)
            return [logits]

        return call

    @staticmethod
    def need(size: Size, layers: int, weights: int) -> int:
        """Each model's cache, and a layer of it while it grows; the prompt's intermediate results."""
        layer = 2 * size.tokens * size.shape.widths[1] * DTYPES[size.dtype].itemsize
        return 2 * (layers + 1) * layer + 24 * size.tokens * size.shape.intermediate


BENCHMARK = models.benchmark(
    __file__,
    __doc__,
    Conversation,
    title="Decoding with a whole model",
    unit="ms",
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k 4k"],
        "cuda": ["LLaMA2-7B Llama-3-8B: 8k 16k"],
        "quick": ["tiny-256: 256"],
    },
    share={"cuda": 7},
    products=True,
)
