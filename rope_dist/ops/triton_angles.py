"""Device functions that the kernels share: fixed-point angle, cosine and sine, the rotation of a pair."""

from __future__ import annotations

import triton
import triton.language as tl

# Least-maximum-error fits in u, an angle in eighths of a revolution on [-1, 1]; each coefficient was rounded to
# float32 before the next was fitted, and pi/4 is split in two, so that little but the last rounding is
# left: the largest error is 7e-8, the mean 1.3e-8. The multiply-adds are written out because Triton 3.10
# will no longer make them by itself.
SIN_1 = tl.constexpr(0.7853981852531433)
SIN_1_REST = tl.constexpr(-3.271051340902886e-08)
SIN_3 = tl.constexpr(-0.08074536919593811)
SIN_5 = tl.constexpr(0.0024898769333958626)
SIN_7 = tl.constexpr(-3.588034451240674e-05)
COS_2 = tl.constexpr(-0.3084251284599304)
COS_4 = tl.constexpr(0.015854282304644585)
COS_6 = tl.constexpr(-0.000325863336911425)
COS_8 = tl.constexpr(3.490520384730189e-06)
EIGHTH = tl.constexpr(4.656612873077393e-10)  # 2^-31: from 2^-34 revolutions to eighths of one
RADIANS = tl.constexpr(1.4629180792671596e-09)  # 2 pi / 2^32


@triton.jit
def angle(position, high, low):
    """Angle of ``position`` (int32) in 2^-32 revolutions, int32, by the halves of inv_freq_q64."""
    # One wide multiplication and one multiply-add; the lower half is signed (fixed_point.py), so negative
    # positions need nothing more.
    carry = ((position.to(tl.int64) * low.to(tl.int64)) >> 32).to(tl.int32)
    return tl.add(tl.mul(position, high, sanitize_overflow=False), carry, sanitize_overflow=False)


@triton.jit
def cos_sin(revolutions):
    """Cosine and sine, float32, of an angle in 2^-32 revolutions (int32).

    A polynomial rather than tl.cos and tl.sin, which reduce any argument: thousands of instructions and local
    memory. Its error, 7e-8, is that of float32 itself.
    """
    # Two bits of this are the nearest quarter revolution; shifted out, what is left is the signed distance to it.
    quarter = tl.add(revolutions, 1 << 29, sanitize_overflow=False)
    u = (revolutions << 2).to(tl.float32) * EIGHTH
    z = u * u
    sin = tl.fma(z, SIN_7, SIN_5)
    sin = tl.fma(z, sin, SIN_3)
    sin = tl.fma(z, sin, SIN_1_REST)
    sin = tl.fma(u, SIN_1, u * sin)
    cos = tl.fma(z, COS_8, COS_6)
    cos = tl.fma(z, cos, COS_4)
    cos = tl.fma(z, cos, COS_2)
    cos = tl.fma(z, cos, 1.0)
    odd = (quarter & (1 << 30)) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = _flip(c, tl.add(quarter, 1 << 30, sanitize_overflow=False))
    return c, _flip(s, quarter)


@triton.jit
def fast_cos_sin(revolutions, HARDWARE: tl.constexpr):
    """:func:`cos_sin` for a kernel whose results have 16 bits and whose registers hold an accumulator.

    The special function unit is right to 7e-7 within a revolution (NVIDIA documents 2^-20.5 for the sine and 2^-20.9
    for the cosine), little beside what 16 bits resolve, and takes a sixth of the polynomial's instructions.
    ``HARDWARE`` is false where there is no inline assembly for it.
    """
    if HARDWARE:
        radians = revolutions.to(tl.float32) * RADIANS
        cos = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [radians], dtype=tl.float32, is_pure=True, pack=1
        )
        sin = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [radians], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        cos, sin = cos_sin(revolutions)
    return cos, sin


def has_hardware(arch: str) -> bool:
    """Whether kernels for ``arch`` may use the special function unit: NVIDIA's, and not the interpreter's."""
    return arch.startswith("sm_") and isinstance(angle, triton.JITFunction)


