"""The one place where a backend is chosen.

CUDA tensors of a type the kernels take go to Triton, or to the native library where there is no Triton;
rotations of CPU tensors go to the native library; everything else goes to the reference, with one warning
where a library is missing. The environment variable ``ROPE_DIST_BACKEND`` (``auto``, ``triton``, ``native``,
``reference``), or :func:`use` for a block of code, overrides it: ``triton`` on CPU tensors runs the kernels in
Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before the first import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import native, reference

BACKENDS = ("auto", "triton", "native", "reference")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton is no dependency of a CPU-only installation. ``sys.modules`` may hold None for a forbidden import.
HAS_TRITON = sys.modules.get("triton", "") is not None and importlib.util.find_spec("triton") is not None

_override: str | None = None


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose ``"triton"``, ``"native"``, ``"reference"`` or ``"auto"`` within a ``with`` block.

    For every thread of the process: autograd runs backward passes in threads of its own.

    Raises:
        ValueError: no such backend.
    """
    global _override
    before, _override = _override, _known(backend)
    try:
        yield
    finally:
        _override = before


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"no such backend {backend!r}; there are {', '.join(BACKENDS)}")
    return backend


@torch.compiler.assume_constant_result
def chosen() -> str:
    """What :func:`use` or the environment variable says; torch.compile takes it as it is when it traces.

    Raises:
        ValueError: the environment variable names no backend.
    """
    return _override or _known(os.environ.get("ROPE_DIST_BACKEND", "auto"))


def backend_for(x: torch.Tensor) -> str:
    """``"triton"`` or ``"reference"``: what projects ``x`` (the native library only rotates).

    Raises:
        ValueError: the environment variable names no backend.
    """
    asked_for = chosen()
    if asked_for in ("native", "reference") or x.dtype not in KERNEL_DTYPES:
        return "reference"
    if asked_for == "triton" or (x.is_cuda and HAS_TRITON):
        return "triton"
    return "reference"


class Choice(NamedTuple):
    """A backend (``"triton"``, ``"native"`` or ``"reference"``) and why."""

    name: str
    reason: str
    missing: bool = False
    """Another would serve, but its library is not there."""


def rotary_backend(x: torch.Tensor) -> Choice:
    """What rotates ``x`` (dtype and device matter), and why.

    Raises:
        ValueError: the environment variable names no backend.
    """
    asked_for = chosen()
    if backend_for(x) == "triton":
        return Choice("triton", "asked for" if asked_for == "triton" else "a GPU, and Triton is installed")
    if asked_for in ("triton", "reference"):
        asked = "asked for" if asked_for == "reference" else f"no kernel for {x.dtype} on {x.device.type}"
        return Choice("reference", asked)
    if x.dtype not in native.dtypes_on(x.device.type):
        return Choice("reference", f"no kernel for {x.dtype} on {x.device.type}")
    absent = native.unavailable(x)
    if absent is not None:
        return Choice("reference", f"the native library is missing: {absent}", missing=True)
    where = "the library for CPUs is there" if x.is_cpu else "a GPU without Triton"
    return Choice("native", "asked for" if asked_for == "native" else where)


def _rotary_backend_name(x: torch.Tensor) -> str:
    choice = rotary_backend(x)
    if choice.missing:
        _warn_once(x.device.type, choice.reason)
    return choice.name


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    warnings.warn(
        f"rope_dist: on {device} the slower PyTorch reference is used, {reason} (see rope-dist info)",
        RuntimeWarning,
        stacklevel=2,
    )


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtypes of their operands: what an operator returns must not depend on autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`rope_dist.ops.reference.rotary`."""
    if _rotary_backend_name(q) == "reference":
        return reference.rotary(q, k, cos, sin, interleaved, inverse)
    return rotate(q, k, cos, sin, interleaved=interleaved, inverse=inverse)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    offset: int = 0,
    scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`rope_dist.ops.reference.rotate_tokens`."""
    angles = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse)
    angles += (q_bias, k_bias)
    backend = _rotary_backend_name(q)
    if backend == "reference":
        return reference.rotate_tokens(q, k, *angles)
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape) if k is not None else None
    _launch(backend, q, k, q_out, k_out, *angles)
    return q_out, k_out if k is not None else q.new_empty(0)


def rotate_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    offset: int = 0,
    scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> None:
    """:func:`rotate` in place."""
    angles = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse)
    angles += (q_bias, k_bias)
    backend = _rotary_backend_name(q)
    if backend != "reference":
        _launch(backend, q, k, q, k, *angles)
        return
    q_out, k_out = reference.rotate_tokens(q, k, *angles)
    q.copy_(q_out)
    if k is not None:
        k.copy_(k_out)


def _launch(
    backend, q, k, q_out, k_out, cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved,
    inverse, q_bias, k_bias,
):  # fmt: skip
    if cos is not None:
        # Rows of a table may lie anywhere; its last axis is read as it is.
        cos = cos if cos.stride(-1) == 1 else cos.contiguous()
        sin = sin if sin.stride(-1) == 1 else sin.contiguous()
    if backend == "native":
        run = native.rotate
    else:
        from . import triton_rotary

        run = triton_rotary.launch
    run(
        q, k, q_out, k_out, cos=cos, sin=sin, words=words, positions=positions, cu_seqlens=cu_seqlens,
        offsets=offsets, offset=offset, scaling=scaling, interleaved=interleaved, inverse=inverse,
        q_bias=q_bias, k_bias=k_bias,
    )  # fmt: skip
