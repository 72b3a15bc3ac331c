"""Decoding: projection with rotary of a few tokens, where the time goes into reading the weights.

The rooflines are the products alone, and a copy that moves as many bytes as the weights have (half of them copied).
On a GPU "with the cache write" also stores keys and values into their cache in the same launch, which the others
leave to another kernel.
"""

from __future__ import annotations

from functools import partial

import torch

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, huggingface
from rope_dist.ops import dispatch_projection

from .baselines import COMPILED
from .benchmark import OPERATORS, Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation
from .projection import Layer, exact_forward
from .shapes import DTYPES


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    weights = sum(shape.widths) * shape.hidden
    moved = size.tokens * (shape.hidden + sum(shape.widths))

    def exact(layer: Layer) -> list[torch.Tensor]:
        return exact_forward(size, torch.arange(size.tokens, device=device), layer)

    case = Case(
        name=f"{shape.name}, {size.tokens} token{'s' * (size.tokens > 1)}, {size.dtype}",
        inputs=partial(Layer, size, dtype, device, False),
        implementations=lambda layer: implementations(size, options, layer),
        exact=exact,
        pick=lambda outputs: [y[0] for y in outputs],
        tolerance=2 * TOLERANCES[dtype],
        bytes=weights * dtype.itemsize,
        # Two copies of the weights, what the copy moves of them, and every result also in float64.
        need=4 * weights * dtype.itemsize + moved * (4 * dtype.itemsize + 8),
        labels=size.labels,
    )
    return [case]


def implementations(size: Size, options: Options, layer: Layer) -> list[Implementation]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    angles = shape.angles(size.tokens, dtype, device)
    at = {"head_dim": shape.head_dim, "inv_freq": angles.fixed, "position_ids": angles.position_ids}

    def stock(inputs: Layer):
        q, k, v = inputs.project(shape.head_dim)
        return *huggingface(q, k, angles), v

    def separate(inputs: Layer):
        q, k, v = inputs.project(shape.head_dim)
        return *ops.rotary(q, k, angles.cos, angles.sin, inplace=True), v

    def fused(inputs: Layer, path: str = "auto"):
        return ops.qkv_rotary(inputs.x, *inputs.weights, path=path, **at)

    def cached(inputs: Layer):
        entries = (size.tokens, shape.k_heads, shape.head_dim)
        caches = [torch.empty(entries, dtype=dtype, device=device) for _ in range(2)]
        slots = torch.arange(size.tokens, device=device)
        rest = {"inv_freq": angles.fixed, "position_ids": angles.position_ids, "slots": slots}

        def call():
            q = ops.decode_rotary(inputs.x, *inputs.weights, k_cache=caches[0], v_cache=caches[1], **rest)
            return q, caches[0][None], caches[1][None]

        return call

    def read(inputs: Layer):
        halves = [w.flatten()[: w.numel() // 2] for w in inputs.weights]
        targets = [torch.empty_like(half) for half in halves]
        return lambda: [a.copy_(b) for a, b in zip(targets, halves, strict=True)]

    def bound(run):
        return lambda inputs: partial(run, inputs)

    found = [
        Implementation(HUGGINGFACE, bound(stock), kind="reference"),
        Implementation("weights moved", read, kind="roofline"),
        Implementation(
            "products alone", lambda inputs: partial(inputs.project, shape.head_dim), kind="roofline"
        ),
    ]
    if ops.backend_for(layer.x) == "triton":
        found.append(Implementation("rope_dist", bound(fused), kind="ours"))
        rotary_dim = 2 * angles.fixed.shape[1]
        for path in dispatch_projection.candidates(layer.x, *layer.weights, shape.head_dim, rotary_dim):
            found.append(Implementation(f"rope_dist, {path}", bound(partial(fused, path=path)), kind="ours"))
        found.append(Implementation("rope_dist, with the cache write", cached, kind="ours"))
    else:
        found.append(Implementation("rope_dist", bound(separate), kind="ours"))
    if options.wants(COMPILED):
        compiled = torch.compile(stock, dynamic=False)
        found.append(Implementation(COMPILED, bound(compiled), late=True))
    return found


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Decoding: projection and rotary of a few tokens",
    cases=cases,
    sizes={
        "cpu": [(("TinyLlama-1.1B", "Llama-3-8B"), (1, 16), ("bf16",))],
        "cuda": [(("Llama-3-8B", "LLaMA2-7B"), (1, 16, 2, 4, 8), ("bf16",))],
    },
    quick=[(("SmolLM2-135M",), (1,), ("bf16",))],
    share={"cpu": 4, "cuda": 10},
    baselines=(COMPILED,),
    sources=(*OPERATORS, "benchmarks/projection.py"),
)