@triton.jit
def _flip(x, bits):
    """``-x`` where the sign bit of ``bits`` is set: one bitwise operation."""
    return (x.to(tl.int32, bitcast=True) ^ ((bits >> 31) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def rotate(first, second, cos, sin):
    """The pair is_rotary by the angle; all float32 (and broadcast to one shape)."""
    return tl.fma(first, cos, -(second * sin)), tl.fma(second, cos, first * sin)


@triton.jit
def token_place(
    batch, seq, cu_seqlens, seqlen_offsets, sequences, offset,
    HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Place of token ``seq`` of ``batch`` (both int64) in its sequence, the sequence, and whether it is in one.

    ``SEQUENCES``: bounds that are looked at at once.
    """
    known = True
    place = seq.to(tl.int32) + offset
    sequence = batch.to(tl.int32)
    if HAS_CU_SEQLENS:
        # The start of a token's sequence is the largest bound that is not past the token.
        first = 0
        sequence = -1
        for block in range(0, sequences, SEQUENCES):
            index = block + tl.arange(0, SEQUENCES)
            bound = tl.load(cu_seqlens + index, mask=index < sequences, other=2147483647).to(tl.int32)
            before = bound <= seq
            first = tl.maximum(first, tl.max(tl.where(before, bound, 0), axis=0))
            sequence += tl.sum(before.to(tl.int32), axis=0)
        place -= first
        known = (sequence >= 0) & (seq < tl.load(cu_seqlens + sequences))
    if HAS_OFFSETS:
        place += tl.load(seqlen_offsets + sequence, mask=sequence >= 0, other=0).to(tl.int32)
    return place, sequence, known


@triton.jit
def token_position(
    batch, seq, positions, cu_seqlens, seqlen_offsets, sequences, offset, pos_b, pos_s,
    HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Position of token ``seq`` of ``batch`` (both int64), and whether it is in a sequence; see ``Angles``.

    Of positions with several axes the first.
    """
    if HAS_POSITIONS:
        position = tl.load(positions + batch * pos_b + seq * pos_s).to(tl.int32)
        known = True
    else:
        position, _, known = token_place(
            batch, seq, cu_seqlens, seqlen_offsets, sequences, offset, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES
        )
    return position, known


@triton.jit
def token_cos_sin(
    batch, position, known, cos_table, sin_table, inv_freq_q64, table_rows, scaling, cos_b, cos_s, sin_b, sin_s,
    NUM_PAIRS: tl.constexpr, WIDTH: tl.constexpr, CONJUGATE: tl.constexpr, TABLE: tl.constexpr,
    AXES: tl.constexpr = 1, positions=None, next_axis=0,
):  # fmt: skip
    """cos and sin ``[WIDTH]`` float32 of a token's ``NUM_PAIRS`` pairs, and whether it is rotated.

    The angles of a token that is not are zero where they come from a table, and any where they do not.
    Of positions with several axes ``position`` is the first, at ``positions``; the others are ``next_axis`` apart.
    """
    pair = tl.arange(0, WIDTH)
    if TABLE:
        # Tokens past the table pass through, as in flash-attention: no access outside it.
        row = position.to(tl.int64)
        known = known & (position >= 0) & (position < table_rows)
        here = known & (pair < NUM_PAIRS)
        cos = tl.load(cos_table + batch * cos_b + row * cos_s + pair, mask=here, other=1.0).to(tl.float32)
        sin = tl.load(sin_table + batch * sin_b + row * sin_s + pair, mask=here, other=0.0).to(tl.float32)
    else:
        high = tl.load(inv_freq_q64 + pair, mask=pair < NUM_PAIRS, other=0)
        low = tl.load(inv_freq_q64 + NUM_PAIRS + pair, mask=pair < NUM_PAIRS, other=0)
        revolutions = angle(position, high, low)
        for axis in tl.static_range(1, AXES):
            there = inv_freq_q64 + 2 * axis * NUM_PAIRS + pair
            high = tl.load(there, mask=pair < NUM_PAIRS, other=0)
            low = tl.load(there + NUM_PAIRS, mask=pair < NUM_PAIRS, other=0)
            position = tl.load(positions + axis * next_axis).to(tl.int32)
            revolutions = tl.add(revolutions, angle(position, high, low), sanitize_overflow=False)
        cos, sin = cos_sin(revolutions)
        cos *= scaling
        sin *= scaling
    if CONJUGATE:
        sin = -sin
    return cos, sin, known
