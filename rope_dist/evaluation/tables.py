"""Tables of perplexity, passkey and task measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..defaults import COMPARED_PROMPTS
from ..tables import text_table
from .paired import paired_difference, percent, wilson_interval
from .perplexity import METHODS, WIDTH, Bucket

Measurement = Mapping[str, Any]
"""``{"what": settings, "result": numbers}``, as :class:`rope_dist.evaluation.Record` stores it."""

Parts = dict[tuple[Any, ...], tuple[float, int]]
"""By passage and first position: the mean of a part of :data:`WIDTH` positions, and how many tokens are in it."""


def average_perplexity(results: Sequence[Mapping[str, Any]]) -> float:
    """Perplexity of all predicted tokens of several results together."""
    predicted = sum(r["predicted"] for r in results)
    return math.exp(sum(r["nll"] * r["predicted"] for r in results) / predicted)


def average_buckets(results: Sequence[Mapping[str, Any]], width: int) -> list[Bucket]:
    """Perplexity by position, averaged over passages of equal length.

    Args:
        results: as in a record.
        width: positions a bucket, a multiple of :data:`WIDTH`.

    Raises:
        ValueError: another width, or passages of different lengths.
    """
    check_width(width)
    if len({r["predicted"] for r in results}) != 1:
        raise ValueError("perplexity by position can only be averaged over passages of equal length")
    length = results[0]["predicted"] + 1
    buckets = []
    for start in range(0, length, width):
        end = min(start + width, length)
        total = count = 0.0
        for low in range(start, end, WIDTH):
            weight = min(low + WIDTH, end) - max(low, 1)
            if weight > 0:  # position 0 has no prediction
                total += weight * sum(r["nll_by_position"][low // WIDTH] for r in results) / len(results)
                count += weight
        if count:
            buckets.append(Bucket(start, end, math.exp(total / count)))
    return buckets


def check_width(width: int) -> int:
    """``width`` if it is a valid bucket width; ``ValueError`` otherwise."""
    if width < 1 or width % WIDTH:
        raise ValueError(f"the width of a bucket must be a multiple of {WIDTH} positions, got {width}")
    return width


def bucket_width(tokens: int) -> int:
    """A bucket width that divides ``tokens`` into about six to twelve buckets: 256 times a power of two."""
    width = WIDTH
    while tokens > 12 * width:
        width *= 2
    return width


def parts_of(measurements: Iterable[Measurement]) -> Parts:
    """The parts of several readings by one variant."""
    parts: Parts = {}
    for m in measurements:
        what, end = m["what"], m["result"]["predicted"] + 1
        for index, mean in enumerate(m["result"]["nll_by_position"]):
            start = index * WIDTH
            count = min(start + WIDTH, end) - max(start, 1)
            parts[what["text"], what["piece"], what["digest"], start] = mean, count
    return parts


def difference(parts: Parts, others: Parts, start: int = 0, end: float = math.inf) -> str:
    """Perplexity against that of ``others`` at positions ``start`` to ``end``, with its paired standard error.

    Only parts that lie between them, of passages in both, are compared; empty where there is none.
    """
    common = [
        key
        for key in parts
        if key in others and key[-1] >= start and (key[-1] + WIDTH <= end or end == math.inf)
    ]
    if not common:
        return ""
    own, other = ([side[key][0] for key in common] for side in (parts, others))
    return percent(*paired_difference(own, other, [parts[key][1] for key in common]))


def compared_with(labels: Iterable[str], against: str | None) -> str:
    """The label that the others are compared with, by default the first; ``ValueError`` for one that is not there."""
    labels = list(dict.fromkeys(labels))
    if against is not None and against not in labels:
        raise ValueError(f"nothing to compare with: {against!r} is not one of {', '.join(labels)}")
    return labels[0] if against is None else against


def spans_to_compare(tokens: int, trained_length: int) -> list[tuple[int, float, str]]:
    """Below and past the trained length, as start, end and title; all of a shorter text."""
    if tokens <= trained_length:
        return [(0, math.inf, "")]
    return [
        (0, trained_length, f"0-{trained_length} "),
        (trained_length, math.inf, f"{trained_length}-{tokens}* "),
    ]


def curves(measurements: Sequence[Measurement], width: int, method: str = "whole") -> dict[str, list[Bucket]]:
    """Perplexity by position of every variant (``whole`` or ``grown``), averaged over all passages."""
    chosen = [m for m in measurements if m["what"]["method"] == method]
    return {
        label: average_buckets([m["result"] for m in chosen if m["what"]["variant"] == label], width)
        for label in dict.fromkeys(m["what"]["variant"] for m in chosen)
    }


def perplexity_tables(
    measurements: Sequence[Measurement], trained_length: int, width: int, against: str | None = None
) -> str:
    """Perplexity by position and, for several texts, by text (``whole``, ``grown``), and by window (``sliding``).

    A row per variant; ``*`` marks what lies beyond the trained length. The last columns compare every variant with
    ``against``, by default the first: the difference of the same tokens and its standard error over parts of
    :data:`WIDTH` positions (:func:`rope_dist.evaluation.paired_difference`).

    Raises:
        ValueError: ``against`` is none of the variants.
    """
    base = compared_with((m["what"]["variant"] for m in measurements), against)

    def rows(method: str, key: str) -> tuple[list[Any], dict[str, list[str]]]:
        results: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
        for m in measurements:
            if m["what"]["method"] == method:
                results.setdefault((m["what"]["variant"], m["what"][key]), []).append(m["result"])
        columns = list(dict.fromkeys(column for _, column in results))
        return columns, {
            label: [f"{average_perplexity(results[label, column]):.2f}" for column in columns]
            for label in dict.fromkeys(label for label, _ in results)
        }

    def parts_by_label(**chosen: Any) -> dict[str, Parts]:
        found: dict[str, list[Measurement]] = {}
        for m in measurements:
            if all(m["what"].get(key) == value for key, value in chosen.items()):
                found.setdefault(m["what"]["variant"], []).append(m)
        return {label: parts_of(of_label) for label, of_label in found.items()}

    def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
        return text_table([title, *columns], [[label, *cells] for label, cells in rows.items()])

    parts = []
    for method in (METHODS[0], METHODS[2]):
        by_position = curves(measurements, width, method)
        if not by_position:
            continue
        _, overall = rows(method, "method")
        first = next(iter(by_position.values()))
        marked = [f"{b.start}-{b.end}{'*' if b.start >= trained_length else ''}" for b in first]
        found = parts_by_label(method=method)
        spans = spans_to_compare(first[-1].end, trained_length) if len(by_position) > 1 else []
        cells = {
            label: [
                *overall[label],
                *(f"{b.perplexity:.2f}" for b in buckets),
                *("" if label == base else difference(found[label], found[base], *s[:2]) for s in spans),
            ]
            for label, buckets in by_position.items()
        }
        grown = " of growing texts" if method != METHODS[0] else ""
        titles = [f"{title}against {base}" for *_, title in spans]
        parts.append(table(f"perplexity by position{grown}", ["all", *marked, *titles], cells))
        texts, by_text = rows(method, "text")
        if len(texts) > 1:
            parts.append(table(f"perplexity by text{grown}", texts, by_text))
    lengths, by_length = rows("sliding", "length")
    if lengths:
        marked, compared = _marked_lengths(lengths, trained_length), lengths if len(by_length) > 1 else []
        for length in compared:
            found = parts_by_label(method="sliding", length=length)
            for label, row in by_length.items():
                row.append("" if label == base else difference(found[label], found[base]))
        titles = [f"{length} against {base}" for length in compared]
        parts.append(table("sliding window, by its length", [*marked, *titles], by_length))
    notes = [f"* past the {trained_length} tokens that the model was trained on"]
    if len({m["what"]["variant"] for m in measurements}) > 1:
        notes.append(f"±: standard error of the paired difference, over parts of {WIDTH} positions")
    return "\n\n".join([*parts, "\n".join(notes)])


def _marked_lengths(lengths: Iterable[int], trained_length: int) -> list[str]:
    return [f"{n}{'*' if n > trained_length else ''}" for n in lengths]


class Score(NamedTuple):
    """Correct answers out of a number of prompts; printed as ``2/3``, and from 20 prompts on as ``67%``."""

    correct: int
    prompts: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.correct / self.prompts

    def with_interval(self) -> str:
        """With the 95 % interval of Wilson from 20 prompts on: ``67% (45-83)``."""
        low, high = wilson_interval(self.correct, self.prompts)
        return f"{self} ({100 * low:.0f}-{100 * high:.0f})" if self.prompts >= COMPARED_PROMPTS else str(self)

    def __str__(self) -> str:
        # A percentage of a few prompts suggests more precision than there is.
        return (
            f"{self.accuracy:.0%}" if self.prompts >= COMPARED_PROMPTS else f"{self.correct}/{self.prompts}"
        )


def total(scores: Iterable[Score]) -> Score:
    """The score over all their prompts."""
    scores = list(scores)
    return Score(sum(s.correct for s in scores), sum(s.prompts for s in scores))


def scores(measurements: Sequence[Measurement]) -> dict[tuple[int, float], Score]:
    """Score of every ``(length, depth)``, from passkey measurements of one variant and scoring."""
    answers: dict[tuple[int, float], list[bool]] = {}
    for m in measurements:
        answers.setdefault((m["what"]["length"], m["what"]["depth"]), []).append(m["result"]["correct"])
    return {cell: Score(sum(correct), len(correct)) for cell, correct in sorted(answers.items())}


def grids(measurements: Sequence[Measurement]) -> dict[str, dict[tuple[int, float], Score]]:
    """:func:`scores` by title: the variant, and the scoring if there are several."""
    scorings = {m["what"]["scoring"] for m in measurements}
    by_title: dict[str, list[Measurement]] = {}
    for m in measurements:
        suffix = f", {m['what']['scoring']}" if len(scorings) > 1 else ""
        by_title.setdefault(m["what"]["variant"] + suffix, []).append(m)
    return {title: scores(chosen) for title, chosen in by_title.items()}


def passkey_tables(measurements: Sequence[Measurement], trained_length: int) -> str:
    """Correct answers by depth (rows) and length (columns), a table per variant and scoring."""
    parts = []
    for title, cells in grids(measurements).items():
        lengths = sorted({length for length, _ in cells})
        depths = sorted({depth for _, depth in cells})
        rows = [[f"depth {d:g}", *(str(cells.get((n, d), "")) for n in lengths)] for d in depths]
        columns = [[v for (n, _), v in cells.items() if n == length] for length in lengths]
        rows.append(["all depths", *(total(column).with_interval() for column in columns)])
        parts.append(text_table([title, *_marked_lengths(lengths, trained_length)], rows))
    note = f"correct answers (95 % interval); * past the {trained_length} tokens of the training"
    return "\n\n".join([*parts, note])


def tasks_table(measurements: Sequence[Measurement]) -> str:
    """Scores of lm-eval: a row per task and metric, a column per variant."""
    labels = list(dict.fromkeys(m["what"]["variant"] for m in measurements))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for m in measurements:
        shots = m["what"]["shots"]
        for name, metrics in m["result"]["scores"].items():
            for metric, value in metrics.items():
                row = cells.setdefault((name, "" if shots is None else str(shots), metric), {})
                row[m["what"]["variant"]] = f"{value:.4f}"
    rows = [[*key, *(row.get(label, "") for label in labels)] for key, row in cells.items()]
    return text_table(["task", "examples shown", "metric", *labels], rows, left=3)
