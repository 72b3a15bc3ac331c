"""How a projection with rotation is carried out: fused, or by cuBLAS with a rotary pass after it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from . import autotune, dispatch, launch_cache, reference, reference_cache
from .arguments import Angles, KeyValueCache, Norms, Projections
from .backend import Backend, without_autocast

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Queries, keys and values ``[B, S, heads, head_dim]``; values None where they have no weight."""

PATHS = ("auto", "separate", "triton", "triton_tma", "decode")
"""Of a kernel that has several configurations, ``"triton_tma:64x128x64/4"`` names one (``configurations.py``)."""


def qkv_rotary(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    path: str = "auto",
    key: launch_cache.Key | None = None,
    norms: Norms | None = None,
) -> Heads:
    """As :func:`rope_dist.ops.reference.qkv_rotary`; with ``norms`` queries and keys are normalised too.

    Args:
        path: one of :data:`PATHS`, or one with a configuration.
        key: of the launch cache, where the launch is to be kept.
    """
    backend = dispatch.projecting(x)
    final = True
    if backend is dispatch.REFERENCE:
        if norms is None:
            with without_autocast(x):
                return reference.qkv_rotary(x, projections, angles)
        backend, path = dispatch.serving(x), "separate"
    elif path == "auto":
        path, final = choose(backend, x, projections, angles, norms)
    heads, again = run(backend, path, x, projections, angles, norms)
    launch_cache.put(key if final else None, again)
    return heads


def run(
    backend: Backend,
    path: str,
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    norms: Norms | None = None,
) -> tuple[Heads, Callable[..., Heads] | None]:
    """The heads by ``path``, and what makes them again of tensors of the same metadata."""
    if path == "separate":
        return separate(backend, x, projections, angles, norms)
    outputs, launch = backend.project(path, x, projections, angles, norms)
    if launch is None:
        return _heads(outputs), None
    shapes = [y.shape for y in outputs]

    def again(x: torch.Tensor, projections: Projections, angles: Angles, norms: Norms | None = None) -> Heads:
        outputs = [x.new_empty(shape) for shape in shapes]
        launch(x, projections, angles, outputs, norms)
        return _heads(outputs)

    return _heads(outputs), again


def separate(
    backend: Backend,
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    norms: Norms | None = None,
) -> tuple[Heads, Callable[..., Heads] | None]:
    """:func:`run` by the library's matrix products, then one pass of norm and rotation in place."""
    heads = project(x, projections)
    ready = dispatch.whole_rows(angles)
    q, k = heads[:2]
    turn = backend.rotate if norms is None else functools.partial(backend.norm_rotate, norms=norms)
    launch = turn(q, k, q, k, angles=ready)
    if launch is None or ready is not angles:
        return _heads(heads), None

    def again(x: torch.Tensor, projections: Projections, angles: Angles, norms: Norms | None = None) -> Heads:
        heads = project(x, projections)
        q, k = heads[:2]
        launch(q, k, q, k, *(() if norms is None else (norms,)), angles)
        return _heads(heads)

    return _heads(heads), again


