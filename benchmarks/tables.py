"""Markdown tables of results."""

from typing import Any

from tabulate import tabulate

from . import results
from .benchmark import Benchmark, figure, find, machine_of, notes
from .results import DEVICES, Rows, place

ORDER = {"reference": 0, "ours": 1, "baseline": 2, "roofline": 3}
COLUMNS = 6
"""What a page has room for."""


def markdown(rows: list[list[str]], headers: list[str], text: int = 1) -> str:
    """A table whose first ``text`` columns are text."""
    align = (*("left",) * text, *("right",) * (len(headers) - text))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def section(name: str, device: str) -> tuple[str, str]:
    """Table and footnote of one benchmark on ``cpu`` or ``cuda``, and the machine; says so without results."""
    benchmark, rows = find(name), results.of(name, device)
    if not rows:
        return f"Not measured on a {DEVICES[device]} yet.", ""
    table = (wide if benchmark.wide else long)(benchmark, rows)
    return f"{table}\n\n{footnote(benchmark, rows)}", machine_of(rows[0])


def wide(benchmark: Benchmark, rows: Rows) -> str:
    """A row a case, a column an implementation: medians with speedups, the roofline and how near the fastest is.

    The other way round where only that is narrow enough (:data:`COLUMNS`).
    """
    timed, unit = sorted((row for row in rows if "seconds" in row), key=place), benchmark.unit
    names = {r["implementation"]: r["kind"] for r in sorted(timed, key=lambda row: ORDER[row["kind"]])}
    bounded = "roofline" in names.values()
    names = {name: kind for name, kind in names.items() if kind != "roofline"}
    # A GPU's memory is known of each call, and what a model adds to it is worth a column; so is what a case measures.
    shown = [row for row in timed if unit == "tokens/s" or row["device"] == "cpu"]
    peaks = {
        row["implementation"] for row in shown if row["kind"] in ("reference", "ours") and "peak_bytes" in row
    }
    lines = []
    for case in dict.fromkeys(row["case"] for row in timed):
        found = {row["implementation"]: row for row in timed if row["case"] == case}
        line = [case, *(_cell(found.get(name), unit) for name in names)]
        if bounded:
            bounds = [row for row in found.values() if row["kind"] == "roofline"]
            least = _cell(min(bounds, key=lambda row: row["seconds"], default=None), unit)
            shares = [r["roofline"] for r in found.values() if r["kind"] == "ours" and "roofline" in r]
            line.append(least + (f" ({max(shares):.0%})" if least and shares else ""))
        memory = (found.get(n, {}).get("peak_bytes") for n in names if n in peaks)
        lines.append(line + ["" if peak is None else f"{peak / 2**20:.1f}" for peak in memory])
    headers = ["", *names, *["roofline"] * bounded, *(f"peak MiB, {n}" for n in names if n in peaks)]
    if len(headers) > COLUMNS > len(lines):
        headers, *lines = [list(row) for row in zip(headers, *lines, strict=True)]
    return markdown(lines, headers) if lines else ""


def long(benchmark: Benchmark, rows: Rows) -> str:
    """A row an implementation of each case."""
    unit, timed = benchmark.unit, [row for row in rows if "seconds" in row]
    lines = [[row["case"], row["implementation"], _cell(row, unit)] for row in timed]
    return markdown(lines, ["", "implementation", unit], text=2)


def _cell(row: dict[str, Any] | None, unit: str) -> str:
    if row is None:
        return ""
    cell = figure(row["seconds"], unit, row.get("tokens"))
    compared = "ratio" in row and row["kind"] not in ("reference", "roofline")
    return f"{cell} ({1 / row['ratio']:.2f}x)" if compared else cell


def footnote(benchmark: Benchmark, rows: Rows) -> str:
    """Units, command, spread, packages, what was not timed; and whether the code has changed."""
    timed, first = [row for row in rows if "seconds" in row], rows[0]
    kinds = {row["kind"]: row["implementation"] for row in reversed(timed)}
    ran = f"`{first['command']}` at {first['commit'] or 'no commit'}."
    if not timed:
        parts = [ran]
    else:
        reference = f" (speedup over {kinds['reference']})" if "reference" in kinds else ""
        share = " (share of it that the fastest rope_dist reaches)" * ("ours" in kinds)
        bound = f"; roofline{share}" * ("roofline" in kinds)
        counts = [row["rounds"] for row in timed]
        spread = sorted((row["p80"] - row["p20"]) / row["seconds"] for row in timed)[len(timed) // 2]
        one = first["threads"] == "1"
        threads = f"{first['threads']} thread{'s' * (not one)}, " * (first["device"] == "cpu")
        rounds = (
            f"{threads}{min(counts)} to {max(counts)} rounds, median spread (p20-p80) {spread * 100:.0f} %."
        )
        parts = [f"Median {benchmark.unit}{reference}{bound}.", ran, rounds]
    packages = {
        f"{row['implementation']}: {row['package']}"
        + (f" ({row['kernel']})" if "kernel" in row else ""): None
        for row in timed
        if "package" in row
    }
    if packages:
        parts.append(f"Packages: {', '.join(packages)}.")
    parts += [f"{note[0].upper()}{note[1:]}." for note in notes(rows)]
    parts += ["**A quick run, no measurement.**"] * first["quick"]
    parts += ["**Older than the code.**"] * (first["code"] != benchmark.code)
    return " ".join(parts)
