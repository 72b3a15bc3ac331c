"""Attention by two rotations of a few new tokens over cached keys, in one pass over the cache where a kernel serves."""

from __future__ import annotations

import torch

from . import dispatch
from .window_angles import WindowAngles

MAX_ROWS = 64
"""New tokens times query heads that share a key head."""
MAX_HEAD_DIM = 256

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def has_window_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether :func:`window_decode` takes them: few new tokens, no gradient, on a GPU with Triton."""
    if any(type(x) not in _PLAIN for x in (q, k, v)) or (
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    ):
        return False
    return (
        q.shape[1] // k.shape[1] * q.shape[2] <= MAX_ROWS
        and max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and all(x.numel() > 0 and x.stride(3) == 1 for x in (q, k, v))
        # Nothing intercepts the operators of torch, of which the kernel is none.
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and dispatch.choose(q).backend.decodes_windows
    )


def window_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: WindowAngles,
    seen: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention by two rotations in one pass over the keys, which are rotated on as they are read.

    The result is that of :func:`rope_dist.ops.windowed_attention.windowed_attention`, without a gradient.

    Args:
        q: ``[B, H, S, D]``, rotated by the trained frequencies; the last of the tokens.
        k: ``[B, Hkv, T, D]``, rotated by the trained frequencies, ``Hkv`` divides ``H``.
        v: ``[B, Hkv, T, Dv]``.
        angles: beyond the window.
        seen: ``[B or 1, 1, S, T]`` bool, which keys a query sees; None: itself and those before it.
        scale: of the logits, by default ``D ** -0.5``.

    Returns:
        ``[B, H, S, Dv]`` in the dtype of ``q``; zeros for queries that see no key.

    Raises:
        ValueError: shapes that do not fit, or :func:`has_window_decode` is not so.
    """
    _check(q, k, v, angles, seen)
    if not has_window_decode(q, k, v):
        raise ValueError(
            f"there is no kernel for these tensors: it takes at most {MAX_ROWS} tokens times heads that share a key "
            f"head, head dimensions to {MAX_HEAD_DIM}, no gradient, and a GPU"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dispatch.choose(q).backend.window_decode(q, k, v, angles, seen, scale)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: WindowAngles, seen: torch.Tensor | None
) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.shape[:3] != k.shape[:3]
        or k.shape[0] != q.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[1] % k.shape[1]
        or q.shape[2] > k.shape[2]
    ):
        raise ValueError(
            "q must be [B, H, S, D], k [B, Hkv, T, D] and v [B, Hkv, T, Dv], Hkv divide H and S be at most T, got "
            f"{[list(x.shape) for x in (q, k, v)]}"
        )
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    for name, positions, tokens in (
        ("positions", angles.positions, queries),
        ("key_positions", angles.key_positions, keys),
    ):
        if positions.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(f"{name} must be [{batch} or 1, {tokens}], got {list(positions.shape)}")
    pairs = angles.inv_freq.shape[-1]
    if angles.inv_freq.shape != (pairs,) or angles.change_q64.shape != (2, pairs):
        raise ValueError(
            f"inv_freq must be [R/2] and change_q64 [2, R/2], got {list(angles.inv_freq.shape)} and "
            f"{list(angles.change_q64.shape)}"
        )
    if not 0 <= angles.first <= q.shape[3] - 2 * pairs or (
        angles.first and angles.first + 2 * pairs < q.shape[3]
    ):
        raise ValueError(
            f"the {2 * pairs} rotated dimensions must be the first or the last of {q.shape[3]}, got first="
            f"{angles.first}"
        )
    if seen is not None and seen.shape not in ((batch, 1, queries, keys), (1, 1, queries, keys)):
        raise ValueError(f"seen must be [{batch} or 1, 1, {queries}, {keys}], got {list(seen.shape)}")
