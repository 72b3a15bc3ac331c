"""Plots of results: time or speed against length, one colour an implementation."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rope_dist.plots import Curve, mixed_with_white, plot_curves

from .benchmark import FACTORS, Benchmark, machine_of
from .results import ROOT, Rows, place

PLOTS = ROOT / "benchmarks" / "plots"
DRAWING = 3
"""Of plots; another one makes those that are there out of date."""
COLOURS = {
    "rope_dist": "#1f77b4",
    "huggingface": "#d62728",
    "torch.compile": "#ff7f0e",
    "Liger": "#2ca02c",
    "flash-attn": "#9467bd",
    "FlashInfer": "#8c564b",
    "quack": "#e377c2",
    "vLLM": "#bcbd22",
    "Unsloth": "#17becf",
}
"""The same implementation has the same colour in every plot."""
FORMS = {
    "in place, no table": ("s", 0.35),
    "new tensors": ("^", 0.55),
    "native library": ("D", 0.2),
    "separate": ("s", 0.4),
    "triton": ("^", 0.2),
    "triton_tma": ("D", 0.3),
    "decode": ("v", 0.5),
    "nvidia-cutedsl": ("s", 0.4),
}
"""Of one implementation the variants: marker, and how far its colour is mixed with white."""


def style(name: str) -> tuple[str | None, str]:
    """Colour (None: any) and marker of an implementation."""
    base = next((known for known in COLOURS if name.startswith(known)), None)
    rest = name[len(base) :] if base else ""
    marker, white = next((form for key, form in FORMS.items() if rest.endswith(key)), ("o", 0.0))
    return base and mixed_with_white(COLOURS[base], white), marker


def panels(benchmark: Benchmark, rows: Rows) -> dict[str, list[Curve]]:
    """Time or speed against length, a panel for every model, dtype and pass with three lengths or more."""
    points: dict[str, dict[str, list[tuple]]] = {}
    for row in sorted((row for row in rows if "seconds" in row), key=place):
        title = ", ".join(str(row[key]) for key in ("model", "dtype", "pass") if key in row)
        name = row["implementation"] + " (roofline)" * (row["kind"] == "roofline")
        factor = FACTORS.get(benchmark.unit)
        values = [row[p] * factor if factor else row["tokens"] / row[p] for p in ("seconds", "p20", "p80")]
        points.setdefault(title, {}).setdefault(name, []).append((row["tokens"], *values))
    return {
        title: [
            Curve(name, *zip(*values, strict=True), name.endswith("(roofline)"), *style(name))
            for name, values in curves.items()
        ]
        for title, curves in points.items()
        if any(len(values) > 2 for values in curves.values())
    }


def path_of(benchmark: Benchmark, device: str, rows: Rows) -> Path | None:
    """Where the plot of those rows is, or None where there is none."""
    return PLOTS / f"{benchmark.name}-{device}.svg" if benchmark.plot and panels(benchmark, rows) else None


def digest(values: Any) -> str:
    """What a plot was made from, so that one of other values is found."""
    return hashlib.sha256(json.dumps([DRAWING, values], sort_keys=True).encode()).hexdigest()[:16]


def draw(path: Path, benchmark: Benchmark, rows: Rows) -> None:
    """Write the plot."""
    better = "higher" if benchmark.unit == "tokens/s" else "lower"
    plot_curves(
        panels(benchmark, rows),
        "tokens",
        f"median, {benchmark.unit} ({better} is better)",
        path,
        title=f"{benchmark.title}\n{machine_of(rows[0])}",
        note=digest(rows),
    )
