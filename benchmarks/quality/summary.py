"""The study's tables: only texts and lengths that every strategy has finished are counted."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.tables import markdown
from rope_dist.evaluation.perplexity import WIDTH, Bucket
from rope_dist.evaluation.tables import average_buckets, scores, total
from rope_dist.evaluation.variants import STOCK

TRAINED = 8192
SCRIPTS = {"tuning": "tuning", "growth": "growth", "growth_passkey": "growth_passkeys"}
"""Kind of a record -> what makes it, where that is not the study."""


def load(folder: Path, kind: str) -> dict[str, Any]:
    """A record of the study; ``ValueError`` names the command that makes it."""
    path = folder / f"quality_{kind}.json"
    if not path.exists():
        raise ValueError(f"there is no {path}: python -m benchmarks.quality.{SCRIPTS.get(kind, 'study')}")
    return json.loads(path.read_text(encoding="utf-8"))


def finished_readings(record: dict[str, Any], tokens: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by text and label, of readings of ``tokens``: texts that every label has read."""
    by_text: dict[str, dict[str, dict[str, Any]]] = {}
    for m in record["measurements"]:
        if m["what"]["tokens"] == tokens:
            by_text.setdefault(m["what"]["text"], {})[m["what"]["variant"]] = m["result"]
    labels = {label for results in by_text.values() for label in results}
    return {text: results for text, results in by_text.items() if results.keys() == labels}


def _curve(results: Iterable[dict[str, Any]], tokens: int) -> list[Bucket]:
    """Perplexity by position, about eight buckets."""
    return average_buckets(list(results), max(tokens // 8 // WIDTH, 1) * WIDTH)


def finished_curves(record: dict[str, Any], tokens: int) -> tuple[dict[str, list[Bucket]], int]:
    """Perplexity by position by label, and over how many texts."""
    texts = list(finished_readings(record, tokens).values())
    return {label: _curve((r[label] for r in texts), tokens) for label in (texts or [{}])[0]}, len(texts)


def perplexity_table(record: dict[str, Any], tokens: int) -> str:
    """A row a strategy: everywhere, past the trained length (of several texts also its range), by position."""
    (curves, several), texts = finished_curves(record, tokens), finished_readings(record, tokens).values()
    rows, headers = [], []
    for label, buckets in curves.items():
        past = [_past(_curve([results[label]], tokens)) for results in texts]
        overall = math.exp(sum(results[label]["nll"] for results in texts) / several)
        cells = {
            "": label,
            "all": f"{overall:.2f}",
            f"past {TRAINED}": f"{_past(buckets):.2f}",
            **({"over the texts": f"{min(past):.2f} - {max(past):.2f}"} if several > 1 else {}),
        }
        for b in buckets:
            mark = "*" if b.start >= TRAINED else ""
            cells[f"{b.start / 1024:g}-{b.end / 1024:g}k{mark}"] = f"{b.perplexity:.2f}"
        headers = list(cells)
        rows.append(list(cells.values()))
    return markdown(rows, headers) if rows else ""


def where_others_lead(record: dict[str, Any], tokens: int, label: str = "auto") -> str:
    """A sentence: in how much of each text past the trained length ``label`` is the best extension, and where not."""
    places, behind = 0, []
    for text, results in finished_readings(record, tokens).items():
        if label not in results:
            return ""
        curves = {name: _curve([result], tokens) for name, result in results.items() if name != STOCK}
        for parts in zip(*curves.values(), strict=True):
            by_name = dict(zip(curves, parts, strict=True))
            own, best = by_name[label], min(by_name, key=lambda name, at=by_name: at[name].perplexity)
            if own.start < TRAINED:
                continue
            places += 1
            if best != label:
                numbers = f"{best} {by_name[best].perplexity:.2f}, {label} {own.perplexity:.2f}"
                behind.append(f"{text}, {own.start / 1024:g}-{own.end / 1024:g}k ({numbers})")
    if not places:
        return ""
    ahead, rest = places - len(behind), f"; not in {'; '.join(behind)}" if behind else ""
    return f"Text by text `{label}` is the best extension in {ahead} of {places} parts past {TRAINED}{rest}."


def _past(buckets: list[Bucket]) -> float:
    """Perplexity of the tokens past the trained length; not a number where none was read."""
    past = {b: b.end - b.start for b in buckets if b.start >= TRAINED}
    nll = sum(math.log(b.perplexity) * tokens for b, tokens in past.items())
    return math.exp(nll / sum(past.values())) if past else math.nan


def passkey_table(record: dict[str, Any]) -> str:
    """A row a strategy, per length the right answers of all prompts (generated, among decoys)."""
    found = defaultdict(list)
    for m in record["measurements"]:
        found[m["what"]["length"], m["what"]["variant"], m["what"]["scoring"]].append(m)
    lengths, labels = sorted({key[0] for key in found}), list(dict.fromkeys(key[1] for key in found))
    cells: dict[str, list[str]] = {label: [label] for label in labels}
    headers = ["passkeys found"]
    for length in lengths:
        answers = {label: [found[length, label, how] for how in ("generate", "decoys")] for label in labels}
        counts = {tuple(map(len, both)) for both in answers.values()}
        # Every strategy has answered equally many prompts: the length is finished.
        if len(counts) == 1 and all(counts.pop()):
            headers.append(f"{length}{'*' if length > TRAINED else ''}")
            for label, both in answers.items():
                cells[label].append(", ".join(str(total(scores(m).values())) for m in both))
    return markdown(list(cells.values()), headers) if len(headers) > 1 else ""


def block(folder: Path) -> tuple[str, str]:
    """The README's block, tables and the plot, and the machines that measured it."""
    perplexity, passkey = load(folder, "perplexity"), load(folder, "passkey")
    parts = []
    for tokens in sorted({m["what"]["tokens"] for m in perplexity["measurements"]}):
        texts = "; ".join(finished_readings(perplexity, tokens))
        read = {m["what"]["frequencies"] for m in perplexity["measurements"] if m["what"]["tokens"] == tokens}
        plans = (plan for name, plan in perplexity["plans"].items() if name in read)
        targets = ", ".join(map(str, sorted({plan["target_length"] for plan in plans})))
        if texts and targets:  # not where only the stock model has read
            parts.append(f"Perplexity of the first {tokens} tokens of {texts}. Extended to {targets}:")
            parts += [perplexity_table(perplexity, tokens), where_others_lead(perplexity, tokens)]
    if (folder / "quality.png").exists():
        parts.append("![Perplexity by position](benchmarks/results/quality.png)")
    if table := passkey_table(passkey):
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
    return "\n\n".join(filter(None, parts)), "; ".join(machines)


def tuning(folder: Path) -> tuple[str, str]:
    """The README's table of what the constants of ``auto`` were chosen on, and the machine."""
    record = load(folder, "tuning")
    model = record["model"]
    return (
        f"{perplexity_table(record, 2 * TRAINED)}\n\n\\* past the {TRAINED} tokens that the model was trained on. "
        f"`python -m benchmarks.quality.tuning`: {model['name']}, {model['dtype']}."
    ), machine_of(record["machines"][0])
