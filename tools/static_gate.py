"""``python -m tools.static_gate``: what the compiler makes of every kernel, without a GPU.

Compiles each kernel as its launch would for the architectures it is for, reads registers, stack, shared
memory and machine instructions, and holds them to limits. A compiler or a change that loses the tensor
cores' asynchrony, spills, narrows an access or moves the accumulator through shared memory fails here,
where it would otherwise only show as time on a GPU. Prints a table; the exit status is 1, and the kernels
and numbers that fell short are named, where a limit is not kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from tabulate import tabulate

from . import static_cache, static_compile, static_norm, static_projection, static_rotary, static_window
from .static_case import Case
from .static_compile import Report

SHARED_MEMORY = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
CASES = (*static_rotary.CASES, *static_norm.CASES, *static_projection.CASES, *static_cache.CASES)
CASES += static_window.CASES


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


def measure(index: int, target: str) -> Report:
    """Compile ``CASES[index]`` for ``target``."""
    case = CASES[index]
    launch = static_compile.record(lambda: case.call(target))
    compiled = static_compile.compile_for(launch, target)
    report = static_compile.report(case.name, compiled, target)
    if "serialized" in case.most:
        report.counts["serialized"] = serialized(compiled)
    return report


def short_of(case: Case, report: Report, target: str) -> list[str]:
    """What fell short of the limits of ``case``."""
    found = numbers(report)
    most = {"shared": SHARED_MEMORY[target], **case.most}
    over = [f"{name} {found[name]}, at most {limit}" for name, limit in most.items() if found[name] > limit]
    under = [
        f"{name} {found[name]}, at least {limit}" for name, limit in case.least.items() if found[name] < limit
    ]
    return over + under


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.static_gate", description=__doc__)
    parser.add_argument("--target", choices=sorted(static_compile.TARGETS), help="only this architecture")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("static_gate: unset TRITON_INTERPRET, nothing is compiled under it", file=sys.stderr)
        return 2
    wanted = [
        (index, target)
        for index, case in enumerate(CASES)
        for target in case.targets
        if options.only in case.name and options.target in (None, target)
    ]
    rows, failures = [], []
    for (index, target), report in zip(wanted, measured(wanted), strict=True):
        case, found = CASES[index], numbers(report)
        short = short_of(case, report, target)
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


def measured(wanted: list[tuple[int, str]]) -> Iterable[Report]:
    """:func:`measure` of each, by as many processes as there are processors: a compilation takes one or two seconds."""
    if len(wanted) < 8:
        return [measure(*one) for one in wanted]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*wanted, strict=True), chunksize=4))


if __name__ == "__main__":
    sys.exit(main())
