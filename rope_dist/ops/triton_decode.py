"""Projection and rotation of 1 to 16 tokens in one launch, optionally writing the key/value cache.

Decoding is bound by reading the weights once. A program takes 16 pairs of one head, the 16 weight rows of
their first and the 16 of their second members, over the whole depth: no two programs share a weight and
none has to add up partial sums. Tokens are padded to 16, the least the tensor cores take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_angles import angle, fast_cos_sin, has_hardware, rotate
from .triton_rotary import architecture, device_of

MAX_TOKENS = 16
PAIRS = 16


@triton.jit
def decode_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, words, positions, slots,
    rows, depth, q_heads, k_heads, period, scaling, x_stride, q_stride, k_stride, v_stride,
    k_token, k_head, v_token, v_head,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    PROGRAMS_A_HEAD: tl.constexpr, EVEN_DEPTH: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, HARDWARE: tl.constexpr,
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
    turned = pair < HALF
    # The pairs past the rotated ones are any two columns that are left; they pass through.
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        first = tl.where(turned, pair, HALF + pair)
        second = tl.where(turned, HALF + pair, HEAD_DIM // 2 + pair)
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

    turned = turned & (is_v == 0)
    if TABLE:
        at = (token * HALF)[:, None] + pair[None, :]
        mask = here[:, None] & turned[None, :]
        cos = tl.load(cos_table + at, mask=mask, other=1.0)
        sin = tl.load(sin_table + at, mask=mask, other=0.0)
    else:
        position = tl.load(positions + token % period, mask=here, other=0).to(tl.int32)
        high = tl.load(words + pair, mask=turned, other=0)
        low = tl.load(words + HALF + pair, mask=turned, other=0)
        cos, sin = fast_cos_sin(angle(position[:, None], high[None, :], low[None, :]), HARDWARE)
        cos *= scaling
        sin *= scaling
    rotated_a, rotated_b = rotate(sum_a, sum_b, cos, sin)
    sum_a = tl.where(turned[None, :], rotated_a, sum_a)
    sum_b = tl.where(turned[None, :], rotated_b, sum_b)

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
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor, ...] | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
    slots: torch.Tensor | None = None,
    arch: str | None = None,
) -> None:
    """Project and rotate up to 16 tokens. Checks nothing.

    Args:
        x: ``[M, K]`` float16 or bfloat16, last axis contiguous, ``1 <= M <= 16``.
        weights, biases: as in ``triton_projection.launch``.
        q: contiguous ``[M, Hq, D]``.
        k, v: ``[M, Hk, D]``, or with ``slots`` caches ``[slots, Hk, D]``, of which token ``m`` writes entry
            ``slots[m]`` and nothing where that is negative; last axis contiguous.
        cos, sin: ``[M, R/2]`` float32, contiguous; or words, positions and scaling as there.
        slots: ``[M]`` integers.
        arch: instead of that of the device of ``x``.
    """
    rows, depth = x.shape
    head_dim = q.shape[2]
    half = (cos if words is None else words).shape[-1]
    w_q, w_k, w_v = weights if len(weights) == 3 else (*weights, weights[1])
    b_q, b_k, b_v = (None,) * 3 if biases is None else biases if len(biases) == 3 else (*biases, biases[1])
    heads = q.shape[1] + k.shape[1] + (v.shape[1] if v is not None else 0)
    v = v if v is not None else k
    a_head = triton.cdiv(head_dim // 2, PAIRS)
    block_k = 256
    arch = arch or architecture(x.device)
    with device_of(x):
        decode_kernel[(heads * a_head,)](
            x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos, sin, words, positions, slots,
            rows, depth, q.shape[1], k.shape[1], rows if words is None else positions.shape[0], scaling,
            x.stride(0), w_q.stride(0), w_k.stride(0), w_v.stride(0),
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            ROWS=MAX_TOKENS, BLOCK_K=block_k, PAIRS=PAIRS, HEAD_DIM=head_dim, HALF=half, PROGRAMS_A_HEAD=a_head,
            EVEN_DEPTH=depth % block_k == 0, INTERLEAVED=interleaved, TABLE=words is None,
            HAS_BIAS=biases is not None, HAS_SLOTS=slots is not None,
            HARDWARE=has_hardware(arch), num_warps=4, num_stages=4,
        )  # fmt: skip
