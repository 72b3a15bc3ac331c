"""Attention by two rotations of a few queries over all cached keys, each of which is read once.

Cached keys are rotated by the trained frequencies. A block of them is multiplied by the near queries as it is, rotated
on in registers to its angles beyond the window, and multiplied by the far queries; each logit is taken from one of the
two by its distance. The far queries are made by the kernel too. Decoding is bound by reading keys and values: the
keys of one head are split over programs (flash-decoding), and a second kernel merges what they found by its
log-sum-exp. A program has all query heads and tokens that share a key head, padded to 16 rows, the least the tensor
cores take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch_cache, triton_launch
from .backend import Launch
from .triton_angles import angle, fast_cos_sin, has_hardware, rotate
from .triton_launch import architecture, head_strides, row_strides
from .triton_projection import programs as multiprocessors
from .window_angles import WindowAngles

MAX_SPLITS = 128
LEAST_KEYS = 256
"""Of a split: fewer do not pay for the merge."""
WAVES = 2
"""Programs a multiprocessor that the keys are split for: as many as its shared memory takes at once."""

REVOLUTIONS = tl.constexpr(683565275.5764316)  # 2^32 / (2 pi)
LOG2_E = 1.4426950408889634


@triton.jit
def _far_cos_sin(position, steps, inv_freq, high, low, HARDWARE: tl.constexpr):
    """cos and sin ``[N, P]`` of ``steps * change``, int32 ``[N]`` times frequencies ``[P]``, plus what the float32
    product ``position * inv_freq``, by which the model rotated, lacks of the angle."""
    revolutions = angle(steps[:, None], high[None, :], low[None, :])
    place = position.to(tl.float32)[:, None]
    lacking = tl.fma(place, inv_freq[None, :], -(place * inv_freq[None, :]))
    revolutions = tl.add(revolutions, (lacking * REVOLUTIONS).to(tl.int32), sanitize_overflow=False)
    return fast_cos_sin(revolutions, HARDWARE)


@triton.jit
def _pairs(
    at, here, FIRST: tl.constexpr, NUM_PAIRS: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second members of the pairs of the rows at ``at`` ``[N, 1]``; interleaved ones are together in both."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * WIDTH)[None, :]
        first = tl.load(at + FIRST + column, mask=here & (column < 2 * NUM_PAIRS), other=0.0)
        second = first
    else:
        column = tl.arange(0, WIDTH)[None, :]
        mask = here & (column < NUM_PAIRS)
        first = tl.load(at + FIRST + column, mask=mask, other=0.0)
        second = tl.load(at + FIRST + NUM_PAIRS + column, mask=mask, other=0.0)
    return first, second


@triton.jit
def _rotated(first, second, cos, sin, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """:func:`_pairs` rotated on, in their dtype."""
    dtype = first.dtype
    if INTERLEAVED:
        a, b = tl.split(tl.reshape(first.to(tl.float32), (ROWS, WIDTH, 2)))
        a, b = rotate(a, b, cos, sin)
        first = tl.reshape(tl.join(a, b), (ROWS, 2 * WIDTH)).to(dtype)
        second = first
    else:
        a, b = rotate(first.to(tl.float32), second.to(tl.float32), cos, sin)
        first = a.to(dtype)
        second = b.to(dtype)
    return first, second


@triton.jit
def _products(
    q_first, q_second, k_first, k_second, total, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr
):
    total = tl.dot(q_first, tl.trans(k_first), total, input_precision=PRECISION)
    if not INTERLEAVED:
        total = tl.dot(q_second, tl.trans(k_second), total, input_precision=PRECISION)
    return total


# Compiled once for any number of keys. Strides are in units of VEC: see triton_launch.head_strides.
@triton.jit(do_not_specialize=[
    "queries", "keys", "key_heads", "split_keys", "splits", "window", "steps_of_window", "group", "scale",
    "near_scaling", "far_scaling", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "v_b", "v_h", "v_t", "seen_b", "seen_q",
    "pos_b", "key_b",
])  # fmt: skip
def window_decode_kernel(
    q, k, v, out, part, part_lse, seen, positions, key_positions, inv_freq, change_q64,
    queries, keys, key_heads, split_keys, splits, window, steps_of_window, group, scale, near_scaling, far_scaling,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, seen_b, seen_q, pos_b, key_b,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, NUM_PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, REST: tl.constexpr, REST_WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    VEC: tl.constexpr, INTERLEAVED: tl.constexpr, GROUPED: tl.constexpr, HAS_MASK: tl.constexpr,
    WHOLE: tl.constexpr, HARDWARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: ``(batch * key_heads + key head) * splits + split``. Arguments are in :func:`launch`."""
    program = tl.program_id(0)
    split = program % splits
    batch = (program // splits // key_heads).to(tl.int64)
    key_head = ((program // splits) % key_heads).to(tl.int64)

    row = tl.arange(0, ROWS)
    token = row // GROUPS
    known = token < queries
    head = key_head * GROUPS + row % GROUPS
    pair = tl.arange(0, WIDTH)
    frequency = tl.load(inv_freq + pair, mask=pair < NUM_PAIRS, other=0.0)
    high = tl.load(change_q64 + pair, mask=pair < NUM_PAIRS, other=0)
    low = tl.load(change_q64 + NUM_PAIRS + pair, mask=pair < NUM_PAIRS, other=0)

    position = tl.load(positions + batch * pos_b + token, mask=known, other=0).to(tl.int32)
    steps = position
    if GROUPED:
        steps = position // group - position
    q_at = q + (batch * q_b + head * q_h + token.to(tl.int64) * q_t)[:, None] * VEC
    q_first, q_second = _pairs(q_at, known[:, None], FIRST, NUM_PAIRS, WIDTH, INTERLEAVED)
    q_cos, q_sin = _far_cos_sin(position, steps - steps_of_window, frequency, high, low, HARDWARE)
    far_first, far_second = _rotated(
        q_first, q_second, q_cos * far_scaling, q_sin * far_scaling, INTERLEAVED, ROWS, WIDTH
    )
    q_first = (q_first.to(tl.float32) * near_scaling).to(q.dtype.element_ty)
    q_second = (q_second.to(tl.float32) * near_scaling).to(q.dtype.element_ty)
    # What is not rotated stands behind what is, or before it.
    REST_FIRST: tl.constexpr = 2 * NUM_PAIRS if FIRST == 0 else 0
    rest = tl.arange(0, REST_WIDTH)[None, :]
    if REST > 0:
        q_rest = tl.load(q_at + REST_FIRST + rest, mask=known[:, None] & (rest < REST), other=0.0)

    column = tl.arange(0, V_WIDTH)[None, :]
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, V_WIDTH), tl.float32)
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, keys)
    for start in range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        here = key < end
        entry = key.to(tl.int64)[:, None]
        k_at = k + (batch * k_b + key_head * k_h + entry * k_t) * VEC
        k_first, k_second = _pairs(k_at, here[:, None], FIRST, NUM_PAIRS, WIDTH, INTERLEAVED)
        v_at = v + (batch * v_b + key_head * v_h + entry * v_t) * VEC
        value = tl.load(v_at + column, mask=here[:, None] & (column < V_DIM), other=0.0)
        key_position = tl.load(key_positions + batch * key_b + key, mask=here, other=0).to(tl.int32)

        near = tl.zeros((ROWS, BLOCK), tl.float32)
        if REST > 0:
            k_rest = tl.load(k_at + REST_FIRST + rest, mask=here[:, None] & (rest < REST), other=0.0)
            near = tl.dot(q_rest, tl.trans(k_rest), near, input_precision=PRECISION)
        far = near
        near = _products(q_first, q_second, k_first, k_second, near, INTERLEAVED, PRECISION)
        key_steps = key_position
        if GROUPED:
            key_steps = key_position // group - key_position
        cos, sin = _far_cos_sin(key_position, key_steps, frequency, high, low, HARDWARE)
        k_first, k_second = _rotated(k_first, k_second, cos, sin, INTERLEAVED, BLOCK, WIDTH)
        far = _products(far_first, far_second, k_first, k_second, far, INTERLEAVED, PRECISION)

        logits = tl.where(position[:, None] - key_position[None, :] < window, near, far) * scale
        if HAS_MASK:
            at = seen + batch * seen_b + token.to(tl.int64)[:, None] * seen_q + key[None, :]
            visible = tl.load(at, mask=known[:, None] & here[None, :], other=0) != 0
        else:
            visible = here[None, :] & (key[None, :] <= (keys - queries + token)[:, None])
        logits = tl.where(visible, logits, float("-inf"))

        new_most = tl.maximum(most, tl.max(logits, axis=1))
        # Of a row that has seen no key yet every exponential is 0.
        shift = tl.where(new_most == float("-inf"), 0.0, new_most)
        weight = tl.exp2(logits - shift[:, None])
        before = tl.exp2(most - shift)
        total = total * before + tl.sum(weight, axis=1)
        result = tl.dot(weight.to(value.dtype), value, result * before[:, None], input_precision=PRECISION)
        most = new_most

    result = result / tl.where(total > 0, total, 1.0)[:, None]
    if WHOLE:
        at = out + ((batch * queries + token) * (key_heads * GROUPS) + head)[:, None] * V_DIM + column
        tl.store(at, result.to(out.dtype.element_ty), mask=known[:, None] & (column < V_DIM))
    else:
        at = (program.to(tl.int64) * ROWS + row)[:, None] * V_WIDTH + column
        tl.store(part + at, result, mask=known[:, None] & (column < V_DIM))
        lse = tl.where(total > 0, most + tl.log2(total), float("-inf"))
        tl.store(part_lse + program.to(tl.int64) * ROWS + row, lse, mask=known)


