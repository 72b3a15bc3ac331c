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
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate

from rope_dist.ops import triton_rotary
from rope_dist.ops.arguments import Angles

from . import static_compile, static_projection
from .static_case import BF16, Case
from .static_case import angles as _angles
from .static_case import meta as _meta
from .static_compile import Report

SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


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


NVIDIA = ("sm_80", "sm_90", "sm_100")
# Heads are read and written 16 bytes at a time; what else is loaded is one position and the frequencies.
WIDE = {"registers": 64, "stack": 0, "shared": 0, "narrow stores": 0, "narrow loads": 2, "convert_layout": 0}
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
    *static_projection.CASES,
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
            for prefix in (
                "HGMMA",
                "HGMMA.64x256x16",
                "HGMMA.64x128x16",
                "UTMALDG",
                "UTMASTG",
                "UTCHMMA",
                "HMMA",
                "LDGSTS",
            )
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
            tensor = next((n for n in ("HGMMA", "UTCHMMA", "HMMA") if found[n]), "")
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
