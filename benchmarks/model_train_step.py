"""One training step of a LLaMA-shaped model with random weights: forward, backward, AdamW.

The roofline is the layers' matrix products of the forward pass and twice those for the backward pass. Models are
cut to a few layers, so that a GPU holds the optimizer's state; the steps share parameters and optimizer.
"""

from __future__ import annotations

import torch

from . import models
from .baselines import COMPILED
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import Case

LAYERS = {"cpu": 1, "cuda": 4}


class Training(models.Pair):
    """Also the optimizer of the shared parameters."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        super().__init__(size, layers, device)
        # A rate at which the steps of one run leave the weights as good as they were.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-7, weight_decay=0.0)
        for model in (self.model, self.enabled):
            model.train()


def cases(size: Size, options: Options) -> list[Case]:
    def run(training: Training, model):
        attention = training.model.model.layers[0].self_attn

        def call() -> list[torch.Tensor]:
            training.optimizer.zero_grad(set_to_none=True)
            loss = model(training.ids, labels=training.ids, use_cache=False).loss
            loss.backward()
            training.optimizer.step()
            # Whole gradients that have gone through the rotation's backward pass.
            weights = attention.q_proj.weight, attention.k_proj.weight
            return [loss.detach()[None], *(w.grad.flatten() for w in weights)]

        return call

    # Gradients and the optimizer's state; activations.
    def need(layers: int, weights: int) -> int:
        activations = size.tokens * (layers * 16 * size.shape.intermediate + 3 * size.shape.vocabulary)
        return 3 * weights + 4 * activations

    more = {"passes": (3, size.tokens), "compiled": 1, "need": need, "gradients": True}
    return [models.case(size, options, run, pair=Training, layers=LAYERS, **more)]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="A training step",
    cases=cases,
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k"],
        "cuda": ["Llama-3-8B LLaMA2-7B: 8k 16k", "Llama-3-8B: 1k 4k"],
        "quick": ["tiny-256: 512"],
    },
    share={"cpu": 14, "cuda": 7},
    baselines=(COMPILED,),
    unit="tokens/s",
    layers=True,
    sources=MODELS,
)
