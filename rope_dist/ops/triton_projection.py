"""Query, key and value projection with the rotation in the epilogue: one launch for all three weights.

The float32 accumulator of a tile holds whole heads. In the tensor cores' layout the two members of a
half-split pair are in one thread, so pairing and rotating them moves nothing between threads; the result
is rounded once. The three weights stay as they are: a tile's index chooses which one it reads.

Two kernels: tensor descriptors (TMA) and a persistent loop for Hopper and later; pointers before it and
for AMD. On Triton 3.6 a descriptor kernel that is not persistent has its tensor-core instructions
serialised, and with descriptors on Ampere the copies are no longer asynchronous.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_angles import angle, fast_cos_sin, has_hardware, rotate
from .triton_rotary import architecture, device_of


@triton.jit
def _tile(index, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Row and column of a tile; ``GROUP`` rows share the columns' weights while those are in the cache."""
    group = index // (GROUP * n_tiles)
    rows = tl.minimum(m_tiles - group * GROUP, GROUP)
    within = index % (GROUP * n_tiles)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _rotate_tile(
    acc, cos, sin,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of ``acc`` ``[BLOCK_M, BLOCK_N]`` by ``cos`` and ``sin`` ``[BLOCK_M, HALF]``."""
    GROUPS: tl.constexpr = BLOCK_N // (2 * HALF)
    A_HEAD: tl.constexpr = HEAD_DIM // (2 * HALF)
    if INTERLEAVED:
        pairs = tl.reshape(acc, (BLOCK_M, GROUPS, HALF, 2))
    else:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_M, GROUPS, 2, HALF)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    cos = tl.expand_dims(cos, 1)
    sin = tl.expand_dims(sin, 1)
    if A_HEAD > 1:
        # Partial rotary: of the groups of R columns in a head only the first turns.
        turned = (tl.arange(0, GROUPS) % A_HEAD == 0)[None, :, None]
        a, b = rotate(first, second, cos, sin)
        first = tl.where(turned, a, first)
        second = tl.where(turned, b, second)
    else:
        first, second = rotate(first, second, cos, sin)
    pairs = tl.join(first, second)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, (0, 1, 3, 2))
    return tl.reshape(pairs, (BLOCK_M, BLOCK_N))


@triton.jit
def _angles(
    words,
    positions,
    row,
    rows,
    period,
    scaling,
    HALF: tl.constexpr,
    SCALED: tl.constexpr,
    PERIODIC: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """cos and sin ``[BLOCK_M, HALF]`` of the tokens ``row``, whose positions may repeat after ``period``."""
    known = row < rows
    if PERIODIC:
        row = row % period
    position = tl.load(positions + row, mask=known, other=0).to(tl.int32)
    pair = tl.arange(0, HALF)
    high = tl.load(words + pair)
    low = tl.load(words + HALF + pair)
    cos, sin = fast_cos_sin(angle(position[:, None], high[None, :], low[None, :]), HARDWARE)
    if SCALED:
        cos *= scaling
        sin *= scaling
    return cos, sin


@triton.jit
def descriptor_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, words, positions,
    rows, depth, n_q, n_k, n_v, period, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, SCALED: tl.constexpr, PERIODIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_V: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid: ``PROGRAMS``, each taking every ``PROGRAMS``-th tile. Arguments are in :func:`launch`."""
    q_tiles = tl.cdiv(n_q, BLOCK_N)
    k_tiles = tl.cdiv(n_k, BLOCK_N)
    n_tiles = q_tiles + k_tiles
    if HAS_V:
        n_tiles += tl.cdiv(n_v, BLOCK_N)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    k_steps = tl.cdiv(depth, BLOCK_K)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, PROGRAMS, flatten=False):
        m, n = _tile(tile, m_tiles, n_tiles, GROUP)
        weight = w_q
        out = q
        bias = b_q
        width = n_q
        turns = True
        # Chosen here, once a tile: a choice inside the loop over the depth would end its pipelining.
        if n >= q_tiles:
            weight = w_k
            out = k
            bias = b_k
            width = n_k
            n -= q_tiles
            if HAS_V and n >= k_tiles:
                weight = w_v
                out = v
                bias = b_v
                width = n_v
                n -= k_tiles
                turns = False
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(k_steps):
            a = x.load([m * BLOCK_M, step * BLOCK_K])
            b = weight.load([n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        if HAS_BIAS:
            column = n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if turns:
            if TABLE:
                cos = cos_table.load([m * BLOCK_M, 0])
                sin = sin_table.load([m * BLOCK_M, 0])
            else:
                row = m * BLOCK_M + tl.arange(0, BLOCK_M)
                cos, sin = _angles(
                    words, positions, row, rows, period, scaling, HALF, SCALED, PERIODIC, HARDWARE
                )
            acc = _rotate_tile(acc, cos, sin, BLOCK_M, BLOCK_N, HEAD_DIM, HALF, INTERLEAVED)
        out.store([m * BLOCK_M, n * BLOCK_N], acc.to(out.dtype))


@triton.jit
def pointer_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, words, positions,
    rows, depth, n_q, n_k, n_v, period, scaling, x_stride, q_stride, k_stride, v_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, SCALED: tl.constexpr, PERIODIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_V: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid: one program a tile. ``q_stride`` and its like are the weights' row strides."""
    q_tiles = tl.cdiv(n_q, BLOCK_N)
    k_tiles = tl.cdiv(n_k, BLOCK_N)
    n_tiles = q_tiles + k_tiles
    if HAS_V:
        n_tiles += tl.cdiv(n_v, BLOCK_N)
    m, n = _tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M), n_tiles, GROUP)
    # where, not if: through a branch the compiler forgets that the addresses are multiples of 16.
    is_k = n >= q_tiles
    weight = tl.where(is_k, w_k, w_q)
    stride = tl.where(is_k, k_stride, q_stride)
    out = tl.where(is_k, k, q)
    width = tl.where(is_k, n_k, n_q)
    if HAS_BIAS:
        bias = tl.where(is_k, b_k, b_q)
    n = tl.where(is_k, n - q_tiles, n)
    turns = True
    if HAS_V:
        is_v = is_k & (n >= k_tiles)
        weight = tl.where(is_v, w_v, weight)
        stride = tl.where(is_v, v_stride, stride)
        out = tl.where(is_v, v, out)
        width = tl.where(is_v, n_v, width)
        if HAS_BIAS:
            bias = tl.where(is_v, b_v, bias)
        n = tl.where(is_v, n - k_tiles, n)
        turns = is_v == 0

    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end wrap to ones that exist: read, never stored, and no mask in the loop.
    a_at = x + (row % rows).to(tl.int64)[:, None] * x_stride + inner[None, :]
    b_at = weight + (column % width).to(tl.int64)[None, :] * stride + inner[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(depth, BLOCK_K)):
        if EVEN_DEPTH:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            left = depth - step * BLOCK_K
            a = tl.load(a_at, mask=inner[None, :] < left, other=0.0)
            b = tl.load(b_at, mask=inner[:, None] < left, other=0.0)
        acc = tl.dot(a, b, acc)
        a_at += BLOCK_K
        b_at += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if turns:
        if TABLE:
            pair = tl.arange(0, HALF)
            at = row.to(tl.int64)[:, None] * HALF + pair[None, :]
            known = row[:, None] < rows
            cos = tl.load(cos_table + at, mask=known, other=1.0)
            sin = tl.load(sin_table + at, mask=known, other=0.0)
        else:
            cos, sin = _angles(words, positions, row, rows, period, scaling, HALF, SCALED, PERIODIC, HARDWARE)
        acc = _rotate_tile(acc, cos, sin, BLOCK_M, BLOCK_N, HEAD_DIM, HALF, INTERLEAVED)
    out_at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < width))


