"""How long planning takes, once and before inference: against length, head size and number of candidates.

On one core. The roofline computes the angles of every position and pair once, at the trained and at the target
length, and sorts none of them. Ratios are to the plan that the paper's method makes by default.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from rope_dist.planning import plan

from .benchmark import Benchmark, Options, Size
from .harness import BenchmarkError, Case, Implementation
from .shapes import Shape

CANDIDATES = ("extrapolation", "pi", "ntk", "dynamic-ntk", "yarn", "llama3")
TRAINED = 4096
HEADS = {f"head-{n}": Shape(f"head-{n}", 1, 1, n, n, n, 1, 1, 1e4) for n in (64, 128, 256)}
"""Models of which only the head size matters."""


def cases(size: Size, options: Options) -> list[Case]:
    if size.dtype != "fp32":
        raise BenchmarkError(f"--dtypes: plans are made in fp32 (one column in float64), not {size.dtype}")
    dim, target = size.shape.head_dim, max(size.tokens, 2 * TRAINED)
    model = {"theta": size.shape.theta, "head_dim": dim, "original_length": TRAINED, "target_length": target}

    def made(name: str, strategy: str = "dprope", kind: str = "baseline", **settings) -> Implementation:
        call = partial(plan, **model, strategy=strategy, **{"dtype": "float32", **settings})
        return Implementation(name, lambda _: call, kind)

    def angles(_: None) -> Callable[[], torch.Tensor]:
        frequencies = size.shape.inv_freq(torch.device("cpu"))
        positions = torch.arange(TRAINED + target, dtype=torch.float32)
        return lambda: torch.outer(positions, frequencies).remainder_(2 * math.pi)

    found = [
        made("two candidates", kind="reference"),
        made("four candidates", candidates=CANDIDATES[:4]),
        made("six candidates", candidates=CANDIDATES),
        made("two candidates, float64", dtype="float64"),
        made("yarn", "yarn"),
        made("auto", "auto"),
        *([made("refined", "refined")] if target <= 4 * TRAINED else []),
        Implementation("angles", angles, "roofline"),
    ]
    case = Case(
        name=f"head size {dim}, {TRAINED // 1024}k to {target // 1024}k",
        inputs=lambda: None,
        implementations=lambda _: found,
        need=(TRAINED + target) * dim // 2 * 4,
        kernel=False,
        labels=size.labels | {"tokens": target, "head_dim": dim},
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
