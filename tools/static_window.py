"""Cases of the static gate: decoding with a window."""

from __future__ import annotations

import torch

from rope_dist.ops import triton_window
from rope_dist.ops.window_angles import WindowAngles

from .static_case import BF16, Case, meta

KEYS = 8192


def _decode(
    heads,
    key_heads,
    head_dim,
    *,
    queries=1,
    rotary_dim=None,
    dtype=BF16,
    mask=False,
    splits=(512, 16),
    **order,
):
    def call(arch: str) -> None:
        sizes = (heads, queries), (key_heads, KEYS), (key_heads, KEYS)
        q, k, v = (meta(1, *size, head_dim, dtype=dtype) for size in sizes)
        out = meta(1, queries, heads, head_dim, dtype=dtype)
        pairs = (rotary_dim or head_dim) // 2
        angles = WindowAngles(
            meta(1, queries, dtype=torch.int64),
            meta(1, KEYS, dtype=torch.int64),
            meta(pairs, dtype=torch.float32),
            meta(2, pairs, dtype=torch.int32),
            1024,
            **order,
        )
        rows = triton_window.padded_rows(q, k)
        programs = key_heads * splits[1]
        shapes = ((programs, rows, 2 * max(8, head_dim // 2)), (programs, rows)) if splits[1] > 1 else ()
        scratch = [meta(*shape, dtype=torch.float32) for shape in shapes]
        seen = meta(1, queries, KEYS, dtype=torch.uint8) if mask else None
        triton_window.launch(q, k, v, out, scratch, seen, angles, 0.1, splits, arch)

    return call


def _merge(heads, key_heads, head_dim):
    def call(arch: str) -> None:
        scratch = [
            meta(16 * key_heads, 16, head_dim, dtype=torch.float32),
            meta(16 * key_heads, 16, dtype=torch.float32),
        ]
        triton_window.launch_merge(scratch, meta(1, 1, heads, head_dim), key_heads, 16)

    return call


GPUS = ("sm_80", "sm_89", "sm_90", "sm_100")
NOTHING_SPILLED = {"stack": 0}
# Near and far queries of a wide head alone are 128 registers of each thread; Triton 3.6 spills 104 bytes, 3.9 up to 64.
WIDE_HEAD = {"stack": 104}
# Keys and values of three stages are copied asynchronously, in one or several instructions a thread.
ASYNC = {"LDGSTS": 18}

CASES = (
    Case("window decode 32+8", _decode(32, 8, 128), GPUS, NOTHING_SPILLED, ASYNC),
    Case("window decode 32+32", _decode(32, 32, 128), ("sm_90",), NOTHING_SPILLED, ASYNC),
    Case("window decode head 64", _decode(9, 3, 64), ("sm_90",), NOTHING_SPILLED),
    Case("window decode head 80", _decode(32, 32, 80), ("sm_90",), NOTHING_SPILLED, ASYNC),
    Case("window decode head 96", _decode(32, 8, 96), ("sm_90",), NOTHING_SPILLED, ASYNC),
    Case("window decode head 256", _decode(16, 8, 256), GPUS, WIDE_HEAD, ASYNC),
    Case("window decode 64 rows", _decode(64, 8, 128, queries=8), GPUS, NOTHING_SPILLED, ASYNC),
    Case(
        "window decode interleaved", _decode(32, 8, 128, interleaved=True), ("sm_90",), NOTHING_SPILLED, ASYNC
    ),
    Case("window decode partial", _decode(32, 8, 128, rotary_dim=64), ("sm_90",), NOTHING_SPILLED, ASYNC),
    Case(
        "window decode masked",
        _decode(32, 8, 128, mask=True, splits=(8192, 1)),
        ("sm_90",),
        NOTHING_SPILLED,
        ASYNC,
    ),
    Case("window decode grouped", _decode(32, 8, 128, group=4), ("sm_90",), NOTHING_SPILLED, ASYNC),
    Case("window decode fp32", _decode(32, 8, 128, dtype=torch.float32), ("sm_90",), NOTHING_SPILLED),
    Case("window decode 32+8", _decode(32, 8, 128), ("gfx942",), NOTHING_SPILLED),
    Case("window merge", _merge(32, 8, 128), (*GPUS, "gfx942"), NOTHING_SPILLED),
)
