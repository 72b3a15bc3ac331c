"""How long planning takes, once and before inference: against length, head size and number of candidates.

On one core. The roofline computes the angles of every position and pair once, at the trained and at the target
length, and sorts none of them. Ratios are to the plan that the paper's method makes by default.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from rope_dist.planning import plan

from .benchmark import Benchmark, Options, Size
from .harness import BenchmarkError, Case, Implementation
from .shapes import DTYPES, Shape

CANDIDATES = ("extrapolation", "pi", "ntk", "dynamic-ntk", "yarn", "llama3")
TRAINED = 4096
DEFAULT = "two candidates"


HEADS = {f"head-{dim}": Shape(f"head-{dim}", 1, 1, dim, dim, dim, 1, 1, 1e4) for dim in (64, 128, 256)}
"""Models of which only the head size matters."""


def cases(size: Size, options: Options) -> list[Case]:
    """Plans from 4k to that length, for that size of a head."""
    dim = size.shape.head_dim
    target = max(size.tokens, 2 * TRAINED)
    make = partial(plan, theta=size.shape.theta, head_dim=dim, original_length=TRAINED, target_length=target)
    if size.dtype != "fp32":
        raise BenchmarkError(
            f"--dtypes: plans are made in fp32 (float64 has a row of its own), not {size.dtype}"
        )
    dtype = "float32"
    frequencies = size.shape.inv_freq(torch.device("cpu"))
    size_of_angles = (TRAINED + target) * dim // 2 * DTYPES["fp32"].itemsize

    def angles() -> torch.Tensor:
        positions = torch.arange(TRAINED + target, dtype=torch.float32)
        return torch.outer(positions, frequencies).remainder_(2 * math.pi)

    def bound(call):
        return lambda _: call

    found = [
        Implementation(DEFAULT, bound(partial(make, strategy="dprope", dtype=dtype)), kind="reference"),
        *(
            Implementation(
                f"{count} candidates",
                bound(partial(make, strategy="dprope", dtype=dtype, candidates=CANDIDATES[:number])),
            )
            for count, number in (("four", 4), ("six", 6))
        ),
        Implementation("two candidates, float64", bound(partial(make, strategy="dprope", dtype="float64"))),
        Implementation("yarn", bound(partial(make, strategy="yarn", dtype=dtype))),
        Implementation("auto", bound(partial(make, strategy="auto", dtype=dtype))),
        *(
            [Implementation("refined", bound(partial(make, strategy="refined", dtype=dtype)))]
            if target <= 4 * TRAINED
            else []
        ),
        Implementation("angles", bound(angles), kind="roofline"),
    ]
    case = Case(
        name=f"head size {dim}, {TRAINED // 1024}k to {target // 1024}k",
        inputs=lambda: None,
        implementations=lambda _: found,
        need=size_of_angles,
        kernel=False,
        labels={"model": size.shape.name, "tokens": target, "dtype": dtype, "head_dim": dim},
    )
    return [case]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Planning",
    cases=cases,
    sizes={
        "cpu": ["head-128: 8k 16k 32k 128k: fp32", "head-64 head-256: 16k: fp32"],
        "quick": ["head-128: 8k: fp32"],
    },
    share={"cpu": 6},
    threads=1,
    shapes=HEADS,
    sources=("rope_dist/planning.py", "rope_dist/strategies/*.py", "rope_dist/distribution.py"),
)
