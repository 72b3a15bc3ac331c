"""The definition of the rotation, in plain PyTorch. Every backend is tested against this file.

Half-split pairs (``interleaved=False``, Hugging Face) join dimension ``i`` with ``i + R/2`` of the
``R`` rotated dimensions; interleaved pairs (GPT-J) join ``2i`` with ``2i + 1``; ``deinterleave`` reads these and
writes those (multi-head latent attention). Dimensions past ``R`` pass through.
"""

from __future__ import annotations

import torch

from . import fixed_point
from .arguments import Angles, Projections, present


def cos_sin(
    inv_freq: torch.Tensor, position_ids: torch.Tensor, attention_scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of ``cos`` and ``sin``, with the float32 product and order of stock Hugging Face.

    Args:
        inv_freq: ``[R/2]`` float32, radians a token.
        position_ids: ``[B, S]`` or ``[1, S]``, integers.
        attention_scaling: factor on both tables (YaRN's temperature).

    Returns:
        Two ``[B, S, R/2]`` float32 tensors.
    """
    angles = position_ids[..., None].to(torch.float32) * inv_freq
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    deinterleave: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Rotate the pairs of ``x`` by the angles of the tables.

    16-bit inputs are rotated in float32 and rounded once; float32 and float64 in their own type.

    Args:
        x: ``[B, S, H, D]``, any strides.
        cos, sin: ``[B or 1, S, R/2]``, ``R <= D``.
        interleaved, deinterleave: which dimensions make a pair, before and after; see :class:`Angles`.
        conjugate: rotate by the negative angles (the transpose, which is the gradient of the rotation).

    Returns:
        ``[B, S, H, D]`` contiguous, in the dtype of ``x``.
    """
    compute = compute_dtype(x)
    cos = cos[:, :, None, :].to(compute)
    sin = sin[:, :, None, :].to(compute)
    num_pairs = cos.shape[-1]
    order = Angles(interleaved=interleaved, deinterleave=deinterleave, conjugate=conjugate)
    first, second = _members(x[..., : 2 * num_pairs].to(compute), order.interleaved_in)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = _members(out[..., : 2 * num_pairs], order.interleaved_out)
    # Subtraction of a product, as in q * cos + rotate_half(q) * sin: equal to stock to the last bit.
    if conjugate:
        out_first.copy_(first * cos + second * sin)
        out_second.copy_(second * cos - first * sin)
    else:
        out_first.copy_(first * cos - second * sin)
        out_second.copy_(second * cos + first * sin)
    out[..., 2 * num_pairs :] = x[..., 2 * num_pairs :]
    return out


def _members(rotated: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first and of the second members of all pairs."""
    if interleaved:
        return rotated[..., 0::2], rotated[..., 1::2]
    half = rotated.shape[-1] // 2
    return rotated[..., :half], rotated[..., half:]


NOWHERE = -(2**63)
"""Position of a token that is in no sequence; all others are within int32."""


def token_positions(angles: Angles, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Position of every token, as :class:`Angles` defines it.

    Returns:
        ``[B or 1, S]`` int64; :data:`NOWHERE` for tokens outside the bounds.
    """
    if angles.positions is not None:
        return angles.positions.to(torch.int64)
    index = torch.arange(length, device=device)[None]
    sequence = torch.arange(batch, device=device)[:, None]
    inside = None
    if angles.cu_seqlens is not None:
        starts = angles.cu_seqlens[:-1].to(torch.int64)
        sequence = torch.searchsorted(starts, index, right=True) - 1
        inside = (sequence >= 0) & (index < angles.cu_seqlens[-1])
        sequence = sequence.clamp_min(0)
        index = index - starts[sequence]
    if angles.seqlen_offsets is not None:
        index = index + angles.seqlen_offsets.to(torch.int64)[sequence]
    index = index + angles.offset
    return index if inside is None else torch.where(inside, index, NOWHERE)


def token_tables(angles: Angles, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """cos and sin ``[B or 1, S, R/2]`` of the tokens of ``q``, and which tokens are rotated (None: all)."""
    batch, length = q.shape[:2]
    at = token_positions(angles, batch, length, q.device)
    known = at != NOWHERE if angles.cu_seqlens is not None else None
    if angles.inv_freq_q64 is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return *fixed_point.tables(angles.inv_freq_q64, at, angles.scaling, dtype), known
    cos, sin = present(angles.cos), present(angles.sin)
    rows, start = cos.shape[1], angles.offset
    by_index = all(x is None for x in (angles.positions, angles.cu_seqlens, angles.seqlen_offsets))
    if by_index and 0 <= start <= rows - length:
        return cos[:, start : start + length], sin[:, start : start + length], known
    known = (at >= 0) & (at < rows)
    if rows == 0:
        cos, sin = (t.new_zeros(t.shape[0], 1, t.shape[2]) for t in (cos, sin))
    entry = torch.arange(cos.shape[0], device=q.device)[:, None] if cos.shape[0] > 1 else 0
    row = at.clamp(0, max(rows - 1, 0))
    return cos[entry, row], sin[entry, row], known


def with_tables(angles: Angles, q: torch.Tensor) -> Angles:
    """``angles`` of positions with several axes as tables of the tokens of ``q``, for kernels that know one axis."""
    if angles.inv_freq_q64 is None or angles.inv_freq_q64.ndim == 2:
        return angles
    cos, sin, _ = token_tables(angles, q)
    return angles._replace(cos=cos, sin=sin, inv_freq_q64=None, positions=None, scaling=1.0)


def rotate_tokens(
    q: torch.Tensor,
    k: torch.Tensor | None,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate ``q`` ``[B, S, Hq, D]`` and ``k`` ``[B, S, Hk, D]`` (or None) by the angles of their tokens.

    Args:
        q_bias, k_bias: ``[heads * D]``, added before the rotation; 16-bit sums are not rounded between.

    Returns:
        New contiguous tensors; None for ``k`` None.
    """
    cos, sin, known = token_tables(angles, q)
    order = {name: getattr(angles, name) for name in ("interleaved", "deinterleave", "conjugate")}

    def rotated(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = x if bias is None else add_bias(x, bias)
        out = rotate(wide, cos, sin, **order)
        if known is not None:
            out = torch.where(known[:, :, None, None], out, wide).contiguous()
        return out.to(x.dtype)

    return rotated(q, q_bias), rotated(k, k_bias) if k is not None else None


def add_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, S, H, D]`` with ``bias`` ``[H * D]`` added, in the type that the rotation computes in."""
    compute = compute_dtype(x)
    return x.to(compute) + bias.to(compute).unflatten(0, x.shape[2:])


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """16-bit tensors are computed in float32, others in their own type."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def qkv_rotary(
    x: torch.Tensor, projections: Projections, angles: Angles
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Project ``x`` ``[B, S, K]`` and rotate queries and keys, rounding once.

    Returns:
        ``[B, S, heads, head_dim]`` each; None for values that are left out.
    """
    compute = compute_dtype(x)
    heads = []
    for weight, bias in projections.pairs():
        bias = bias.to(compute) if bias is not None else None
        y = torch.nn.functional.linear(x.to(compute), weight.to(compute), bias)
        heads.append(y.unflatten(-1, (weight.shape[0] // projections.head_dim, projections.head_dim)))
    q, k = rotate_tokens(heads[0], heads[1], angles)
    return q.to(x.dtype), present(k).to(x.dtype), heads[2].to(x.dtype) if len(heads) == 3 else None
