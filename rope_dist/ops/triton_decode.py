"""Projection and rotation of 1 to 16 tokens in one launch, optionally writing the key/value cache.

Decoding is bound by reading the weights once. A program takes 16 (or 8) pairs of one head, the weight rows of
their first and of their second members, over the whole depth: no two programs share a weight and none has to
add up partial sums. Tokens are padded to 16, the least the tensor cores take; of those that are not there nothing
is read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_launch
from .arguments import Angles, Projections
from .backend import Launch
from .configurations import DECODE, Configuration
from .triton_angles import fast_cos_sin, has_hardware, rotate
from .triton_launch import architecture
from .triton_projection import angle_rows, axis_angle, table_stride, three, token_stride

MAX_TOKENS = 16


# Compiled once for any number of tokens.
@triton.jit(do_not_specialize=["rows", "period"])
def decode_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, inv_freq_q64, positions, slots,
    rows, depth, q_heads, k_heads, period, scaling, table_stride, x_stride, q_stride, k_stride,
    v_stride, k_token, k_head, v_token, v_head,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    PROGRAMS_A_HEAD: tl.constexpr, EVEN_DEPTH: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr,
    AXES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid: heads of q, k and v times ``PROGRAMS_A_HEAD``. Arguments are in :func:`launch`."""
    program = tl.program_id(0)
    head = program // PROGRAMS_A_HEAD
    # where, not if: through a branch the compiler forgets that the addresses are multiples of 16.
    is_k = head >= q_heads
    is_v = head >= q_heads + k_heads
    weight = tl.where(is_v, w_v, tl.where(is_k, w_k, w_q))
    stride = tl.where(is_v, v_stride, tl.where(is_k, k_stride, q_stride))
    out = tl.where(is_v, v, tl.where(is_k, k, q))
    token_stride = tl.where(is_v, v_token, tl.where(is_k, k_token, q_heads * HEAD_DIM)).to(tl.int64)
    head_stride = tl.where(is_v, v_head, tl.where(is_k, k_head, HEAD_DIM)).to(tl.int64)
    own = head - tl.where(is_v, q_heads + k_heads, tl.where(is_k, q_heads, 0))

    pair = (program % PROGRAMS_A_HEAD) * PAIRS + tl.arange(0, PAIRS)
    is_rotary = pair < NUM_PAIRS
    # The pairs past the rotated ones are any two columns that are left; they pass through.
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        first = tl.where(is_rotary, pair, NUM_PAIRS + pair)
        second = tl.where(is_rotary, NUM_PAIRS + pair, HEAD_DIM // 2 + pair)
    known = pair < HEAD_DIM // 2
    # Rows past the head wrap to its first: read, never stored, and no mask in the loop.
    row_a = (own * HEAD_DIM + tl.where(known, first, 0)).to(tl.int64)
    row_b = (own * HEAD_DIM + tl.where(known, second, 0)).to(tl.int64)

    token = tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the last are zeros, not read.
    here = token < rows
    x_at = x + token.to(tl.int64)[:, None] * x_stride + inner[None, :]
    a_at = weight + row_a[None, :] * stride + inner[:, None]
    b_at = weight + row_b[None, :] * stride + inner[:, None]
    sum_a = tl.zeros((ROWS, PAIRS), tl.float32)
    sum_b = tl.zeros((ROWS, PAIRS), tl.float32)
    for step in range(tl.cdiv(depth, BLOCK_K)):
        if EVEN_DEPTH:
            part = tl.load(x_at, mask=here[:, None], other=0.0)
            weight_a = tl.load(a_at)
            weight_b = tl.load(b_at)
        else:
            left = depth - step * BLOCK_K
            part = tl.load(x_at, mask=here[:, None] & (inner[None, :] < left), other=0.0)
            weight_a = tl.load(a_at, mask=inner[:, None] < left, other=0.0)
            weight_b = tl.load(b_at, mask=inner[:, None] < left, other=0.0)
        sum_a = tl.dot(part, weight_a, sum_a)
        sum_b = tl.dot(part, weight_b, sum_b)
        x_at += BLOCK_K
        a_at += BLOCK_K
        b_at += BLOCK_K
    if HAS_BIAS:
        bias = tl.where(is_v, b_v, tl.where(is_k, b_k, b_q))
        sum_a += tl.load(bias + row_a).to(tl.float32)[None, :]
        sum_b += tl.load(bias + row_b).to(tl.float32)[None, :]

    is_rotary = is_rotary & (is_v == 0)
    if TABLE:
        at = (token % period).to(tl.int64)[:, None] * table_stride + pair[None, :]
        mask = here[:, None] & is_rotary[None, :]
        cos = tl.load(cos_table + at, mask=mask, other=1.0)
        sin = tl.load(sin_table + at, mask=mask, other=0.0)
    else:
        row = token % period
        revolutions = axis_angle(inv_freq_q64, positions, row, here, is_rotary, 0, period, pair, NUM_PAIRS)
        for axis in tl.static_range(1, AXES):
            more = axis_angle(inv_freq_q64, positions, row, here, is_rotary, axis, period, pair, NUM_PAIRS)
            revolutions = tl.add(revolutions, more, sanitize_overflow=False)
        cos, sin = fast_cos_sin(revolutions, HARDWARE)
        cos *= scaling
        sin *= scaling
    rotated_a, rotated_b = rotate(sum_a, sum_b, cos, sin)
    sum_a = tl.where(is_rotary[None, :], rotated_a, sum_a)
    sum_b = tl.where(is_rotary[None, :], rotated_b, sum_b)

    target = token.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + token, mask=here, other=-1).to(tl.int64)
        target = tl.where(is_k, slot, target)
        # A negative slot is a token that has no place in the cache (padding).
        here = here & (target >= 0)
    out_at = out + (target * token_stride)[:, None] + own * head_stride
    stored = here[:, None] & known[None, :]
    tl.store(out_at + first[None, :], sum_a.to(out.dtype.element_ty), mask=stored)
    tl.store(out_at + second[None, :], sum_b.to(out.dtype.element_ty), mask=stored)


