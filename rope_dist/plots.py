"""Pictures of plans and readings (needs the extra ``plot``)."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_bytes
from .optional import require

if TYPE_CHECKING:
    from .evaluation.perplexity import Bucket
    from .planning import RopePlan


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
        for p in (p for p in plans if p.target_length == length):
            pairs = range(len(p.factors))
            style = {"linewidth": 2.2, "zorder": 3} if p.strategy == "dprope" else {"linewidth": 1.2}
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
        below.set_xlabel("rotary pair (0 turns fastest)")
        for axis in (above, below):
            axis.grid(alpha=0.3)
        above.legend(fontsize=8, loc="lower left")
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
    figure, axes = _figure(1, 1, 8.0, 4.8)
    axis = axes[0, 0]
    for label, buckets in curves.items():
        middles = [(b.start + b.end) / 2 for b in buckets]
        axis.plot(middles, [b.perplexity for b in buckets], marker="o", markersize=4, label=label)
    if any(bucket.end > trained_length for buckets in curves.values() for bucket in buckets):
        axis.axvline(trained_length, color="black", linestyle="--", linewidth=1, label="trained length")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.set_xlabel("position, tokens")
    width = max(b.end - b.start for buckets in curves.values() for b in buckets)
    axis.set_ylabel(f"perplexity of {width} tokens")
    axis.set_title(title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_passkey(
    grids: Mapping[str, Mapping[tuple[int, float], float]],
    trained_length: int,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Passkey accuracy as heat maps of depth by length, a panel a label.

    Args:
        grids: accuracy (0 to 1) by ``(length, depth)``, by label, as from
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
        shares = [[cells.get((n, d), math.nan) for n in lengths] for d in depths]
        axis.set_facecolor("lightgrey")
        picture = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                if not math.isnan(share):
                    axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
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
    figure.colorbar(picture, ax=axes, label="right answers", shrink=0.8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        xs, ys: its points.
        lows, highs: the band around them.
        limit: drawn black and dashed.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]
    limit: bool = False


def plot_curves(
    panels: dict[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    path: str | os.PathLike[str],
    note: str = "",
) -> None:
    """Curves on logarithmic axes, a panel a title, two panels a row.

    Args:
        panels: curves by title.
        path: the picture to write.
        note: kept in the picture's metadata (SVG only).
    """
    ticker = require("matplotlib.ticker", "plot", "a plot")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, 6.4 * columns, 4.4 * rows)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        dashes = cycle(("--", ":", "-."))
        for curve in curves:
            style = (
                {"linestyle": next(dashes), "color": "black"}
                if curve.limit
                else {"marker": "o", "markersize": 4}
            )
            (line,) = axis.plot(curve.xs, curve.ys, label=curve.label, linewidth=1.4, **style)
            axis.fill_between(curve.xs, curve.lows, curve.highs, color=line.get_color(), alpha=0.15)
        ticks = sorted({x for curve in curves for x in curve.xs})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else f"{x}" for x in ticks])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    _save(figure, path, note)
