"""Tables of perplexity, passkey and task measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..tables import text_table
from .perplexity import WIDTH, Bucket

Measurement = Mapping[str, Any]
"""``{"what": settings, "result": numbers}``, as :class:`rope_dist.evaluation.Record` stores it."""


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


def curves(measurements: Sequence[Measurement], width: int) -> dict[str, list[Bucket]]:
    """Perplexity by position of every variant (method ``whole``), averaged over all passages."""
    whole = [m for m in measurements if m["what"]["method"] == "whole"]
    return {
        label: average_buckets([m["result"] for m in whole if m["what"]["variant"] == label], width)
        for label in dict.fromkeys(m["what"]["variant"] for m in whole)
    }


def perplexity_tables(measurements: Sequence[Measurement], trained_length: int, width: int) -> str:
    """Perplexity by position and, for several texts, by text (``whole``), and by window length (``sliding``).

    A row per variant; ``*`` marks what lies beyond the trained length.
    """

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

    def table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
        return text_table([title, *columns], [[label, *cells] for label, cells in rows.items()])

    parts = []
    by_position = curves(measurements, width)
    if by_position:
        _, overall = rows("whole", "method")
        first = next(iter(by_position.values()))
        marked = [f"{b.start}-{b.end}{'*' if b.start >= trained_length else ''}" for b in first]
        cells = {
            label: [*overall[label], *(f"{b.perplexity:.2f}" for b in buckets)]
            for label, buckets in by_position.items()
        }
        parts.append(table("perplexity by position", ["all", *marked], cells))
        texts, by_text = rows("whole", "text")
        if len(texts) > 1:
            parts.append(table("perplexity by text", texts, by_text))
    lengths, by_length = rows("sliding", "length")
    if lengths:
        parts.append(
            table("sliding window, by its length", _marked_lengths(lengths, trained_length), by_length)
        )
    return "\n\n".join([*parts, f"* past the {trained_length} tokens that the model was trained on"])


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

    def __str__(self) -> str:
        # A percentage of a few prompts suggests more precision than there is.
        return f"{self.accuracy:.0%}" if self.prompts >= 20 else f"{self.correct}/{self.prompts}"


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
        rows.append(["all depths", *(str(total(column)) for column in columns)])
        parts.append(text_table([title, *_marked_lengths(lengths, trained_length)], rows))
    return "\n\n".join([*parts, f"correct answers; * past the {trained_length} tokens of the training"])


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