def launch(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    outputs: list[torch.Tensor],
    slots: torch.Tensor | None = None,
    *,
    configuration: Configuration = DECODE,
    arch: str | None = None,
) -> Launch | None:
    """Project and rotate up to 16 tokens. Checks nothing.

    Args:
        x, projections, angles: as in :func:`triton_projection.launch`, with any even ``head_dim``; at most 16 tokens.
        outputs: queries, contiguous ``[B, S, Hq, D]``; keys and, with their weight, values ``[B, S, Hk, D]``,
            contiguous too, or with ``slots`` caches ``[entries, Hk, D]``, last axis contiguous.
        slots: ``[B * S]`` integers: token ``m`` writes entry ``slots[m]``, and nothing where that is negative.
        configuration: of :mod:`rope_dist.ops.configurations`; its columns are pairs of a head.
        arch: instead of that of the device of ``x``.

    Returns:
        What does the same again, called as ``launch(x, projections, angles, outputs, slots)``.
    """
    weights, biases, head_dim = projections.weights(), projections.biases(), projections.head_dim
    rows, depth = x.shape[0] * x.shape[1], x.shape[2]
    heads = [weight.shape[0] // head_dim for weight in weights]
    _, pairs, block_k = configuration[:3]
    a_head = triton.cdiv(head_dim // 2, pairs)
    # Strides of an entry and of a head: a cache's own, or of tokens side by side.
    strides = [
        (y.stride(0), y.stride(1)) if slots is not None else (n * head_dim, head_dim)
        for y, n in zip(outputs[1:], heads[1:], strict=True)
    ]
    numbers = (
        rows, depth, heads[0], heads[1], angle_rows(angles), angles.scaling, table_stride(angles),
        token_stride(x), *three([weight.stride(0) for weight in weights]), *strides[0], *strides[-1],
    )  # fmt: skip
    options = {
        "ROWS": MAX_TOKENS, "BLOCK_K": block_k, "PAIRS": pairs, "HEAD_DIM": head_dim,
        "NUM_PAIRS": angles.num_pairs, "PROGRAMS_A_HEAD": a_head, "EVEN_DEPTH": depth % block_k == 0,
        "INTERLEAVED": angles.interleaved, "TABLE": angles.cos is not None, "AXES": angles.axes,
        "HAS_BIAS": biases is not None, "HAS_SLOTS": slots is not None,
        "HARDWARE": has_hardware(arch or architecture(x.device)), **configuration.compiled(),
    }  # fmt: skip

    def pack(x, projections, angles, outputs, slots=None) -> tuple[Any, ...]:
        weights, biases = three(projections.weights()), three(projections.biases())
        return x, *weights, *three(outputs), *biases, *angles[:4], slots, *numbers

    tensors = (x, projections, angles, outputs, slots)
    return triton_launch.launch(decode_kernel, sum(heads) * a_head, x.device, pack, tensors, options)
