"""Losses by position in the studies' records: the newest plan of every label, in parts that can be paired."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rope_dist.evaluation.paired import paired_difference
from rope_dist.evaluation.perplexity import WIDTH, Bucket

SCRIPTS = {
    "tuning": "tuning",
    "tuning_small": "tuning",
    "growth": "growth",
    "growth_passkey": "growth_passkeys",
}
"""Kind of a record -> what makes it, where that is not the study."""
Losses = list[list[float]]
"""Of a text: passages, and of each the mean loss of every ``width`` positions."""


def path_of(folder: Path, kind: str) -> Path:
    """Of a record of the study."""
    return folder / f"quality_{kind}.json"


def load(folder: Path, kind: str) -> dict[str, Any]:
    """A record of the study; ``ValueError`` names the command that makes it."""
    path = path_of(folder, kind)
    if not path.exists():
        raise ValueError(f"there is no {path}: python -m benchmarks.quality.{SCRIPTS.get(kind, 'study')}")
    return json.loads(path.read_text(encoding="utf-8"))


def summarise(nll: torch.Tensor, width: int = WIDTH) -> dict[str, Any]:
    """What a record keeps of the token losses ``[passages, S - 1]`` of a text.

    Of one passage and the usual width it is what ``rope-dist eval perplexity`` keeps.
    """
    passages, predicted = nll.shape
    means = [
        nll[:, max(start - 1, 0) : start + width - 1].double().mean(1)
        for start in range(0, predicted + 1, width)
    ]
    by_position = torch.stack([mean for mean in means if not mean.isnan().any()], 1).flatten().tolist()
    digits = 6 if passages == 1 else 4  # of many numbers the file would be large
    result = {
        "nll": nll.double().mean().item(),
        "predicted": predicted,
        "nll_by_position": [round(value, digits) for value in by_position],
    }
    return result if width == WIDTH else result | {"width": width}


def newest(measurements: Iterable[dict[str, Any]], size: str = "tokens") -> dict[tuple[str, int], str]:
    """The frequencies of a label's newest reading of so many tokens; earlier plans of its name are others."""
    return {(m["what"]["variant"], m["what"][size]): m["what"]["frequencies"] for m in measurements}


def only_newest(measurements: Sequence[dict[str, Any]], size: str = "tokens") -> list[dict[str, Any]]:
    """Measurements by the newest plan of their label."""
    current = newest(measurements, size)
    return [
        m for m in measurements if m["what"]["frequencies"] == current[m["what"]["variant"], m["what"][size]]
    ]


def superseded(measurements: Iterable[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Label, tokens and texts of readings by frequencies that are not the newest of their label."""
    measurements = list(measurements)
    current = newest(measurements)
    found: dict[tuple[str, int], list[str]] = {}
    for m in measurements:
        what = m["what"]
        at = what["variant"], what["tokens"]
        if what["frequencies"] != current[at]:
            found.setdefault(at, []).append(what["text"])
    return [(*at, list(dict.fromkeys(texts))) for at, texts in found.items()]


def span(texts: Sequence[Losses], start: int, end: int, width: int = WIDTH) -> list[float]:
    """The parts of positions ``start`` to ``end`` of all passages of several texts."""
    return [loss for passages in texts for parts in passages for loss in parts[start // width : end // width]]


def perplexity(parts: Sequence[float]) -> float:
    """Of parts of equally many tokens."""
    return math.exp(statistics.fmean(parts))


@dataclass(frozen=True)
class Readings:
    """Readings of ``tokens`` tokens of one record.

    Attributes:
        trained: length that the model was trained to.
        tokens: of a passage.
        width: positions a part.
        losses: by label, then by text.
    """

    trained: int
    tokens: int
    width: int
    losses: dict[str, dict[str, Losses]]

    @property
    def past(self) -> tuple[int, int]:
        """The positions past the trained length."""
        return self.trained, self.tokens

    @property
    def below(self) -> tuple[int, int]:
        """The positions up to the trained length."""
        return 0, self.trained

    def both(self, label: str, other: str) -> list[str]:
        """Texts that two labels have read."""
        return [text for text in self.losses.get(other, {}) if text in self.losses.get(label, {})]

    def parts(self, label: str, texts: Sequence[str], start: int, end: int) -> list[float]:
        """The parts of positions ``start`` to ``end``."""
        return span([self.losses[label][text] for text in texts], start, end, self.width)

    def perplexity(self, label: str, texts: Sequence[str], start: int, end: int) -> float:
        """Of the tokens at those positions."""
        return perplexity(self.parts(label, texts, start, end))

    def difference(
        self, label: str, against: str, texts: Sequence[str], start: int, end: int
    ) -> tuple[float, float]:
        """Mean difference of losses, ``label`` less ``against``, and its standard error."""
        return paired_difference(*(self.parts(one, texts, start, end) for one in (label, against)))

    def curve(self, label: str, texts: Sequence[str], buckets: int = 8) -> list[Bucket]:
        """Perplexity by position, about ``buckets`` of them."""
        step = max(self.tokens // buckets // self.width, 1) * self.width
        spans = [(at, min(at + step, self.tokens)) for at in range(0, self.tokens, step)]
        return [Bucket(*at, self.perplexity(label, texts, *at)) for at in spans]


def readings(record: dict[str, Any], tokens: int, labels: Sequence[str] | None = None) -> Readings:
    """Whole readings of ``tokens`` by the newest plan of every label, in the order of ``labels`` (None: of the record).

    Raises:
        ValueError: readings of parts of different widths, which cannot be paired.
    """
    measurements = only_newest([m for m in record["measurements"] if m["what"]["tokens"] == tokens])
    found: dict[str, dict[str, Losses]] = {label: {} for label in labels or ()}
    widths = set()
    for m in measurements:
        what, flat = m["what"], m["result"]["nll_by_position"]
        label = what["variant"]
        if labels and label not in labels:
            continue
        widths.add(m["result"].get("width", WIDTH))
        each = len(flat) // what.get("passages", 1)
        passages = [flat[at : at + each] for at in range(0, len(flat), each)]
        found.setdefault(label, {})[what["text"]] = passages
    if len(widths) > 1:
        raise ValueError(
            f"readings of {tokens} tokens in parts of {sorted(widths)} positions cannot be compared"
        )
    return Readings(
        trained_length(record), tokens, *(widths or {WIDTH}), {k: v for k, v in found.items() if v}
    )


def trained_length(record: dict[str, Any]) -> int:
    """Length that the model of a record was trained to."""
    lengths = {plan["original_length"] for plan in record["plans"].values() if "original_length" in plan}
    if len(lengths) != 1:
        raise ValueError(
            f"the plans of a record of {record['model']['name']} have trained lengths {sorted(lengths)}"
        )
    return lengths.pop()
