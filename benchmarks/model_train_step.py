"""One training step of a LLaMA-shaped model with random weights: forward, backward, AdamW.

The roofline is the layers' matrix products of the forward pass and twice those for the backward pass. Models are
cut to a few layers, so that a GPU holds the optimizer's state; the steps share parameters and optimizer.
"""

from typing import ClassVar

import torch

from . import models
from .benchmark import Size


class Training(models.Pair):
    """Also the optimizer of the shared parameters."""

    most_layers: ClassVar = {"cpu": 1, "cuda": 4}
    passes = (3, None)
    compiled = 1
    gradients = True

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        # A rate at which the steps of one run leave the weights as good as they were.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-7, weight_decay=0.0)
        for model in (self.model, self.enabled):
            model.train()

    def run(self, model):
        attention = self.model.model.layers[0].self_attn

        def call() -> list[torch.Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            loss = model(self.ids, labels=self.ids, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            # Whole gradients that have gone through the rotation's backward pass.
            weights = attention.q_proj.weight, attention.k_proj.weight
            return [loss.detach()[None], *(w.grad.flatten() for w in weights)]

        return call

    @staticmethod
    def need(size: Size, layers: int, weights: int) -> int:
        """Gradients and the optimizer's state; activations."""
        activations = size.tokens * (layers * 16 * size.shape.intermediate + 3 * size.shape.vocabulary)
        return 3 * weights + 4 * activations


BENCHMARK = models.benchmark(
    __file__,
    __doc__,
    Training,
    title="A training step",
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k"],
        "cuda": ["Llama-3-8B LLaMA2-7B: 8k 16k", "Llama-3-8B: 1k 4k"],
        "quick": ["tiny-256: 512"],
    },
    share={"cpu": 14, "cuda": 7},
    products=True,
)
