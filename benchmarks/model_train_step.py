"""One training step of a LLaMA-shaped model with random weights: forward, backward, AdamW.

The limit is the layers' matrix products of the forward pass and twice those for the backward pass. Models are
cut to a few layers, so that a GPU holds the optimizer's state; the steps share parameters and optimizer.
"""

from __future__ import annotations

import sys

import torch

from . import models
from .harness import Case, Provider
from .model_prefill import STOCK, Prompt, add_layers, layers_of
from .peers import COMPILED
from .question import Options, Question, Size

LAYERS = {"cpu": 1, "cuda": 4}


class Training(Prompt):
    """Also the optimizer of the shared parameters."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        super().__init__(size, layers, device)
        # A rate at which the steps of one run leave the weights as good as they were.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-7, weight_decay=0.0)
        for model in (self.model, self.enabled):
            model.train()


def cases(size: Size, options: Options) -> list[Case]:
    """The case of that size."""
    layers, device = layers_of(size, options, LAYERS), options.device
    weights = models.parameters_bytes(size, layers)
    shared: list[Training] = []

    def inputs() -> Training:
        if not shared:
            shared.append(Training(size, layers, device))
        return shared[0]

    def step(model: torch.nn.Module, training: Training):
        attention = training.model.model.layers[0].self_attn

        def call() -> list[torch.Tensor]:
            training.optimizer.zero_grad(set_to_none=True)
            loss = model(training.ids, labels=training.ids, use_cache=False).loss
            loss.backward()
            training.optimizer.step()
            # What the rotation's backward pass has gone through.
            return [loss.detach()[None], attention.q_proj.weight.grad, attention.k_proj.weight.grad]

        return call

    def exact(training: Training) -> list[torch.Tensor]:
        return [y.clone().double().flatten() for y in step(training.model, training)()]

    def products(training: Training):
        forward = models.products(training.model, size.tokens)

        def call() -> None:
            with torch.no_grad():
                for _ in range(3):
                    forward()

        return call

    def providers(training: Training) -> list[Provider]:
        found = [
            Provider(STOCK, lambda t: step(t.model, t), kind="stock"),
            Provider("rope_dist.enable", lambda t: step(t.enabled, t), kind="ours"),
            Provider("products alone", products, kind="limit"),
        ]
        if device.type == "cuda" and options.wants(COMPILED):
            compiled = torch.compile(training.model, dynamic=False)
            found.append(Provider(COMPILED, lambda t: step(compiled, t), late=True))
        return found

    activations = size.tokens * (layers * 16 * size.shape.intermediate + 3 * size.shape.vocabulary)
    case = Case(
        name=f"{size}, {layers} layer{'s' * (layers > 1)}",
        inputs=inputs,
        providers=providers,
        exact=exact,
        pick=lambda outputs: [y.flatten() for y in outputs],
        # Of whole gradients; softmax and rounding are between them and the rotation.
        tolerance=0.1,
        bytes=8 * weights,
        flops=3 * (models.linear_flops(size, layers) + models.attention_flops(size, layers)),
        need=4 * weights + 4 * activations,
        kernel=False,
        gradients=True,
        labels={"model": size.shape.name, "layers": layers, "tokens": size.tokens, "dtype": size.dtype},
    )
    return [case]


QUESTION = Question(
    name="model_train_step",
    doc=__doc__,
    cases=cases,
    sizes={
        "cpu": [(("four heads",), (8192, 16384, 1024), ("bf16",))],
        "cuda": [
            (("Llama-3-8B", "LLaMA2-7B"), (8192, 16384), ("bf16",)),
            (("Llama-3-8B",), (1024, 4096), ("bf16",)),
        ],
    },
    quick={
        "cpu": [(("four heads",), (512,), ("bf16",))],
        "cuda": [(("TinyLlama-1.1B",), (1024,), ("bf16",))],
    },
    sources=(
        "rope_dist/ops/**/*.py",
        "rope_dist/hf/**/*.py",
        "csrc/*.h",
        "csrc/*.cpp",
        "csrc/*.cu",
        "benchmarks/models.py",
        "benchmarks/model_train_step.py",
    ),
    peers=(COMPILED,),
    seconds=75.0,
    unit="tokens/s",
    add=add_layers,
)

if __name__ == "__main__":
    sys.exit(QUESTION.main())
