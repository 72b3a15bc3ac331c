"""Host time of one call at one token, in microseconds: what an eager GPU waits for between kernels.

The rotation alone at the sizes of published models, a whole attention layer at those of ``tiny-64``, whose products
on a CPU take little but the time of their calls. Triton's kernels are compiled for sm_90 and not launched
(``host_driver.py``), which leaves out the driver's own time for each launch: a stock layer makes 13, an enabled one 2
to 5. "native" is the CPU's own library.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, IN_PLACE, NEW, Heads, rotary_calls
from rope_dist.ops import dispatch_projection
from rope_dist.ops.triton_backend import INSTALLED

from . import models
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import Case, Implementation, Skipped
from .host_driver import host_only
from .shapes import DTYPES

CALLS = 200
NO_TRITON = [] if INSTALLED else [Skipped("rope_dist (triton)", "triton is not installed")]
PATHS = dispatch_projection.PATHS[1:]


@contextlib.contextmanager
def backend(name: str, path: str = "") -> Iterator[None]:
    """Calls go to that backend, ``"triton"`` without launching, and take that path (``ROPE_DIST_PATH``)."""
    before = os.environ.get("ROPE_DIST_PATH", "")
    os.environ["ROPE_DIST_PATH"] = path
    try:
        with host_only() if name == "triton" else ops.use_backend(name):
            yield
    finally:
        os.environ["ROPE_DIST_PATH"] = before


def repeated(make: Callable[[Any], Callable[[], Any]], name: str, path: str, x: Any) -> Callable[[], Any]:
    """:data:`CALLS` calls; backend and path are switched once for all of them."""
    call = make(x)

    def run() -> Any:
        with backend(name, path):
            for _ in range(CALLS):
                found = call()
        return found

    return run


def rotation(size: Size) -> Case:
    """One token of that model's heads, Hugging Face's function against this package's."""
    shape, dtype, device = size.shape, DTYPES[size.dtype], torch.device("cpu")

    def implementations(_: Heads) -> list[Implementation | Skipped]:
        angles = shape.angles(size.tokens, dtype, device)

        def of(name: str) -> Callable[[Heads], Callable[[], Any]]:
            return lambda x: rotary_calls(x, angles)[name]

        def at(x: Heads) -> Callable[[], Any]:
            return lambda: ops.rotary_at(x.q, x.k, angles.inv_freq_q64, angles.position_ids, inplace=True)

        makers = {"rotary": of(NEW), "rotary, in place": of(IN_PLACE), "rotary_at, in place": at}
        found = [Implementation(HUGGINGFACE, partial(repeated, of(HUGGINGFACE), "auto", ""), "reference")]
        for where in ("native", *["triton"] * INSTALLED):
            for name, make in makers.items():
                bind = partial(repeated, make, where, "")
                found.append(Implementation(f"rope_dist, {name} ({where})", bind, "ours"))
        return found + NO_TRITON

    return Case(
        name=f"rotation, {size.shape.name}",
        inputs=lambda: Heads(shape.heads, shape.head_dim, size.tokens, dtype, device),
        implementations=implementations,
        need=10 * size.tokens * sum(shape.heads) * shape.head_dim * dtype.itemsize,
        kernel=False,
        repeat=CALLS,
        labels=size.labels,
    )


def layer(size: Size) -> Case:
    """One token through an attention layer without a cache, stock and enabled."""

    def of(ours: bool) -> Callable[[models.Pair], Callable[[], Any]]:
        def make(pair: models.Pair) -> Callable[[], Any]:
            model = (pair.enabled if ours else pair.model).model
            x = torch.randn(1, size.tokens, size.shape.hidden, dtype=DTYPES[size.dtype])
            tables = model.rotary_emb(x, torch.arange(size.tokens)[None])
            return lambda: model.layers[0].self_attn(x, position_embeddings=tables, attention_mask=None)

        return make

    places = {"native": ("native", "")}
    places |= {f"triton, {path}": ("triton", path) for path in PATHS if INSTALLED}
    found = [Implementation(HUGGINGFACE, partial(repeated, of(False), "auto", ""), "reference")] + [
        Implementation(f"rope_dist.enable ({name})", partial(repeated, of(True), *place), "ours")
        for name, place in places.items()
    ]
    return Case(
        name=f"attention layer, {size.shape.name}",
        inputs=cache(lambda: models.Pair(size, 1, torch.device("cpu"))),
        implementations=lambda _: found + NO_TRITON,
        need=models.parameters_bytes(size, 1) + 12 * size.tokens * size.shape.hidden * 2,
        kernel=False,
        repeat=CALLS,
        labels=size.labels,
    )


def cases(size: Size, options: Options) -> list[Case]:
    return [layer(size) if size.shape.name == "tiny-64" else rotation(size)]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Host time of one call at one token",
    cases=cases,
    sizes={
        "cpu": ["Llama-3-8B tiny-64: 1"],
        "quick": ["Llama-3-8B tiny-64: 1"],
    },
    share={"cpu": 5},
    unit="us",
    wide=False,
    threads=1,
    sources=(*MODELS, "benchmarks/host_driver.py"),
)
