"""Decoding: projection with rotary of a few tokens, where the time goes into reading the weights.

The rooflines are the products alone, and a copy that moves as many bytes as the weights have (half of them copied).
On a GPU "with the cache write" also stores keys and values into their cache in the same launch, which the others
leave to another kernel.
"""

import torch

from rope_dist import ops

from . import projection
from .baselines import COMPILED
from .benchmark import OPERATORS, Benchmark, Options, Size
from .harness import Case, Implementation, Skipped
from .projection import Layer


def cases(size: Size, options: Options) -> list[Case]:
    def products(x: Layer):
        return x.project

    def read(x: Layer):
        halves = [w.flatten()[: w.numel() // 2] for w in x.weights]
        targets = [torch.empty_like(half) for half in halves]
        return lambda: [a.copy_(b) for a, b in zip(targets, halves, strict=True)]

    def cached(x: Layer):
        caches = [x.x.new_empty(size.tokens, size.shape.k_heads, x.head_dim) for _ in range(2)]
        angles = size.shape.angles(size.tokens, x.x.dtype, options.device)
        at = {"slots": angles.position_ids[0], "k_cache": caches[0], "v_cache": caches[1]}
        at |= {"inv_freq": angles.inv_freq_q64, "position_ids": angles.position_ids}
        return lambda: (ops.decode_rotary(x.x, *x.weights, **at), caches[0][None], caches[1][None])

    def implementations(layer: Layer) -> list[Implementation | Skipped]:
        found = projection.implementations(size, options, layer)
        found.append(Implementation("products alone", products, "roofline"))
        found.append(Implementation("weights moved", read, "roofline"))
        if ops.backend_for(layer.x) == "triton":
            found.append(Implementation("rope_dist, with the cache write", cached, "ours"))
        return found

    case = projection.case(size, options, gradients=False)
    case.name = f"{size.shape.name}, {size.tokens} token{'s' * (size.tokens > 1)}, {size.dtype}"
    case.labels, case.implementations = size.labels, implementations
    # Two copies of the weights, joined for the roofline, and what the copy moves of them; results in float64 too.
    case.need = round(1.4 * case.need)
    return [case]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Decoding: projection and rotary of a few tokens",
    cases=cases,
    sizes={
        "cpu": ["TinyLlama-1.1B Llama-3-8B: 1 16"],
        "cuda": ["Llama-3-8B LLaMA2-7B: 1 16 2 4 8"],
        "quick": ["SmolLM2-135M: 1"],
    },
    share={"cpu": 4, "cuda": 10},
    products=True,
    baselines=(COMPILED, projection.LIGER, projection.QUACK),
    sources=(*OPERATORS, "benchmarks/projection.py"),
)
