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
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_launch
from .arguments import Angles, Norms, Projections, present
from .backend import Launch
from .configurations import Configuration, candidates
from .triton_angles import angle, fast_cos_sin, has_hardware, rotate
from .triton_launch import architecture


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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of ``acc`` ``[BLOCK_M, BLOCK_N]`` by ``cos`` and ``sin`` ``[BLOCK_M, NUM_PAIRS]``."""
    GROUPS: tl.constexpr = BLOCK_N // (2 * NUM_PAIRS)
    A_HEAD: tl.constexpr = HEAD_DIM // (2 * NUM_PAIRS)
    if INTERLEAVED:
        pairs = tl.reshape(acc, (BLOCK_M, GROUPS, NUM_PAIRS, 2))
    else:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_M, GROUPS, 2, NUM_PAIRS)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    cos = tl.expand_dims(cos, 1)
    sin = tl.expand_dims(sin, 1)
    if A_HEAD > 1:
        # Partial rotary: of the groups of R columns in a head only the first is rotated.
        is_rotary = (tl.arange(0, GROUPS) % A_HEAD == 0)[None, :, None]
        a, b = rotate(first, second, cos, sin)
        first = tl.where(is_rotary, a, first)
        second = tl.where(is_rotary, b, second)
    else:
        first, second = rotate(first, second, cos, sin)
    pairs = tl.join(first, second)
    if not INTERLEAVED:
        pairs = tl.permute(pairs, (0, 1, 3, 2))
    return tl.reshape(pairs, (BLOCK_M, BLOCK_N))


@triton.jit
def _norm_tile(
    acc, weight, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """RMS norm of each head of ``acc`` ``[BLOCK_M, BLOCK_N]``; ``weight`` is None or points to ``[HEAD_DIM]``."""
    heads = tl.reshape(acc, (BLOCK_M, BLOCK_N // HEAD_DIM, HEAD_DIM))
    # A row of a head is in four neighbouring threads.
    mean = tl.sum(heads * heads, axis=2) * (1.0 / HEAD_DIM)
    heads *= tl.expand_dims(tl.rsqrt(mean + eps), 2)
    if weight is not None:
        heads *= (tl.load(weight + tl.arange(0, HEAD_DIM)).to(tl.float32) + offset)[None, None, :]
    return tl.reshape(heads, (BLOCK_M, BLOCK_N))


@triton.jit
def axis_angle(
    inv_freq_q64, positions, row, known_row, known_pair, axis, period, pair, NUM_PAIRS: tl.constexpr
):  # fmt: skip
    """Angles ``[rows, pairs]`` of the positions of one axis, in 2^-32 revolutions."""
    position = tl.load(positions + axis * period + row, mask=known_row, other=0).to(tl.int32)
    at = inv_freq_q64 + axis * (2 * NUM_PAIRS) + pair
    high = tl.load(at, mask=known_pair, other=0)
    low = tl.load(at + NUM_PAIRS, mask=known_pair, other=0)
    return angle(position[:, None], high[None, :], low[None, :])


@triton.jit
def _angles(
    inv_freq_q64, positions, row, rows, period, scaling,
    NUM_PAIRS: tl.constexpr, AXES: tl.constexpr, SCALED: tl.constexpr, PERIODIC: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """cos and sin ``[BLOCK_M, NUM_PAIRS]`` of the tokens ``row``, whose positions may repeat after ``period``."""
    known = row < rows
    if PERIODIC:
        row = row % period
    revolutions = axis_angle(
        inv_freq_q64, positions, row, known, True, 0, period, tl.arange(0, NUM_PAIRS), NUM_PAIRS
    )
    for axis in tl.static_range(1, AXES):
        more = axis_angle(
            inv_freq_q64, positions, row, known, True, axis, period, tl.arange(0, NUM_PAIRS), NUM_PAIRS
        )
        revolutions = tl.add(revolutions, more, sanitize_overflow=False)
    cos, sin = fast_cos_sin(revolutions, HARDWARE)
    if SCALED:
        cos *= scaling
        sin *= scaling
    return cos, sin


# Compiled once for any number of tokens.
@triton.jit(do_not_specialize=["rows", "period"])
def descriptor_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, inv_freq_q64, positions,
    q_norm, k_norm, rows, depth, n_q, n_k, n_v, period, scaling, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, AXES: tl.constexpr, SCALED: tl.constexpr, PERIODIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_V: tl.constexpr, NORM: tl.constexpr, NORM_AFTER: tl.constexpr,
    HARDWARE: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, which take the tiles in turn. Arguments are in :func:`launch`."""
    q_tiles = tl.cdiv(n_q, BLOCK_N)
    k_tiles = tl.cdiv(n_k, BLOCK_N)
    n_tiles = q_tiles + k_tiles
    if HAS_V:
        n_tiles += tl.cdiv(n_v, BLOCK_N)
    m_tiles = tl.cdiv(rows, BLOCK_M)
    k_steps = tl.cdiv(depth, BLOCK_K)
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0), flatten=False):
        m, n = _tile(tile, m_tiles, n_tiles, GROUP)
        weight = w_q
        out = q
        bias = b_q
        width = n_q
        norm = q_norm
        rotates = True
        # Chosen here, once a tile: a choice inside the loop over the depth would end its pipelining.
        if n >= q_tiles:
            weight = w_k
            out = k
            bias = b_k
            width = n_k
            norm = k_norm
            n -= q_tiles
            if HAS_V and n >= k_tiles:
                weight = w_v
                out = v
                bias = b_v
                width = n_v
                n -= k_tiles
                rotates = False
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(k_steps):
            a = x.load([m * BLOCK_M, step * BLOCK_K])
            b = weight.load([n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        if HAS_BIAS:
            column = n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if rotates:
            if NORM and not NORM_AFTER:
                acc = _norm_tile(acc, norm, eps, offset, BLOCK_M, BLOCK_N, HEAD_DIM)
            if TABLE:
                row = m * BLOCK_M
                if PERIODIC:
                    row = row % period
                cos = cos_table.load([row, 0])
                sin = sin_table.load([row, 0])
            else:
                row = m * BLOCK_M + tl.arange(0, BLOCK_M)
                cos, sin = _angles(
                    inv_freq_q64,
                    positions,
                    row,
                    rows,
                    period,
                    scaling,
                    NUM_PAIRS,
                    AXES,
                    SCALED,
                    PERIODIC,
                    HARDWARE,
                )
            acc = _rotate_tile(acc, cos, sin, BLOCK_M, BLOCK_N, HEAD_DIM, NUM_PAIRS, INTERLEAVED)
            if NORM and NORM_AFTER:
                acc = _norm_tile(acc, norm, eps, offset, BLOCK_M, BLOCK_N, HEAD_DIM)
        if HALVES:
            # One after the other through half the shared memory, which then has room for another stage of the loop.
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([m * BLOCK_M, n * BLOCK_N], left.to(out.dtype))
            out.store([m * BLOCK_M, n * BLOCK_N + BLOCK_N // 2], right.to(out.dtype))
        else:
            out.store([m * BLOCK_M, n * BLOCK_N], acc.to(out.dtype))


# Compiled once for any number of tokens.
@triton.jit(do_not_specialize=["rows", "period"])
def pointer_kernel(
    x, w_q, w_k, w_v, q, k, v, b_q, b_k, b_v, cos_table, sin_table, inv_freq_q64, positions,
    q_norm, k_norm, rows, depth, n_q, n_k, n_v, period, scaling, eps, offset,
    table_stride, x_stride, q_stride, k_stride, v_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, AXES: tl.constexpr, SCALED: tl.constexpr, PERIODIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_V: tl.constexpr, NORM: tl.constexpr, NORM_AFTER: tl.constexpr,
    HARDWARE: tl.constexpr,
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
    norm = q_norm
    if NORM and q_norm is not None:
        norm = tl.where(is_k, k_norm, q_norm)
    n = tl.where(is_k, n - q_tiles, n)
    rotates = True
    if HAS_V:
        is_v = is_k & (n >= k_tiles)
        weight = tl.where(is_v, w_v, weight)
        stride = tl.where(is_v, v_stride, stride)
        out = tl.where(is_v, v, out)
        width = tl.where(is_v, n_v, width)
        if HAS_BIAS:
            bias = tl.where(is_v, b_v, bias)
        n = tl.where(is_v, n - k_tiles, n)
        rotates = is_v == 0

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
    if rotates:
        if NORM and not NORM_AFTER:
            acc = _norm_tile(acc, norm, eps, offset, BLOCK_M, BLOCK_N, HEAD_DIM)
        if TABLE:
            pair = tl.arange(0, NUM_PAIRS)
            source = row % period if PERIODIC else row
            at = source.to(tl.int64)[:, None] * table_stride + pair[None, :]
            known = row[:, None] < rows
            cos = tl.load(cos_table + at, mask=known, other=1.0)
            sin = tl.load(sin_table + at, mask=known, other=0.0)
        else:
            cos, sin = _angles(
                inv_freq_q64,
                positions,
                row,
                rows,
                period,
                scaling,
                NUM_PAIRS,
                AXES,
                SCALED,
                PERIODIC,
                HARDWARE,
            )
        acc = _rotate_tile(acc, cos, sin, BLOCK_M, BLOCK_N, HEAD_DIM, NUM_PAIRS, INTERLEAVED)
        if NORM and NORM_AFTER:
            acc = _norm_tile(acc, norm, eps, offset, BLOCK_M, BLOCK_N, HEAD_DIM)
    out_at = out + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < width))


def fits(head_dim: int, rotary_dim: int) -> bool:
    """Whether a head can be rotated in a tile: powers of two, no more columns than a tile has, and rows of a
    table that descriptors can read."""
    powers = all(n & (n - 1) == 0 for n in (head_dim, rotary_dim))
    return powers and 16 <= rotary_dim <= head_dim <= 256


def fits_tma(x: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether the matrices can be read by descriptors: aligned to 16 bytes in address and row."""
    strides = [token_stride(x), *(weight.stride(0) for weight in weights)]
    return all(
        y.data_ptr() % 16 == 0 and stride * y.element_size() % 16 == 0
        for y, stride in zip((x, *weights), strides, strict=True)
    )


def fits_norms(norms: Norms, head_dim: int) -> bool:
    """Whether norms can be made in a tile: of each head by itself, with contiguous weights of one dtype or without."""
    q_weight, k_weight = norms.weights()
    if q_weight is None or k_weight is None:
        return q_weight is k_weight
    return q_weight.dtype == k_weight.dtype and all(
        w.shape == (head_dim,) and w.stride(0) == 1 for w in (q_weight, k_weight)
    )


def norm_weights(norms: Norms | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of queries and keys; None where there are no norms, or norms without weights."""
    return (None, None) if norms is None else norms.weights()


def has_tma(arch: str, head_dim: int) -> bool:
    """Whether the descriptor kernel is for ``arch``: Hopper, and data-centre Blackwell but for wide heads.

    Other GPUs lack the instructions or, as consumer Blackwell, the shared memory; on sm_100 a tile of 256
    columns spills.
    """
    return arch == "sm_90" or (arch in ("sm_100", "sm_103") and head_dim <= 128)


@functools.cache
def programs(device: torch.device) -> int:
    """Multiprocessors of ``device``; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    outputs: list[torch.Tensor],
    norms: Norms | None = None,
    *,
    tma: bool,
    configuration: Configuration | None = None,
    arch: str | None = None,
    num_programs: int | None = None,
) -> Launch | None:
    """Project ``x`` into ``outputs``, rotating the first two. Checks nothing.

    Args:
        x: ``[B, S, K]`` float16 or bfloat16, not empty, tokens equally far apart, last axis contiguous.
        projections: weights ``[N, K]``, last axis contiguous, and a ``head_dim`` for which :func:`fits` holds.
        angles: tables ``[B or 1, S, R/2]``, float32, rows equally far apart and aligned to 16 bytes; or contiguous
            ``inv_freq_q64`` and positions ``[B or 1, S]``, or of several axes. Those of one row serve every batch.
        outputs: contiguous ``[B, S, heads, head_dim]`` for each weight.
        norms: of each head of queries and keys, for which :func:`fits_norms` holds.
        tma: which kernel; needs :func:`fits_tma`, and of tables a row a token or a multiple of the tile's rows.
        configuration: how it is compiled; None: as it is unmeasured.
        arch, num_programs: instead of those of the device of ``x``.

    Returns:
        What does the same again, called as ``launch(x, projections, angles, outputs, norms)``.
    """
    weights, biases, head_dim = projections.weights(), projections.biases(), projections.head_dim
    rows, depth = x.shape[0] * x.shape[1], x.shape[2]
    arch = arch or architecture(x.device)
    if configuration is None:
        configuration = candidates(
            "triton_tma" if tma else "triton", arch, head_dim, rows, norms is not None
        )[0]
    if head_dim > 128 or norms is not None or angles.axes > 1:
        configuration = configuration._replace(maxnreg=None)
    block_m, block_n, block_k = configuration[:3]
    widths = [weight.shape[0] for weight in weights] + [0] * (3 - len(weights))
    tiles = triton.cdiv(rows, block_m) * sum(triton.cdiv(width, block_n) for width in widths)
    period = angle_rows(angles)
    options = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": configuration.group,
        "HEAD_DIM": head_dim, "NUM_PAIRS": angles.num_pairs, "INTERLEAVED": angles.interleaved,
        "TABLE": angles.cos is not None, "AXES": angles.axes, "SCALED": angles.scaling != 1.0,
        "PERIODIC": period != rows, "HAS_BIAS": biases is not None, "HAS_V": len(weights) == 3,
        "HARDWARE": has_hardware(arch), "NORM": norms is not None, "NORM_AFTER": norms is not None and norms.norm_after,
        **configuration.compiled(),
    }  # fmt: skip
    eps, offset = (norms.eps, norms.weight_offset) if norms is not None else (0.0, 0.0)
    numbers = (rows, depth, *widths, period, angles.scaling, eps, offset)
    tensors = (x, projections, angles, outputs, norms)
    if not tma:
        options["EVEN_DEPTH"] = depth % block_k == 0
        numbers += (table_stride(angles), token_stride(x), *three([weight.stride(0) for weight in weights]))

        def pack(x, projections, angles, outputs, norms=None) -> tuple[Any, ...]:
            weights, biases = three(projections.weights()), three(projections.biases())
            return x, *weights, *three(outputs), *biases, *angles[:4], *norm_weights(norms), *numbers

        return triton_launch.launch(pointer_kernel, tiles, x.device, pack, tensors, options)

    options["HALVES"] = configuration.halves
    stored = (block_m, block_n // 2 if configuration.halves else block_n)
    read_x = Descriptor(x, (rows, depth), token_stride(x), (block_m, block_k))
    read = [Descriptor(w, w.shape, w.stride(0), (block_n, block_k)) for w in weights]
    write = [Descriptor(y, (rows, n), n, stored) for y, n in zip(outputs, widths, strict=False)]
    table = Descriptor(
        angles.cos, (period, angles.num_pairs), table_stride(angles), (block_m, angles.num_pairs)
    )

    def describe(x, projections, angles, outputs, norms=None) -> tuple[Any, ...]:
        loads = three([make(weight) for make, weight in zip(read, projections.weights(), strict=True)])
        stores = three([make(output) for make, output in zip(write, outputs, strict=True)])
        tables = (table(angles.cos), table(angles.sin), *angles[2:4])
        rest = (*norm_weights(norms), *numbers)
        return read_x(x), *loads, *stores, *three(projections.biases()), *tables, *rest

    grid = min(num_programs or programs(x.device), tiles)
    return triton_launch.launch(descriptor_kernel, grid, x.device, describe, tensors, options)


class Descriptor:
    """Makes tensor descriptors of matrices that differ in their address only."""

    def __init__(self, base: torch.Tensor | None, shape, row_stride: int, block) -> None:
        self.fields = None
        if base is not None:
            made = TensorDescriptor(base, list(shape), [row_stride, 1], list(block))
            self.fields = {name: value for name, value in vars(made).items() if name != "base"}

    def __call__(self, base: torch.Tensor | None) -> TensorDescriptor | None:
        if self.fields is None:
            return None
        # Its own constructor would check again what holds for every such matrix.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.__dict__ = {**self.fields, "base": base}
        return descriptor


def three(items: list | None) -> tuple:
    """``items`` of queries, keys and values; keys stand in for values that are left out, and None for all."""
    return (None,) * 3 if items is None else tuple(items) if len(items) == 3 else (*items, items[1])


def token_stride(x: torch.Tensor) -> int:
    """Elements between the tokens of ``x`` ``[B, S, K]``."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def table_stride(angles: Angles) -> int:
    """Elements between the rows of the tables; 0 where there are none."""
    return 0 if angles.cos is None else token_stride(angles.cos)


def angle_rows(angles: Angles) -> int:
    """Tokens that ``angles`` has a row for."""
    if angles.cos is not None:
        return angles.cos.shape[0] * angles.cos.shape[1]
    positions = present(angles.positions)
    return positions.shape[-2] * positions.shape[-1]
