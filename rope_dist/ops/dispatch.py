"""The one place where a backend is chosen.

The first entry of :data:`BACKENDS` that supports a tensor serves it, with one warning where a library is missing.
The environment variable ``ROPE_DIST_BACKEND`` (``auto`` or a name), or :func:`use` for a block of code, names
another: ``triton`` on CPU tensors runs the kernels in Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before
the first import.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import backend as backends
from . import launch_cache, reference, reference_norm, validation
from .arguments import Angles, Norms, is_joint
from .backend import Backend, NotBuilt, Reference
from .native import Native
from .triton_backend import Triton

REFERENCE = Reference()
BACKENDS: tuple[Backend, ...] = (Triton(), Native(), REFERENCE)
"""In the order in which they are asked."""


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose a backend by its name, or ``"auto"``, within a ``with`` block.

    For every thread of the process: autograd runs backward passes in threads of its own.

    Raises:
        ValueError: no such backend.
    """
    before, backends.override = backends.override, _known(backend)
    try:
        yield
    finally:
        backends.override = before


def _known(name: str) -> str:
    names = ("auto", *(backend.name for backend in BACKENDS))
    if name not in names:
        raise ValueError(f"no such backend {name!r}; there are {', '.join(names)}")
    return name


class Choice(NamedTuple):
    """A backend, and why the ones before it in the list do not serve (by name)."""

    backend: Backend
    skipped: dict[str, str]


def choose(x: torch.Tensor) -> Choice:
    """What rotates heads of the dtype and device of ``x``; asked once for each.

    Raises:
        ValueError: the environment variable names no backend.
    """
    asked = (x.dtype, x.device, backends.requested())
    choice = _CHOICES.get(asked)
    if choice is None:
        choice = _CHOICES[asked] = _choose(x, _known(asked[2]))
    return choice


_CHOICES: dict[tuple[torch.dtype, torch.device, str], Choice] = {}


def _choose(x: torch.Tensor, name: str) -> Choice:
    skipped: dict[str, str] = {}
    for backend in BACKENDS:
        if name in ("auto", backend.name):
            reason = backend.supports(x, requested=name == backend.name)
            if reason is None:
                return Choice(backend, skipped)
            skipped[backend.name] = reason
    return Choice(REFERENCE, skipped)


def forget() -> None:
    """Choose backends anew, as after building a library."""
    _CHOICES.clear()
    launch_cache.clear()
    _warn_once.cache_clear()


def backend_for(x: torch.Tensor) -> str:
    """Name of the backend that rotates heads of the dtype and device of ``x``.

    Raises:
        ValueError: the environment variable names no backend.
    """
    return choose(x).backend.name


def serving(x: torch.Tensor) -> Backend:
    """The backend of :func:`choose`, with a warning where it is the reference for lack of a library."""
    backend, skipped = choose(x)
    if backend is REFERENCE:
        for reason in skipped.values():
            if isinstance(reason, NotBuilt):
                _warn_once(x.device.type, reason)
    return backend


def projecting(x: torch.Tensor) -> Backend:
    """The backend that projects ``x`` and rotates: one with kernels for it, else the reference."""
    backend = choose(x).backend
    return backend if backend.projects else REFERENCE


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    warnings.warn(
        f"rope_dist: on {device} the slower PyTorch reference is used, {reason} (see rope-dist info)",
        RuntimeWarning,
        stacklevel=2,
    )


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`reference.rotate_tokens` by the backend that serves ``q``; ``inplace`` changes and returns its inputs.

    Args:
        key: of the launch cache, where the launch is to be kept.
    """
    backend = serving(q)
    if backend is REFERENCE and not inplace:
        return reference.rotate_tokens(q, k, angles, q_bias, k_bias)
    if inplace:
        q_out, k_out = q, k
        _count_change(q, k)
    else:
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else None
    whole = whole_rows(angles)
    again = backend.rotate(q, k, q_out, k_out, whole, q_bias, k_bias)
    if again is not None and whole is angles:
        launch_cache.put(key, _changing(again, q, k) if inplace else _returning(again))
    return q_out, k_out


def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`reference_norm.norm_rotate_tokens`, without the reciprocal norms; otherwise as :func:`rotate`."""
    backend = serving(q)
    if backend is REFERENCE and not inplace:
        return reference_norm.norm_rotate_tokens(q, k, norms, angles, q_bias, k_bias)[:2]
    if inplace:
        q_out, k_out = q, k
        _count_change(q, k)
    else:
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else None
    whole = whole_rows(angles)
    again = backend.norm_rotate(q, k, q_out, k_out, norms, whole, q_bias, k_bias)
    if again is not None and whole is angles:
        launch_cache.put(key, _changing(again, q, k) if inplace else _returning(again))
    return q_out, k_out


def norm_rotate_saving(
    q: torch.Tensor,
    k: torch.Tensor | None,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor | None]]:
    """:func:`norm_rotate` with the reciprocal norms ``[B, S, heads or 1]`` that the backward pass needs."""
    backend = serving(q)
    if backend is REFERENCE:
        q_new, k_new, q_rstd, k_rstd = reference_norm.norm_rotate_tokens(q, k, norms, angles, q_bias, k_bias)
        return q_new, k_new, (q_rstd, k_rstd)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else None
    rstds = _empty_rstd(q, norms.q_weight), _empty_rstd(k, norms.k_weight) if k is not None else None
    backend.norm_rotate(q, k, q_out, k_out, norms, whole_rows(angles), q_bias, k_bias, rstds)
    return q_out, k_out, rstds


def _empty_rstd(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    heads = 1 if is_joint(weight, x) else x.shape[2]
    return x.new_empty((*x.shape[:2], heads), dtype=reference.compute_dtype(x))


def norm_rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor | None],
    heads: tuple[torch.Tensor, torch.Tensor | None],
    rstds: tuple[torch.Tensor, torch.Tensor | None],
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As :func:`reference_norm.norm_rotate_backward` by the backend that serves the heads."""
    backend = serving(heads[0])
    return backend.norm_rotate_backward(grads, heads, rstds, norms, whole_rows(angles), q_bias, k_bias)


def whole_rows(angles: Angles) -> Angles:
    """``angles`` whose tables have a contiguous last axis (rows may lie anywhere), and whose lists are contiguous."""
    whole = [
        x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 or x is angles.positions else x.contiguous()
        for x in angles.tensors()
    ]
    if all(a is b for a, b in zip(whole, angles, strict=False)):
        return angles
    return Angles._make((*whole, *angles[len(whole) :]))


def _returning(again: Callable[..., None]) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def launch(q, k, *rest):
        q_out = q.new_empty(q.shape)
        k_out = k.new_empty(k.shape) if k is not None else None
        again(q, k, q_out, k_out, *rest)
        return q_out, k_out

    return launch


def _changing(
    again: Callable[..., None], q: torch.Tensor, k: torch.Tensor | None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    q_bytes, k_bytes = (_reach(x) if x is not None else 0 for x in (q, k))

    def launch(q, k, *rest):
        if k is not None and -k_bytes < k.data_ptr() - q.data_ptr() < q_bytes:
            validation.writable(q, k)  # they may share memory
        _count_change(q, k)
        again(q, k, q, k, *rest)
        return q, k

    return launch


def _reach(x: torch.Tensor) -> int:
    """Bytes from the first element of ``x`` to the end of its last."""
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def _count_change(q: torch.Tensor, k: torch.Tensor | None) -> None:
    """Let autograd see that the tensors changed: what it saved of them is no longer what they are."""
    torch.autograd.graph.increment_version(q if k is None else (q, k))
