"""Rotary operators on tensors. They know no model.

:func:`rotary` checks its arguments and calls ``torch.ops.rope_dist.rotary``; ``reference.py`` defines
the mathematics.
"""

from __future__ import annotations

import torch

from . import library  # noqa: F401  (registers torch.ops.rope_dist)
from .reference import cos_sin

__all__ = ["cos_sin", "rotary"]


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by the angles of their positions (Su et al. 2021, eq. 34).

    Args:
        q: ``[B, S, Hq, D]`` queries, floating, any strides.
        k: ``[B, S, Hk, D]`` keys, same dtype and device.
        cos, sin: ``[B, S, R/2]`` or ``[1, S, R/2]``, floating (float32 where ``q`` is 16-bit), ``R <= D``
            rotated dimensions; see :func:`cos_sin`.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of Hugging Face's ``(i, i + R/2)``.

    Returns:
        New tensors, contiguous, shaped and typed as ``q`` and ``k``. Differentiable in ``q`` and ``k``.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or tables that need a
            gradient (they are constants).
    """
    _check(q, k, cos, sin)
    return torch.ops.rope_dist.rotary(q, k, cos, sin, interleaved)


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, S, heads, D] with one B, S and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if (
        cos.shape != sin.shape
        or cos.ndim != 3
        or cos.shape[0] not in (1, q.shape[0])
        or cos.shape[1] != q.shape[1]
    ):
        raise ValueError(
            f"cos and sin must be [B or 1, S, R/2] for q {list(q.shape)}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[2] > q.shape[3]:
        raise ValueError(f"the tables rotate {2 * cos.shape[2]} dimensions, the heads have {q.shape[3]}")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q and k must have one floating dtype, got {q.dtype} and {k.dtype}")
    if cos.dtype != sin.dtype or not cos.dtype.is_floating_point:
        raise ValueError(f"cos and sin must have one floating dtype, got {cos.dtype} and {sin.dtype}")
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(
            f"q, k, cos and sin must be on one device, got {q.device}, {k.device}, {cos.device}, {sin.device}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants of the rotation: detach them, no gradient reaches them")
