"""Right answers to prompts, by plan and length: needles of the synthetic tasks, and passkeys."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.quality.parts import BASELINE
from benchmarks.quality.readings import load, only_newest, path_of
from benchmarks.quality.summary import WINDOW_KINDS
from benchmarks.tables import markdown
from rope_dist.evaluation.passkey import SCORINGS
from rope_dist.evaluation.variants import STOCK

Answers = dict[tuple[str, int], list[tuple[bool, ...]]]
"""By label and length of the prompts: of each whether it was written, and likelier than every decoy."""
KINDS = {
    "passkey": "SmolLM2-135M, trained to 8192 tokens",
    "passkey_small": f"{WINDOW_KINDS['perplexity_small_2']}, trained to 256 tokens",
}
"""Record of passkeys -> the title of its model."""
PROMPTS = 20
"""A cell of fewer is empty: its prompts are not all answered."""


def needles(folder: Path) -> tuple[str, str]:
    """Single needles that SmolLM2 finds with and without a window, a column a length; nothing without a record."""
    found: Answers = {}
    for m in _measured(folder, "synthetic"):
        if m["what"]["task"] == "single-key":
            right = m["result"]["generated"], m["result"]["decoys"]
            found.setdefault((m["what"]["variant"], m["what"]["length"]), []).append(right)
    return answers_table(found), ""


def passkeys(folder: Path) -> tuple[str, str]:
    """A section of a table a model, and the machines; nothing without a record."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    for kind in (kind for kind in KINDS if path_of(folder, kind).exists()):
        record = load(folder, kind)
        found = answers_table(passkey_answers(folder, kind))
        parts += [f"{KINDS[kind]}, {record['model']['dtype']}:", found] if found else []
        machines |= dict.fromkeys(map(machine_of, record["machines"]))
    return "\n\n".join(parts), "; ".join(machines)


def passkey_answers(folder: Path, kind: str) -> Answers:
    """Prompts that were scored in every way."""
    scored: dict[tuple[Any, ...], dict[str, bool]] = {}
    for m in _measured(folder, kind):
        what = m["what"]
        prompt = what["variant"], what["length"], what["depth"], what["trial"], what["seed"]
        scored.setdefault(prompt, {})[what["scoring"]] = m["result"]["correct"]
    found: Answers = {}
    for (label, length, *_), correct in scored.items():
        if len(correct) == len(SCORINGS):
            found.setdefault((label, length), []).append(tuple(correct[scoring] for scoring in SCORINGS))
    return found


def _measured(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Answers by the newest plan of every label; none without a record."""
    if not path_of(folder, kind).exists():
        return []
    return only_newest(load(folder, kind)["measurements"], "length")


def answers_table(answers: Answers, names: dict[str, str] | None = None, head: str = "") -> str:
    """A row a label, a column a length; a row or column without a cell is left out.

    Args:
        answers: to the prompts.
        names: label -> its row, in this order (default: all labels, windows last).
        head: of the column of names.
    """
    full = {cell: asked for cell, asked in answers.items() if len(asked) >= PROMPTS}
    lengths = sorted({length for _, length in full})
    labels = {label for label, _ in full}
    names = names or {label: f"`{label}`" for label in _ordered(labels)}

    def cell(label: str, length: int) -> str:
        asked = full.get((label, length), [])
        return ", ".join(f"{sum(right)}/{len(asked)}" for right in zip(*asked, strict=True))

    rows = [
        [name, *(cell(label, length) for length in lengths)]
        for label, name in names.items()
        if label in labels
    ]
    return markdown(rows, [head, *(f"{n} tokens" for n in lengths)]) if rows else ""


def _ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda label: (label != STOCK, label != BASELINE, "+window=" in label, label))
