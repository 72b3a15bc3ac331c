"""The definition of the rotation, in plain PyTorch. Every backend is tested against this file.

Half-split pairs (``interleaved=False``, Hugging Face) join dimension ``i`` with ``i + R/2`` of the
``R`` rotated dimensions; interleaved pairs (GPT-J) join ``2i`` with ``2i + 1``. Dimensions past ``R``
pass through.
"""

from __future__ import annotations

import torch

from . import angles


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
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, inverse: bool = False
) -> torch.Tensor:
    """Rotate the pairs of ``x`` by the angles of the tables.

    16-bit inputs are rotated in float32 and rounded once; float32 and float64 in their own type.

    Args:
        x: ``[B, S, H, D]``, any strides.
        cos, sin: ``[B or 1, S, R/2]``, ``R <= D``.
        interleaved: which dimensions make a pair.
        inverse: rotate by the negative angles (the transpose, which is the gradient of the rotation).

    Returns:
        ``[B, S, H, D]`` contiguous, in the dtype of ``x``.
    """
    compute = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    cos = cos[:, :, None, :].to(compute)
    sin = sin[:, :, None, :].to(compute)
    half = cos.shape[-1]
    rotated = x[..., : 2 * half].to(compute)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if interleaved:
        out_first, out_second = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
    else:
        out_first, out_second = out[..., :half], out[..., half : 2 * half]
    # Subtraction of a product, as in q * cos + rotate_half(q) * sin: equal to stock to the last bit.
    if inverse:
        out_first.copy_(first * cos + second * sin)
        out_second.copy_(second * cos - first * sin)
    else:
        out_first.copy_(first * cos - second * sin)
        out_second.copy_(second * cos + first * sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rotate` of queries ``[B, S, Hq, D]`` and keys ``[B, S, Hk, D]`` by one pair of tables."""
    return (
        rotate(q, cos, sin, interleaved=interleaved, inverse=inverse),
        rotate(k, cos, sin, interleaved=interleaved, inverse=inverse),
    )


NOWHERE = -(2**63)
"""Position of a token that is in no sequence; all others are within int32."""


def token_positions(
    batch: int,
    length: int,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offsets: torch.Tensor | None,
    offset: int,
    device: torch.device,
) -> torch.Tensor:
    """Position of every token: as given, or its index in its own sequence plus that sequence's offset.

    Args:
        positions: ``[B or 1, S]`` integers; the other arguments are then not used.
        cu_seqlens: ``[sequences + 1]`` bounds of packed sequences in the one row of the batch.
        offsets: ``[sequences]`` (``[B]`` without ``cu_seqlens``).
        offset: added to every position.

    Returns:
        ``[B or 1, S]`` int64; :data:`NOWHERE` for tokens outside the bounds.
    """
    if positions is not None:
        return positions.to(torch.int64)
    index = torch.arange(length, device=device)[None]
    sequence = torch.arange(batch, device=device)[:, None]
    inside = None
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].to(torch.int64)
        sequence = torch.searchsorted(starts, index, right=True) - 1
        inside = (sequence >= 0) & (index < cu_seqlens[-1])
        sequence = sequence.clamp_min(0)
        index = index - starts[sequence]
    if offsets is not None:
        index = index + offsets.to(torch.int64)[sequence]
    index = index + offset
    return index if inside is None else torch.where(inside, index, NOWHERE)


def rotate_tokens(
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
    """Rotate ``q`` ``[B, S, Hq, D]`` and ``k`` ``[B, S, Hk, D]`` (or None) by the positions of their tokens.

    Args:
        cos, sin: tables ``[B or 1, rows, R/2]``; a token's row is its position, and a token whose position
            is not in the table is not rotated.
        words: instead, frequencies ``[2, R/2]`` from :func:`rope_dist.ops.turns`, with ``scaling``.
        positions, cu_seqlens, offsets, offset: see :func:`token_positions`; a token in no sequence is not rotated.
        q_bias, k_bias: ``[heads * D]``, added before the rotation; 16-bit sums are not rounded between.

    Returns:
        New contiguous tensors; for ``k`` None an empty one.
    """
    at = token_positions(q.shape[0], q.shape[1], positions, cu_seqlens, offsets, offset, q.device)
    known = at != NOWHERE if cu_seqlens is not None else None
    if words is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        cos, sin = angles.tables(words, at, scaling, dtype)
    elif (
        cu_seqlens is None
        and offsets is None
        and positions is None
        and 0 <= offset <= cos.shape[1] - q.shape[1]
    ):
        cos, sin = (t[:, offset : offset + q.shape[1]] for t in (cos, sin))
    else:
        rows = cos.shape[1]
        known = (at >= 0) & (at < rows)
        if rows == 0:
            cos, sin = (t.new_zeros(t.shape[0], 1, t.shape[2]) for t in (cos, sin))
        entry = torch.arange(cos.shape[0], device=q.device)[:, None] if cos.shape[0] > 1 else 0
        row = at.clamp(0, max(rows - 1, 0))
        cos, sin = cos[entry, row], sin[entry, row]

    def turned(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = x if bias is None else _add_bias(x, bias)
        out = rotate(wide, cos, sin, interleaved=interleaved, inverse=inverse)
        if known is not None:
            out = torch.where(known[:, :, None, None], out, wide).contiguous()
        return out.to(x.dtype)

    return turned(q, q_bias), turned(k, k_bias) if k is not None else q.new_empty(0)


def _add_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, S, H, D]`` with ``bias`` ``[H * D]`` added, in the type that the rotation computes in."""
    compute = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    return x.to(compute) + bias.to(compute).unflatten(0, x.shape[2:])


def qkv_rotary(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    b_q: torch.Tensor | None,
    b_k: torch.Tensor | None,
    b_v: torch.Tensor | None,
    head_dim: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project ``x`` ``[B, S, K]`` by ``[N, K]`` weights and rotate queries and keys, rounding once.

    16-bit inputs are projected and rotated in float32.

    Returns:
        ``[B, S, N / head_dim, head_dim]`` each; for ``w_v`` None an empty third.
    """
    compute = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32

    def project(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = bias.to(compute) if bias is not None else None
        y = torch.nn.functional.linear(x.to(compute), weight.to(compute), bias)
        return y.unflatten(-1, (weight.shape[0] // head_dim, head_dim))

    q, k = rotate_tokens(
        project(w_q, b_q),
        project(w_k, b_k),
        cos,
        sin,
        words,
        positions,
        scaling=scaling,
        interleaved=interleaved,
    )
    v = project(w_v, b_v) if w_v is not None else x.new_empty(0)
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


def pack_inverse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """``q`` and ``k`` ``[B, S, heads, D]`` rotated back, with ``v``, side by side in ``[B, S, all heads * D]``."""
    q, k = rotate_tokens(
        q, k, cos, sin, words, positions, scaling=scaling, interleaved=interleaved, inverse=True
    )
    return torch.cat([x.flatten(-2) for x in (q, k, v) if x is not None], dim=-1)


def write_cache(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write token ``i`` of ``k`` and ``v`` ``[T, H, D]`` to entry ``slots[i]`` of the caches ``[entries, H, D]``.

    A negative slot is not written. Without waiting for the device: such a token rewrites what is there.
    """
    if k_cache.shape[0] == 0:
        return
    slots = slots.to(torch.int64)
    for new, cache in ((k, k_cache), (v, v_cache)):
        for token in range(new.shape[0]):
            entry = slots[token : token + 1]
            at = entry.clamp_min(0)
            cache.index_copy_(
                0, at, torch.where((entry >= 0)[:, None, None], new[token : token + 1], cache[at])
            )
