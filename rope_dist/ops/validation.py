"""Checks of the operators' arguments: every mistake is a ``ValueError`` that names what was given."""

from __future__ import annotations

import functools
import math

import torch
from torch.autograd import forward_ad

from .arguments import Angles, Norms, present


def heads(q: torch.Tensor, k: torch.Tensor | None) -> None:
    """``q`` and ``k`` are ``[B, S, heads, D]`` of one shape (but for the heads), dtype and device."""
    if k is None:
        if q.ndim != 4:
            raise ValueError(f"the heads must be [B, S, heads, D], got {list(q.shape)}")
    elif q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, S, heads, D] with one B, S and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if not q.dtype.is_floating_point or (k is not None and q.dtype != k.dtype):
        given = f"{q.dtype}" if k is None else f"{q.dtype} and {k.dtype}"
        raise ValueError(f"q and k must have one floating dtype, got {given}")
    if k is not None and q.device != k.device:
        raise ValueError(f"q and k must be on one device, got {q.device} and {k.device}")


def biases(
    q: torch.Tensor, k: torch.Tensor | None, q_bias: torch.Tensor | None, k_bias: torch.Tensor | None
) -> None:
    """``q_bias`` and ``k_bias`` are None or ``[heads * D]``, of the dtype and device of ``q``."""
    for name, bias, x in (("q_bias", q_bias, q), ("k_bias", k_bias, k)):
        if bias is None:
            continue
        if x is None:
            raise ValueError(f"{name} without {name[0]}")
        size = x.shape[2] * x.shape[3]
        if bias.shape != (size,) or bias.dtype != x.dtype or bias.device != x.device:
            raise ValueError(
                f"{name} must be [{size}] {x.dtype} on {x.device}, got {list(bias.shape)} {bias.dtype} on "
                f"{bias.device}"
            )


