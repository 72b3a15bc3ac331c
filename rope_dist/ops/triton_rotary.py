"""Rotary embedding alone: queries and keys (and a copied value) in one launch, in place or not.

One program takes one token and goes over its heads in chunks that give every thread exactly one 16-byte
access a half: with a narrower chunk the compiler falls back to 8 or 2 bytes. Cosine and sine are made or
loaded once a token and serve every head. Offsets are 64-bit: heads of a million tokens lie 2^27 elements
apart.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_launch
from .arguments import Angles
from .backend import Launch
from .triton_angles import rotate, token_cos_sin, token_position
from .triton_launch import position_strides, row_strides

# Between interleaved pairs and halves: a thread whose 16 bytes of each half are the members of V pairs holds the 2 V
# neighbours that they are, in two accesses of 16 bytes. So no element goes from one thread to another. All first
# accesses come before all second ones, so that a thread's registers are in the order of its pairs.


@triton.jit
def _neighbours(
    start, V: tl.constexpr, HEADS: tl.constexpr, NUM_PAIRS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Head, column and mask of the neighbours, ``[2 * CHUNK, WIDTH]``."""
    row = tl.arange(0, 2 * CHUNK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    head = start + row % CHUNK
    column = column // V * (2 * V) + row // CHUNK * V + column % V
    return head, column, (head < HEADS) & (column < 2 * NUM_PAIRS)


@triton.jit
def _load_pairs(
    x, bias, start, stride_h, stride_d, BIAS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, NUM_PAIRS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """First and second members ``[CHUNK, WIDTH]`` of interleaved pairs, float32."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    V: tl.constexpr = VECTOR if VECTOR < WIDTH else WIDTH
    head, column, mask = _neighbours(start, V, HEADS, NUM_PAIRS, CHUNK, WIDTH)
    pairs = tl.load(x + head.to(tl.int64) * stride_h + column.to(tl.int64) * stride_d, mask=mask).to(
        tl.float32
    )
    if BIAS:
        pairs += tl.load(bias + head * HEAD_DIM + column, mask=mask).to(tl.float32)
    first, second = tl.split(tl.reshape(pairs, (2, CHUNK, WIDTH // V, V // 2, 2)))
    first = tl.reshape(tl.permute(first, (1, 2, 0, 3)), (CHUNK, WIDTH))
    second = tl.reshape(tl.permute(second, (1, 2, 0, 3)), (CHUNK, WIDTH))
    return first, second


@triton.jit
def _store_pairs(
    out, first, second, start, out_h, out_d,
    HEADS: tl.constexpr, NUM_PAIRS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store first and second members ``[CHUNK, WIDTH]`` as interleaved pairs."""
    VECTOR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    V: tl.constexpr = VECTOR if VECTOR < WIDTH else WIDTH
    head, column, mask = _neighbours(start, V, HEADS, NUM_PAIRS, CHUNK, WIDTH)
    first = tl.permute(tl.reshape(first, (CHUNK, WIDTH // V, 2, V // 2)), (2, 0, 1, 3))
    second = tl.permute(tl.reshape(second, (CHUNK, WIDTH // V, 2, V // 2)), (2, 0, 1, 3))
    pairs = tl.reshape(tl.join(first, second), (2 * CHUNK, WIDTH)).to(out.dtype.element_ty)
    tl.store(out + head.to(tl.int64) * out_h + column.to(tl.int64) * out_d, pairs, mask=mask)


@triton.jit
def _heads(
    x, out, bias, batch, seq, cos, sin,
    stride_b, stride_s, stride_h, stride_d, out_b, out_s, out_h, out_d,
    BIAS: tl.constexpr, HEADS: tl.constexpr, NUM_PAIRS: tl.constexpr, TAIL: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, TAIL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rotate ``HEADS`` heads of a token; strides are in units of ``VEC`` but for the last axis's.

    ``IN`` and ``OUT``: whether pairs are interleaved where they are read and where they are written.
    """
    x += (batch * stride_b + seq * stride_s) * VEC
    out += (batch * out_b + seq * out_s) * VEC
    stride_h = tl.cast(stride_h, tl.int64) * VEC
    out_h = tl.cast(out_h, tl.int64) * VEC
    column = tl.arange(0, WIDTH)[None, :]
    wide = column.to(tl.int64)
    for start in range(0, HEADS, CHUNK):
        head = start + tl.arange(0, CHUNK)[:, None]
        known = head < HEADS
        source = x + head.to(tl.int64) * stride_h
        target = out + head.to(tl.int64) * out_h
        added = bias + head * HEAD_DIM if BIAS else x
        if NUM_PAIRS > 0:
            if IN and OUT:
                mask = known & (column < 2 * NUM_PAIRS)
                pair = tl.load(source + wide * stride_d, mask=mask).to(tl.float32)
                if BIAS:
                    pair += tl.load(added + column, mask=mask).to(tl.float32)
                first, second = tl.split(tl.reshape(pair, (CHUNK, WIDTH // 2, 2)))
                first, second = rotate(first, second, cos[None, :], sin[None, :])
                pair = tl.reshape(tl.join(first, second), (CHUNK, WIDTH))
                tl.store(target + wide * out_d, pair.to(out.dtype.element_ty), mask=mask)
            else:
                mask = known & (column < NUM_PAIRS)
                if IN:
                    first, second = _load_pairs(
                        x,
                        bias,
                        start,
                        stride_h,
                        stride_d,
                        BIAS,
                        HEAD_DIM,
                        HEADS,
                        NUM_PAIRS,
                        CHUNK,
                        WIDTH,
                    )
                else:
                    first = tl.load(source + wide * stride_d, mask=mask).to(tl.float32)
                    if BIAS:
                        first += tl.load(added + column, mask=mask).to(tl.float32)
                    second = tl.load(source + (wide + NUM_PAIRS) * stride_d, mask=mask).to(tl.float32)
                    if BIAS:
                        second += tl.load(added + column + NUM_PAIRS, mask=mask).to(tl.float32)
                first, second = rotate(first, second, cos[None, :], sin[None, :])
                if OUT:
                    _store_pairs(out, first, second, start, out_h, out_d, HEADS, NUM_PAIRS, CHUNK, WIDTH)
                else:
                    tl.store(target + wide * out_d, first.to(out.dtype.element_ty), mask=mask)
                    tl.store(target + (wide + NUM_PAIRS) * out_d, second.to(out.dtype.element_ty), mask=mask)
        if TAIL > 0:
            rest = 2 * NUM_PAIRS + tl.arange(0, TAIL_WIDTH)[None, :]
            mask = known & (rest < 2 * NUM_PAIRS + TAIL)
            value = tl.load(source + rest.to(tl.int64) * stride_d, mask=mask)
            if BIAS:
                value = value.to(tl.float32) + tl.load(added + rest, mask=mask).to(tl.float32)
            tl.store(target + rest.to(tl.int64) * out_d, value.to(out.dtype.element_ty), mask=mask)


# An offset that is a multiple of 16 one day and not the next would be compiled twice.
@triton.jit(do_not_specialize=["offset"])
def rotary_kernel(
    q, k, v, q_out, k_out, v_out, q_bias, k_bias,
    cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    length, sequences, offset, table_rows, scaling,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d,
    qo_b, qo_s, qo_h, qo_d, ko_b, ko_s, ko_h, ko_d, vo_b, vo_s, vo_h, vo_d,
    cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr,
    NUM_PAIRS: tl.constexpr, TAIL: tl.constexpr, HEAD_DIM: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, CONJUGATE: tl.constexpr, TABLE: tl.constexpr,
    AXES: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    TAIL_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Grid: one program a token, ``batch * length + seq``; shapes are in :func:`launch`."""
    token = tl.program_id(0)
    batch = (token // length).to(tl.int64)
    seq = (token % length).to(tl.int64)

    position, known_token = token_position(
        batch, seq, positions, cu_seqlens, seqlen_offsets, sequences, offset, pos_b, pos_s,
        HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
    )  # fmt: skip
    cos, sin, known_token = token_cos_sin(
        batch, position, known_token, cos_table, sin_table, inv_freq_q64, table_rows, scaling,
        cos_b, cos_s, sin_b, sin_s, NUM_PAIRS, WIDTH // 2 if IN and OUT else WIDTH, CONJUGATE, TABLE,
        AXES, positions + batch * pos_b + seq * pos_s if AXES > 1 else None, next_axis,
    )  # fmt: skip

    # Turned by nothing, an infinity would still make its partner NaN: what is not rotated is copied.
    if known_token:
        _heads(q, q_out, q_bias, batch, seq, cos, sin, q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, qo_d,
               Q_BIAS, Q_HEADS, NUM_PAIRS, TAIL, IN, OUT, VEC, CHUNK, WIDTH, TAIL_WIDTH, HEAD_DIM)  # fmt: skip
        if K_HEADS > 0:
            _heads(k, k_out, k_bias, batch, seq, cos, sin, k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, ko_d,
                   K_BIAS, K_HEADS, NUM_PAIRS, TAIL, IN, OUT, VEC, CHUNK, WIDTH, TAIL_WIDTH, HEAD_DIM)  # fmt: skip
    else:
        _heads(q, q_out, q_bias, batch, seq, cos, sin, q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, qo_d,
               Q_BIAS, Q_HEADS, 0, HEAD_DIM, IN, OUT, VEC, CHUNK, WIDTH, V_WIDTH, HEAD_DIM)  # fmt: skip
        if K_HEADS > 0:
            _heads(k, k_out, k_bias, batch, seq, cos, sin, k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, ko_d,
                   K_BIAS, K_HEADS, 0, HEAD_DIM, IN, OUT, VEC, CHUNK, WIDTH, V_WIDTH, HEAD_DIM)  # fmt: skip
    if V_HEADS > 0:
        _heads(v, v_out, v, batch, seq, cos, sin, v_b, v_s, v_h, v_d, vo_b, vo_s, vo_h, vo_d,
               False, V_HEADS, 0, HEAD_DIM, IN, OUT, VEC, CHUNK, WIDTH, V_WIDTH, HEAD_DIM)  # fmt: skip


def blocks(most_heads: int, num_pairs: int, interleaved: bool, itemsize: int) -> dict[str, int]:
    """Heads a chunk, their width and the warps, so that each thread holds 16 bytes of a chunk.

    Args:
        most_heads: heads of the tensor that has most.
        num_pairs: rotated pairs a head.
        interleaved: pairs are adjacent where they are read and where they are written, so that one access holds
            both members.
        itemsize: bytes an element.
    """
    vector = 16 // itemsize
    width = triton.next_power_of_2(2 * max(num_pairs, 1) if interleaved else max(num_pairs, 2))
    # At least two heads for each element of a vector, masked where there are fewer: the chunk then has more
    # threads than a row of angles has elements, and the compiler loads those where they are used. With
    # fewer it passes them through shared memory.
    chunk = max(2 * vector, min(triton.next_power_of_2(most_heads), 4 * 32 * vector // width))
    return {"CHUNK": chunk, "WIDTH": width, "num_warps": min(8, max(1, chunk * width // (32 * vector)))}


def launch(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> Launch | None:
    """As :meth:`Backend.rotate` for float16, bfloat16 and float32, and copy ``v`` into ``v_out``."""
    batch, length, _, head_dim = q.shape
    tokens = batch * length
    num_pairs = angles.num_pairs
    heads = [x.shape[2] if x is not None else 0 for x in (q, k, v)]
    if tokens == 0 or max(heads) == 0 or head_dim == 0:
        return None
    vec = triton_launch.common_vector(q, k, v, q_out, k_out, v_out)
    every = [triton_launch.head_strides(x, vec) for x in (q, k, v, q_out, k_out, v_out)]
    # What is not rotated stays where it is, unless a bias is added to it.
    biased = q_bias is not None or k_bias is not None
    tail = 0 if q_out is q and not biased else head_dim - 2 * num_pairs
    whole_biases = [bias.contiguous() if bias is not None else None for bias in (q_bias, k_bias)]
    cos, cu_seqlens = angles.cos, angles.cu_seqlens
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    numbers = (
        cos.shape[1] if cos is not None else 0, angles.scaling,
        *itertools.chain(*every), *row_strides(cos), *row_strides(angles.sin), *position_strides(angles.positions),
    )  # fmt: skip
    read, written = angles.interleaved_in, angles.interleaved_out
    options = {
        "Q_BIAS": q_bias is not None, "K_BIAS": k_bias is not None,
        "Q_HEADS": heads[0], "K_HEADS": heads[1], "V_HEADS": heads[2],
        "NUM_PAIRS": num_pairs, "TAIL": tail, "HEAD_DIM": head_dim,
        "IN": read, "OUT": written, "CONJUGATE": angles.conjugate, "TABLE": cos is not None,
        "AXES": angles.axes, "HAS_POSITIONS": angles.positions is not None, "HAS_CU_SEQLENS": cu_seqlens is not None,
        "HAS_OFFSETS": angles.seqlen_offsets is not None, "VEC": vec,
        "TAIL_WIDTH": triton.next_power_of_2(max(tail, 1)), "V_WIDTH": triton.next_power_of_2(head_dim),
        "SEQUENCES": 128, **blocks(max(heads), num_pairs, read and written, q.element_size()),
    }  # fmt: skip

    def pack(q, k, q_out, k_out, angles, q_bias=None, k_bias=None, v=None, v_out=None) -> tuple[Any, ...]:
        heads = (q, k, v, q_out, k_out, v_out, q_bias, k_bias)
        return *heads, *angles[:6], length, sequences, angles.offset, *numbers

    tensors = (q, k, q_out, k_out, angles, *whole_biases, v, v_out)
    again = triton_launch.launch(rotary_kernel, tokens, q.device, pack, tensors, options)
    return again if whole_biases[0] is q_bias and whole_biases[1] is k_bias else None
