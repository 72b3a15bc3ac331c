"""Tables and picture of the study of training after an extension."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.quality.readings import only_newest
from benchmarks.tables import markdown
from rope_dist.evaluation.paired import paired_difference, percent
from rope_dist.plots import TrainingCurve, plot_training

RECORD, PICTURE = "quality_after_training.json", "quality_after_training.png"
BASELINE = "auto"
MEETS = 0.01
"""Strategies have met where their perplexities are within one percent."""

Parts = list[float]
"""Mean losses past (or below) the trained length, one a held-out sample."""


@dataclass(frozen=True)
class Scale:
    """The trainings of one scale that every strategy has finished.

    Attributes:
        steps: that were evaluated.
        seeds: that all labels have.
        results: by label, then by step, one of every seed.
    """

    scale: int
    tokens: int
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    results: dict[str, dict[int, list[dict[str, Any]]]]

    @property
    def trained(self) -> int:
        """Length of the first training."""
        return self.tokens // self.scale

    def parts(self, label: str, step: int, index: int, past: bool) -> Parts:
        """Of the seed of this index."""
        nll = self.results[label][step][index]["nll"]
        chosen = slice(1, None) if past else slice(0, 1)
        return [statistics.fmean(row[chosen]) for rows in nll.values() for row in rows]

    def loss(self, label: str, step: int, past: bool = True) -> list[float]:
        """Mean loss of every seed."""
        return [statistics.fmean(self.parts(label, step, i, past)) for i in range(len(self.seeds))]

    def difference(self, label: str, other: str, step: int, past: bool = True) -> tuple[float, float]:
        """Mean difference of losses and its standard error.

        The error has two parts, added as squares: that of the held-out samples, whose losses are averaged over the
        seeds, and that of the seeds.
        """
        pairs = [[self.parts(name, step, i, past) for i in range(len(self.seeds))] for name in (label, other)]
        by_sample = [[statistics.fmean(values) for values in zip(*seeds, strict=True)] for seeds in pairs]
        mean, error = paired_difference(*by_sample)
        if len(self.seeds) > 1 and step:
            by_seed = [[statistics.fmean(parts) for parts in seeds] for seeds in pairs]
            error = math.hypot(error, paired_difference(*by_seed)[1])
        return mean, error

    def passkeys(self, label: str, step: int, scoring: str) -> str:
        """Found of all prompts of all seeds."""
        answers = [answer for result in self.results[label][step] for answer in result[scoring]]
        return f"{sum(answers)}/{len(answers)}"


def scales(record: dict[str, Any]) -> list[Scale]:
    """Of a record, by the newest plan of every label; a scale without a finished training is left out."""
    found: dict[tuple[int, int], dict[str, dict[Any, dict[int, Any]]]] = {}
    for m in only_newest(record["measurements"]):
        what = m["what"]
        by_seed = found.setdefault((what["scale"], what["tokens"]), {}).setdefault(what["variant"], {})
        by_seed.setdefault(what["seed"], {})[what["step"]] = m["result"]
    made = []
    for (scale, tokens), labels in sorted(found.items()):
        steps = sorted({step for seeds in labels.values() for of_seed in seeds.values() for step in of_seed})
        # Before the first step there is no seed.
        finished = {
            label: {
                seed
                for seed in seeds
                if seed is not None and 1 + len(seeds[seed]) == len(steps) and None in seeds
            }
            for label, seeds in labels.items()
        }
        finished = {label: seeds for label, seeds in finished.items() if seeds}
        shared = sorted(set.intersection(*finished.values())) if finished else []
        if not shared:
            continue
        results = {
            label: {step: [labels[label][seed if step else None][step] for seed in shared] for step in steps}
            for label in finished
        }
        made.append(Scale(scale, tokens, tuple(steps), tuple(shared), results))
    return made


def finished(folder: Path) -> list[Scale]:
    """Of the record in a folder; empty where there is none."""
    path = folder / RECORD
    return scales(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def table(scale: Scale) -> str:
    """A row a strategy: perplexity past the trained length after every number of steps, and the last against others."""
    last = scale.steps[-1]
    rows = []
    labels = sorted(scale.results, key=lambda label: statistics.fmean(scale.loss(label, last)))
    for label in labels:
        cells = [f"{math.exp(statistics.fmean(scale.loss(label, step))):.2f}" for step in scale.steps]
        compared = [
            ""
            if label == BASELINE or BASELINE not in scale.results
            else percent(*scale.difference(label, BASELINE, step))
            for step in (scale.steps[0], last)
        ]
        below = f"{math.exp(statistics.fmean(scale.loss(label, last, past=False))):.2f}"
        found = f"{scale.passkeys(label, 0, 'decoys')}, {scale.passkeys(label, last, 'decoys')}"
        rows.append([f"`{label}`", *cells, *compared, below, found])
    heads = ["", *(f"step {step}" for step in scale.steps)]
    heads += [
        f"against {BASELINE}, before",
        "after",
        f"below {scale.trained}, after",
        "passkeys, before, after",
    ]
    return markdown(rows, heads)


def meeting(scale: Scale, label: str, other: str) -> int | None:
    """The first evaluated step from which on two strategies stay within :data:`MEETS`; None: they do not meet."""
    found = None
    for step in reversed(scale.steps):
        if abs(math.expm1(scale.difference(label, other, step)[0])) > MEETS:
            break
        found = step
    return found


def sentences(scale: Scale) -> str:
    """Whether dprope is ahead, whether its threshold matters, and where strategies meet."""
    last, labels = scale.steps[-1], list(scale.results)
    best = min(labels, key=lambda label: statistics.fmean(scale.loss(label, last)))
    made = [f"After {last} steps `{best}` has the lowest perplexity past {scale.trained}."]
    ours = [label for label in labels if label.partition(":")[0] == "dprope"]
    others = [label for label in labels if label not in ours]
    if ours and others:
        first = min(ours, key=lambda label: statistics.fmean(scale.loss(label, last)))
        rest = min(others, key=lambda label: statistics.fmean(scale.loss(label, last)))
        mean, error = scale.difference(first, rest, last)
        verdict = "not separable from" if not abs(mean) > 2 * error else "ahead of" if mean < 0 else "behind"
        made.append(f"`{first}` is {verdict} the best other, `{rest}` ({percent(mean, error)}).")
        for label in ours[1:]:
            against = percent(*scale.difference(label, ours[0], last))
            made.append(f"`{label}` has {against} against `{ours[0]}`.")
    met = [(label, meeting(scale, label, best)) for label in labels if label != best]
    near = [f"`{label}` from step {step} on" for label, step in met if step is not None]
    far = [f"`{label}`" for label, step in met if step is None]
    made.append(
        f"Within {100 * MEETS:g} % of it: {', '.join(near) or 'none'}; "
        f"not within {last} steps: {', '.join(far) or 'none'}."
    )
    return " ".join(made)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def block(folder: Path) -> tuple[str, str]:
    """The block ``after-training`` of docs/quality.md and the machines; a sentence where there is no result yet."""
    found = finished(folder)
    if not found:
        return "Not measured yet: `python -m benchmarks.quality.after_training`.", ""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    whats = [m["what"] for m in record["measurements"] if m["what"]["step"]]
    texts = list(record["measurements"][0]["result"]["nll"])
    parts = []
    for scale in found:
        parts.append(
            f"Extended {scale.scale}x, to {scale.tokens} tokens ({_plural(len(scale.seeds), 'seed')}; perplexity of "
            f"held-out tokens past {scale.trained}):"
        )
        parts += [table(scale), sentences(scale)]
    if (folder / PICTURE).exists():
        parts.append(f"![Perplexity after training](../benchmarks/results/{PICTURE})")
    model, batch, rate = record["model"], whats[0]["batch"], whats[0]["rate"]
    parts.append(
        f"`python -m benchmarks.quality.after_training`: a LLaMA of {found[0].trained} trained tokens "
        f"(`benchmarks.quality.small_llama`, fingerprint {model['fingerprint']}), {batch} tokens a step, learning rate "
        f"{rate:.2g} held constant. Read: {'; '.join(texts)}. Differences are paired by held-out sample and by seed. "
        "Passkeys: likelier than each of nine decoys, prompts of the extended length."
    )
    return "\n\n".join(parts), "; ".join(dict.fromkeys(map(machine_of, record["machines"])))


def curves(scale: Scale) -> list[TrainingCurve]:
    """Perplexity past the trained length against steps, with the range of the seeds."""
    made = []
    for label in scale.results:
        losses = [scale.loss(label, step) for step in scale.steps]
        made.append(
            TrainingCurve(
                label,
                list(scale.steps),
                [math.exp(statistics.fmean(of_step)) for of_step in losses],
                [math.exp(min(of_step)) for of_step in losses],
                [math.exp(max(of_step)) for of_step in losses],
            )
        )
    return made


def draw(folder: Path, found: Sequence[Scale]) -> None:
    """The picture, beside the record."""
    panels = {
        f"{s.scale}x, {s.tokens} tokens ({_plural(len(s.seeds), 'seed')})": (s.trained, curves(s))
        for s in found
    }
    plot_training(panels, "Perplexity past the trained length while training on", folder / PICTURE)
