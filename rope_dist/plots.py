"""Pictures of plans and readings (needs the extra ``plot``)."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_bytes
from .optional import require

if TYPE_CHECKING:
    from .evaluation.passkey import Score
    from .evaluation.perplexity import Bucket
    from .planning import RopePlan


_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    figure_module = require("matplotlib.figure", "plot", "a plot")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str | os.PathLike[str], note: str = "") -> None:
    rc_context = require("matplotlib", "plot", "a plot").rc_context
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"cannot plot to {path}: the ending must be one of {', '.join(sorted(known))}")
    metadata = {"Date": None, "Description": note} if suffix == "svg" else {}
    buffer = io.BytesIO()
    # The same picture is the same file, whenever it is made.
    with rc_context({"svg.hashsalt": "rope_dist", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
    write_bytes(path, buffer.getvalue())


COLOURS = {
    "stock": "#7f7f7f",
    "extrapolation": "#7f7f7f",
    "pi": "#8c564b",
    "ntk": "#9467bd",
    "dynamic-ntk": "#e377c2",
    "yarn": "#2ca02c",
    "llama3": "#bcbd22",
    "longrope": "#17becf",
    "dprope": "#1f77b4",
    "refined": "#ff7f0e",
    "auto": "#d62728",
}
"""A strategy has the same colour in every picture."""


def _colours(labels: Iterable[str]) -> dict[str, str]:
    """By label such as ``yarn:beta_fast=16``: the strategy's colour, mixed with white where it is taken already."""
    found: dict[str, str] = {}
    others = cycle(("#000000", "#393b79", "#637939", "#843c39"))
    for label in labels:
        colour = COLOURS.get(label.partition(":")[0]) or next(others)
        same = sum(label.partition(":")[0] == before.partition(":")[0] for before in found)
        found[label] = mixed_with_white(colour, same / (same + 2))
    return found


