"""The plots of the pages: bars of times, and perplexities relative to YaRN."""

import hashlib
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rope_dist.evaluation.perplexity import Bucket
from rope_dist.plots import Bar, mixed_with_white, plot_bars, plot_relative_perplexity

from . import results
from .benchmark import figure, find, machine_of
from .quality import after_training_summary, growth_summary
from .quality.growth import GROWN
from .quality.readings import Readings, load, readings, trained_length
from .results import ROOT, Rows

PLOTS = ROOT / "benchmarks" / "plots"
DRAWING = 4
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
ROOFLINE, OTHER = "#b0b0b0", "#4d4d4d"
FORMS = {
    "in place, no table": 0.3,
    "new tensors": 0.5,
    "native library": 0.2,
    "separate": 0.4,
    "triton": 0.15,
    "triton_tma": 0.25,
    "decode": 0.6,
    "nvidia-cutedsl": 0.4,
}
"""Of one implementation the variants: how far its colour is mixed with white."""
BARS = (
    ("rotary", "Llama-3-8B, 8k, bf16"),
    ("norm_rotary", "Qwen3-8B, 8k, bf16"),
    ("projection", "TinyLlama-1.1B, 8k, bf16, forward + backward"),
    ("rerotate", "Llama-3-8B, 8k, bf16"),
)
"""Benchmarks and cases that are drawn, those of them that were measured."""
SHOWN = ("stock", "ntk", "dprope", "yarn", "auto")
"""Strategies whose perplexity is drawn."""
SCALES = (2, 4)
BUCKETS = 8
"""Points of a curve of perplexity."""


def style(name: str) -> str:
    """Colour of an implementation."""
    base = next((known for known in COLOURS if name.startswith(known)), None)
    if base is None:
        return OTHER
    rest = name[len(base) :]
    white = next((form for key, form in FORMS.items() if rest.endswith(key)), 0.0)
    return mixed_with_white(COLOURS[base], white)


def bars(device: str) -> tuple[dict[str, list[Bar]], Rows]:
    """Bars of each benchmark of :data:`BARS`, and the rows that they are made of; slowest implementation first."""
    panels, used = {}, []
    for name, case in BARS:
        rows = results.timed(name, device, case)
        if not any(row["kind"] == "ours" for row in rows):
            continue
        bounds = [row for row in rows if row["kind"] == "roofline"]
        rows = sorted((row for row in rows if row["kind"] != "roofline"), key=lambda row: -row["seconds"])
        rows += sorted(bounds, key=lambda row: row["seconds"])[:1]
        unit = find(name).unit
        panels[f"{find(name).title}: {rows[0]['case']}"] = [_bar(row, unit) for row in rows]
        used += rows
    return panels, used


def _bar(row: dict[str, Any], unit: str) -> Bar:
    low, value, high = (float(figure(row[key], unit, row["tokens"])) for key in ("p20", "seconds", "p80"))
    text = f"{figure(row['seconds'], unit, row['tokens'])} {unit}"
    if row["kind"] == "roofline":
        return Bar(f"roofline: {row['implementation']}", value, low, high, text, ROOFLINE)
    if row["kind"] != "reference":
        text += f", {1 / row['ratio']:.1f}x"
    return Bar(row["implementation"], value, low, high, text, style(row["implementation"]))


def draw_bars(path: Path, device: str) -> None:
    """Write the plot of :func:`bars`."""
    panels, rows = bars(device)
    plot_bars(
        panels,
        f"median time (lower is better), speedup over {rows[0]['implementation']}",
        path,
        title=f"{machine_of(rows[0])}",
        note=digest(rows),
    )


Panels = tuple[dict[str, dict[str, list[Bucket]]], dict[str, dict[str, list[float]]]]
"""Curves and their standard errors in percent, by panel and label."""


