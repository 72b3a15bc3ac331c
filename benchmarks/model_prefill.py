"""Prefill: a whole LLaMA-shaped model with random weights reads a prompt and gives the next token's logits.

The limit is the layers' matrix products alone (attention comes on top of them for everyone). Liger is no peer
here: it replaces functions of transformers for the whole process, the stock model's included.
"""

from __future__ import annotations

import argparse
import sys

import torch

from . import models
from .harness import Case, Provider
from .peers import COMPILED
from .question import Options, Question, Size

LAYERS = {"cpu": 2}
"""A CPU reads as many layers at 16k in seconds; a GPU takes the model's own number."""
STOCK = "Hugging Face, sdpa"


class Prompt:
    """A model, the same one enabled, and a prompt ``[1, S]``."""

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        self.model = models.build(size, layers, device)
        self.enabled = models.enabled(self.model)
        generator = torch.Generator(device).manual_seed(0)
        self.ids = torch.randint(
            0, size.shape.vocabulary, (1, size.tokens), device=device, generator=generator
        )


def layers_of(size: Size, options: Options, defaults: dict[str, int]) -> int:
    """How many layers are built."""
    return options.extra.layers or min(
        defaults.get(options.device.type, size.shape.layers), size.shape.layers
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """The option ``--layers``."""
    parser.add_argument("--layers", type=_positive, metavar="N", help="layers of each model")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return int(text)


def cases(size: Size, options: Options) -> list[Case]:
    """The case of that size."""
    layers, device = layers_of(size, options, LAYERS), options.device
    weights = models.parameters_bytes(size, layers)
    shared: list[Prompt] = []

    def inputs() -> Prompt:
        # One model for all: it is not changed, and two of them may not fit.
        if not shared:
            shared.append(Prompt(size, layers, device))
        return shared[0]

    def read(model: torch.nn.Module, prompt: Prompt):
        return lambda: model(prompt.ids, logits_to_keep=1).logits

    def providers(prompt: Prompt) -> list[Provider]:
        found = [
            Provider(STOCK, lambda p: read(p.model, p), kind="stock"),
            Provider("rope_dist.enable", lambda p: read(p.enabled, p), kind="ours"),
            Provider("products alone", lambda p: models.products(p.model, size.tokens), kind="limit"),
        ]
        if device.type == "cuda" and options.wants(COMPILED):
            for name, model in (
                (COMPILED, prompt.model),
                (f"{COMPILED} of rope_dist.enable", prompt.enabled),
            ):
                compiled = torch.compile(model, dynamic=False)
                kind = "peer" if name == COMPILED else "ours"
                found.append(Provider(name, lambda p, m=compiled: read(m, p), kind=kind, late=True))
        return found

    length = layers * size.tokens * sum(size.shape.widths) * 2
    case = Case(
        name=f"{size}, {layers} layers",
        inputs=inputs,
        providers=providers,
        # Both are right or wrong together with the stock model in its own type.
        exact=lambda prompt: [prompt.model(prompt.ids, logits_to_keep=1).logits.double()],
        pick=lambda logits: [logits],
        tolerance=0.1,
        bytes=weights,
        flops=models.linear_flops(size, layers) + models.attention_flops(size, layers),
        need=weights + length + 12 * size.tokens * size.shape.intermediate * 2,
        kernel=False,
        labels={"model": size.shape.name, "layers": layers, "tokens": size.tokens, "dtype": size.dtype},
    )
    return [case]


QUESTION = Question(
    name="model_prefill",
    doc=__doc__,
    cases=cases,
    sizes={
        "cpu": [(("four heads",), (8192, 16384, 1024, 4096), ("bf16",))],
        "cuda": [
            (("Llama-3-8B", "LLaMA2-7B"), (8192, 16384), ("bf16",)),
            (("LLaMA2-13B",), (8192, 16384), ("bf16",)),
            (("Llama-3-8B",), (1024, 4096, 32768), ("bf16",)),
        ],
    },
    quick={
        "cpu": [(("four heads",), (1024,), ("bf16",))],
        "cuda": [(("TinyLlama-1.1B",), (1024,), ("bf16",))],
    },
    sources=(
        "rope_dist/ops/**/*.py",
        "rope_dist/hf/**/*.py",
        "csrc/*.h",
        "csrc/*.cpp",
        "csrc/*.cu",
        "benchmarks/models.py",
        "benchmarks/model_prefill.py",
    ),
    peers=(COMPILED,),
    seconds=75.0,
    unit="tokens/s",
    add=add_layers,
)

if __name__ == "__main__":
    sys.exit(QUESTION.main())
