"""Plots of plans, perplexity, passkey retrieval and benchmarks (needs the extra ``plot``).

Every function writes the file ``path``, whose suffix selects the format. It raises ``ValueError`` for a suffix that
matplotlib does not support, and :class:`rope_dist.optional.MissingPackageError` without matplotlib.
"""

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
    from .evaluation.perplexity import Bucket
    from .evaluation.tables import Score
    from .planning import RopePlan


MOST_RELATIVE = 20
"""Percent. Relative perplexities above it are not drawn: a strategy that fails would hide all other differences."""


def _figure(rows: int, columns: int, width: float, height: float, **shared: bool | str) -> tuple[Any, Any]:
    figure_module = require("matplotlib.figure", "plot", "a plot")
    figure = figure_module.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _save(figure: Any, path: str | os.PathLike[str], note: str = "") -> None:
    rc_context = require("matplotlib", "plot", "a plot").rc_context
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"cannot plot to {path}: the ending must be one of {', '.join(sorted(known))}")
    metadata = {"Date": None, "Description": note} if suffix == "svg" else {}
    buffer = io.BytesIO()
    # Reproducible: the same plot is the same file.
    with rc_context({"svg.hashsalt": "rope_dist", "svg.fonttype": "none", "axes.unicode_minus": False}):
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
    "ntk-mixed": "#c5b0d5",
    "longrope2": "#9edae5",
    "mrrope-uni": "#e6ab02",
    "mrrope-pro": "#a6761d",
    "resonance": "#98df8a",
    "cope": "#393b79",
    "clip": "#8c6d31",
    "dprope": "#1f77b4",
    "refined": "#ff7f0e",
    "auto": "#d62728",
    "auto+dynamic": "#6b0f1a",
    "auto-yarn": "#e7969c",
}
"""Every strategy has the same colour in all plots."""


def _colours(labels: Iterable[str]) -> dict[str, str]:
    """Colours by label, e.g. ``yarn:beta_fast=16``: the strategy's, mixed with white from its second label on."""
    found: dict[str, str] = {}
    others = cycle(("#000000", "#393b79", "#637939", "#843c39"))
    for label in labels:
        colour = COLOURS.get(label.partition(":")[0]) or next(others)
        same = sum(label.partition(":")[0] == before.partition(":")[0] for before in found)
        found[label] = mixed_with_white(colour, same / (same + 2))
    return found