def project(x: torch.Tensor, projections: Projections) -> list[torch.Tensor]:
    """The library's matrix products, ``[B, S, heads, head_dim]`` for each weight that there is."""
    (batch, length, _), head_dim = x.shape, projections.head_dim
    with without_autocast(x):
        return [
            functional.linear(x, w, b).view(batch, length, w.shape[0] // head_dim, head_dim)
            for w, b in projections.pairs()
        ]


def _heads(outputs: list[torch.Tensor]) -> Heads:
    return outputs[0], outputs[1], outputs[2] if len(outputs) == 3 else None


def choose(
    backend: Backend, x: torch.Tensor, projections: Projections, angles: Angles, norms: Norms | None = None
) -> tuple[str, bool]:
    """The path for these tensors: fixed by the environment, the only one, or the fastest (``autotune.py``).

    Returns:
        The path, and whether later calls like this one take it too: not where it could not be measured.
    """
    num_pairs = angles.num_pairs
    fixed = autotune.fixed()
    if fixed is not None:
        if fixed.partition(":")[0] not in PATHS[1:]:
            raise ValueError(f"ROPE_DIST_PATH={fixed!r} is no path; there are {', '.join(PATHS[1:])}")
        return (fixed if serves(backend, fixed, x, projections, num_pairs, norms) else "separate"), True
    if torch.are_deterministic_algorithms_enabled():
        # A measured choice may differ between processes, and with it the rounding.
        return "separate", True
    possible = candidates(backend, x, projections, num_pairs, norms)
    if len(possible) == 1 or not x.is_cuda:
        # Without a GPU nothing is timed: the interpreter runs the kernel that is the most special.
        return possible[-1], True
    forms = {
        "table": angles.cos is not None,
        "bias": projections.biases() is not None,
        "interleaved": angles.interleaved,
        "norm": norms is not None,
        "no TMA": "triton_tma" not in possible,
    }
    problem = autotune.AutotuneKey(
        device=torch.cuda.get_device_name(x.device),
        dtype=str(x.dtype).removeprefix("torch."),
        rows=autotune.rows_class(x.shape[0] * x.shape[1]),
        depth=x.shape[2],
        widths=tuple(w.shape[0] for w in projections.weights()),
        head_dim=projections.head_dim,
        rotary_dim=2 * angles.num_pairs,
        form="+".join(name for name, used in forms.items() if used),
    )
    calls = {
        path: functools.partial(run, backend, path, x, projections, angles, norms)
        for path in configured(backend, possible, x, projections, norms)
    }
    with torch.cuda.device(x.device):
        path = autotune.choose(problem, calls)
    return path, autotune.cache().get(problem) == path


def candidates(
    backend: Backend, x: torch.Tensor, projections: Projections, num_pairs: int, norms: Norms | None = None
) -> list[str]:
    """The paths that can serve these tensors, the one that is taken unmeasured last."""
    return ["separate", *backend.paths(x, projections, num_pairs, norms)]


def configured(
    backend: Backend,
    paths: list[str],
    x: torch.Tensor,
    projections: Projections,
    norms: Norms | None = None,
    *,
    every: bool = False,
) -> list[str]:
    """``paths``, each followed by its other configurations that are worth measuring, or by all of them."""
    found = []
    for path in paths:
        names = [] if path == "separate" else backend.configurations(path, x, projections, norms, every=every)
        found += [path, *(f"{path}:{name}" for name in (names if every else names[1:]))]
    return found


def serves(
    backend: Backend,
    path: str,
    x: torch.Tensor,
    projections: Projections,
    num_pairs: int,
    norms: Norms | None = None,
) -> bool:
    """Whether ``path``, which may name a configuration, can serve these tensors."""
    possible = candidates(backend, x, projections, num_pairs, norms)
    if ":" in path:
        possible = configured(backend, possible, x, projections, norms, every=True)
    return path in possible


def decode_cached(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    key: launch_cache.Key | None = None,
) -> torch.Tensor:
    """:func:`qkv_rotary` whose keys and values go to entries ``slots`` of caches ``[entries, Hk, D]``.

    Returns:
        The queries ``[B, S, Hq, D]``.
    """
    decoded = dispatch.projecting(x).decode(x, projections, angles, caches, slots)
    if decoded is None:
        q, k, v = qkv_rotary(x, projections, angles)
        assert v is not None
        reference_cache.write(k, v, KeyValueCache(*caches, slots), angles)
        return q
    q, launch = decoded
    if launch is not None:
        shape = q.shape

        def again(x, projections, angles, caches, slots) -> torch.Tensor:
            q = x.new_empty(shape)
            launch(x, projections, angles, [q, *caches], slots)
            return q

        launch_cache.put(key, again)
    return q


def pack_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, angles: Angles) -> torch.Tensor:
    """``q`` and ``k`` ``[B, S, heads, D]`` rotated, with ``v``, side by side ``[B, S, all heads * D]``."""
    backend = dispatch.serving(q)
    angles = dispatch.whole_rows(angles)
    return backend.pack_gradients(q, k, v, angles)
