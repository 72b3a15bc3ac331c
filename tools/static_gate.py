"""``python -m tools.static_gate``: what the compiler makes of every kernel, without a GPU.

Compiles each kernel as its launch would for the architectures it is for, reads registers, stack, shared
memory and machine instructions, and holds them to limits. A compiler or a change that loses the tensor
cores' asynchrony, spills, narrows an access or moves the accumulator through shared memory fails here,
where it would otherwise only show as time on a GPU. Prints a table; the exit status is 1, and the kernels
and numbers that fell short are named, where a limit is not kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate

from rope_dist.ops import triton_cache, triton_decode, triton_projection, triton_rotary
from rope_dist.ops.arguments import Angles, KeyValueCache, Norms, Projections

from . import static_compile
from .static_compile import Report

BF16 = torch.bfloat16
SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Case:
    """A kernel in one use, the architectures it is for, and its limits.

    Attributes:
        least, most: limits on a number of :func:`numbers`, by its name.
    """

    name: str
    call: Callable[[str], Any]
    targets: tuple[str, ...]
    most: dict[str, int] = field(default_factory=dict)
    least: dict[str, int] = field(default_factory=dict)


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _angles(tokens: int, rotary_dim: int, table: bool, axes: int = 0, **options: Any) -> Angles:
    """Angles of ``tokens`` of one sequence; ``axes`` of M-RoPE's positions."""
    num_pairs = rotary_dim // 2
    if table:
        cos, sin = (_meta(1, tokens, num_pairs, dtype=torch.float32) for _ in range(2))
        return Angles(cos, sin, **options)
    first = (axes,) if axes else ()
    inv_freq_q64 = _meta(*first, 2, num_pairs, dtype=torch.int32)
    positions = _meta(*first, 1, tokens, dtype=torch.int64)
    return Angles(inv_freq_q64=inv_freq_q64, positions=positions, **options)


def _rotary(
    q_heads, k_heads, head_dim, *, rotary_dim=None, table=False, bias=False, inplace=True, dtype=BF16, **order
):
    def call(arch: str) -> None:
        q, k = (_meta(1, 8192, heads, head_dim, dtype=dtype) for heads in (q_heads, k_heads))
        out = (q, k) if inplace else (torch.empty_like(q), torch.empty_like(k))
        angles = _angles(8192, rotary_dim or head_dim, table, **order)
        biases = (_meta(q_heads * head_dim), _meta(k_heads * head_dim)) if bias else ()
        triton_rotary.launch(q, k, *out, angles, *biases)

    return call


def _packed(arch: str) -> None:
    """As flash-attention calls it: one packed tensor, a table, bounds and offsets."""
    x, table = _meta(1, 8192, 32, 128), _meta(1, 8192, 64, dtype=torch.float32)
    bounds, offsets = _meta(9, dtype=torch.int32), _meta(8, dtype=torch.int32)
    angles = Angles(table, table, cu_seqlens=bounds, seqlen_offsets=offsets)
    triton_rotary.launch(x, None, x, None, angles)


def _pack_gradients(arch: str) -> None:
    """The backward pass: rotated back and joined with the gradient of the values."""
    q, k, v = (_meta(1, 8192, heads, 128) for heads in (32, 8, 8))
    packed = [
        part.unflatten(-1, (-1, 128)) for part in _meta(1, 8192, 48 * 128).split([4096, 1024, 1024], -1)
    ]
    angles = _angles(8192, 128, False, conjugate=True)
    triton_rotary.launch(q, k, packed[0], packed[1], angles, v=v, v_out=packed[2])


def _projections(heads: tuple[int, ...], head_dim: int, bias: bool) -> Projections:
    weights = [_meta(h * head_dim, 4096) for h in heads]
    biases = [_meta(w.shape[0]) if bias else None for w in weights]
    left_out = [None] * (3 - len(heads))
    return Projections(*weights, *left_out, *biases, *left_out, head_dim)