def fits(head_dim: int, rotary_dim: int) -> bool:
    """Whether a head can be rotated in a tile: powers of two, no more columns than a tile has, and rows of a
    table that descriptors can read."""
    powers = all(n & (n - 1) == 0 for n in (head_dim, rotary_dim))
    return powers and 16 <= rotary_dim <= head_dim <= 256


def fits_descriptors(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the matrices can be read by descriptors: aligned to 16 bytes in address and row."""
    return all(
        y.data_ptr() % 16 == 0 and y.stride(0) * y.element_size() % 16 == 0 and y.shape[0] * y.shape[1] > 0
        for y in (x, *weights)
    )


def has_descriptors(arch: str, head_dim: int) -> bool:
    """Whether the descriptor kernel is for ``arch``: Hopper, and data-centre Blackwell but for wide heads.

    Other GPUs lack the instructions or, as consumer Blackwell, the shared memory; on sm_100 a tile of 256
    columns spills.
    """
    return arch == "sm_90" or (arch in ("sm_100", "sm_103") and head_dim <= 128)


def configuration(arch: str, descriptors: bool, head_dim: int) -> dict[str, object]:
    """Block, warps and stages for ``arch``, which the static gate holds to."""
    if descriptors and arch == "sm_90":
        return {"block": (128, 256, 64), "num_warps": 8, "num_stages": 3}
    if descriptors:
        return {"block": (128, 128, 64), "num_warps": 8, "num_stages": 4}
    rows = 64 if head_dim > 128 else 128
    if arch.startswith("gfx"):
        return {"block": (rows, max(128, head_dim), 64), "num_warps": 4, "num_stages": 2}
    return {"block": (rows, max(128, head_dim), 32), "num_warps": 8, "num_stages": 4}


@functools.cache
def programs(device: torch.device) -> int:
    """Multiprocessors of ``device``; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor, ...] | None,
    outputs: tuple[torch.Tensor, ...],
    *,
    head_dim: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
    descriptors: bool = True,
    arch: str | None = None,
    num_programs: int | None = None,
) -> None:
    """Project ``x`` by two or three weights into ``outputs``, rotating the first two. Checks nothing.

    Args:
        x: ``[M, K]`` float16 or bfloat16, last axis contiguous, M and K positive.
        weights: of queries, keys and, unless it is left out, values: ``[N, K]`` each, last axis contiguous,
            N a multiple of ``head_dim``.
        biases: one ``[N]`` for each weight, or None.
        outputs: contiguous ``[M, N]`` for each weight.
        head_dim: for which :func:`fits` holds.
        cos, sin: ``[M, R/2]`` float32, contiguous.
        words: instead, ``[2, R/2]`` int32 from :func:`rope_dist.ops.turns`, with ``positions`` ``[M]`` or, for
            batches that share them, ``[S]`` integers, contiguous.
        descriptors: which kernel; needs :func:`fits_descriptors`.
        arch, num_programs: instead of those of the device of ``x``.
    """
    rows, depth = x.shape
    half = (cos if words is None else words).shape[-1]
    has_v = len(weights) == 3
    arch = arch or architecture(x.device)
    tuned = configuration(arch, descriptors, head_dim)
    block_m, block_n, block_k = tuned["block"]
    widths = [weight.shape[0] for weight in weights] + [0] * (3 - len(weights))
    tiles = triton.cdiv(rows, block_m) * sum(triton.cdiv(width, block_n) for width in widths)
    w_q, w_k, w_v = weights if has_v else (*weights, weights[1])
    q, k, v = outputs if has_v else (*outputs, outputs[1])
    b_q, b_k, b_v = (None,) * 3 if biases is None else biases if has_v else (*biases, biases[1])
    table = words is None
    period = rows if table else positions.shape[0]
    common = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": 8,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "INTERLEAVED": interleaved,
        "TABLE": table,
        "SCALED": scaling != 1.0,
        "PERIODIC": period != rows,
        "HAS_BIAS": biases is not None,
        "HAS_V": has_v,
        "HARDWARE": has_hardware(arch),
        # Left alone the compiler takes up to 212 for a longer schedule; at 192 it spills nothing either.
        **({"maxnreg": 192} if descriptors and arch == "sm_90" and head_dim <= 128 else {}),
        "num_warps": tuned["num_warps"],
        "num_stages": tuned["num_stages"],
    }
    with device_of(x):
        if descriptors:
            count = min(num_programs or programs(x.device), tiles)
            load = [TensorDescriptor.from_tensor(w, [block_n, block_k]) for w in (w_q, w_k, w_v)]
            store = [TensorDescriptor.from_tensor(y, [block_m, block_n]) for y in (q, k, v)]
            tables = [TensorDescriptor.from_tensor(t, [block_m, half]) if table else None for t in (cos, sin)]
            descriptor_kernel[(count,)](
                TensorDescriptor.from_tensor(x, [block_m, block_k]), *load, *store, b_q, b_k, b_v, *tables,
                words, positions, rows, depth, *widths, period, scaling,
                PROGRAMS=count, **common,
            )  # fmt: skip
        else:
            pointer_kernel[(tiles,)](
                x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos, sin, words, positions,
                rows, depth, *widths, period, scaling,
                x.stride(0), w_q.stride(0), w_k.stride(0), w_v.stride(0),
                EVEN_DEPTH=depth % block_k == 0, **common,
            )  # fmt: skip
