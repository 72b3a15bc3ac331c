"""Cases of the static gate: rotary with the key/value cache write."""

from __future__ import annotations

import torch

from rope_dist.ops import triton_cache
from rope_dist.ops.arguments import KeyValueCache, Norms

from .static_case import BF16, Case, angles, meta
from .static_rotary import NVIDIA, WIDE


def _cache_write(
    q_heads,
    k_heads,
    head_dim,
    *,
    rotary_dim=None,
    v_dim=None,
    fp8=None,
    table=False,
    norm=None,
    form="NHD",
    **order,
):
    """Of 8192 tokens.

    ``fp8``: shape of the scales. ``norm``: "head", "joint" or "after". ``form``: "NHD", "HND", "blocks" (a table).
    """

    def call(arch: str) -> None:
        dims = (head_dim, head_dim, v_dim or head_dim)
        q, k, v = (meta(1, 8192, n, d) for n, d in zip((q_heads, k_heads, k_heads), dims, strict=True))
        block = (k_heads, 16) if form == "HND" else (16, k_heads)
        caches = [meta(1024, *block, d, dtype=torch.float8_e4m3fn if fp8 else BF16) for d in dims[1:]]
        scale = meta(*fp8, dtype=torch.float32) if fp8 else None
        slots, blocks = meta(8192, dtype=torch.int64), meta(1, 512, dtype=torch.int32)
        entries = (None, blocks) if form == "blocks" else (slots, None)
        cache = KeyValueCache(*caches, *entries, scale, scale, heads_first=form == "HND")
        sizes = [n * head_dim if norm == "joint" else head_dim for n in (q_heads, k_heads)]
        norms = Norms(*(meta(n) for n in sizes), norm_after=norm == "after") if norm else None
        at = angles(8192, rotary_dim or head_dim, table, **order)
        triton_cache.launch(q, k, v, q, cache, norms, at, arch)

    return call


GPUS = ("sm_80", "sm_89", "sm_90", "sm_100")
# Beside heads: a token's position and its slot or block.
CACHE = {**WIDE, "registers": 56}
# A thread reads 8 numbers of 2 bytes and stores them in 8 bytes; two scales are read.
CACHE_FP8 = {**WIDE, "narrow stores": 2, "narrow loads": 4}
# The sums of warps meet in shared memory; a warp's number is four bytes.
CACHE_JOINT = {**WIDE, "shared": 64}
# Three parts of a head, read twice: 72 registers let seven programs of 128 threads on a multiprocessor.
CACHE_PARTIAL = {**WIDE, "registers": 72}
CACHE_AMD = {"stack": 0, "shared": 0}

CASES = (
    Case("cache write 32+8", _cache_write(32, 8, 128), GPUS, CACHE, {"wide stores": 5}),
    Case("cache write 32+32", _cache_write(32, 32, 128), NVIDIA, CACHE, {"wide stores": 8}),
    Case("cache write HND", _cache_write(32, 8, 128, form="HND"), ("sm_90",), CACHE, {"wide stores": 5}),
    Case(
        "cache write block table", _cache_write(32, 8, 128, form="blocks"), NVIDIA, CACHE, {"wide stores": 5}
    ),
    Case("cache write table", _cache_write(32, 8, 128, table=True), NVIDIA, CACHE, {"wide stores": 5}),
    Case(
        "cache write interleaved",
        _cache_write(32, 8, 128, interleaved=True),
        ("sm_90",),
        CACHE,
        {"wide stores": 4},
    ),
    Case("cache write head 64", _cache_write(9, 3, 64), ("sm_90",), CACHE, {"wide stores": 5}),
    Case("cache write head 80", _cache_write(32, 32, 80), ("sm_90",), CACHE, {"wide stores": 8}),
    Case("cache write head 96", _cache_write(32, 8, 96), ("sm_90",), CACHE, {"wide stores": 5}),
    Case("cache write head 256", _cache_write(16, 8, 256), ("sm_90",), CACHE, {"wide stores": 5}),
    Case(
        "cache write 192+128",
        _cache_write(128, 128, 192, rotary_dim=64, v_dim=128),
        NVIDIA,
        WIDE,
        {"wide stores": 48},
    ),
    Case("cache write fp8", _cache_write(32, 8, 128, fp8=(1,)), GPUS, CACHE_FP8, {"wide stores": 3}),
    Case(
        "cache write fp8 heads", _cache_write(32, 8, 128, fp8=(8,)), ("sm_90",), CACHE_FP8, {"wide stores": 3}
    ),
    Case("cache write norm", _cache_write(32, 8, 128, norm="head"), NVIDIA, WIDE, {"wide stores": 5}),
    Case(
        "cache write norm after", _cache_write(32, 8, 128, norm="after"), ("sm_90",), WIDE, {"wide stores": 5}
    ),
    Case(
        "cache write norm head 256",
        _cache_write(16, 8, 256, norm="head"),
        ("sm_90",),
        WIDE,
        {"wide stores": 5},
    ),
    Case(
        "cache write norm interleaved",
        _cache_write(32, 8, 128, norm="head", interleaved=True),
        ("sm_90",),
        WIDE,
        {"wide stores": 3},
    ),
    Case(
        "cache write norm fp8",
        _cache_write(32, 8, 128, norm="head", fp8=(1,)),
        GPUS,
        CACHE_FP8,
        {"wide stores": 3},
    ),
    Case(
        "cache write norm of all",
        _cache_write(32, 32, 128, norm="joint"),
        NVIDIA,
        CACHE_JOINT,
        {"wide stores": 8},
    ),
    Case(
        "cache write norm partial",
        _cache_write(32, 8, 128, rotary_dim=64, norm="head"),
        NVIDIA,
        CACHE_PARTIAL,
        {"wide stores": 8},
    ),
    Case("cache write 32+8", _cache_write(32, 8, 128), ("gfx942",), CACHE_AMD),
    Case("cache write norm fp8", _cache_write(32, 8, 128, norm="head", fp8=(8,)), ("gfx942",), CACHE_AMD),
)
