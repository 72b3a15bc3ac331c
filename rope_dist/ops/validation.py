"""Checks of the operators' arguments: every mistake is a ``ValueError`` that names what was given."""

from __future__ import annotations

import torch


def heads(q: torch.Tensor, k: torch.Tensor | None) -> None:
    """``q`` and ``k`` are ``[B, S, heads, D]`` of one shape (but for the heads), dtype and device."""
    if k is None:
        if q.ndim != 4:
            raise ValueError(f"x must be [B, S, heads, D], got {list(q.shape)}")
    elif q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, S, heads, D] with one B, S and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if not q.dtype.is_floating_point or (k is not None and q.dtype != k.dtype):
        raise ValueError(
            f"q and k must have one floating dtype, got {q.dtype} and {k.dtype if k is not None else None}"
        )
    if k is not None and q.device != k.device:
        raise ValueError(f"q and k must be on one device, got {q.device} and {k.device}")


def biases(
    q: torch.Tensor, k: torch.Tensor, q_bias: torch.Tensor | None, k_bias: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Those of ``q_bias`` and ``k_bias`` that are given: ``[heads * D]``, of the dtype and device of ``q``."""
    given = {}
    for name, bias, x in (("q_bias", q_bias, q), ("k_bias", k_bias, k)):
        if bias is None:
            continue
        size = x.shape[2] * x.shape[3]
        if bias.shape != (size,) or bias.dtype != x.dtype or bias.device != x.device:
            raise ValueError(
                f"{name} must be [{size}] {x.dtype} on {x.device}, got {list(bias.shape)} {bias.dtype} on "
                f"{bias.device}"
            )
        given[name] = bias
    return given


def tables(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rows: int | None) -> None:
    """``cos`` and ``sin`` are ``[B or 1, rows, R/2]`` constants that fit ``q``; ``rows`` None: any number."""
    if (
        cos.shape != sin.shape
        or cos.ndim != 3
        or cos.shape[0] not in (1, q.shape[0])
        or (rows is not None and cos.shape[1] != rows)
    ):
        raise ValueError(
            f"cos and sin must be [B or 1, S, R/2] for q {list(q.shape)}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[2] > q.shape[3]:
        raise ValueError(f"the tables rotate {2 * cos.shape[2]} dimensions, the heads have {q.shape[3]}")
    if cos.dtype != sin.dtype or not cos.dtype.is_floating_point:
        raise ValueError(f"cos and sin must have one floating dtype, got {cos.dtype} and {sin.dtype}")
    if not q.device == cos.device == sin.device:
        raise ValueError(
            f"q, cos and sin must be on one device, got {q.device}, {cos.device} and {sin.device}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants of the rotation: detach them, no gradient reaches them")


def frequencies(inv_freq: torch.Tensor, head_dim: int, device: torch.device) -> None:
    """``inv_freq`` is ``[R/2]`` floating, or ``[2, R/2]`` int32 words, with ``R <= head_dim``."""
    words = inv_freq.ndim == 2 and inv_freq.shape[0] == 2 and inv_freq.dtype == torch.int32
    if not words and (inv_freq.ndim != 1 or not inv_freq.dtype.is_floating_point):
        raise ValueError(
            "inv_freq must be [R/2] floating, or the [2, R/2] int32 of rope_dist.ops.turns, got "
            f"{list(inv_freq.shape)} {inv_freq.dtype}"
        )
    if 2 * inv_freq.shape[-1] > head_dim:
        raise ValueError(f"inv_freq rotates {2 * inv_freq.shape[-1]} dimensions, the heads have {head_dim}")
    if inv_freq.requires_grad:
        raise ValueError("inv_freq is a constant of the rotation: detach it, no gradient reaches it")
    if inv_freq.device != device:
        raise ValueError(f"inv_freq must be on {device}, got {inv_freq.device}")


def positions(position_ids: torch.Tensor, batch: int, length: int, device: torch.device) -> None:
    """``position_ids`` is ``[B or 1, S]`` int32 or int64; values are looked at where that costs no wait."""
    if position_ids.ndim != 2 or position_ids.shape not in ((1, length), (batch, length)):
        raise ValueError(f"position_ids must be [{batch} or 1, {length}], got {list(position_ids.shape)}")
    integers(position_ids, "position_ids", device)


def integers(values: torch.Tensor, name: str, device: torch.device) -> None:
    """``values`` are int32 or int64 on ``device``, within int32 (looked at on a CPU only)."""
    if values.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {values.dtype}")
    if values.device != device:
        raise ValueError(f"{name} must be on {device}, got {values.device}")
    if (
        values.dtype == torch.int64
        and device.type == "cpu"
        and values.numel() > 0
        and not torch.compiler.is_compiling()
    ):
        low, high = (int(x) for x in values.aminmax())
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"{name} must be within int32, got values from {low} to {high}")


def bounds(cu_seqlens: torch.Tensor, device: torch.device) -> None:
    """``cu_seqlens`` is ``[sequences + 1]`` integers with at least one sequence."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {list(cu_seqlens.shape)}")
    integers(cu_seqlens, "cu_seqlens", device)


def writable(x: torch.Tensor, name: str) -> None:
    """``x`` can be changed in place: no two of its elements share memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is expanded (strides {list(x.stride())}): it cannot be rotated in place")
