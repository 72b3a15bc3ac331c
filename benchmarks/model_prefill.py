"""Prefill: a whole LLaMA-shaped model with random weights reads a prompt and gives the next token's logits.

The roofline is the layers' matrix products alone (attention comes on top of them for everyone). Liger is no baseline
here: it replaces functions of transformers for the whole process, the stock model's included.
"""

from typing import ClassVar

from . import models
from .benchmark import Size


class Prefill(models.Pair):
    # A CPU reads as many layers at 16k in seconds; a GPU takes the model's own number.
    most_layers: ClassVar = {"cpu": 2}
    compiled = 2

    def run(self, model):
        return lambda: [model(self.ids, logits_to_keep=1).logits]

    @staticmethod
    def need(size: Size, layers: int, weights: int) -> int:
        """The cache of keys and values, and the intermediate results of a feed-forward layer."""
        return 2 * size.tokens * (layers * sum(size.shape.widths) + 12 * size.shape.intermediate)


BENCHMARK = models.benchmark(
    __file__,
    __doc__,
    Prefill,
    title="Prefill of a whole model",
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k 4k"],
        "cuda": ["Llama-3-8B LLaMA2-7B LLaMA2-13B: 8k 16k", "Llama-3-8B: 1k 4k 32k"],
        "quick": ["tiny-256: 1k"],
    },
    share={"cpu": 10, "cuda": 14},
    products=True,
)
