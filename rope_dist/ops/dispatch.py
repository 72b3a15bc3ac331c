"""The one place where a backend is chosen.

CUDA tensors of a type the kernels take go to Triton, everything else to the reference. The environment
variable ``ROPE_DIST_BACKEND`` (``auto``, ``triton``, ``reference``), or :func:`use` for a block of code,
overrides it: ``triton`` on CPU tensors runs the kernels in Triton's interpreter, where
``TRITON_INTERPRET=1`` was set before the first import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import torch

from . import reference

BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton is no dependency of a CPU-only installation. ``sys.modules`` may hold None for a forbidden import.
HAS_TRITON = sys.modules.get("triton", "") is not None and importlib.util.find_spec("triton") is not None

_override: str | None = None


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose ``"triton"``, ``"reference"`` or ``"auto"`` within a ``with`` block.

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
    """``"triton"`` or ``"reference"``: what rotates ``x``.

    Raises:
        ValueError: the environment variable names no backend.
    """
    backend = chosen()
    if backend == "reference" or x.dtype not in KERNEL_DTYPES:
        return "reference"
    if backend == "triton" or (x.is_cuda and HAS_TRITON):
        return "triton"
    return "reference"


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`rope_dist.ops.reference.rotary`."""
    if backend_for(q) == "reference":
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`rope_dist.ops.reference.rotate_tokens`."""
    angles = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse)
    if backend_for(q) == "reference":
        return reference.rotate_tokens(q, k, *angles)
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape) if k is not None else None
    _launch(q, k, q_out, k_out, *angles)
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
) -> None:
    """:func:`rotate` in place."""
    angles = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse)
    if backend_for(q) == "triton":
        _launch(q, k, q, k, *angles)
        return
    q_out, k_out = reference.rotate_tokens(q, k, *angles)
    q.copy_(q_out)
    if k is not None:
        k.copy_(k_out)


def _launch(
    q, k, q_out, k_out, cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse
):
    from . import triton_rotary

    if cos is not None:
        # Rows of a table may lie anywhere; its last axis is read as it is.
        cos = cos if cos.stride(-1) == 1 else cos.contiguous()
        sin = sin if sin.stride(-1) == 1 else sin.contiguous()
    triton_rotary.launch(
        q, k, q_out, k_out, cos=cos, sin=sin, words=words, positions=positions, cu_seqlens=cu_seqlens,
        offsets=offsets, offset=offset, scaling=scaling, interleaved=interleaved, inverse=inverse,
    )  # fmt: skip
