"""Prefill: a whole LLaMA-shaped model with random weights reads a prompt and gives the next token's logits.

The roofline is the layers' matrix products alone (attention comes on top of them for everyone). Liger is no baseline
here: it replaces functions of transformers for the whole process, the stock model's included.
"""

from __future__ import annotations

from . import models
from .baselines import COMPILED
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import Case

LAYERS = {"cpu": 2}
"""A CPU reads as many layers at 16k in seconds; a GPU takes the model's own number."""


def cases(size: Size, options: Options) -> list[Case]:
    def run(pair: models.Pair, model):
        return lambda: [model(pair.ids, logits_to_keep=1).logits]

    # The cache of keys and values, and the intermediate results of a feed-forward layer.
    def need(layers: int, weights: int) -> int:
        return 2 * size.tokens * (layers * sum(size.shape.widths) + 12 * size.shape.intermediate)

    return [models.case(size, options, run, layers=LAYERS, compiled=2, need=need)]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Prefill of a whole model",
    cases=cases,
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k 4k"],
        "cuda": ["Llama-3-8B LLaMA2-7B LLaMA2-13B: 8k 16k", "Llama-3-8B: 1k 4k 32k"],
        "quick": ["tiny-256: 1k"],
    },
    share={"cpu": 10, "cuda": 14},
    baselines=(COMPILED,),
    unit="tokens/s",
    layers=True,
    sources=MODELS,
)