def tables(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, rows: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin`` are ``[B or 1, rows, R/2]`` or ``[rows, R/2]`` constants that fit ``q``.

    Args:
        rows: None: any number.

    Returns:
        Both with three axes.
    """
    if cos.ndim == sin.ndim == 2:
        cos, sin = cos[None], sin[None]
    if (
        cos.shape != sin.shape
        or cos.ndim != 3
        or cos.shape[0] not in (1, q.shape[0])
        or (rows is not None and cos.shape[1] != rows)
    ):
        raise ValueError(
            f"cos and sin must be [B or 1, S, R/2] or [S, R/2] for q {list(q.shape)}, got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if 2 * cos.shape[2] > q.shape[3]:
        raise ValueError(
            f"the tables rotate {2 * cos.shape[2]} dimensions, the heads have {q.shape[3]}: of tables [S, R] that "
            "have each value twice (Hugging Face's) give the first half"
        )
    if cos.dtype != sin.dtype or not cos.dtype.is_floating_point:
        raise ValueError(f"cos and sin must have one floating dtype, got {cos.dtype} and {sin.dtype}")
    if not q.device == cos.device == sin.device:
        raise ValueError(
            f"q, cos and sin must be on one device, got {q.device}, {cos.device} and {sin.device}"
        )
    if cos.requires_grad or sin.requires_grad or _has_tangent(cos) or _has_tangent(sin):
        raise ValueError("cos and sin are constants of the rotation: detach them, no gradient reaches them")
    return cos, sin


def frequencies(inv_freq: torch.Tensor, head_dim: int, device: torch.device) -> None:
    """``inv_freq`` is ``[R/2]`` or ``[axes, R/2]`` floating, or int32 fixed point of it, with ``R <= head_dim``."""
    fixed_point = inv_freq.dtype == torch.int32 and inv_freq.ndim in (2, 3) and inv_freq.shape[-2] == 2
    floating = inv_freq.dtype.is_floating_point and inv_freq.ndim in (1, 2)
    if not (fixed_point or floating) or 0 in inv_freq.shape[:-1]:
        raise ValueError(
            "inv_freq must be [R/2] or [axes, R/2] floating, or the int32 that rope_dist.ops.to_fixed_point makes of "
            f"it, got {list(inv_freq.shape)} {inv_freq.dtype}"
        )
    if 2 * inv_freq.shape[-1] > head_dim:
        raise ValueError(f"inv_freq rotates {2 * inv_freq.shape[-1]} dimensions, the heads have {head_dim}")
    if inv_freq.requires_grad or _has_tangent(inv_freq):
        raise ValueError("inv_freq is a constant of the rotation: detach it, no gradient reaches it")
    if inv_freq.device != device:
        raise ValueError(f"inv_freq must be on {device}, got {inv_freq.device}")


def angles_at(q: torch.Tensor, inv_freq: torch.Tensor, angles: Angles, packed: bool) -> None:
    """Frequencies, and positions or bounds and offsets, fit ``q`` ``[B, S, heads, D]``."""
    frequencies(inv_freq, q.shape[3], q.device)
    position_ids, cu_seqlens, seqlen_offsets = angles.positions, angles.cu_seqlens, angles.seqlen_offsets
    axes = angles.axes if present(angles.inv_freq_q64).ndim == 3 else None
    if position_ids is not None:
        if cu_seqlens is not None or seqlen_offsets is not None:
            raise ValueError("give position_ids, or cu_seqlens and seqlen_offsets, not both")
        positions(position_ids, q.shape[0], q.shape[1], q.device, axes)
    elif axes is not None:
        raise ValueError(f"frequencies of {axes} axes need position_ids [{axes}, B or 1, S]")
    if cu_seqlens is not None:
        if not packed:
            raise ValueError(f"cu_seqlens needs packed q and k [T, heads, D], got {list(q.shape)}")
        bounds(cu_seqlens, q.shape[1], q.device)
    if seqlen_offsets is not None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if seqlen_offsets.shape != (sequences,):
            raise ValueError(f"seqlen_offsets must be [{sequences}], got {list(seqlen_offsets.shape)}")
        integers(seqlen_offsets, "seqlen_offsets", q.device)


def angle_values(angles: Angles, tokens: int) -> None:
    """What of :func:`angles_at` is not in the metadata of tensors: their values, looked at on a CPU."""
    values(angles.positions, "position_ids")
    values(angles.seqlen_offsets, "seqlen_offsets")
    bound_values(angles.cu_seqlens, tokens)


def norms(
    q: torch.Tensor, k: torch.Tensor | None, norms: Norms, names: tuple[str, str] = ("q_weight", "k_weight")
) -> None:
    """Weights are None, ``[D]`` or ``[heads * D]``, floating, on the device of ``q``; ``eps`` is no less than 0."""
    if not (isinstance(norms.eps, float) and 0 <= norms.eps < float("inf")):
        raise ValueError(f"eps must be a number from 0 on, got {norms.eps!r}")
    if not -float("inf") < norms.weight_offset < float("inf"):
        raise ValueError(f"weight_offset must be a finite number, got {norms.weight_offset!r}")
    for name, weight, x in zip(names, norms.weights(), (q, k), strict=True):
        if weight is None:
            continue
        if x is None:
            raise ValueError(f"{name} without {name[0]}")
        if weight.ndim != 1 or weight.shape[0] not in (x.shape[3], x.shape[2] * x.shape[3]):
            raise ValueError(
                f"{name} must be [{x.shape[3]}] (each head by itself) or [{x.shape[2] * x.shape[3]}] (all heads "
                f"together), got {list(weight.shape)}"
            )
        if not weight.dtype.is_floating_point or weight.device != x.device:
            raise ValueError(f"{name} must be floating on {x.device}, got {weight.dtype} on {weight.device}")


def positions(
    position_ids: torch.Tensor, batch: int, length: int, device: torch.device, axes: int | None = None
) -> None:
    """``position_ids`` is ``[B or 1, S]`` int32 or int64, or ``[axes, B or 1, S]``.

    Values are looked at where that costs no wait.
    """
    first = () if axes is None else (axes,)
    if position_ids.shape not in ((*first, 1, length), (*first, batch, length)):
        wanted = ", ".join(str(n) for n in (*first, f"{batch} or 1", length))
        raise ValueError(f"position_ids must be [{wanted}], got {list(position_ids.shape)}")
    integers(position_ids, "position_ids", device)


def integers(integer: torch.Tensor, name: str, device: torch.device) -> None:
    """``integer`` is int32 or int64 on ``device``, within int32 (looked at on a CPU only)."""
    if integer.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {integer.dtype}")
    if integer.device != device:
        raise ValueError(f"{name} must be on {device}, got {integer.device}")
    values(integer, name)


def values(integer: torch.Tensor | None, name: str) -> None:
    """``integer``, where there is one that can be read without waiting, is within int32."""
    if (
        integer is None
        or integer.dtype != torch.int64
        or integer.numel() == 0
        or not readable(integer.device)
    ):
        return
    low, high = (int(x) for x in integer.aminmax())
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name} must be within int32, got values from {low} to {high}")


def rows(positions: torch.Tensor, count: int, name: str) -> None:
    """``positions``, where they can be read without waiting, are among the ``count`` rows of a table."""
    if positions.numel() == 0 or not readable(positions.device):
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{name} must be rows of the table of {count}, got values from {low} to {high}")


def bounds(cu_seqlens: torch.Tensor, tokens: int, device: torch.device, name: str = "cu_seqlens") -> None:
    """``cu_seqlens`` is ``[sequences + 1]`` integers, at least two; see :func:`bound_values`."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be [sequences + 1], got {list(cu_seqlens.shape)}")
    integers(cu_seqlens, name, device)
    bound_values(cu_seqlens, tokens, name)


