"""Markdown tables of results."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from . import results
from .benchmark import Benchmark, figure, find, machine_of, notes
from .results import DEVICES, Rows

ORDER = {"reference": 0, "ours": 1, "baseline": 2, "roofline": 3}


def markdown(rows: list[list[str]], headers: list[str], text: int = 1) -> str:
    """A table whose first ``text`` columns are text."""
    align = (*("left",) * text, *("right",) * (len(headers) - text))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def section(name: str, device: str) -> tuple[str, str]:
    """Table, plot and footnote of one benchmark on ``cpu`` or ``cuda``, and the machine; says so without results."""
    benchmark, rows = find(name), results.of(name, device)
    if not rows:
        return f"Not measured on a {DEVICES[device]} yet.", ""
    from .figures import path_of

    parts = [(wide if benchmark.wide else long)(benchmark, rows)]
    if path := path_of(benchmark, device, rows):
        parts.append(
            f"![{benchmark.title} on a {DEVICES[device]}]({path.relative_to(results.ROOT).as_posix()})"
        )
    return "\n\n".join([*parts, footnote(benchmark, rows)]), machine_of(rows[0])


def place(row: dict[str, Any]) -> tuple:
    """Where a row stands: by model, dtype, pass and length."""
    return row.get("model", ""), row.get("dtype", ""), row.get("pass", ""), row.get("tokens", 0)


def wide(benchmark: Benchmark, rows: Rows) -> str:
    """A row a case, a column an implementation: medians with speedups, the roofline and how near the fastest is."""
    timed = sorted((row for row in rows if "seconds" in row), key=place)
    columns = {
        row["implementation"]: row["kind"] for row in sorted(timed, key=lambda row: ORDER[row["kind"]])
    }
    names = [name for name, kind in columns.items() if kind != "roofline"]
    # A GPU's memory is known of each call, and what a model adds to it is worth a column.
    peaks = [n for n in names if columns[n] in ("reference", "ours")] if benchmark.unit == "tokens/s" else []
    peaks = peaks if timed and timed[0]["device"] == "cuda" else []
    lines = []
    for case in dict.fromkeys(row["case"] for row in timed):
        found = {row["implementation"]: row for row in timed if row["case"] == case}
        line = [case, *(_cell(found.get(name), benchmark.unit) for name in names)]
        bounds = [row for row in found.values() if row["kind"] == "roofline"]
        if bounds:
            least = min(bounds, key=lambda row: row["seconds"])
            shares = [
                row["roofline"] for row in found.values() if row["kind"] == "ours" and "roofline" in row
            ]
            share = f" ({max(shares):.0%})" if shares else ""
            line.append(figure(least["seconds"], benchmark.unit, least.get("tokens")) + share)
        elif "roofline" in columns.values():
            line.append("")
        line += [
            f"{found[n]['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in found.get(n, {}) else "" for n in peaks
        ]
        lines.append(line)
    headers = [
        "",
        *names,
        *["roofline"] * ("roofline" in columns.values()),
        *(f"peak MiB, {n}" for n in peaks),
    ]
    return markdown(lines, headers) if lines else ""


def long(benchmark: Benchmark, rows: Rows) -> str:
    """A row an implementation of each case."""
    timed = [row for row in rows if "seconds" in row]
    lines = [[row["case"], row["implementation"], _cell(row, benchmark.unit)] for row in timed]
    return markdown(lines, ["", "implementation", benchmark.unit], text=2)


def _cell(row: dict[str, Any] | None, unit: str) -> str:
    if row is None:
        return ""
    speedup = f" ({1 / row['ratio']:.2f}x)" if "ratio" in row and row["kind"] != "reference" else ""
    return figure(row["seconds"], unit, row.get("tokens")) + speedup


def footnote(benchmark: Benchmark, rows: Rows) -> str:
    """Units, command, spread, packages, what was not timed; and whether the code has changed."""
    timed = [row for row in rows if "seconds" in row]
    parts = []
    if timed:
        reference = next(
            (f" (speedup over {r['implementation']})" for r in timed if r["kind"] == "reference"), ""
        )
        share = " (share of it that the fastest rope_dist reaches)" * any(r["kind"] == "ours" for r in timed)
        bound = f"; roofline{share}" * any(row["kind"] == "roofline" for row in timed)
        parts.append(f"Median {benchmark.unit}{reference}{bound}.")
    parts.append(f"`{rows[0]['command']}` at {rows[0]['commit'] or 'no commit'}.")
    if timed:
        spreads = sorted((row["p80"] - row["p20"]) / row["seconds"] for row in timed)
        counts = [row["rounds"] for row in timed]
        threads = f"{rows[0]['threads']} threads, " * (rows[0]["device"] == "cpu")
        spread = f"median spread (p20-p80) {spreads[len(spreads) // 2] * 100:.0f} %"
        parts.append(
            f"{threads}{min(counts)} to {max(counts)} rounds, {spread}.".replace("1 threads", "1 thread")
        )
    packages = {
        row["implementation"]: row["package"] + (f" ({row['kernel']})" if "kernel" in row else "")
        for row in timed
        if "package" in row
    }
    if packages:
        parts.append(f"Packages: {', '.join(f'{name}: {package}' for name, package in packages.items())}.")
    parts += [f"{note[0].upper()}{note[1:]}." for note in notes(rows)]
    if rows[0]["quick"]:
        parts.append("**A quick run, no measurement.**")
    if rows[0]["code"] != benchmark.code:
        parts.append("**Older than the code.**")
    return " ".join(parts)