def relative_perplexity(folder: Path, baseline: str = "yarn") -> tuple[Panels, int]:
    """Perplexity by position at 2x and 4x, and the trained length: strategies, and the dynamic plan where it was read.

    A curve is ``baseline``'s times the ratio of the perplexities of the texts that both have read. A strategy that has
    not read every text of the baseline is left out, the dynamic plan has its number of texts in the panel's title.
    """
    record = load(folder, "perplexity")
    trained = trained_length(record)
    curves: dict[str, dict[str, list[Bucket]]] = {}
    errors: dict[str, dict[str, list[float]]] = {}
    for scale in SCALES:
        found = readings(record, scale * trained, SHOWN)
        texts = list(found.losses.get(baseline, {}))
        if not texts:
            continue
        labels = [label for label in found.losses if len(found.both(label, baseline)) == len(texts)]
        name = f"{scale}x, {scale * trained} tokens, {_count(texts)}"
        if grown := dynamic(folder, found):
            found.losses[GROWN] = grown
            labels.append(GROWN)
            if len(grown) < len(texts):
                name += f" ({GROWN}: {_count(list(grown))})"
        curves[name], errors[name] = {}, {}
        for label in labels:
            both = found.both(label, baseline)
            points = found.curve(baseline, texts, BUCKETS)
            compared = [found.difference(label, baseline, both, b.start, b.end) for b in points]
            curves[name][label] = [
                Bucket(b.start, b.end, b.perplexity * math.exp(mean))
                for b, (mean, _) in zip(points, compared, strict=True)
            ]
            errors[name][label] = [100 * math.exp(mean) * error for mean, error in compared]
    return (curves, errors), trained


def _count(texts: list[str]) -> str:
    return f"{len(texts)} text{'s' * (len(texts) != 1)}"


def dynamic(folder: Path, found: Readings) -> dict[str, list[list[float]]]:
    """Losses of growing texts by the dynamic plan to as many tokens, by text; only texts of ``found``."""
    if not (folder / "quality_growth.json").exists():
        return {}
    read = growth_summary.readings(folder, found.tokens).get(GROWN, {})
    known = {text for texts in found.losses.values() for text in texts}
    return {text: losses for text, losses in read.items() if text in known}


def draw_relative_perplexity(path: Path, folder: Path, note: str) -> None:
    """Write the plot of :func:`relative_perplexity`."""
    (curves, errors), trained = relative_perplexity(folder)
    title = f"{load(folder, 'perplexity')['model']['name']}, without training: perplexity relative to YaRN"
    plot_relative_perplexity(curves, trained, title, path, errors=errors, note=note)


def digest(values: Any) -> str:
    """What a plot was made from, so that one of other values is found."""
    return hashlib.sha256(json.dumps([DRAWING, values], sort_keys=True).encode()).hexdigest()[:16]


def plots_of_results(folder: Path, devices: dict[str, str]) -> list[tuple[Path, str, Any]]:
    """Path, digest of the values, and drawing of every plot that there are results for."""
    found: list[tuple[Path, str, Any]] = []
    for device in devices:
        panels, rows = bars(device)
        if panels:
            found.append((PLOTS / f"speed-{device}.svg", digest(rows), partial(draw_bars, device=device)))
    (curves, errors), _ = relative_perplexity(folder)
    if curves:
        points = {
            name: {label: [[b.start, b.end, b.perplexity] for b in of] for label, of in labels.items()}
            for name, labels in curves.items()
        }
        shown = digest(_six_decimals([points, errors]))
        draw = partial(draw_relative_perplexity, folder=folder, note=shown)
        found.append((PLOTS / "perplexity.svg", shown, draw))
    if trained := after_training_summary.finished(folder):
        panels = after_training_summary.panels(trained)
        shown = digest(_six_decimals({title: list(map(asdict, of)) for title, (_, of) in panels.items()}))
        draw = partial(after_training_summary.draw, found=trained, note=shown)
        found.append((PLOTS / "after_training.svg", shown, draw))
    return found


def _six_decimals(values: Any) -> Any:
    """JSON values with rounded numbers: another CPU's exp may differ in the last of a double."""
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 6))