def bound_values(cu_seqlens: torch.Tensor | None, tokens: int, name: str = "cu_seqlens") -> None:
    """Bounds, where there are some on a CPU, are none below the one before it, and within the ``tokens``."""
    if cu_seqlens is None or not readable(cu_seqlens.device):
        return
    ordered = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    if not (cu_seqlens[0] >= 0 and cu_seqlens[-1] <= tokens and ordered):
        raise ValueError(
            f"{name} must not decrease and be within 0 and {tokens} tokens, got {cu_seqlens.tolist()}"
        )


def slot_values(slots: torch.Tensor, entries: int) -> None:
    """Entries of a cache, where they can be read without waiting, exist; negative ones are padding."""
    values(slots, "slots")
    if readable(slots.device) and slots.numel() and int(slots.max()) >= entries:
        raise ValueError(f"slot {int(slots.max())} is past the cache's {entries} entries")


def apart(written: dict[str, torch.Tensor | None], read: dict[str, torch.Tensor | None]) -> None:
    """No two elements of ``written``, and none of one of them and one of ``read``, share memory. By their names."""
    targets, sources = (
        [(name, x) for name, x in group.items() if x is not None] for group in (written, read)
    )
    for name, x in targets:
        if not x.is_contiguous() and _overlaps_itself(x):
            raise ValueError(
                f"{name} is expanded or its elements share memory (strides {list(x.stride())}): it cannot be written to"
            )
    if torch.compiler.is_compiling():
        return  # such tensors have no storage
    everything = [(name, x, x.untyped_storage()._cdata) for name, x in (*targets, *sources)]
    for i, (name, x, storage) in enumerate(everything[: len(targets)]):
        for other, y, other_storage in everything[i + 1 :]:
            if storage == other_storage and _share_elements(x, y):
                raise ValueError(f"{name} and {other} share memory: one would be written over the other")


