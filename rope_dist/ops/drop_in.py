"""The signatures of Hugging Face and flash-attention over these operators: change one import."""

from __future__ import annotations

import torch

from . import launch_cache, library, validation
from .arguments import Angles, present


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``transformers.models.llama.modeling_llama.apply_rotary_pos_emb``, in one launch.

    Rotates in float32 and rounds once; the stock function rounds after every operation.

    Args:
        q: ``[B, Hq, S, D]``, or ``[B, S, Hq, D]`` with ``unsqueeze_dim=2``.
        k: the same with its own heads; None rotates ``q`` alone.
        cos, sin: ``[B or 1, S, R]`` floating, each pair's value twice, as the stock rotary embedding makes
            them; of the two equal halves the first is read. Or ``[S, R]``, as vision towers have them.
        unsqueeze_dim: where ``cos`` gets an axis for the heads, as in the stock function: 1 or 2, and with
            ``[S, R]`` 0 (``[B, H, S, D]``) or 1 (``[B, S, H, D]``, ``[S, H, D]``).

    Returns:
        Tensors shaped and typed as ``q`` and ``k``. Differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    if cos.ndim not in (2, 3) or cos.shape[-1] % 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be [B or 1, S, R] or [S, R] with R even, got {list(cos.shape)} and {list(sin.shape)}"
        )
    # The axis of the heads, counted from the last: that of tokens and heads which comes first differs.
    axis = unsqueeze_dim - cos.ndim - 1 if unsqueeze_dim >= 0 else unsqueeze_dim
    if axis not in (-3, -2):
        before = cos.ndim - 2
        raise ValueError(
            f"unsqueeze_dim must be {before} ([B, H, S, D]) or {before + 1} ([B, S, H, D]) for cos {list(cos.shape)}, "
            f"got {unsqueeze_dim}"
        )
    axes = 3 if cos.ndim == 2 and q.ndim == 3 else 4
    if q.ndim != axes or (k is not None and k.ndim != axes):
        shapes = f"{list(q.shape)} and {list(k.shape) if k is not None else None}"
        raise ValueError(f"q and k must have four axes (or three, with cos [S, R]), got {shapes}")
    num_pairs = cos.shape[-1] // 2

    def moved(x: torch.Tensor | None) -> torch.Tensor | None:
        x = x if x is None or axis == -2 else x.transpose(-3, -2)
        return x if x is None or axes == 4 else x[None]

    q, k = present(moved(q)), moved(k)
    angles = Angles(cos[..., :num_pairs], sin[..., :num_pairs])
    launch, key = launch_cache.find("apply_rotary_pos_emb", (q, k), angles)
    if launch is not None:
        rotated = launch(q, k, angles)
    else:
        validation.heads(q, k)
        tables = validation.tables(q, cos[..., :num_pairs], sin[..., :num_pairs], rows=q.shape[1])
        rotated = library.rotate(q, k, Angles(*tables), key=key)

    def back(x: torch.Tensor) -> torch.Tensor:
        x = x if axes == 4 else x[0]
        return x if axis == -2 else x.transpose(-3, -2)

    q_out, k_out = rotated
    return back(q_out), back(k_out) if k_out is not None else None


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """As ``flash_attn.layers.rotary.apply_rotary_emb``.

    Args:
        x: ``[B, S, H, D]``, or packed ``[T, H, D]`` with ``cu_seqlens``.
        cos, sin: ``[rows, R/2]`` floating; a token's row is its place in its sequence plus the offset, and
            a token past the last row is not rotated.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        inplace: change ``x`` and return it.
        seqlen_offsets: added to the positions; one integer, or ``[sequences]`` integers on the device.
        cu_seqlens: ``[sequences + 1]`` int32 or int64, not decreasing; tokens outside the bounds are not rotated.
        max_seqlen: longest sequence in ``cu_seqlens``; only checked against the table.

    Returns:
        Shaped and typed as ``x``. Differentiable in ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or a table with fewer rows than
            an integer offset and the length need.
    """
    packed = cu_seqlens is not None
    if x.ndim != (3 if packed else 4):
        raise ValueError(
            f"x must be {'[T, H, D] with cu_seqlens' if packed else '[B, S, H, D]'}, got {list(x.shape)}"
        )
    x = x[None] if packed else x
    if cos.ndim != 2:
        raise ValueError(f"cos and sin must be [rows, R/2], got {list(cos.shape)} and {list(sin.shape)}")
    validation.heads(x, None)
    validation.tables(x, cos[None], sin[None], rows=None)
    sequences, length = x.shape[:2]
    if cu_seqlens is not None:
        validation.bounds(cu_seqlens, x.shape[1], x.device)
        sequences, length = cu_seqlens.shape[0] - 1, max_seqlen or 0
    offset, offsets = 0, None
    if isinstance(seqlen_offsets, torch.Tensor):
        offsets = seqlen_offsets
        if offsets.shape != (sequences,):
            raise ValueError(f"seqlen_offsets must be [{sequences}], got {list(offsets.shape)}")
        validation.integers(offsets, "seqlen_offsets", x.device)
    else:
        offset = int(seqlen_offsets)
        if offset < 0 or offset + length > cos.shape[0]:
            raise ValueError(
                f"a length of {length} from {offset} needs {length + offset} rows of cos, got {cos.shape[0]}"
            )
    angles = Angles(
        cos[None],
        sin[None],
        cu_seqlens=cu_seqlens,
        seqlen_offsets=offsets,
        offset=offset,
        interleaved=interleaved,
    )
    launch, key = launch_cache.find("apply_rotary_emb", (x,), angles, inplace)
    x, _ = (
        launch(x, None, angles)
        if launch is not None
        else library.rotate(x, None, angles, inplace=inplace, key=key)
    )
    return x[0] if packed else x
