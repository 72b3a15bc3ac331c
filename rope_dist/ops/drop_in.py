"""The signatures of Hugging Face and flash-attention over these operators: change one import."""

from __future__ import annotations

import torch

from . import library, validation


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``transformers.models.llama.modeling_llama.apply_rotary_pos_emb``, in one launch.

    Rotates in float32 and rounds once; the stock function rounds after every operation.

    Args:
        q: ``[B, Hq, S, D]``, or ``[B, S, Hq, D]`` with ``unsqueeze_dim=2``.
        k: the same with its own heads.
        cos, sin: ``[B or 1, S, R]`` floating, each pair's value twice, as the stock rotary embedding makes
            them; of the two equal halves the first is read.
        unsqueeze_dim: the axis of the heads.

    Returns:
        Tensors shaped and typed as ``q`` and ``k``. Differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 ([B, H, S, D]) or 2 ([B, S, H, D]), got {unsqueeze_dim}")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must have four axes, got {list(q.shape)} and {list(k.shape)}")
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if cos.ndim != 3 or cos.shape[-1] % 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be [B or 1, S, R] with R even, got {list(cos.shape)} and {list(sin.shape)}"
        )
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    validation.heads(q, k)
    validation.tables(q, cos, sin, rows=q.shape[1])
    q, k = torch.ops.rope_dist.rotary(q, k, cos, sin)
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


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
        cu_seqlens: ``[sequences + 1]`` int32 or int64.
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
    if packed:
        validation.bounds(cu_seqlens, x.device)
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
    x, _ = library.rotate(
        x,
        None,
        cos=cos[None],
        sin=sin[None],
        cu_seqlens=cu_seqlens,
        offsets=offsets,
        offset=offset,
        interleaved=interleaved,
        inplace=inplace,
    )
    return x[0] if packed else x