def writable(*tensors: torch.Tensor | None, names: tuple[str, ...] = ("q", "k")) -> None:
    """Tensors can be changed in place: no two elements, of one or of two of them, share memory."""
    present = [(x, name) for x, name in zip(tensors, names, strict=False) if x is not None]
    for x, name in present:
        if not x.is_contiguous() and _overlaps_itself(x):
            raise ValueError(
                f"{name} is expanded or its elements share memory (strides {list(x.stride())}): it cannot be "
                "rotated in place"
            )
    if len(present) == 2:
        (a, first), (b, second) = present
        if a is b or _share_elements(a, b):
            raise ValueError(
                f"{first} and {second} share memory: in place it would be rotated twice (give one tensor with "
                f"{second}=None, or inplace=False)"
            )


def same_order(angles: Angles) -> None:
    """A rotation in place writes each pair where it read it."""
    if angles.deinterleave:
        raise ValueError(
            "deinterleave writes a pair elsewhere than it reads it, so it cannot be done in place: give inplace=False"
        )


def changeable(x: torch.Tensor, name: str) -> None:
    """Autograd can follow a change of ``x``: it is no leaf, and no view that it does not know how to write to."""
    is_view = x._is_view()
    base = x._base if x._base is not None else x
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            f"{name} is a leaf that requires a gradient, or a view of one: autograd does not let it be changed in "
            "place. Rotate it with inplace=False"
        )
    if is_view and torch._C._autograd._get_creation_meta(x) != torch._C._autograd.CreationMeta.DEFAULT:
        raise ValueError(
            f"{name} is one of several views that one call made (unbind, split, chunk), or was made without "
            "gradients: autograd does not follow a change of it. Take it by an index or narrow(), or rotate it with "
            "inplace=False"
        )


def readable(device: torch.device) -> bool:
    """Whether values can be looked at: they are on a CPU, and neither traced nor batched by ``torch.func.vmap``."""
    return (
        device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _has_tangent(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether one axis steps into what the axes with smaller strides reach. Views of memory that is whole never do."""
    if x.numel() == 0:
        return False
    if torch.compiler.is_compiling():
        return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _share_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False  # such tensors have no storage
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or a.numel() == 0 or b.numel() == 0:
        return False
    a_size, b_size = a.element_size(), b.element_size()
    unit = math.gcd(a_size, b_size)
    a_size, b_size = a_size // unit, b_size // unit
    # Elements of unlike sizes share one where a part of one is a part of the other.
    axes = (
        *((s * a_size, n) for s, n in zip(a.stride(), a.shape, strict=True)),
        *((-s * b_size, n) for s, n in zip(b.stride(), b.shape, strict=True)),
        *(((1, a_size), (-1, b_size)) if a_size != b_size else ()),
    )
    return _is_reached(b.storage_offset() * b_size - a.storage_offset() * a_size, axes)


@functools.lru_cache(1024)
def _is_reached(distance: int, axes: tuple[tuple[int, int], ...]) -> bool:
    """Whether ``distance`` is a sum of ``i * stride`` with ``0 <= i < size`` of each of ``axes`` (stride, size).

    Axes of one stride are one axis from -size to size; the largest first leaves at most a few indices to try.
    """
    spans: dict[int, tuple[int, int]] = {}
    for stride, size in axes:
        low, high = spans.get(abs(stride), (0, 0))
        spans[abs(stride)] = (low - (size - 1), high) if stride < 0 else (low, high + size - 1)
    steps = sorted((stride, *span) for stride, span in spans.items() if stride and span != (0, 0))

    def reached(left: int, count: int) -> bool:
        if count == 0:
            return left == 0
        stride, low, high = steps[count - 1]
        down = sum(s * n for s, n, _ in steps[: count - 1])
        up = sum(s * n for s, _, n in steps[: count - 1])
        first, last = max(low, -((up - left) // stride)), min(high, (left - down) // stride)
        return any(reached(left - stride * i, count - 1) for i in range(first, last + 1))

    return reached(distance, len(steps))