def _projection(
    heads, head_dim, *, rotary_dim=None, table=False, bias=False, interleaved=False, tma=True, batch=1
):
    def call(arch: str) -> None:
        projections = _projections(heads, head_dim, bias)
        angles = _angles(8192 // batch, rotary_dim or head_dim, table, interleaved=interleaved)
        outputs = [_meta(batch, 8192 // batch, h, head_dim) for h in heads]
        x = _meta(batch, 8192 // batch, 4096)
        triton_projection.launch(x, projections, angles, outputs, tma=tma, arch=arch, num_programs=132)

    return call


def _decode(q_heads, k_heads, head_dim, *, bias=False, slots=False, tokens=16):
    def call(arch: str) -> None:
        projections = _projections((q_heads, k_heads, k_heads), head_dim, bias)
        q = _meta(1, tokens, q_heads, head_dim)
        others = [_meta(*((tokens,) if slots else (1, tokens)), k_heads, head_dim) for _ in range(2)]
        angles = _angles(tokens, head_dim, False)
        entries = _meta(tokens, dtype=torch.int64) if slots else None
        triton_decode.launch(_meta(1, tokens, 4096), projections, angles, [q, *others], entries, arch)

    return call


NVIDIA = ("sm_80", "sm_90", "sm_100")
# Heads are read and written 16 bytes at a time; what else is loaded is one position and the frequencies.
WIDE = {"registers": 64, "stack": 0, "shared": 0, "narrow stores": 0, "narrow loads": 2, "convert_layout": 0}
HOPPER = {
    "registers": 192,
    "stack": 0,
    "instructions": 1_200,
    "serialized": 0,
    "convert_layout": 0,
    "shared accesses": 0,
    "narrow stores": 0,
    "wide stores": 0,
}
TENSOR = {"HGMMA.64x256x16": 4, "UTMALDG": 6, "UTMASTG": 1}
TABLE = {"shared accesses": 32}
BIAS = {"instructions": 1_500, "convert_layout": 1, "shared accesses": 32}
INTERLEAVED = {"instructions": 1_250}
# Heads as wide as a tile hold twice the angles a thread. One program fills a multiprocessor whatever its
# registers: what counts is that none is spilled.
WIDE_HEAD = {"registers": 255, "instructions": 1_600}
AMPERE = {"registers": 200, "stack": 0, "narrow copies": 0, "narrow stores": 0}
DECODE = {"registers": 80, "stack": 0, "shared": 76_800, "narrow copies": 0}
# Held to 80 registers it spills there. Shared memory lets two programs on a multiprocessor, so 96 cost nothing.
DECODE_SM80 = {**DECODE, "registers": 96}
ASYNC = {"HMMA": 16, "LDGSTS": 8}

# Interleaved pairs in and halves out, or the other way: a thread keeps its elements. The conversions that are left are
# between two names of one layout, and no instruction.
MLA = {"deinterleave": True, "inplace": False}
REORDERED = {**WIDE, "convert_layout": 4, "shuffles": 0}

CASES = (
    Case("rotary 32+32 in place", _rotary(32, 32, 128), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 in place", _rotary(32, 8, 128), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 table", _rotary(32, 8, 128, table=True), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 bias", _rotary(32, 8, 128, bias=True), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 new", _rotary(32, 8, 128, inplace=False), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary 32+1", _rotary(32, 1, 128), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary 9+3 head 64", _rotary(9, 3, 64), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 80", _rotary(32, 32, 80), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 96", _rotary(32, 32, 96), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 256", _rotary(16, 8, 256), ("sm_90",), WIDE, {"wide stores": 4}),
    Case(
        "rotary partial new",
        _rotary(32, 32, 80, rotary_dim=32, inplace=False),
        ("sm_90",),
        WIDE,
        {"wide stores": 6},
    ),
    # One position an axis.
    Case(
        "rotary M-RoPE", _rotary(32, 8, 128, axes=3), NVIDIA, {**WIDE, "narrow loads": 4}, {"wide stores": 4}
    ),
    Case("rotary interleaved", _rotary(32, 8, 128, interleaved=True), ("sm_90",), WIDE, {"wide stores": 2}),
    Case("rotary deinterleave", _rotary(128, 1, 64, **MLA), NVIDIA, REORDERED, {"wide stores": 4}),
    Case(
        "rotary deinterleave table",
        _rotary(16, 16, 64, table=True, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave bias",
        _rotary(64, 1, 64, bias=True, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave float32",
        _rotary(16, 16, 64, dtype=torch.float32, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave partial",
        _rotary(32, 32, 80, rotary_dim=32, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 6},
    ),
    Case(
        "rotary deinterleave gradient",
        _rotary(128, 1, 64, conjugate=True, **MLA),
        NVIDIA,
        REORDERED,
        {"wide stores": 4},
    ),
    # A wave has 64 threads, each with half of that: neighbours exchange through shared memory.
    Case("rotary deinterleave", _rotary(128, 1, 64, **MLA), ("gfx942",), {"stack": 0, "shared": 4096}),
    # The bounds are looked through by all threads together: a few bytes to add up what each found.
    Case(
        "rotary packed", _packed, ("sm_90",), {**WIDE, "shared": 128, "narrow loads": 8}, {"wide stores": 4}
    ),
    Case("rotary gradients", _pack_gradients, ("sm_90",), WIDE, {"wide stores": 5}),
    Case("rotary 32+8 in place", _rotary(32, 8, 128), ("gfx942",), {"stack": 0, "shared": 0}),
    Case("projection 7B", _projection((32, 32, 32), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection 8B", _projection((32, 8, 8), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection two weights", _projection((32, 8), 128), ("sm_90",), HOPPER, TENSOR),
    Case("projection head 64", _projection((32, 8, 8), 64), ("sm_90",), HOPPER, TENSOR),
    Case("projection partial", _projection((32, 32, 32), 128, rotary_dim=64), ("sm_90",), HOPPER, TENSOR),
    Case(
        "projection table",
        _projection((32, 8, 8), 128, table=True),
        ("sm_90",),
        {**HOPPER, **TABLE},
        {**TENSOR, "UTMALDG": 8},
    ),
    Case("projection bias", _projection((32, 8, 8), 128, bias=True), ("sm_90",), {**HOPPER, **BIAS}, TENSOR),
    Case(
        "projection table of batches",
        _projection((32, 8, 8), 128, table=True, batch=4),
        ("sm_90",),
        {**HOPPER, **TABLE},
        {**TENSOR, "UTMALDG": 8},
    ),
    Case("projection head 256", _projection((16, 8, 8), 256), ("sm_90",), {**HOPPER, **WIDE_HEAD}, TENSOR),
    Case(
        "projection interleaved",
        _projection((32, 8, 8), 128, interleaved=True),
        ("sm_90",),
        {**HOPPER, **INTERLEAVED},
        TENSOR,
    ),
    Case(
        "projection 8B", _projection((32, 8, 8), 128), ("sm_100",), {"stack": 0}, {"UTCHMMA": 4, "UTMASTG": 1}
    ),
    Case(
        "projection 8B",
        _projection((32, 8, 8), 128, tma=False),
        ("sm_80", "sm_89"),
        AMPERE,
        ASYNC,
    ),
    Case(
        "projection bias",
        _projection((32, 32, 32), 128, bias=True, tma=False),
        ("sm_80",),
        AMPERE,
        ASYNC,
    ),
    Case(
        "projection table",
        _projection((32, 8, 8), 128, table=True, tma=False),
        ("sm_80",),
        AMPERE,
        ASYNC,
    ),
    Case("projection head 256", _projection((16, 8, 8), 256, tma=False), ("sm_80",), AMPERE, ASYNC),
    Case("projection 8B", _projection((32, 8, 8), 128, tma=False), ("gfx942",), {"stack": 0}),
    Case("decode 7B", _decode(32, 32, 128, tokens=1), ("sm_90", "sm_100"), DECODE, ASYNC),
    Case("decode 7B", _decode(32, 32, 128, tokens=1), ("sm_80",), DECODE_SM80, ASYNC),
    Case(
        "decode 8B bias cache", _decode(32, 8, 128, bias=True, slots=True), ("sm_90", "sm_100"), DECODE, ASYNC
    ),
    Case("decode 8B bias cache", _decode(32, 8, 128, bias=True, slots=True), ("sm_80",), DECODE_SM80, ASYNC),
    Case("decode head 80", _decode(32, 32, 80), ("sm_90",), DECODE, ASYNC),
)


# --- rotary with the key/value cache write ---


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
    **angles,
):
    """Of 8192 tokens.

    ``fp8``: shape of the scales. ``norm``: "head", "joint" or "after". ``form``: "NHD", "HND", "blocks" (a table).
    """

    def call(arch: str) -> None:
        dims = (head_dim, head_dim, v_dim or head_dim)
        q, k, v = (_meta(1, 8192, n, d) for n, d in zip((q_heads, k_heads, k_heads), dims, strict=True))
        block = (k_heads, 16) if form == "HND" else (16, k_heads)
        caches = [_meta(1024, *block, d, dtype=torch.float8_e4m3fn if fp8 else BF16) for d in dims[1:]]
        scale = _meta(*fp8, dtype=torch.float32) if fp8 else None
        slots, blocks = _meta(8192, dtype=torch.int64), _meta(1, 512, dtype=torch.int32)
        entries = (None, blocks) if form == "blocks" else (slots, None)
        cache = KeyValueCache(*caches, *entries, scale, scale, heads_first=form == "HND")
        sizes = [n * head_dim if norm == "joint" else head_dim for n in (q_heads, k_heads)]
        norms = Norms(*(_meta(n) for n in sizes), norm_after=norm == "after") if norm else None
        at = _angles(8192, rotary_dim or head_dim, table, **angles)
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

CASES += (
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


def numbers(report: Report) -> dict[str, int]:
    """The numbers that limits are on, by name; any other name counts the opcodes that start with it."""
    counts = report.counts

    def total(*prefixes: str) -> int:
        return sum(n for opcode, n in counts.items() if opcode.startswith(prefixes))

    def narrow(prefix: str) -> int:
        return sum(
            n for opcode, n in counts.items() if opcode.startswith(prefix) and not opcode.endswith(".128")
        )

    return {
        "registers": report.registers,
        "stack": report.stack,
        "shared": report.shared,
        "instructions": report.instructions,
        "convert_layout": counts["convert_layout"],
        "serialized": counts.get("serialized", 0),
        # Storing the tile for TMA is a matrix store (STSM); plain accesses are layout conversions.
        "shared accesses": total("LDS.", "STS.") + counts.get("LDS", 0) + counts.get("STS", 0),
        "shuffles": total("SHFL"),
        "narrow loads": narrow("LDG."),
        "narrow stores": narrow("STG."),
        "wide stores": counts.get("STG.E.128", 0),
        "narrow copies": sum(
            n for o, n in counts.items() if o.startswith("LDGSTS") and not o.endswith(".128")
        ),
        **{
            prefix: total(prefix)
            for prefix in ("HGMMA.64x256x16", "UTMALDG", "UTMASTG", "UTCHMMA", "HMMA", "LDGSTS")
        },
    }


def serialized(compiled: Any) -> int:
    """1 where the assembler says that it serialised the tensor cores' instructions (C7510, C7515 and so on)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        # Triton ships two assemblers, of which one may be too old for the code of the other.
        for tool in sorted(tools.glob("ptxas*")):
            command = [tool, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder) / "kernel.cubin"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                return int("serializ" in result.stderr.lower())
    raise RuntimeError(f"no assembler took the code: {result.stderr}")


def check(case: Case, target: str) -> tuple[Report, list[str]]:
    """Compile ``case`` for ``target``; and what fell short."""
    launch = static_compile.record(lambda: case.call(target))
    compiled = static_compile.compile_for(launch, target)
    report = static_compile.report(case.name, compiled, target)
    if "serialized" in case.most:
        report.counts["serialized"] = serialized(compiled)
    found = numbers(report)
    most = {"shared": SHARED_MEMORY[target], **case.most}
    short = [f"{name} {found[name]}, at most {limit}" for name, limit in most.items() if found[name] > limit]
    short += [
        f"{name} {found[name]}, at least {limit}" for name, limit in case.least.items() if found[name] < limit
    ]
    return report, short


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.static_gate", description=__doc__)
    parser.add_argument("--target", choices=sorted(static_compile.TARGETS), help="only this architecture")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("static_gate: unset TRITON_INTERPRET, nothing is compiled under it", file=sys.stderr)
        return 2
    rows, failures = [], []
    for case in CASES:
        for target in case.targets:
            if options.only not in case.name or options.target not in (None, target):
                continue
            report, short = check(case, target)
            found = numbers(report)
            tensor = next((n for n in ("HGMMA.64x256x16", "UTCHMMA", "HMMA") if found[n]), "")
            row = [case.name, target, report.registers, report.stack, report.shared, report.instructions]
            row += [found["convert_layout"], found["wide stores"], tensor, "short" if short else "ok"]
            rows.append(row)
            failures += [f"{case.name} on {target}: {text}" for text in short]
    head = ["kernel", "target", "registers", "stack", "shared", "instr.", "converts", "STG.128", "tensor", ""]
    print(f"Triton {triton.__version__}\n{tabulate(rows, head)}")
    for failure in failures:
        print(f"FELL SHORT: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
