"""Gradients of RMS norm and rotary embedding: of queries, keys and the norms' weights in one launch.

Each program takes every n-th token and sums the gradients of the weights in registers, where its threads have the same
columns at every token; what it found is one row of a buffer that is added up afterwards. Nothing is summed by atomics:
the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_launch
from .arguments import Angles, Norms, present
from .triton_launch import position_strides, row_strides
from .triton_norm_rotary import constants, load_heads, load_weight, store_heads, token_angles, turn
from .triton_projection import programs


@triton.jit
def _heads(
    grad, x, out, bias, weight, rstds, first_sum, second_sum, token, batch, seq, cos, sin, is_rotary, weight_offset,
    grad_b, grad_s, grad_h, grad_d, stride_b, stride_s, stride_h, stride_d,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, JOINT: tl.constexpr, AFTER: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of ``HEADS`` heads of a token, and the sums with those of the weights added."""
    grad += (batch * grad_b + seq * grad_s) * VEC
    x += (batch * stride_b + seq * stride_s) * VEC
    grad_h = tl.cast(grad_h, tl.int64) * VEC
    stride_h = tl.cast(stride_h, tl.int64) * VEC
    out += token * HEADS * HEAD_DIM
    for start in range(0, HEADS, CHUNK):
        index = start + tl.arange(0, CHUNK)
        head = index[:, None]
        first_grad, second_grad = load_heads(
            grad, head, grad_h, grad_d, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
        )
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
        else:
            first_grad, second_grad = turn(first_grad, second_grad, cos, -sin, is_rotary)
        # Zero for heads that do not exist: nothing of them reaches the sums.
        at = token + 0 * head if JOINT else token * HEADS + head
        rstd = tl.load(rstds + at, mask=head < HEADS, other=0.0)
        first *= rstd
        second *= rstd
        if WEIGHT:
            first_sum += first_grad * first
            second_sum += second_grad * second
            first_weight, second_weight = load_weight(
                weight, head, weight_offset, JOINT, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
            )
            first_grad *= first_weight
            second_grad *= second_weight
        along = tl.sum(first_grad * first + second_grad * second, axis=1)
        if JOINT:
            tl.static_assert(CHUNK >= HEADS)
            mean = tl.sum(along, axis=0) * (1.0 / (HEADS * HEAD_DIM))
        else:
            mean = along[:, None] * (1.0 / HEAD_DIM)
        first = rstd * (first_grad - first * mean)
        second = rstd * (second_grad - second * mean)
        if AFTER:
            first, second = turn(first, second, cos, -sin, is_rotary)
        store_heads(out, first, second, head, HEAD_DIM, 1, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH)
    return first_sum, second_sum


