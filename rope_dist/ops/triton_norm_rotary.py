"""RMS norm and rotary embedding in one pass: queries and keys in one launch, in place or not.

As in ``triton_rotary.py`` one program takes one token, and every thread 16 bytes of each half of a chunk of heads. The
norm needs no second look at them: of one head it is a sum over a few threads of a warp, of all heads together over the
single chunk that they then are. Dimensions that are not rotated are taken in pairs too: whatever is rotated of it, a
head is two blocks of one layout.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_launch
from .arguments import Angles, Norms, is_joint
from .backend import Launch
from .triton_angles import rotate, token_cos_sin, token_position
from .triton_launch import position_strides, row_strides
from .triton_rotary import blocks


@triton.jit
def _columns(HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """First and second dimension of every pair ``[1, WIDTH]``: of halves, then of those that are not rotated."""
    pair = tl.arange(0, WIDTH)[None, :]
    if 2 * NUM_PAIRS == HEAD_DIM:
        return pair, pair + NUM_PAIRS
    is_rotary = pair < NUM_PAIRS
    return (
        tl.where(is_rotary, pair, pair + NUM_PAIRS),
        tl.where(is_rotary, pair + NUM_PAIRS, pair + HEAD_DIM // 2),
    )


@triton.jit
def load_heads(
    x, head, stride_h, stride_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """First and second members ``[rows of head, WIDTH]`` of the pairs of heads, float32; zero where there is none."""
    x += head.to(tl.int64) * stride_h
    known = head < HEADS
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        mask = known & (column < HEAD_DIM)
        pairs = tl.load(x + column.to(tl.int64) * stride_d, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (head.shape[0], WIDTH, 2)))
    else:
        first_column, second_column = _columns(HEAD_DIM, NUM_PAIRS, WIDTH)
        mask = known & (tl.arange(0, WIDTH)[None, :] < HEAD_DIM // 2)
        first = tl.load(x + first_column.to(tl.int64) * stride_d, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + second_column.to(tl.int64) * stride_d, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_heads(
    out, first, second, head, stride_h, stride_d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store what :func:`load_heads` loads."""
    out += head.to(tl.int64) * stride_h
    known = head < HEADS
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        pairs = tl.reshape(tl.join(first, second), (head.shape[0], 2 * WIDTH))
        mask = known & (column < HEAD_DIM)
        tl.store(out + column.to(tl.int64) * stride_d, pairs.to(out.dtype.element_ty), mask=mask)
    else:
        first_column, second_column = _columns(HEAD_DIM, NUM_PAIRS, WIDTH)
        mask = known & (tl.arange(0, WIDTH)[None, :] < HEAD_DIM // 2)
        tl.store(out + first_column.to(tl.int64) * stride_d, first.to(out.dtype.element_ty), mask=mask)
        tl.store(out + second_column.to(tl.int64) * stride_d, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(
    weight, head, offset,
    JOINT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The weights of the members of the pairs of ``head``, float32: of one row where all heads share them."""
    if JOINT:
        first, second = load_heads(weight, head, HEAD_DIM, 1, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH)
    else:
        row = tl.arange(0, 1)[:, None]
        first, second = load_heads(weight, row, HEAD_DIM, 1, 1, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH)
    return first + offset, second + offset


@triton.jit
def token_angles(
    batch, seq, cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    sequences, offset, table_rows, scaling, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    NUM_PAIRS: tl.constexpr, WIDTH: tl.constexpr, CONJUGATE: tl.constexpr, TABLE: tl.constexpr,
    AXES: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """cos and sin ``[WIDTH]`` of a token's pairs, and which of them are rotated ``[1, WIDTH]``."""
    position, known = token_position(
        batch, seq, positions, cu_seqlens, seqlen_offsets, sequences, offset, pos_b, pos_s,
        HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
    )  # fmt: skip
    cos, sin, known = token_cos_sin(
        batch, position, known, cos_table, sin_table, inv_freq_q64, table_rows, scaling,
        cos_b, cos_s, sin_b, sin_s, NUM_PAIRS, WIDTH, CONJUGATE, TABLE,
        AXES, positions + batch * pos_b + seq * pos_s if AXES > 1 else None, next_axis,
    )  # fmt: skip
    return cos, sin, known & (tl.arange(0, WIDTH)[None, :] < NUM_PAIRS)


@triton.jit
def turn(first, second, cos, sin, is_rotary):
    """The pairs rotated by their angles, and as they are where ``is_rotary`` is not set.

    Selected of the results: turned by nothing, an infinity would still make its partner NaN.
    """
    turned_first, turned_second = rotate(first, second, cos[None, :], sin[None, :])
    return tl.where(is_rotary, turned_first, first), tl.where(is_rotary, turned_second, second)


@triton.jit
def _heads(
    x, out, bias, weight, rstds, token, batch, seq, cos, sin, is_rotary, eps, weight_offset,
    stride_b, stride_s, stride_h, stride_d, out_b, out_s, out_h, out_d,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, JOINT: tl.constexpr, AFTER: tl.constexpr, SAVE: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate ``HEADS`` heads of a token; strides as of :func:`triton_launch.head_strides`."""
    x += (batch * stride_b + seq * stride_s) * VEC
    out += (batch * out_b + seq * out_s) * VEC
    stride_h = tl.cast(stride_h, tl.int64) * VEC
    out_h = tl.cast(out_h, tl.int64) * VEC
    for start in range(0, HEADS, CHUNK):
        index = start + tl.arange(0, CHUNK)
        head = index[:, None]
        first, second = load_heads(
            x, head, stride_h, stride_d, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
        )
        if BIAS:
            first_bias, second_bias = load_heads(
                bias, head, HEAD_DIM, 1, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
            )
            first += first_bias
            second += second_bias
        if AFTER:
            first, second = turn(first, second, cos, sin, is_rotary)
        squares = tl.sum(first * first + second * second, axis=1)
        if JOINT:
            tl.static_assert(CHUNK >= HEADS)
            rstd = tl.rsqrt(tl.sum(squares, axis=0) * (1.0 / (HEADS * HEAD_DIM)) + eps)
            if SAVE:
                tl.store(rstds + token, rstd)
        else:
            each = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)
            if SAVE:
                tl.store(rstds + token * HEADS + index, each, mask=index < HEADS)
            rstd = each[:, None]
        first *= rstd
        second *= rstd
        if WEIGHT:
            first_weight, second_weight = load_weight(
                weight, head, weight_offset, JOINT, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
            )
            first *= first_weight
            second *= second_weight
        if not AFTER:
            first, second = turn(first, second, cos, sin, is_rotary)
        store_heads(out, first, second, head, out_h, out_d, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH)


# An offset that is a multiple of 16 one day and not the next would be compiled twice.
@triton.jit(do_not_specialize=["offset"])
def norm_rotary_kernel(
    q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, q_rstd, k_rstd,
    cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    length, sequences, offset, table_rows, scaling, eps, weight_offset,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, qo_b, qo_s, qo_h, qo_d, ko_b, ko_s, ko_h, ko_d,
    cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr,
    Q_JOINT: tl.constexpr, K_JOINT: tl.constexpr, AFTER: tl.constexpr, SAVE: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, TABLE: tl.constexpr, AXES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr, SEQUENCES: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: one program a token, ``batch * length + seq``; shapes are in :func:`launch`."""
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    seq = token % length
    cos, sin, is_rotary = token_angles(
        batch, seq, cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
        sequences, offset, table_rows, scaling, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
        NUM_PAIRS, WIDTH, CONJUGATE, TABLE, AXES, HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
    )  # fmt: skip
    _heads(q, q_out, q_bias, q_weight, q_rstd, token, batch, seq, cos, sin, is_rotary, eps, weight_offset,
           q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, qo_d, Q_BIAS, Q_WEIGHT, Q_JOINT, AFTER, SAVE,
           Q_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, VEC, CHUNK, WIDTH)  # fmt: skip
    if K_HEADS > 0:
        _heads(k, k_out, k_bias, k_weight, k_rstd, token, batch, seq, cos, sin, is_rotary, eps, weight_offset,
               k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, ko_d, K_BIAS, K_WEIGHT, K_JOINT, AFTER, SAVE,
               K_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, VEC, CHUNK, WIDTH)  # fmt: skip


def chunk(q: torch.Tensor, k: torch.Tensor | None, norms: Norms, interleaved: bool) -> dict[str, int]:
    """As :func:`triton_rotary.blocks`, with a chunk of all heads where they are normalised together."""
    pairs = [(x, weight) for x, weight in zip((q, k), norms.weights(), strict=True) if x is not None]
    itemsize, head_dim = q.element_size(), q.shape[3]
    found = blocks(max(x.shape[2] for x, _ in pairs), head_dim // 2, interleaved, itemsize)
    width = found["WIDTH"] // 2 if interleaved else found["WIDTH"]
    together = [triton.next_power_of_2(x.shape[2]) for x, weight in pairs if is_joint(weight, x)]
    if together and max(together) > found["CHUNK"]:
        rows = max(together)
        warps = min(16, max(found["num_warps"], 2 * rows * width // (32 * 16)))
        return {"CHUNK": rows, "WIDTH": width, "num_warps": warps}
    return {**found, "WIDTH": width}


def constants(
    q: torch.Tensor, k: torch.Tensor | None, norms: Norms, angles: Angles, q_bias, k_bias
) -> dict[str, Any]:
    """Constants of the compilation that the forward and the backward kernel share."""
    return {
        "Q_BIAS": q_bias is not None, "K_BIAS": k_bias is not None,
        "Q_WEIGHT": norms.q_weight is not None, "K_WEIGHT": norms.k_weight is not None,
        "Q_JOINT": is_joint(norms.q_weight, q), "K_JOINT": k is not None and is_joint(norms.k_weight, k),
        "AFTER": norms.norm_after, "Q_HEADS": q.shape[2], "K_HEADS": k.shape[2] if k is not None else 0,
        "HEAD_DIM": q.shape[3], "NUM_PAIRS": angles.num_pairs, "INTERLEAVED": angles.interleaved,
        "CONJUGATE": angles.conjugate, "TABLE": angles.cos is not None, "AXES": angles.axes,
        "HAS_POSITIONS": angles.positions is not None, "HAS_CU_SEQLENS": angles.cu_seqlens is not None,
        "HAS_OFFSETS": angles.seqlen_offsets is not None, "SEQUENCES": 128,
        **chunk(q, k, norms, angles.interleaved),
    }  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    rstds: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Launch | None:
    """As :meth:`Backend.norm_rotate` for float16, bfloat16 and float32 and an even ``D``."""
    batch, length = q.shape[:2]
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return None
    vec = triton_launch.common_vector(q, k, q_out, k_out)
    strides = [stride for x in (q, k, q_out, k_out) for stride in triton_launch.head_strides(x, vec)]
    cos, cu_seqlens = angles.cos, angles.cu_seqlens
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    numbers = (
        cos.shape[1] if cos is not None else 0, angles.scaling, norms.eps, norms.weight_offset,
        *strides, *row_strides(cos), *row_strides(angles.sin), *position_strides(angles.positions),
    )  # fmt: skip
    options = {
        **constants(q, k, norms, angles, q_bias, k_bias), "SAVE": rstds is not None, "VEC": vec
    }  # fmt: skip

    def pack(
        q, k, q_out, k_out, norms, angles, q_bias=None, k_bias=None, rstds=(None, None)
    ) -> tuple[Any, ...]:
        heads = (q, k, q_out, k_out, *norms[:2], q_bias, k_bias, *rstds)
        return *heads, *angles[:6], length, sequences, angles.offset, *numbers

    given = (*norms.weights(), q_bias, k_bias)
    whole = [x.contiguous() if x is not None else None for x in given]
    tensors = (q, k, q_out, k_out, norms._replace(q_weight=whole[0], k_weight=whole[1]), angles, *whole[2:])
    again = triton_launch.launch(
        norm_rotary_kernel, batch * length, q.device, pack, (*tensors, rstds or (None, None)), options
    )
    return again if rstds is None and all(a is b for a, b in zip(whole, given, strict=True)) else None
