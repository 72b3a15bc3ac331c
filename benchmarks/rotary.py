"""Rotary alone: queries and keys of one layer, batch 1, as the projections leave them.

The rooflines are a copy of the same bytes, and a pass that adds 1 to every 32-bit word in place (on a CPU a copy
reads its target too, so that in place is the faster of the two). "in place" changes its inputs; Hugging Face
and torch.compile return new tensors, as "new tensors" does.
"""

import torch

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, Heads, checked_tokens, huggingface, rotated
from rope_dist.ops import native

from .baselines import ROTARY, rotary_baselines
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation
from .shapes import DTYPES


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    both = size.tokens * sum(shape.heads) * shape.head_dim * dtype.itemsize

    tokens = checked_tokens(size.tokens, device)

    def exact(x: Heads) -> list[torch.Tensor]:
        angles = shape.angles(1, dtype, device).exact(tokens)
        return [rotated(y[0, tokens], *angles) for y in x.before]

    case = Case(
        name=str(size),
        inputs=lambda: Heads(shape.heads, shape.head_dim, size.tokens, dtype, device),
        implementations=lambda _: implementations(size, options),
        exact=exact,
        pick=lambda outputs: [y[0, tokens] for y in outputs],
        tolerance=TOLERANCES[dtype],
        bytes=2 * both,
        # Two copies with their originals, and Hugging Face's intermediate results.
        need=10 * both,
        labels=size.labels,
    )
    return [case]


def implementations(size: Size, options: Options) -> list:
    device = options.device
    angles = size.shape.angles(size.tokens, DTYPES[size.dtype], device)
    targets: list[torch.Tensor] = []

    def table(inplace: bool):
        return lambda x: lambda: ops.rotary(x.q, x.k, angles.cos, angles.sin, inplace=inplace)

    def no_table(x: Heads):
        return lambda: ops.rotary_at(x.q, x.k, angles.inv_freq_q64, angles.position_ids, inplace=True)

    def native_library(x: Heads):
        def call():
            with ops.use_backend("native"):
                return ops.rotary(x.q, x.k, angles.cos, angles.sin, inplace=True)

        return call

    def copy(x: Heads):
        if not targets:
            targets.extend(torch.empty_like(y) for y in (x.q, x.k))
        return lambda: [target.copy_(y) for target, y in zip(targets, (x.q, x.k), strict=True)]

    def one_pass(x: Heads):
        # Of other tensors: queries and keys must stay numbers.
        integers = [torch.zeros_like(y).view(torch.int32) for y in (x.q, x.k)]
        return lambda: [y.add_(1) for y in integers]

    found = [
        Implementation("rope_dist, in place", table(True), kind="ours"),
        Implementation("rope_dist, in place, no table", no_table, kind="ours"),
        Implementation("rope_dist, new tensors", table(False), kind="ours"),
        Implementation(HUGGINGFACE, lambda x: lambda: huggingface(x.q, x.k, angles), kind="reference"),
        Implementation("copy", copy, kind="roofline"),
        Implementation("pass in place", one_pass, kind="roofline"),
    ]
    if device.type == "cuda" and native.Native().supports(angles.cos) is None:
        found.append(Implementation("rope_dist, native library", native_library, kind="ours"))
    return found + rotary_baselines(options, angles)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Rotary alone",
    cases=cases,
    sizes={
        "cpu": [
            "Llama-3-8B LLaMA2-7B: 8k 16k",
            "Llama-3-8B: 1k 4k 32k",
            "Llama-3-8B LLaMA2-7B: 8k 16k: fp32",
            "SmolLM2-135M: 8k 16k",
        ],
        "cuda": ["Llama-3-8B LLaMA2-7B LLaMA2-13B: 8k 16k", "Llama-3-8B: 1k 2k 4k 32k"],
        "quick": ["SmolLM2-135M: 1k: bf16 fp32"],
    },
    share={"cpu": 32, "cuda": 23},
    baselines=ROTARY,
)