@triton.jit(do_not_specialize=["queries", "key_heads", "splits"])
def window_merge_kernel(
    part, part_lse, out, queries, key_heads, splits,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, MOST: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: ``(batch * key_heads + key head) * queries * GROUPS + row``: the splits of a row become its output."""
    program = tl.program_id(0)
    rows = queries * GROUPS
    row = program % rows
    first = (program // rows).to(tl.int64) * splits * ROWS + row
    split = tl.arange(0, MOST)
    lse = tl.load(part_lse + first + split * ROWS, mask=split < splits, other=float("-inf"))
    most = tl.max(lse, axis=0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(lse - most), axis=0)
    column = tl.arange(0, V_WIDTH)[None, :]
    result = tl.zeros((CHUNK, V_WIDTH), tl.float32)
    for start in range(0, splits, CHUNK):
        one = start + tl.arange(0, CHUNK)
        here = one < splits
        weight = tl.exp2(tl.load(part_lse + first + one * ROWS, mask=here, other=float("-inf")) - most)
        at = part + (first + one * ROWS)[:, None] * V_WIDTH + column
        result += weight[:, None] * tl.load(at, mask=here[:, None] & (column < V_DIM), other=0.0)
    result = tl.sum(result, axis=0)[None, :] / tl.where(total > 0, total, 1.0)
    batch = (program // rows // key_heads).to(tl.int64)
    head = (program // rows % key_heads) * GROUPS + row % GROUPS
    at = out + ((batch * queries + row // GROUPS) * (key_heads * GROUPS) + head) * V_DIM + column
    tl.store(at, result.to(out.dtype.element_ty), mask=column < V_DIM)


def blocks(rows: int, head_dim: int, arch: str) -> dict[str, int]:
    """Keys at a time, warps and stages; ``head_dim`` is the larger one of keys and values.

    Rotated in registers, 64 keys at a time spill. A stage of 32, or of 16 of wide heads, has 16 KB of keys and values
    in 16 bits: with three, two programs share a multiprocessor. AMD has 64 KB of shared memory.
    """
    block = 16 if head_dim > 128 else 32
    return {
        "BLOCK": block,
        "num_warps": 8 if rows > 16 else 4,
        "num_stages": 2 if arch.startswith("gfx") else 3,
    }


def split(keys: int, programs: int, waves: int, block: int) -> tuple[int, int]:
    """Keys of a split, a multiple of ``block``, and the number of splits.

    Args:
        programs: without splits; ``waves``: those that run at once.
    """
    wanted = min(MAX_SPLITS, max(1, waves // programs), triton.cdiv(keys, LEAST_KEYS))
    of_a_split = triton.cdiv(triton.cdiv(keys, wanted), block) * block
    return of_a_split, triton.cdiv(keys, of_a_split)


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int) -> list[torch.Tensor]:
    """What splits are written to: outputs ``[programs, rows, width]`` and log-sum-exps, to base 2."""
    programs, rows = k.shape[0] * k.shape[1] * splits, padded_rows(q, k)
    shapes = (programs, rows, triton.next_power_of_2(v.shape[3])), (programs, rows)
    return [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]


def padded_rows(q: torch.Tensor, k: torch.Tensor) -> int:
    """Rows of a program: queries and heads that share a key head, at least 16."""
    return max(16, triton.next_power_of_2(q.shape[1] // k.shape[1] * q.shape[2]))


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    seen: torch.Tensor | None,
    angles: WindowAngles,
    scale: float,
) -> None:
    """Attention by as many splits as fill the GPU, merged into ``out``; arguments as of :func:`launch`.

    What was compiled for earlier calls is launched again without Triton's preparations, whatever the sizes are.
    """
    rows, arch = padded_rows(q, k), architecture(q.device)
    block = blocks(rows, max(k.shape[3], v.shape[3]), arch)["BLOCK"]
    splits = split(k.shape[2], k.shape[0] * k.shape[1], WAVES * multiprocessors(q.device), block)
    scratch = parts(q, k, v, splits[1]) if splits[1] > 1 else []
    pointers = (q, k, v, out, *scratch, *(() if seen is None else (seen,)), *angles[:4])
    key = (
        "window_decode", rows, q.shape[1] // k.shape[1], k.shape[3], v.shape[3], angles.inv_freq.shape,
        angles.first, angles.interleaved, angles.group > 0, seen is None, len(scratch), q.device,
        triton_launch.common_vector(q, k, v), max(max(x.stride()) for x in (q, k, v)) >= 2**31,
        *((x.dtype, x.data_ptr() % 16) for x in pointers),
    )  # fmt: skip
    _launched(key, launch, (q, k, v, out, scratch, seen, angles, scale, splits))
    if scratch:
        _launched((*key, "merge"), launch_merge, (scratch, out, k.shape[1], splits[1]))


def _launched(key: launch_cache.Key, first: Callable[..., Launch | None], tensors: tuple[Any, ...]) -> None:
    known = launch_cache.get(key)
    if known is not None:
        known(*tensors)
    else:
        launch_cache.put(key, first(*tensors))


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scratch: list[torch.Tensor],
    seen: torch.Tensor | None,
    angles: WindowAngles,
    scale: float,
    splits: tuple[int, int],
    arch: str | None = None,
) -> Launch | None:
    """Attention of each split of the keys. Checks nothing.

    Args:
        q, k, v: ``[B, H, S, D]``, ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, for which ``has_window_decode`` is so.
        out: ``[B, S, H, Dv]`` contiguous, written where there is one split.
        scratch: of :func:`parts`, written where there are several; else empty.
        seen: ``[B or 1, S, T]`` uint8, not 0 where a query sees a key; None: by the order of the tokens.
        splits: of :func:`split`.
        arch: instead of that of the device.

    Returns:
        What does the same again for other tensors and splits that differ in sizes, as
        ``launch(q, k, v, out, scratch, seen, angles, scale, splits)``.
    """
    arch = arch or architecture(q.device)
    head_dim, v_dim, num_pairs = k.shape[3], v.shape[3], angles.inv_freq.shape[0]
    rows, rest = padded_rows(q, k), head_dim - 2 * num_pairs
    groups, vec = q.shape[1] // k.shape[1], triton_launch.common_vector(q, k, v)
    low = q.dtype != torch.float32
    options = {
        "GROUPS": groups, "ROWS": rows, "FIRST": angles.first, "NUM_PAIRS": num_pairs,
        "WIDTH": max(16, triton.next_power_of_2(num_pairs)), "REST": rest,
        "REST_WIDTH": max(16, triton.next_power_of_2(max(rest, 1))), "V_DIM": v_dim,
        "V_WIDTH": max(16, triton.next_power_of_2(v_dim)), "VEC": vec, "INTERLEAVED": angles.interleaved,
        "GROUPED": angles.group > 0, "HAS_MASK": seen is not None, "WHOLE": not scratch,
        "HARDWARE": low and has_hardware(arch), "PRECISION": "tf32" if low else "ieee",
        **blocks(rows, max(head_dim, v_dim), arch),
    }  # fmt: skip

    def pack(q, k, v, out, scratch, seen, angles, scale, splits) -> tuple[Any, ...]:
        of_window = angles.window // angles.group - angles.window if angles.group else angles.window
        strides = [number for x in (q, k, v) for number in head_strides(x, vec)[:3]]
        return (
            q, k, v, out, *(scratch or (None, None)), seen, angles.positions, angles.key_positions, angles.inv_freq,
            angles.change_q64, q.shape[2], k.shape[2], k.shape[1], *splits, angles.window, of_window, angles.group,
            scale * LOG2_E, angles.near_scaling, angles.far_scaling, *strides, *row_strides(seen),
            row_strides(angles.positions)[0], row_strides(angles.key_positions)[0],
        )  # fmt: skip

    def programs(q, k, v, out, scratch, seen, angles, scale, splits) -> int:
        return k.shape[0] * k.shape[1] * splits[1]

    tensors = (q, k, v, out, scratch, seen, angles, scale, splits)
    return triton_launch.launch(window_decode_kernel, programs, q.device, pack, tensors, options)


def launch_merge(
    scratch: list[torch.Tensor], out: torch.Tensor, key_heads: int, splits: int
) -> Launch | None:
    """Merge the splits that :func:`launch` wrote into ``out`` ``[B, S, H, Dv]``, contiguous; otherwise as that."""
    _, rows, width = scratch[0].shape
    options = {
        "GROUPS": out.shape[2] // key_heads, "ROWS": rows, "V_DIM": out.shape[3], "V_WIDTH": width,
        "MOST": MAX_SPLITS, "CHUNK": 8, "num_warps": 4,
    }  # fmt: skip

    def pack(scratch, out, key_heads, splits) -> tuple[Any, ...]:
        return *scratch, out, out.shape[1], key_heads, splits

    def programs(scratch, out, key_heads, splits) -> int:
        return out.shape[0] * out.shape[1] * out.shape[2]

    tensors = (scratch, out, key_heads, splits)
    return triton_launch.launch(window_merge_kernel, programs, out.device, pack, tensors, options)