def mixed_with_white(colour: str, share: float) -> str:
    """``#rrggbb`` with a ``share`` of white from 0 to 1."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def _log_y_axis(axis: Any) -> None:
    """A logarithmic y axis with at least two labelled ticks, also if it spans less than a decade."""
    ticker = require("matplotlib.ticker", "plot", "a plot")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    # 1, 2, 5, 10, 20, ... if at least three are in the range, else evenly spaced ticks.
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    if sum(low <= step <= high for step in steps) < 3:
        steps = list(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    steps = [step for step in steps if low <= step <= high]
    axis.set_yticks(steps, [f"{step:g}" for step in steps])
    axis.set_ylim(low, high)
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def plot_plans(plans: Sequence[RopePlan], path: str | os.PathLike[str], note: str = "") -> None:
    """Disturbance and scaling factor of every pair (the paper's Figures 7 and 8), a column per target length.

    Args:
        plans: of one model.
        note: stored in the metadata (SVG only).
    """
    lengths = list(dict.fromkeys(p.target_length for p in plans))
    figure, axes = _figure(2, len(lengths), 5.2 * len(lengths), 6.8)
    for column, length in enumerate(lengths):
        above, below = axes[0, column], axes[1, column]
        shown = [p for p in plans if p.target_length == length]
        # Numbered, since two plans may be of one strategy with different settings.
        colours = _colours(f"{p.strategy}:{i}" for i, p in enumerate(shown))
        for i, (p, colour) in enumerate(zip(shown, colours.values(), strict=True)):
            # Pairs are discrete: rings, of falling size so that equal values of several strategies all show.
            size = 3 + 5 * (len(shown) - 1 - i) / max(len(shown) - 1, 1)
            style = {"color": colour, "marker": "o", "markersize": size, "fillstyle": "none", "linestyle": ""}
            base = p.base_factors or (1.0,) * len(p.factors)
            above.plot(p.disturbance_per_pair, label=f"{p.strategy}: {p.disturbance * 1e3:.2f}", **style)
            # A pair that does not rotate has no factor to show.
            of_pairs = zip(p.factors, base, p.inv_freq.tolist(), strict=True)
            below.plot([f / b if theta else math.nan for f, b, theta in of_pairs], label=p.strategy, **style)
        # Disturbances span six decades and can be 0 (a pair that is not scaled at factor 1).
        above.set_yscale("symlog", linthresh=1e-4)
        above.set_ylim(bottom=-1e-5)
        # A path may have bytes that are not UTF-8, which no font can draw.
        source = (plans[0].source or "model").encode(errors="backslashreplace").decode()
        above.set_title(f"{source}: {plans[0].original_length} → {length} tokens")
        above.set_ylabel("disturbance, nats (lower is better)")
        below.set_ylabel("scaling factor (divides the frequency)")
        below.set_xlabel("rotary pair (0 has the highest frequency)")
        for axis in (above, below):
            axis.grid(alpha=0.3)
        below.legend(
            *above.get_legend_handles_labels(),
            title="mean disturbance, 1e-3 nats",
            title_fontsize=8,
            fontsize=8,
            ncols=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )
    _save(figure, path, note)


_TRAINED = "trained length"
Curves = Mapping[str, Sequence["Bucket"]]
"""Perplexity by position, by label."""


def plot_perplexity(curves: Curves, trained_length: int, title: str, path: str | os.PathLike[str]) -> None:
    """Perplexity by position and, below, relative to YaRN or, without YaRN, to the stock model.

    Args:
        curves: as from :meth:`rope_dist.evaluation.PerplexityResult.buckets`.
        trained_length: marked by a line if a curve goes past it.
        title: above the plot.
    """
    baseline = next((label for label in ("yarn", "stock") if label in curves and len(curves) > 1), None)
    rows = 2 if baseline else 1
    figure, axes = _figure(rows, 1, 9.2, 1.2 + 3.6 * rows)
    axis = axes[0, 0]
    width = max(b.end - b.start for buckets in curves.values() for b in buckets)
    absolute = {label: [b.perplexity for b in buckets] for label, buckets in curves.items()}
    _draw_by_position(axis, curves, absolute, trained_length)
    _log_y_axis(axis)
    axis.set_ylabel(f"perplexity of {width} tokens (lower is better)")
    axis.set_title(title)
    if baseline:
        _draw_relative(axes[1, 0], curves, baseline, trained_length)
    axes[-1, 0].set_xlabel("position, tokens")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    _save(figure, path)


def plot_relative_perplexity(
    panels: Mapping[str, Curves],
    trained_length: int,
    title: str,
    path: str | os.PathLike[str],
    *,
    baseline: str = "yarn",
    errors: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    note: str = "",
) -> None:
    """Perplexity by position relative to a baseline, a panel per entry, e.g. per target length.

    Two panels are as wide as the page of a repository, so that their text keeps its size there.

    Args:
        panels: curves by title, each with the baseline.
        trained_length: marked by a line if a curve goes past it.
        title: above the panels.
        baseline: a label.
        errors: standard errors in percent, by panel and label, an entry a bucket: drawn as a band around the curve.
        note: stored in the metadata (SVG only).

    Raises:
        ValueError: a panel has no curve of the baseline.
    """
    figure, axes = _figure(1, len(panels), 4.4 * len(panels), 4.2, sharey=True)
    legend: dict[str, Any] = {}
    # Of all panels: a label that one of them lacks must not shift the colours of others.
    colours = _colours(dict.fromkeys(label for curves in panels.values() for label in curves))
    for axis, (name, curves) in zip(axes[0], panels.items(), strict=True):
        if baseline not in curves:
            raise ValueError(f"{name} has no curve of the baseline {baseline}")
        _draw_relative(axis, curves, baseline, trained_length, colours)
        for label, band in (errors or {}).get(name, {}).items():
            (line,) = (line for line in axis.lines if line.get_label() == label)
            xs, ys = line.get_data()
            low, high = ([y + sign * error for y, error in zip(ys, band, strict=True)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=colours[label], alpha=0.18, linewidth=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("position, tokens")
        axis.label_outer()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    figure.suptitle(title, fontsize=11)
    labels = sorted(legend, key=lambda label: label == _TRAINED)
    columns = min(len(labels), 2 * len(panels) + 1)
    figure.legend(
        [legend[label] for label in labels], labels, fontsize=9, ncols=columns, loc="outside lower center"
    )
    _save(figure, path, note)


def _relative(curves: Curves, baseline: str) -> dict[str, list[float]]:
    """Perplexities relative to the baseline, as a difference in percent; NaN above :data:`MOST_RELATIVE`."""
    base = {(b.start, b.end): b.perplexity for b in curves[baseline]}
    percent = {
        label: [100 * (b.perplexity / base.get((b.start, b.end), math.nan) - 1) for b in buckets]
        for label, buckets in curves.items()
    }
    return {
        label: [v if v <= MOST_RELATIVE else math.nan for v in values] for label, values in percent.items()
    }


def _draw_relative(
    axis: Any, curves: Curves, baseline: str, trained_length: int, colours: Mapping[str, str] | None = None
) -> None:
    values = _relative(curves, baseline)
    _draw_by_position(axis, curves, values, trained_length, colours)
    if not all(math.isfinite(value) for line in values.values() for value in line):
        note = f"above {MOST_RELATIVE} % not drawn"
        axis.text(0.02, 0.98, note, transform=axis.transAxes, va="top", fontsize=8)
    axis.set_ylabel(f"perplexity relative to {baseline}, %")


def _draw_by_position(
    axis: Any,
    curves: Curves,
    values: Mapping[str, Sequence[float]],
    trained_length: int,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw ``values`` at the middles of the buckets of ``curves``, and the trained length."""
    colours = colours or _colours(curves)
    for label, buckets in curves.items():
        middles = [(b.start + b.end) / 2 for b in buckets]
        # The same strategy by a dynamic plan.
        style = {"linestyle": "--"} if "+dynamic" in label else {}
        axis.plot(
            middles, values[label], marker="o", markersize=4, label=label, color=colours[label], **style
        )
    end = max(b.end for buckets in curves.values() for b in buckets)
    if end > trained_length:
        axis.axvline(trained_length, color="black", linestyle=":", linewidth=1.2, label=_TRAINED)
    # Three to five ticks, at the trained length times or divided by powers of two.
    step = trained_length
    while end > 4 * step:
        step *= 2
    while end <= 2 * step and step % 2 == 0:
        step //= 2
    axis.set_xticks(range(0, end + 1, step))
    axis.grid(alpha=0.3)


def plot_passkey(
    grids: Mapping[str, Mapping[tuple[int, float], Score]],
    trained_length: int,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Passkey accuracy as heat maps of depth by length, a panel per label.

    Args:
        grids: scores by ``(length, depth)``, by label, from :func:`rope_dist.evaluation.tables.grids`. Cells that were
            not measured are grey.
        trained_length: lengths past it are marked ``*``.
        title: above the panels.
    """
    lengths = sorted({length for cells in grids.values() for length, _ in cells})
    depths = sorted({depth for cells in grids.values() for _, depth in cells})
    columns = min(4, len(grids))
    rows = -(-len(grids) // columns)
    size = (max(2.6, 0.55 * len(lengths) + 1.2), max(1.9, 0.35 * len(depths) + 1.1))
    figure, axes = _figure(rows, columns, size[0] * columns + 0.8, size[1] * rows + 0.5)
    panels = axes.ravel()
    for axis, (label, cells) in zip(panels, grids.items(), strict=False):
        table = [[cells.get((n, d)) for n in lengths] for d in depths]
        accuracies = [[score.accuracy if score else math.nan for score in row] for row in table]
        axis.set_facecolor("lightgrey")
        image = axis.imshow(accuracies, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(table):
            for x, score in enumerate(row):
                if score:
                    colour = "white" if score.accuracy > 0.6 else "black"
                    axis.text(x, y, str(score), ha="center", va="center", fontsize=7, color=colour)
        marked = [f"{n}{'*' if n > trained_length else ''}" for n in lengths]
        axis.set_xticks(range(len(lengths)), marked, rotation=45, fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=7)
        axis.set_title(label, fontsize=9)
    for axis in panels[len(grids) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the key (0: beginning)", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("prompt length, tokens", fontsize=8)
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


@dataclass(frozen=True)
class Bar:
    """One bar of a panel.

    Attributes:
        label: left of it.
        value: its length.
        low, high: ends of the range that is drawn on it.
        text: right of it.
        colour: ``#rrggbb``.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    colour: str


def plot_bars(
    panels: Mapping[str, Sequence[Bar]],
    x_label: str,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    note: str = "",
) -> None:
    """Horizontal bars, a panel below the other, each with a scale of its own.

    Args:
        panels: bars by title, from above.
        x_label: with its unit.
        title: above all panels.
        note: stored in the metadata (SVG only).
    """
    heights = [len(bars) + 1.2 for bars in panels.values()]
    figure_module = require("matplotlib.figure", "plot", "a plot")
    figure = figure_module.Figure(figsize=(8.8, 0.3 * sum(heights) + 0.9), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (name, bars) in zip(axes[:, 0], panels.items(), strict=True):
        for i, bar in enumerate(bars):
            axis.barh(i, bar.value, color=bar.colour, height=0.7)
            axis.plot((bar.low, bar.high), (i, i), color="black", linewidth=1)
            axis.text(max(bar.value, bar.high), i, f"  {bar.text}", va="center", fontsize=9)
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
        axis.invert_yaxis()
        # Room for the text beside the longest bar.
        axis.set_xlim(0, 1.25 * max(bar.value for bar in bars))
        axis.set_title(name, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel(x_label)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path, note)


@dataclass(frozen=True)
class TrainingCurve:
    """Perplexity after numbers of training steps.

    Attributes:
        label: a strategy, with settings after a colon.
        steps: rising; the first may be 0.
        perplexity, lows, highs: after each number of steps; the band is the range of seeds.
    """

    label: str
    steps: Sequence[int]
    perplexity: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


MOST_ABOVE = 1.6
"""Times the lowest perplexity of a panel. What is above it is not drawn, for the same reason."""


def plot_training(
    panels: Mapping[str, tuple[int, Sequence[TrainingCurve]]],
    title: str,
    path: str | os.PathLike[str],
    *,
    baseline: str = "auto",
    note: str = "",
) -> None:
    """Perplexity against training steps on a logarithmic axis, a panel per entry, e.g. per scale.

    Below each panel that has the baseline, the perplexities relative to it: linear within one percent, beyond it
    logarithmic. A label has the same colour and marker in every panel.

    Args:
        panels: the trained length and the curves, by title.
        title: above the panels.
        baseline: a label.
        note: stored in the metadata (SVG only).
    """
    figure, axes = _figure(2, len(panels), 5.2 * len(panels) + 2.6, 7.2, sharex="col")
    legend: dict[str, Any] = {}
    # A label looks the same in every panel.
    colours = _colours(dict.fromkeys(curve.label for _, curves in panels.values() for curve in curves))
    markers = dict(zip(colours, cycle("osD^vPX*<>"), strict=False))
    for (above, below), (name, (trained_length, curves)) in zip(axes.T, panels.items(), strict=True):
        base = next((curve.perplexity for curve in curves if curve.label == baseline), None)
        for curve in curves:
            label, colour = curve.label, colours[curve.label]
            style = {"color": colour, "marker": markers[label], "markersize": 4, "linewidth": 1.4}
            (line,) = above.plot(curve.steps, curve.perplexity, label=label, **style)
            above.fill_between(curve.steps, curve.lows, curve.highs, color=colour, alpha=0.15, linewidth=0)
            legend.setdefault(label, line)
            if base:
                percent = [100 * (own / other - 1) for own, other in zip(curve.perplexity, base, strict=True)]
                below.plot(curve.steps, percent, **style)
        steps = sorted({step for curve in curves for step in curve.steps})
        for axis in (above, below):
            # Linear below the first step that is above 0, so that 0 has a place.
            axis.set_xscale("symlog", linthresh=next((step for step in steps if step), 1), linscale=0.5)
            axis.set_xticks(steps, [f"{step}" for step in steps])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        lowest = min(value for curve in curves for value in curve.perplexity)
        highest = max(value for curve in curves for value in curve.perplexity)
        top = min(highest, lowest * MOST_ABOVE)
        above.set_ylim(lowest / 1.01, top * 1.01)
        _log_y_axis(above)
        if highest > top:
            text = f"above {top:.0f} not drawn"
            above.text(0.98, 0.98, text, transform=above.transAxes, va="top", ha="right", fontsize=8)
        above.set_ylabel(f"perplexity past {trained_length} tokens")
        above.set_title(name, fontsize=10)
        below.set(xlabel="training steps after the extension", ylabel=f"relative to {baseline}, %")
        # After training the differences are of a percent, before it of tens of them.
        below.set_yscale("symlog", linthresh=1)
        low, high = below.get_ylim()
        ticks = [tick for tick in (-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100) if low <= tick <= high]
        below.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        below.set_yticks([], minor=True)
        below.set_visible(base is not None)
    figure.suptitle(title)
    figure.legend(legend.values(), legend, fontsize=8, loc="outside right upper")
    _save(figure, path, note)
