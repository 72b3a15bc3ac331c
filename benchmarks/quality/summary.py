"""The study's tables: only texts and lengths that every strategy has finished are counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.tables import markdown
from rope_dist.evaluation.perplexity import WIDTH, Bucket
from rope_dist.evaluation.tables import average_buckets, scores, total
from rope_dist.evaluation.variants import STOCK

TRAINED = 8192


def load(folder: Path, kind: str) -> dict[str, Any]:
    """A record of the study; ``ValueError`` names the command that makes it."""
    path = folder / f"quality_{kind}.json"
    if not path.exists():
        script = "tuning" if kind == "tuning" else "study"
        raise ValueError(f"there is no {path}: python -m benchmarks.quality.{script}")
    return json.loads(path.read_text(encoding="utf-8"))


def finished_readings(record: dict[str, Any], tokens: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by text and label, of readings of ``tokens``: texts that every label has read."""
    by_text: dict[str, dict[str, dict[str, Any]]] = {}
    for m in record["measurements"]:
        if m["what"]["tokens"] == tokens:
            by_text.setdefault(m["what"]["text"], {})[m["what"]["variant"]] = m["result"]
    labels = {label for results in by_text.values() for label in results}
    return {text: results for text, results in by_text.items() if results.keys() == labels}


def _width(tokens: int) -> int:
    return max(tokens // 8 // WIDTH, 1) * WIDTH


def finished_curves(record: dict[str, Any], tokens: int) -> tuple[dict[str, list[Bucket]], int]:
    """Perplexity by position (about eight buckets) by label, and over how many texts."""
    by_text = finished_readings(record, tokens)
    if not by_text:
        return {}, 0
    labels = next(iter(by_text.values()))
    return {
        label: average_buckets([results[label] for results in by_text.values()], _width(tokens))
        for label in labels
    }, len(by_text)


def _targets(record: dict[str, Any], tokens: int) -> str:
    """The lengths that the readings of ``tokens`` were planned for."""
    used = {m["what"]["frequencies"] for m in record["measurements"] if m["what"]["tokens"] == tokens}
    lengths = {plan["target_length"] for name, plan in record["plans"].items() if name in used}
    return ", ".join(map(str, sorted(lengths)))


def perplexity_table(record: dict[str, Any], tokens: int) -> str:
    """A row a strategy: everywhere, past the trained length (of several texts also its range), by position."""
    by_text = finished_readings(record, tokens)
    curves, _ = finished_curves(record, tokens)
    if not curves:
        return ""
    first = next(iter(curves.values()))
    several = len(by_text) > 1
    headers = ["", "all", f"past {TRAINED}", *(["over the texts"] if several else [])]
    headers += [f"{b.start / 1024:g}-{b.end / 1024:g}k{'*' if b.start >= TRAINED else ''}" for b in first]
    rows = []
    for label, buckets in curves.items():
        texts = [_past(average_buckets([r[label]], _width(tokens))) for r in by_text.values()]
        overall = math.exp(sum(r[label]["nll"] for r in by_text.values()) / len(by_text))
        spread = [f"{min(texts):.2f} - {max(texts):.2f}"] if several else []
        by_position = [f"{b.perplexity:.2f}" for b in buckets]
        rows.append([label, f"{overall:.2f}", f"{_past(buckets):.2f}", *spread, *by_position])
    return markdown(rows, headers)


def where_others_lead(record: dict[str, Any], tokens: int, label: str = "auto") -> str:
    """A sentence: in how much of each text past the trained length ``label`` is the best extension, and where not."""
    places, behind = 0, []
    for text, results in finished_readings(record, tokens).items():
        if label not in results:
            return ""
        curves = {
            name: average_buckets([result], _width(tokens))
            for name, result in results.items()
            if name != STOCK
        }
        for i, own in enumerate(curves[label]):
            if own.start < TRAINED:
                continue
            places += 1
            best = min(curves, key=lambda name, i=i: curves[name][i].perplexity)
            if best != label:
                behind.append(
                    f"{text}, {own.start / 1024:g}-{own.end / 1024:g}k ({best} "
                    f"{curves[best][i].perplexity:.2f}, {label} {own.perplexity:.2f})"
                )
    if not places:
        return ""
    ahead = places - len(behind)
    sentence = f"Text by text `{label}` is the best extension in {ahead} of {places} parts past {TRAINED}"
    return f"{sentence}; not in {'; '.join(behind)}." if behind else f"{sentence}."


def _past(buckets: list[Bucket]) -> float:
    """Perplexity of the tokens past the trained length; not a number where none was read."""
    past = [b for b in buckets if b.start >= TRAINED]
    tokens = sum(b.end - b.start for b in past)
    return (
        math.exp(sum(math.log(b.perplexity) * (b.end - b.start) for b in past) / tokens) if past else math.nan
    )


def passkey_table(record: dict[str, Any]) -> str:
    """A row a strategy, per length the right answers of all prompts (generated, among decoys)."""
    measurements = record["measurements"]
    labels = list(dict.fromkeys(m["what"]["variant"] for m in measurements))
    columns: dict[int, dict[str, str]] = {}
    for length in sorted({m["what"]["length"] for m in measurements}):
        cells, counts = {}, set()
        for label in labels:
            at = [m for m in measurements if m["what"]["length"] == length and m["what"]["variant"] == label]
            by_scoring = {s: [m for m in at if m["what"]["scoring"] == s] for s in ("generate", "decoys")}
            counts.add(tuple(len(chosen) for chosen in by_scoring.values()))
            if all(by_scoring.values()):
                cells[label] = ", ".join(str(total(scores(m).values())) for m in by_scoring.values())
        # Every strategy has answered equally many prompts: the length is finished.
        if len(counts) == 1 and len(cells) == len(labels):
            columns[length] = cells
    if not columns:
        return ""
    headers = ["passkeys found", *(f"{n}{'*' if n > TRAINED else ''}" for n in columns)]
    return markdown([[label, *(cells[label] for cells in columns.values())] for label in labels], headers)


def block(folder: Path) -> tuple[str, str]:
    """The README's block, tables and the plot, and the machines that measured it."""
    perplexity, passkey = load(folder, "perplexity"), load(folder, "passkey")
    parts = []
    lengths = sorted({m["what"]["tokens"] for m in perplexity["measurements"]})
    for tokens in lengths:
        by_text, targets = finished_readings(perplexity, tokens), _targets(perplexity, tokens)
        if by_text and targets:  # not where only the stock model has read
            parts.append(
                f"Perplexity of the first {tokens} tokens of {'; '.join(by_text)}. Extended to {targets}:"
            )
            parts += filter(
                None, (perplexity_table(perplexity, tokens), where_others_lead(perplexity, tokens))
            )
    if (folder / "quality.png").exists():
        parts.append("![Perplexity by position](benchmarks/results/quality.png)")
    table = passkey_table(passkey)
    if table:
        decoys = next(len(m["what"]["decoys"]) for m in passkey["measurements"] if "decoys" in m["what"])
        parts.append(
            f"Passkeys found, of the prompts of a length: in the greedy continuation, and likelier than each of "
            f"{decoys} decoys (by chance 1 in {decoys + 1}):"
        )
        parts.append(table)
    seeds = sorted({m["what"]["seed"] for m in passkey["measurements"]})
    model = perplexity["model"]
    parts.append(
        f"\\* past the {TRAINED} tokens that the model was trained on. `python -m benchmarks.quality.study`: "
        f"{model['name']}, {model['dtype']}, without training; seed of the passkeys "
        f"{', '.join(map(str, seeds))}, five digits, one key a length and depth."
    )
    machines = dict.fromkeys(map(machine_of, perplexity["machines"] + passkey["machines"]))
    return "\n\n".join(parts), "; ".join(machines)


def tuning(folder: Path) -> tuple[str, str]:
    """The README's table of what the constants of ``auto`` were chosen on, and the machine."""
    record = load(folder, "tuning")
    model = record["model"]
    return (
        f"{perplexity_table(record, 2 * TRAINED)}\n\n\\* past the {TRAINED} tokens that the model was trained on. "
        f"`python -m benchmarks.quality.tuning`: {model['name']}, {model['dtype']}."
    ), machine_of(record["machines"][0])
