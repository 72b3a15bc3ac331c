"""Rotary alone: queries and keys of one layer, batch 1, as the projections leave them.

The limits are a copy of the same bytes, and a pass that adds 1 to every 32-bit word in place (on a CPU a copy
reads its target too, so that in place is the faster of the two). "in place" changes its inputs; Hugging Face
and torch.compile return new tensors, as "new tensors" does.
"""

from __future__ import annotations

import sys

import torch

from rope_dist import ops
from rope_dist.ops import native

from .harness import TOLERANCES, Case, Provider
from .peers import ROTARY_PEERS, STOCK, rotary_peers, stock
from .question import Options, Question, Size
from .shapes import DTYPES, Angles, checked_tokens, random, rotated

OURS = "rope_dist, in place"


class Heads:
    """Queries and keys ``[1, S, H, D]``, and what they were before a rotation in place."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        self.before = before
        self.q, self.k = (x.clone() for x in self.before)

    def reset(self) -> None:
        """As they were."""
        for x, before in zip((self.q, self.k), self.before, strict=True):
            x.copy_(before)


def cases(size: Size, options: Options) -> list[Case]:
    """The case of that size."""
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    both = size.tokens * (shape.q_heads + shape.k_heads) * shape.head_dim * dtype.itemsize

    drawn: list[torch.Tensor] = []

    def inputs() -> Heads:
        if not drawn:
            at = {"dtype": dtype, "device": device}
            heads = (shape.q_heads, shape.k_heads)
            drawn.extend(random(1, size.tokens, n, shape.head_dim, seed=n, **at) for n in heads)
        return Heads(drawn)

    def exact(heads: Heads) -> list[torch.Tensor]:
        tokens = checked_tokens(size.tokens, device)
        cos, sin = Angles(shape, 1, dtype, device).exact(tokens)
        return [rotated(x[0, tokens], cos, sin) for x in heads.before]

    def pick(outputs) -> list[torch.Tensor]:
        tokens = checked_tokens(size.tokens, device)
        return [x[0, tokens] for x in outputs]

    case = Case(
        name=str(size),
        inputs=inputs,
        providers=lambda _: providers(size, options),
        exact=exact,
        pick=pick,
        tolerance=TOLERANCES[dtype],
        bytes=2 * both,
        flops=3 * both // dtype.itemsize,
        # Two copies with their originals, and Hugging Face's intermediate results.
        need=10 * both,
        labels={"model": shape.name, "tokens": size.tokens, "dtype": size.dtype},
    )
    return [case]


def providers(size: Size, options: Options) -> list:
    """Everything that rotates."""
    device, dtype = options.device, DTYPES[size.dtype]
    angles = Angles(size.shape, size.tokens, dtype, device)
    target: list[torch.Tensor] = []

    def copy(heads: Heads):
        if not target:
            target.extend(torch.empty_like(x) for x in (heads.q, heads.k))

        def call():
            target[0].copy_(heads.q)
            target[1].copy_(heads.k)

        return call

    def one_pass(heads: Heads):
        # Of other tensors: queries and keys must stay numbers.
        words = [torch.zeros_like(x).view(torch.int32) for x in (heads.q, heads.k)]
        return lambda: [x.add_(1) for x in words]

    def by_table(inplace: bool):
        return lambda h: lambda: ops.rotary(h.q, h.k, angles.cos, angles.sin, inplace=inplace)

    def by_position(h: Heads):
        return lambda: ops.rotary_at(h.q, h.k, angles.words, angles.positions, inplace=True)

    found = [
        Provider(OURS, by_table(True), kind="ours"),
        Provider("rope_dist, in place, no table", by_position, kind="ours"),
        Provider("rope_dist, new tensors", by_table(False), kind="ours"),
        Provider(STOCK, lambda h: lambda: stock(h.q, h.k, angles), kind="stock"),
        Provider("copy", copy, kind="limit"),
        Provider("pass in place", one_pass, kind="limit"),
    ]
    if device.type == "cuda" and native.unavailable(angles.cos) is None:
        found.append(Provider("rope_dist, native library", lambda h: _native(h, angles), kind="ours"))
    return found + rotary_peers(options, angles)


def _native(heads: Heads, angles: Angles):
    def call():
        with ops.use_backend("native"):
            return ops.rotary(heads.q, heads.k, angles.cos, angles.sin, inplace=True)

    return call


QUESTION = Question(
    name="rotary",
    doc=__doc__,
    cases=cases,
    sizes={
        "cpu": [
            (("Llama-3-8B", "LLaMA2-7B"), (8192, 16384), ("bf16",)),
            (("Llama-3-8B",), (1024, 4096, 32768), ("bf16",)),
            (("Llama-3-8B", "LLaMA2-7B"), (8192, 16384), ("fp32",)),
            (("SmolLM2-135M",), (8192, 16384), ("bf16",)),
        ],
        "cuda": [
            (("Llama-3-8B", "LLaMA2-7B", "LLaMA2-13B"), (8192, 16384), ("bf16",)),
            (("Llama-3-8B",), (1024, 2048, 4096, 32768), ("bf16",)),
        ],
    },
    quick={
        "cpu": [(("SmolLM2-135M",), (1024,), ("bf16", "fp32"))],
        "cuda": [(("Llama-3-8B",), (1024,), ("bf16",))],
    },
    sources=("rope_dist/ops/**/*.py", "csrc/*.h", "csrc/*.cpp", "csrc/*.cu", "benchmarks/rotary.py"),
    peers=ROTARY_PEERS,
    seconds=170.0,
)

if __name__ == "__main__":
    sys.exit(QUESTION.main())
