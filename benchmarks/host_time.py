"""Host time of one call at one token, in microseconds: what an eager GPU waits for between kernels.

The rotation alone at the sizes of published models, a whole attention layer at those of ``tiny-64``, whose products
on a CPU take little but the time of their calls. Triton's kernels are compiled for sm_90 and not launched
(``host_driver.py``), which leaves out the driver's own time for each launch: a stock layer makes 13, an enabled one 2
to 5. "native" is the CPU's own library.
"""

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

Maker = Callable[[Any], Callable[[], Any]]
"""From inputs to a call."""
CALLS = 200
NO_TRITON = [] if INSTALLED else [Skipped("rope_dist (triton)", "triton is not installed")]
PATHS = dispatch_projection.PATHS[1:]


@contextlib.contextmanager
def backend(name: str, path: str = "") -> Iterator[None]:
    """Calls go to that backend, ``"triton"`` without launching, and take that path (``ROPE_DIST_PATH``).

    Without gradients as in transformers' ``generate``.
    """
    before = os.environ.pop("ROPE_DIST_PATH", None)
    os.environ |= {"ROPE_DIST_PATH": path} if path else {}
    try:
        where = host_only() if name == "triton" else ops.use_backend(name)
        with where, torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        os.environ.pop("ROPE_DIST_PATH", None)
        os.environ |= {"ROPE_DIST_PATH": before} if before is not None else {}


def repeated(make: Maker, where: str = "auto", path: str = "") -> Maker:
    """:data:`CALLS` calls; backend and path are switched once for all of them."""

    def bind(x: Any) -> Callable[[], Any]:
        call = make(x)

        def run() -> Any:
            with backend(where, path):
                for _ in range(CALLS):
                    found = call()
            return found

        return run

    return bind


def case(size: Size, name: str, inputs: Callable[[], Any], stock: Maker, ours: dict[str, Maker], need: int):
    found = [Implementation(HUGGINGFACE, repeated(stock), "reference")]
    found += [Implementation(key, make, "ours") for key, make in ours.items()]
    return Case(
        name=f"{name}, {size.shape.name}",
        inputs=inputs,
        implementations=lambda _: found + NO_TRITON,
        need=need,
        kernel=False,
        repeat=CALLS,
        labels=size.labels,
    )


def rotation(size: Size) -> Case:
    """One token of that model's heads, Hugging Face's function against this package's."""
    shape, dtype, device = size.shape, DTYPES[size.dtype], torch.device("cpu")
    angles = cache(lambda: shape.angles(size.tokens, dtype, device))

    def of(name: str) -> Maker:
        return lambda x: rotary_calls(x, angles())[name]

    def at(x: Heads) -> Callable[[], Any]:
        frequencies = angles().inv_freq_q64, angles().position_ids
        return lambda: ops.rotary_at(x.q, x.k, *frequencies, inplace=True)

    makers = {"rotary": of(NEW), "rotary, in place": of(IN_PLACE), "rotary_at, in place": at}
    ours = {
        f"rope_dist, {name} ({where})": repeated(make, where)
        for where in ("native", *["triton"] * INSTALLED)
        for name, make in makers.items()
    }
    inputs = partial(Heads, shape.heads, shape.head_dim, size.tokens, dtype, device)
    need = 10 * size.tokens * sum(shape.heads) * shape.head_dim * dtype.itemsize
    return case(size, "rotation", inputs, of(HUGGINGFACE), ours, need)


def layer(size: Size) -> Case:
    """One token through an attention layer without a cache, stock and enabled."""

    def of(which: str) -> Maker:
        def make(pair: models.Pair) -> Callable[[], Any]:
            model = getattr(pair, which).model
            x = torch.randn(1, size.tokens, size.shape.hidden, dtype=DTYPES[size.dtype])
            tables = model.rotary_emb(x, torch.arange(size.tokens)[None])
            return lambda: model.layers[0].self_attn(x, position_embeddings=tables, attention_mask=None)

        return make

    triton = {f"triton, {path}": ("triton", path) for path in PATHS if INSTALLED}
    places = {"native": ("native",)} | triton
    ours = {f"rope_dist.enable ({key})": repeated(of("enabled"), *place) for key, place in places.items()}
    inputs = cache(lambda: models.Pair(size, 1, torch.device("cpu")))
    need = models.parameters_bytes(size, 1) + 12 * size.tokens * size.shape.hidden * 2
    return case(size, "attention layer", inputs, of("model"), ours, need)


def cases(size: Size, options: Options) -> list[Case]:
    return [layer(size) if size.shape.name == "tiny-64" else rotation(size)]


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Host time of one call at one token",
    cases=cases,
    sizes={key: ["Llama-3-8B tiny-64: 1"] for key in ("cpu", "quick")},
    share={"cpu": 5},
    unit="us",
    wide=False,
    threads=1,
    sources=(*MODELS, "benchmarks/host_driver.py"),
)