@triton.jit
def _tokens(
    grad, x, out, bias, weight, rstds, sums, program, programs,
    cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    tokens, length, sequences, offset, table_rows, scaling, weight_offset,
    grad_b, grad_s, grad_h, grad_d, stride_b, stride_s, stride_h, stride_d,
    cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    BIAS: tl.constexpr, WEIGHT: tl.constexpr, JOINT: tl.constexpr, AFTER: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    TABLE: tl.constexpr, AXES: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, SEQUENCES: tl.constexpr, VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of every ``programs``-th token from ``program`` on, and of the weight the part that they make."""
    first_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    second_sum = tl.zeros((CHUNK, WIDTH), tl.float32)
    for step in range(tl.cdiv(tokens - program, programs)):
        token = program.to(tl.int64) + step * programs
        batch = token // length
        seq = token % length
        cos, sin, is_rotary = token_angles(
            batch, seq, cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
            sequences, offset, table_rows, scaling, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
            NUM_PAIRS, WIDTH, CONJUGATE, TABLE, AXES, HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES,
        )  # fmt: skip
        first_sum, second_sum = _heads(
            grad, x, out, bias, weight, rstds, first_sum, second_sum, token, batch, seq, cos, sin, is_rotary,
            weight_offset, grad_b, grad_s, grad_h, grad_d, stride_b, stride_s, stride_h, stride_d,
            BIAS, WEIGHT, JOINT, AFTER, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, VEC, CHUNK, WIDTH,
        )  # fmt: skip
    if WEIGHT:
        if JOINT:
            head = tl.arange(0, CHUNK)[:, None]
            sums += program * HEADS * HEAD_DIM
            store_heads(
                sums, first_sum, second_sum, head, HEAD_DIM, 1, HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
            )
        else:
            head = tl.arange(0, 1)[:, None]
            first_sum = tl.sum(first_sum, axis=0, keep_dims=True)
            second_sum = tl.sum(second_sum, axis=0, keep_dims=True)
            sums += program * HEAD_DIM
            store_heads(
                sums, first_sum, second_sum, head, HEAD_DIM, 1, 1, HEAD_DIM, NUM_PAIRS, INTERLEAVED, WIDTH
            )


# What is a multiple of 16 one day and not the next would be compiled twice.
@triton.jit(do_not_specialize=["offset", "tokens", "q_programs"])
def norm_backward_kernel(
    q_grad, k_grad, q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, q_rstd, k_rstd, q_sums, k_sums,
    cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
    q_programs, tokens, length, sequences, offset, table_rows, scaling, weight_offset,
    qg_b, qg_s, qg_h, qg_d, kg_b, kg_s, kg_h, kg_d, q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d,
    cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
    Q_BIAS: tl.constexpr, K_BIAS: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr,
    Q_JOINT: tl.constexpr, K_JOINT: tl.constexpr, AFTER: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, TABLE: tl.constexpr, AXES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_CU_SEQLENS: tl.constexpr, HAS_OFFSETS: tl.constexpr, SEQUENCES: tl.constexpr,
    VEC: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: ``q_programs`` for the queries and any number for the keys; shapes are in :func:`launch`."""
    program = tl.program_id(0)
    if program < q_programs:
        _tokens(
            q_grad, q, q_out, q_bias, q_weight, q_rstd, q_sums, program, q_programs,
            cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
            tokens, length, sequences, offset, table_rows, scaling, weight_offset,
            qg_b, qg_s, qg_h, qg_d, q_b, q_s, q_h, q_d, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
            Q_BIAS, Q_WEIGHT, Q_JOINT, AFTER, Q_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, CONJUGATE, TABLE, AXES,
            HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES, VEC, CHUNK, WIDTH,
        )  # fmt: skip
    elif K_HEADS > 0:
        _tokens(
            k_grad, k, k_out, k_bias, k_weight, k_rstd, k_sums, program - q_programs, tl.num_programs(0) - q_programs,
            cos_table, sin_table, inv_freq_q64, positions, cu_seqlens, seqlen_offsets,
            tokens, length, sequences, offset, table_rows, scaling, weight_offset,
            kg_b, kg_s, kg_h, kg_d, k_b, k_s, k_h, k_d, cos_b, cos_s, sin_b, sin_s, pos_b, pos_s, next_axis,
            K_BIAS, K_WEIGHT, K_JOINT, AFTER, K_HEADS, HEAD_DIM, NUM_PAIRS, INTERLEAVED, CONJUGATE, TABLE, AXES,
            HAS_POSITIONS, HAS_CU_SEQLENS, HAS_OFFSETS, SEQUENCES, VEC, CHUNK, WIDTH,
        )  # fmt: skip


def launch(
    grads: tuple[torch.Tensor, torch.Tensor | None],
    heads: tuple[torch.Tensor, torch.Tensor | None],
    rstds: tuple[torch.Tensor, torch.Tensor | None],
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    num_programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As :meth:`Backend.norm_rotate_backward` for float16, bfloat16 and float32 and an even ``D``.

    Args:
        num_programs: instead of as many as the device of ``heads`` runs at once.
    """
    q, k = heads
    out = [x.new_empty(x.shape) if x is not None else None for x in heads]
    weights = (norms.q_weight, norms.k_weight if k is not None else None)
    tokens = q.shape[0] * q.shape[1]
    if q.numel() == 0 and (k is None or k.numel() == 0):
        q_zeros, k_zeros = (torch.zeros_like(w) if w is not None else None for w in weights)
        return present(out[0]), out[1], q_zeros, k_zeros
    vec = triton_launch.common_vector(*grads, *heads)
    strides = [stride for x in (*grads, *heads) for stride in triton_launch.head_strides(x, vec)]
    cos, cu_seqlens = angles.cos, angles.cu_seqlens
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    options = {**constants(q, k, norms, angles, q_bias, k_bias), "VEC": vec}
    # With 128 registers a thread a multiprocessor has room for 16 warps. Queries and keys have
    # programs in proportion to their chunks.
    most = num_programs or programs(q.device) * max(1, 16 // options["num_warps"])
    chunks = [triton.cdiv(x.shape[2], options["CHUNK"]) if x is not None else 0 for x in heads]
    grid = [
        min(tokens, max(1, most * n // sum(chunks))) if x is not None else 0
        for x, n in zip(heads, chunks, strict=True)
    ]
    sums = [
        q.new_empty((n, w.shape[0]), dtype=torch.float32) if w is not None else None
        for n, w in zip(grid, weights, strict=True)
    ]
    numbers = (
        grid[0], tokens, q.shape[1], sequences, angles.offset, cos.shape[1] if cos is not None else 0, angles.scaling,
        norms.weight_offset, *strides, *row_strides(cos), *row_strides(angles.sin), *position_strides(angles.positions),
    )  # fmt: skip
    whole = [x.contiguous() if x is not None else None for x in (*weights, q_bias, k_bias, *rstds)]

    def pack(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
        return *tensors, *angles[:6], *numbers

    tensors = (*grads, *heads, *out, *whole, *sums)
    triton_launch.launch(norm_backward_kernel, sum(grid), q.device, pack, tensors, options)
    of_weights = [
        found.sum(0).to(w.dtype) if w is not None and found is not None else None
        for found, w in zip(sums, weights, strict=True)
    ]
    return present(out[0]), out[1], of_weights[0], of_weights[1]
