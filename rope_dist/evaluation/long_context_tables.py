"""Tables of LongPPL and of synthetic tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..tables import text_table
from .paired import paired_difference
from .perplexity import WIDTH
from .tables import Measurement, Parts, Score, average_perplexity, compared_with, difference, spans_to_compare


def key_parts(measurements: Sequence[Measurement]) -> dict[str, Parts]:
    """By variant the means of key tokens of every 256 positions, from :func:`rope_dist.evaluation.measure_longppl`."""
    positions = {_passage(m): m["result"]["positions"] for m in _of(measurements, "key tokens")}
    parts: dict[str, Parts] = {}
    for m in _of(measurements, "longppl"):
        losses: dict[int, list[float]] = {}
        for position, loss in zip(positions[_passage(m)], m["result"]["key_nll"], strict=True):
            losses.setdefault(position // WIDTH * WIDTH, []).append(loss)
        own = parts.setdefault(m["what"]["variant"], {})
        own |= {(*_passage(m), start): (statistics.fmean(part), len(part)) for start, part in losses.items()}
    return parts


def longppl(parts: Parts, start: int = 0, end: float = math.inf) -> tuple[float, int]:
    """LongPPL of positions ``start`` to ``end``, multiples of 256, and the number of key tokens there."""
    chosen = [value for key, value in parts.items() if start <= key[-1] < end]
    count = sum(n for _, n in chosen)
    return (math.exp(sum(mean * n for mean, n in chosen) / count) if count else math.nan), count


def longppl_tables(
    measurements: Sequence[Measurement],
    trained_length: int,
    width: int,
    against: str | None = None,
) -> str:
    """LongPPL everywhere and by position, perplexity of all tokens, and differences of LongPPL with paired errors.

    Args:
        measurements: of :func:`rope_dist.evaluation.measure_longppl`.
        trained_length: ``*`` marks what lies beyond it.
        width: positions a column, a multiple of 256.
        against: label that the others are compared with; None: the first.

    Raises:
        ValueError: ``against`` is none of the variants.
    """
    parts, readings = key_parts(measurements), _of(measurements, "longppl")
    base = compared_with(parts, against)
    tokens = max(m["what"]["tokens"] for m in readings)
    columns = [(start, min(start + width, tokens)) for start in range(0, tokens, width)]
    marked = [f"{start}-{end}{'*' if start >= trained_length else ''}" for start, end in columns]
    spans = spans_to_compare(tokens, trained_length) if len(parts) > 1 else []
    counts = [longppl(parts[base], *column)[1] for column in columns]
    rows = [["key tokens", sum(counts), *counts, *[""] * (len(spans) + 1)]]
    for label, own in parts.items():
        found = [longppl(own), *(longppl(own, *column) for column in columns)]
        of_label = [m["result"] for m in readings if m["what"]["variant"] == label]
        compared = ["" if label == base else difference(own, parts[base], *span[:2]) for span in spans]
        cells = [f"{value:.2f}" if count else "" for value, count in found]
        rows.append([label, *cells, *compared, f"{average_perplexity(of_label):.2f}"])
    titles = [f"{title}against {base}" for *_, title in spans]
    table = text_table(["LongPPL by position", "all", *marked, *titles, "PPL of all tokens"], rows)
    what = _of(measurements, "key tokens")[0]["what"]
    notes = [
        f"key tokens: by {what['variant']} in windows of {what['window']}, log p at least {what['alpha']:g} nats "
        f"higher than with {what['short']} tokens of context, and above {what['beta']:g}",
        f"* past the {trained_length} tokens that the model was trained on",
        f"±: standard error of the paired difference of key tokens, over parts of {WIDTH} positions",
    ]
    if what["variant"] in parts:
        notes.append(
            f"{what['variant']} found the key tokens, among those that it reads well: where it reads a text as it did "
            f"then (up to {what['window']} tokens) its own LongPPL is too low"
        )
    return "\n".join([table, "", *notes])


def synthetic_tables(
    measurements: Sequence[Measurement], trained_length: int, against: str | None = None
) -> str:
    """A table a length, a row per task and variant: answers generated and among decoys, and their log-probability.

    Args:
        measurements: of :func:`rope_dist.evaluation.measure_synthetic`.
        trained_length: ``*`` marks what lies beyond it.
        against: label that the others are compared with, on the questions that both have answered; None: the first.

    Raises:
        ValueError: ``against`` is none of the variants.
    """
    labels = list(dict.fromkeys(m["what"]["variant"] for m in measurements))
    base = compared_with(labels, against)
    found: dict[tuple[int, str, str], dict[str, Measurement]] = {}
    for m in measurements:
        what, question = m["what"], f"{m['what']['task']} {m['what']['trial']} {m['what']['digest']}"
        for task in (what["task"], ALL_TASKS):
            found.setdefault((what["length"], task, what["variant"]), {})[question] = m["result"]
    tasks = list(dict.fromkeys(m["what"]["task"] for m in measurements))
    parts = []
    for length in sorted({length for length, *_ in found}):
        rows = []
        asked = [task for task in tasks if any((length, task, label) in found for label in labels)]
        for label in labels:
            if not all((length, task, label) in found for task in asked):
                found.pop((length, ALL_TASKS, label), None)  # the mean of some tasks is no mean of all
        for task in [*asked, ALL_TASKS] if len(asked) > 1 else asked:
            for label in labels:
                own, other = found.get((length, task, label), {}), found.get((length, task, base), {})
                if own:
                    compared = [] if len(labels) == 1 else [_compared(own, other) if label != base else ""]
                    rows.append([task, label, *_answers(own), *compared])
        marked = f"{length}{'*' if length > trained_length else ''} tokens"
        heads = [marked, "", "generated", "among decoys", "log p", f"log p against {base}"]
        parts.append(text_table(heads[: len(rows[0])], rows, left=2))
    notes = [
        "right answers, with the 95 % interval from 20 questions on; log p of the right answer, nats",
        f"* past the {trained_length} tokens that the model was trained on; ±: standard error of the paired difference",
    ]
    return "\n\n".join([*parts, "\n".join(notes)])


ALL_TASKS = "all tasks"


def _answers(results: dict[str, Any]) -> list[str]:
    def score(scoring: str) -> str:
        return Score(sum(r[scoring] for r in results.values()), len(results)).with_interval()

    log_p = statistics.fmean(r["log_probability"] for r in results.values())
    return [score("generated"), score("decoys"), f"{log_p:.2f}"]


def _compared(results: dict[str, Any], others: dict[str, Any]) -> str:
    common = [question for question in results if question in others]
    if not common:
        return ""
    pairs = ([side[question]["log_probability"] for question in common] for side in (results, others))
    mean, error = paired_difference(*pairs)
    return f"{mean:+.2f}" if math.isnan(error) else f"{mean:+.2f} ± {error:.2f}"


def _of(measurements: Iterable[Measurement], measure: str) -> list[Measurement]:
    return [m for m in measurements if m["what"]["measure"] == measure]


def _passage(m: Measurement) -> tuple[Any, ...]:
    return m["what"]["text"], m["what"]["piece"], m["what"]["digest"]
