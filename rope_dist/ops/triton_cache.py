"""Rotary with the key/value cache write: queries, keys and values of any number of tokens in one launch.

As in ``triton_rotary.py`` one program takes one token: it finds the token's entry, makes its angles once, and goes
over its heads in chunks that give every thread 16 bytes a half to read, and as many to write (8 where they are stored
in 8 bits). RMS norms are sums within a row of a chunk, which the threads of a warp have; the norm of all heads
together reads them twice, the second time from a cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_launch
from .arguments import Angles, KeyValueCache, Norms, is_joint
from .backend import Launch
from .triton_angles import angle, rotate, token_cos_sin, token_place, token_position
from .triton_launch import architecture, position_strides, row_strides
from .triton_rotary import blocks

# How float8_e4m3fn is made of float32: not at all, by the GPU's instruction, or from the bits.
PLAIN, INSTRUCTION, BITS = 0, 1, 2
# What a value is divided by before: nothing or a number, a tensor of one, or a tensor of one a head.
NUMBER, ONE, EACH = 0, 1, 2
# What is normalised: nothing, each head by itself, or all heads together.
NO_NORM, HEAD, JOINT = 0, 1, 2


@triton.jit
def to_e4m3(x):
    """The bits, uint8, of float32 ``x`` of at most 448 in float8_e4m3fn, rounded to the nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of 23 are kept; exponents count from 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are 2^-9 apart, as those of float32 are at 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    e4m3 = tl.where(size < 0x3C800000, small, normal)
    e4m3 = tl.where(size > 0x7F800000, 0x7F, e4m3)
    return (e4m3 | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _stored(x, factor, out, FP8: tl.constexpr):
    """``x`` times ``factor`` as ``out`` stores it: see :data:`PLAIN`, for which the factor is left out."""
    if FP8 > 0:
        x = tl.clamp(x.to(tl.float32) * factor, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if FP8 == 2:
        x = to_e4m3(x)
    return x.to(out.dtype.element_ty)


@triton.jit
def _weights(
    weight, head, column, mask, offset, HAS_WEIGHT: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """What normalised heads are multiplied by, float32, for ``[CHUNK, 1]`` heads and ``[1, WIDTH]`` columns."""
    result = 1.0
    if HAS_WEIGHT:
        at = weight + column if NORM == 1 else weight + head * HEAD_DIM + column
        result = tl.load(at, mask=mask, other=0.0).to(tl.float32) + offset
    return result


@triton.jit
def _joint_rstd(
    x, stride_h, stride_d, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The reciprocal root mean square of all heads of a token."""
    column = tl.arange(0, WHOLE)[None, :]
    squares = tl.zeros((CHUNK, WHOLE), tl.float32)
    for start in range(0, HEADS, CHUNK):
        head = start + tl.arange(0, CHUNK)[:, None]
        at = x + head.to(tl.int64) * stride_h * VEC + column.to(tl.int64) * stride_d
        value = tl.load(at, mask=(head < HEADS) & (column < HEAD_DIM), other=0.0).to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / (HEADS * HEAD_DIM) + eps)


@triton.jit
def _heads(
    x, out, weight, scale, factor, cos, sin, stride_h, stride_d, out_h, out_d, eps, weight_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, TAIL: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, AFTER: tl.constexpr,
    SCALE: tl.constexpr, FP8: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Normalise, rotate and store the heads of a token, which ``x`` and ``out`` point to.

    Strides of heads are in units of ``VEC``. The last ``TAIL`` columns are not rotated: they are taken ``WIDTH`` at a
    time, so that a thread has the same rows of them and of what is rotated, and norms need no other thread's numbers.
    ``WHOLE``: a power of two that is no less than ``HEAD_DIM``.
    """
    PIECES: tl.constexpr = (TAIL + WIDTH - 1) // WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    wide = column.to(tl.int64)
    rstd = 1.0
    if NORM == 2:
        rstd = _joint_rstd(x, stride_h, stride_d, eps, HEADS, HEAD_DIM, VEC, CHUNK, WHOLE)
    if SCALE == 1:
        factor = 1.0 / tl.load(scale).to(tl.float32)
    for start in range(0, HEADS, CHUNK):
        head = start + tl.arange(0, CHUNK)[:, None]
        known = head < HEADS
        source = x + head.to(tl.int64) * stride_h * VEC
        target = out + head.to(tl.int64) * out_h * VEC
        times = factor
        if SCALE == 2:
            times = 1.0 / tl.load(scale + head, mask=known, other=1.0).to(tl.float32)
        here = known & (column < (2 * NUM_PAIRS if INTERLEAVED else NUM_PAIRS))
        squares = tl.zeros((CHUNK, WIDTH), tl.float32)
        if NUM_PAIRS > 0:
            first = tl.load(source + wide * stride_d, mask=here, other=0.0).to(tl.float32)
            second = first
            if not INTERLEAVED:
                second = tl.load(source + (wide + NUM_PAIRS) * stride_d, mask=here, other=0.0).to(tl.float32)
            if AFTER:
                first, second = _rotated(first, second, cos, sin, INTERLEAVED, CHUNK, WIDTH)
            squares += first * first
            if not INTERLEAVED:
                squares += second * second
        inverse = rstd
        if NORM == 1:
            for piece in range(PIECES):
                rest = 2 * NUM_PAIRS + piece * WIDTH + column
                in_tail = known & (rest < 2 * NUM_PAIRS + TAIL)
                tail = tl.load(source + rest.to(tl.int64) * stride_d, mask=in_tail, other=0.0).to(tl.float32)
                squares += tail * tail
            inverse = tl.rsqrt(tl.sum(squares, axis=1) / HEAD_DIM + eps)[:, None]
        if NUM_PAIRS > 0:
            if NORM > 0:
                first *= inverse * _weights(
                    weight, head, column, here, weight_offset, HAS_WEIGHT, HEAD_DIM, NORM
                )
                if not INTERLEAVED:
                    second *= inverse * _weights(
                        weight, head, column + NUM_PAIRS, here, weight_offset, HAS_WEIGHT, HEAD_DIM, NORM
                    )
            if not AFTER:
                first, second = _rotated(first, second, cos, sin, INTERLEAVED, CHUNK, WIDTH)
            tl.store(target + wide * out_d, _stored(first, times, out, FP8), mask=here)
            if not INTERLEAVED:
                tl.store(target + (wide + NUM_PAIRS) * out_d, _stored(second, times, out, FP8), mask=here)
        for piece in range(PIECES):
            rest = 2 * NUM_PAIRS + piece * WIDTH + column
            in_tail = known & (rest < 2 * NUM_PAIRS + TAIL)
            value = tl.load(source + rest.to(tl.int64) * stride_d, mask=in_tail, other=0.0)
            if NORM > 0:
                value = value.to(tl.float32) * inverse
                value *= _weights(weight, head, rest, in_tail, weight_offset, HAS_WEIGHT, HEAD_DIM, NORM)
            tl.store(target + rest.to(tl.int64) * out_d, _stored(value, times, out, FP8), mask=in_tail)


@triton.jit
def _rotated(first, second, cos, sin, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """``[CHUNK, WIDTH]`` first and second members rotated; interleaved pairs are all in ``first``."""
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(first, (CHUNK, WIDTH // 2, 2)))
        a, b = rotate(a, b, cos[None, :], sin[None, :])
        first = tl.reshape(tl.join(a, b), (CHUNK, WIDTH))
        second = first
    else:
        first, second = rotate(first, second, cos[None, :], sin[None, :])
    return first, second


@triton.jit
def _token_heads(
    rotated, x, out, weight, scale, factor, cos, sin, stride_h, stride_d, out_h, out_d, eps, weight_offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, TAIL: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, AFTER: tl.constexpr,
    SCALE: tl.constexpr, FP8: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """:func:`_heads`, rotated or not: turned by nothing, an infinity would still make its partner NaN."""
    if rotated:
        _heads(x, out, weight, scale, factor, cos, sin, stride_h, stride_d, out_h, out_d, eps, weight_offset,
               HEADS, HEAD_DIM, NUM_PAIRS, TAIL, INTERLEAVED, NORM, HAS_WEIGHT, AFTER, SCALE, FP8, VEC, CHUNK,
               WIDTH, WHOLE)  # fmt: skip
    else:
        _heads(x, out, weight, scale, factor, cos, sin, stride_h, stride_d, out_h, out_d, eps, weight_offset,
               HEADS, HEAD_DIM, 0, HEAD_DIM, INTERLEAVED, NORM, HAS_WEIGHT, False, SCALE, FP8, VEC, CHUNK,
               WHOLE, WHOLE)  # fmt: skip


@triton.jit
def _entry(
    token, batch, seq, position, slots, block_table, cu_seqlens, seqlen_offsets, sequences, offset, num_blocks,
    columns, slot_s, table_b, table_c,
    BLOCK_SIZE: tl.constexpr, BY_POSITION: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Block and entry in it (int64) of a token, and whether there is one."""
    if HAS_SLOTS:
        slot = tl.load(slots + token.to(tl.int64) * slot_s).to(tl.int64)
        known = slot >= 0
        block = slot // BLOCK_SIZE
        entry = slot % BLOCK_SIZE
    else:
        place, sequence, known = token_place(
            batch, seq, cu_seqlens, seqlen_offsets, sequences, offset, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES
        )
        if BY_POSITION:
            place = position
        column = place // BLOCK_SIZE
        known = known & (place >= 0) & (column < columns)
        at = block_table + sequence.to(tl.int64) * table_b + column.to(tl.int64) * table_c
        block = tl.load(at, mask=known, other=-1).to(tl.int64)
        entry = (place % BLOCK_SIZE).to(tl.int64)
    return block, entry, known & (block >= 0) & (block < num_blocks)


@triton.jit(do_not_specialize=["sequences", "offset", "num_blocks", "columns", "table_rows", "table_b"])
def write_cache_kernel(
    q, k, v, q_out, k_cache, v_cache, slots, block_table, k_scale, v_scale, q_weight, k_weight,
    cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    k_factor, v_factor, length, sequences, offset, num_blocks, columns, table_rows, scaling, eps, weight_offset,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, qo_b, qo_s, qo_h, qo_d,
    kc_b, kc_s, kc_h, kc_d, vc_b, vc_s, vc_h, vc_d,
    slot_s, table_b, table_c, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr, Q_TAIL: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr,
    AXES: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BY_POSITION: tl.constexpr, FP8: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, AFTER: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr, V_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Grid: one program a token, ``batch * length + seq``; shapes are in :func:`launch`."""
    token = tl.program_id(0)
    batch = (token // length).to(tl.int64)
    seq = (token % length).to(tl.int64)
    position, rotated = token_position(
        batch, seq, positions, cu_seqlens, seqlen_offsets, sequences, offset, pos_b, pos_s,
        HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
    )  # fmt: skip
    cos, sin, rotated = token_cos_sin(
        batch, position, rotated, cos_table, sin_table, inv_freq_q64, table_rows, scaling,
        cos_b, cos_s, sin_b, sin_s, NUM_PAIRS, WIDTH // 2 if INTERLEAVED else WIDTH, False, TABLE,
        AXES, positions + batch * pos_b + seq * pos_s if AXES > 1 else None, next_axis,
    )  # fmt: skip
    block, entry, written = _entry(
        token, batch, seq, position, slots, block_table, cu_seqlens, seqlen_offsets, sequences, offset,
        num_blocks, columns, slot_s, table_b, table_c,
        BLOCK_SIZE, BY_POSITION, HAS_SLOTS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
    )  # fmt: skip
    # Strides of heads are in units of VEC: see triton_launch.head_strides.
    if Q_HEADS > 0:
        _token_heads(
            rotated, q + (batch * q_b + seq * q_s) * VEC, q_out + (batch * qo_b + seq * qo_s) * VEC,
            q_weight, k_scale, 1.0, cos, sin, q_h, q_d, qo_h, qo_d, eps, weight_offset,
            Q_HEADS, HEAD_DIM, NUM_PAIRS, Q_TAIL, INTERLEAVED, Q_NORM, Q_WEIGHT, AFTER, 0, 0, VEC, CHUNK,
            WIDTH, WHOLE,
        )  # fmt: skip
    if written:
        _token_heads(
            rotated, k + (batch * k_b + seq * k_s) * VEC, k_cache + (block * kc_b + entry * kc_s) * VEC,
            k_weight, k_scale, k_factor, cos, sin, k_h, k_d, kc_h, kc_d, eps, weight_offset,
            K_HEADS, HEAD_DIM, NUM_PAIRS, HEAD_DIM - 2 * NUM_PAIRS, INTERLEAVED, K_NORM, K_WEIGHT, AFTER, K_SCALE,
            FP8, VEC, CHUNK, WIDTH, WHOLE,
        )  # fmt: skip
        _heads(
            v + (batch * v_b + seq * v_s) * VEC, v_cache + (block * vc_b + entry * vc_s) * VEC,
            k_weight, v_scale, v_factor, cos, sin, v_h, v_d, vc_h, vc_d, eps, weight_offset,
            K_HEADS, V_DIM, 0, V_DIM, INTERLEAVED, 0, False, False, V_SCALE,
            FP8, VEC, CHUNK, V_WIDTH, V_WIDTH,
        )  # fmt: skip


def serves(k: torch.Tensor, norms: Norms | None) -> bool:
    """Whether the kernel has these norms: a norm of all heads has to follow the rotation of all of them."""
    joint = norms is not None and any(
        weight is not None and weight.shape[0] != k.shape[3] for weight in norms.weights()
    )
    return not (joint and norms is not None and norms.norm_after)


def has_fp8(arch: str) -> bool:
    """Whether ``arch`` has an instruction that makes float8_e4m3fn, and kernels are compiled for it."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89 and isinstance(angle, triton.JITFunction)


def launch(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    q_out: torch.Tensor | None,
    cache: KeyValueCache,
    norms: Norms | None,
    angles: Angles,
    arch: str | None = None,
) -> Launch | None:
    """As :meth:`Backend.write_cache` for float16, bfloat16 and float32 and norms that :func:`serves`.

    Args:
        arch: instead of that of the device of ``k``.
    """
    batch, length, k_heads, head_dim = k.shape
    num_pairs, v_dim = angles.num_pairs, v.shape[3]
    q_heads = q.shape[2] if q is not None else 0
    tokens = batch * length
    if tokens == 0 or max(k_heads, q_heads) == 0 or max(head_dim, v_dim) == 0:
        return None
    fp8 = PLAIN if not cache.is_fp8 else INSTRUCTION if has_fp8(arch or architecture(k.device)) else BITS
    heads = (q, k, v, q_out, *cache.blocks())
    vec = triton_launch.common_vector(*heads)
    every = [triton_launch.head_strides(x, vec) for x in heads]
    slots, table, cos = cache.slots, cache.block_table, angles.cos
    cu_seqlens = angles.cu_seqlens
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    numbers = (
        cache.k_cache.shape[0], table.shape[1] if table is not None else 0, cos.shape[1] if cos is not None else 0,
        angles.scaling, norms.eps if norms is not None else 0.0, norms.weight_offset if norms is not None else 0.0,
        *itertools.chain(*every),
        slots.stride(0) if slots is not None else 0, *(table.stride() if table is not None else (0, 0)),
        *row_strides(cos), *row_strides(angles.sin), *position_strides(angles.positions),
    )  # fmt: skip
    q_weight, k_weight = norms.weights() if norms is not None else (None, None)
    # What is not rotated stays where it is, unless it is normalised.
    q_tail = 0 if q_out is q and norms is None else head_dim - 2 * num_pairs
    options = {
        "Q_HEADS": q_heads, "K_HEADS": k_heads, "HEAD_DIM": head_dim, "V_DIM": v_dim,
        "NUM_PAIRS": num_pairs, "Q_TAIL": q_tail, "INTERLEAVED": angles.interleaved, "TABLE": cos is not None,
        "AXES": angles.axes, "HAS_POSITIONS": angles.positions is not None, "HAS_CU_SEQLENS": cu_seqlens is not None,
        "HAS_OFFSETS": angles.seqlen_offsets is not None, "HAS_SLOTS": slots is not None,
        "BLOCK_SIZE": cache.block_size,
        "BY_POSITION": angles.positions is not None and angles.seqlen_offsets is None,
        "FP8": fp8, "K_SCALE": _scale_kind(cache.k_scale), "V_SCALE": _scale_kind(cache.v_scale),
        "Q_NORM": _norm_kind(norms, q_weight, q), "K_NORM": _norm_kind(norms, k_weight, k),
        "Q_WEIGHT": q_weight is not None, "K_WEIGHT": k_weight is not None,
        "AFTER": norms is not None and norms.norm_after, "VEC": vec,
        "WHOLE": triton.next_power_of_2(head_dim), "V_WIDTH": triton.next_power_of_2(v_dim),
        "SEQUENCES": 128, **blocks(max(q_heads, k_heads), num_pairs, angles.interleaved, k.element_size()),
    }  # fmt: skip

    def pack(q, k, v, q_out, cache, norms, angles) -> tuple[Any, ...]:
        caches = cache[:2] if fp8 != BITS else [c.view(torch.uint8) for c in cache[:2]]
        weights = norms.weights() if norms is not None else (None, None)
        return (
            q, k, v, q_out, *caches, *cache[2:6], *weights, *angles[:6], 1 / cache.k_scale_value,
            1 / cache.v_scale_value, length, sequences, angles.offset, *numbers,
        )  # fmt: skip

    tensors = (q, k, v, q_out, cache, norms, angles)
    return triton_launch.launch(write_cache_kernel, tokens, k.device, pack, tensors, options)


def _scale_kind(scale: torch.Tensor | None) -> int:
    if scale is None:
        return NUMBER
    return ONE if scale.numel() == 1 else EACH


def _norm_kind(norms: Norms | None, weight: torch.Tensor | None, x: torch.Tensor | None) -> int:
    if norms is None or x is None:
        return NO_NORM
    return JOINT if is_joint(weight, x) else HEAD