def mixed_with_white(colour: str, share: float) -> str:
    """``#rrggbb`` with that share (0 to 1) of white in it."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def _logarithmic(axis: Any) -> None:
    """A logarithmic y axis with at least two numbers on it, whatever its range."""
    ticker = require("matplotlib.ticker", "plot", "a plot")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    # 1, 2, 5, 10, 20, ... where there are three of them; a narrower range is divided evenly.
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    if sum(low <= step <= high for step in steps) < 3:
        steps = list(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    steps = [step for step in steps if low <= step <= high]
    axis.set_yticks(steps, [f"{step:g}" for step in steps])
    axis.set_ylim(low, high)
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def plot_plans(plans: Sequence[RopePlan], path: str | os.PathLike[str], note: str = "") -> None:
    """Disturbance and factor of every pair (the paper's Figures 7 and 8), a column a target length.

    Args:
        plans: of one model.
        path: the picture to write; its ending chooses the format.
        note: kept in the picture's metadata (SVG only).

    Raises:
        ValueError: an ending that matplotlib does not know.
        MissingPackageError: matplotlib is not installed.
    """
    lengths = list(dict.fromkeys(p.target_length for p in plans))
    figure, axes = _figure(2, len(lengths), 6.4 * len(lengths), 7.2)
    for column, length in enumerate(lengths):
        above, below = axes[0, column], axes[1, column]
        shown = [p for p in plans if p.target_length == length]
        # Numbered, since two plans may be of one strategy with other settings.
        colours = _colours(f"{p.strategy}:{i}" for i, p in enumerate(shown))
        for p, colour in zip(shown, colours.values(), strict=True):
            pairs = range(len(p.factors))
            style = {"linewidth": 1.4, "color": colour, "drawstyle": "steps-mid"}
            label = f"{p.strategy} ({p.disturbance * 1e3:.2f}e-3)"
            above.plot(pairs, p.disturbance_per_pair, label=label, **style)
            base = p.base_factors or (1.0,) * len(p.factors)
            below.plot(
                pairs, [f / b for f, b in zip(p.factors, base, strict=True)], label=p.strategy, **style
            )
        # Disturbances span six decades and can be 0 (a pair left alone at no extension).
        above.set_yscale("symlog", linthresh=1e-4)
        above.set_ylim(bottom=0)
        # A path may hold bytes that are no text, which no font can draw.
        source = (plans[0].source or "model").encode(errors="backslashreplace").decode()
        above.set_title(f"{source}: {plans[0].original_length} → {length} tokens")
        above.set_ylabel("disturbance of the pair, nats")
        below.set_ylabel("factor (frequency divided by)")
        below.set_xlabel("rotary pair (0 has the highest frequency)")
        for axis in (above, below):
            axis.grid(alpha=0.3)
        below.legend(*above.get_legend_handles_labels(), fontsize=8, ncols=3, **_BELOW)
    _save(figure, path, note)


def plot_perplexity(
    curves: Mapping[str, Sequence[Bucket]], trained_length: int, title: str, path: str | os.PathLike[str]
) -> None:
    """Perplexity by position, a line a label.

    Args:
        curves: buckets of positions by label, as :meth:`rope_dist.evaluation.Reading.buckets` gives them.
        trained_length: where the model's own context ends, marked where the curves go past it.
        title: above the picture.
        path: the picture to write; its ending chooses the format.

    Raises:
        ValueError: an ending that matplotlib does not know.
        MissingPackageError: matplotlib is not installed.
    """
    figure, axes = _figure(1, 1, 9.2, 4.8)
    axis = axes[0, 0]
    for (label, buckets), colour in zip(curves.items(), _colours(curves).values(), strict=True):
        middles = [(b.start + b.end) / 2 for b in buckets]
        perplexities = [b.perplexity for b in buckets]
        axis.plot(middles, perplexities, marker="o", markersize=4, label=label, color=colour)
    if any(bucket.end > trained_length for buckets in curves.values() for bucket in buckets):
        axis.axvline(trained_length, color="black", linestyle="--", linewidth=1, label="trained length")
    _logarithmic(axis)
    axis.set_xlabel("position, tokens")
    width = max(b.end - b.start for buckets in curves.values() for b in buckets)
    axis.set_ylabel(f"perplexity of {width} tokens (lower is better)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def plot_passkey(
    grids: Mapping[str, Mapping[tuple[int, float], Score]],
    trained_length: int,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Passkey accuracy as heat maps of depth by length, a panel a label.

    Args:
        grids: right answers of all prompts by ``(length, depth)``, by label, as from
            :func:`rope_dist.evaluation.passkey.grids`. A cell that was not measured stays grey.
        trained_length: lengths past it are marked ``*``.
        title: above the panels.
        path: the picture to write; its ending chooses the format.

    Raises:
        ValueError: an ending that matplotlib does not know.
        MissingPackageError: matplotlib is not installed.
    """
    lengths = sorted({length for cells in grids.values() for length, _ in cells})
    depths = sorted({depth for cells in grids.values() for _, depth in cells})
    columns = min(4, len(grids))
    rows = -(-len(grids) // columns)
    size = (max(2.6, 0.55 * len(lengths) + 1.2), max(1.9, 0.35 * len(depths) + 1.1))
    figure, axes = _figure(rows, columns, size[0] * columns + 0.8, size[1] * rows + 0.5)
    panels = axes.ravel()
    for axis, (label, cells) in zip(panels, grids.items(), strict=False):
        found = [[cells.get((n, d)) for n in lengths] for d in depths]
        shares = [[score.accuracy if score else math.nan for score in row] for row in found]
        axis.set_facecolor("lightgrey")
        picture = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(found):
            for x, score in enumerate(row):
                if score:
                    axis.text(x, y, str(score), ha="center", va="center", fontsize=7)
        marked = [f"{n}{'*' if n > trained_length else ''}" for n in lengths]
        axis.set_xticks(range(len(lengths)), marked, rotation=45, fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=7)
        axis.set_title(label, fontsize=9)
    for axis in panels[len(grids) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the key", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    figure.colorbar(picture, ax=axes, label="share of right answers", shrink=0.8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        xs, ys: its points.
        lows, highs: the band around them.
        limit: drawn black and dashed.
        colour: ``#rrggbb``; None: one that no other curve of the panel has.
        marker: of matplotlib.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    limit: bool = False
    colour: str | None = None
    marker: str = "o"


def plot_curves(
    panels: dict[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    note: str = "",
) -> None:
    """Curves on logarithmic axes, a panel a title, two panels a row, one legend for all.

    Args:
        panels: curves by title.
        x_label, y_label: with their units.
        path: the picture to write.
        title: above all panels.
        note: kept in the picture's metadata (SVG only).
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 6.4 * columns, 3.6 * rows + 0.8)
    legend: dict[str, Any] = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        dashes = cycle(("--", ":", "-."))
        for curve in curves:
            style = (
                {"linestyle": next(dashes), "color": "black"}
                if curve.limit
                else {"marker": curve.marker, "markersize": 4, "color": curve.colour}
            )
            (line,) = axis.plot(curve.xs, curve.ys, label=curve.label, linewidth=1.4, **style)
            legend.setdefault(curve.label, line)
            axis.fill_between(curve.xs, curve.lows, curve.highs, color=line.get_color(), alpha=0.15)
        ticks = sorted({x for curve in curves for x in curve.xs})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else f"{x}" for x in ticks])
        axis.set_xticks([], minor=True)
        _logarithmic(axis)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.legend(legend.values(), legend, fontsize=8, ncols=2 * columns, loc="outside lower center")
    _save(figure, path, note)
