"""Tables and plot of the study of training after an extension."""

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

KIND = "after_training"
RECORD = f"quality_{KIND}.json"
BASELINE = "auto"
MEETS = 0.01
"""Strategies have met where their perplexities are within one percent."""

Parts = list[float]
"""Mean losses past (or below) the trained length, one a held-out sample."""
Training = tuple[str, int]
"""The fingerprint of a base, and the seed of the order of the text that it was trained on with."""


@dataclass(frozen=True)
class Scale:
    """The finished trainings of one scale.

    Attributes:
        steps: that were evaluated.
        results: by label, then by training, then by step. What comes before the first step is the same for every seed.
    """

    scale: int
    tokens: int
    steps: tuple[int, ...]
    results: dict[str, dict[Training, dict[int, dict[str, Any]]]]

    @property
    def trained(self) -> int:
        """Length of the first training."""
        return self.tokens // self.scale

    @property
    def reference(self) -> str:
        """The label that the others are compared with."""
        return BASELINE if BASELINE in self.results else next(iter(self.results))

    @property
    def trainings(self) -> list[Training]:
        """All that some label has."""
        return sorted({training for own in self.results.values() for training in own})

    def parts(self, label: str, training: Training, step: int, past: bool) -> Parts:
        """Of one training."""
        nll = self.results[label][training][step]["nll"]
        chosen = slice(1, None) if past else slice(0, 1)
        return [statistics.fmean(row[chosen]) for rows in nll.values() for row in rows]

    def loss(self, label: str, step: int, past: bool = True) -> list[float]:
        """Mean loss of every training of a label."""
        return [statistics.fmean(self.parts(label, one, step, past)) for one in sorted(self.results[label])]

    def differences(self, label: str, other: str, step: int, past: bool = True) -> list[Parts]:
        """Differences of the losses of every held-out sample, of each training that both labels have.

        Before the first step, of each base.
        """
        both = sorted(self.results[label].keys() & self.results[other].keys())
        if not step:
            both = list({base: (base, seed) for base, seed in both}.values())
        pairs = [(self.parts(label, one, step, past), self.parts(other, one, step, past)) for one in both]
        return [[own - its for own, its in zip(*pair, strict=True)] for pair in pairs]

    def difference(self, label: str, other: str, step: int, past: bool = True) -> tuple[float, float] | None:
        """Mean difference of losses and its standard error; None where no training is of both labels.

        The error has two parts, added as squares: that of the held-out samples, whose losses are averaged over the
        trainings, and that of the trainings.
        """
        found = self.differences(label, other, step, past)
        if not found:
            return None
        by_sample = [statistics.fmean(values) for values in zip(*found, strict=True)]
        mean, error = paired_difference(by_sample, [0.0] * len(by_sample))
        if len(found) > 1:
            by_training = [statistics.fmean(parts) for parts in found]
            error = math.hypot(error, paired_difference(by_training, [0.0] * len(found))[1])
        return mean, error

    def passkeys(self, label: str, step: int, scoring: str) -> str:
        """Found of all prompts of all trainings."""
        answers = [answer for of in self.results[label].values() for answer in of[step][scoring]]
        return f"{sum(answers)}/{len(answers)}"


def scales(record: dict[str, Any]) -> list[Scale]:
    """Of a record, by the newest plan of every label; a scale without a finished training is left out."""
    found: dict[tuple[int, int], dict[str, dict[Any, dict[int, Any]]]] = {}
    for m in only_newest(record["measurements"]):
        what = m["what"]
        own = found.setdefault((what["scale"], what["tokens"]), {}).setdefault(what["variant"], {})
        own.setdefault((what["base"], what["seed"]), {})[what["step"]] = m["result"]
    made = []
    for (scale, tokens), labels in sorted(found.items()):
        steps = sorted({step for own in labels.values() for results in own.values() for step in results})
        finished: dict[str, dict[Training, dict[int, Any]]] = {}
        for label, own in labels.items():
            for (base, seed), results in own.items():
                # Before the first step there is no seed.
                whole = results | own.get((base, None), {})
                if seed is not None and len(whole) == len(steps):
                    finished.setdefault(label, {})[base, seed] = whole
        if finished:
            made.append(Scale(scale, tokens, tuple(steps), finished))
    return made


def finished(folder: Path) -> list[Scale]:
    """Of the record in a folder; empty where there is none."""
    path = folder / RECORD
    return scales(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def value(folder: Path, scale: str, label: str, against: str, step: str) -> str:
    """A difference in perplexity past the trained length after ``step`` steps; spaces of labels written as ``_``.

    Raises:
        ValueError: no training of the scale has both labels and the step.
    """
    for one in finished(folder):
        names = {name.replace(" ", "_"): name for name in one.results}
        known = {label, against} <= names.keys() and step in map(str, one.steps)
        if str(one.scale) == scale and known:
            found = one.difference(names[label], names[against], int(step))
            if found is not None:
                return percent(*found)
    raise ValueError(f"no training at {scale}x has step {step} of both {label!r} and {against!r}")


def ordered(scale: Scale) -> list[str]:
    """Labels that have a training in common with the reference, the lowest last loss first."""
    found = {}
    for label in scale.results:
        if against := scale.difference(label, scale.reference, scale.steps[-1]):
            found[label] = against[0]
    return sorted(found, key=found.__getitem__)


def table(scale: Scale) -> str:
    """A row a strategy: perplexity past the trained length against the reference after every number of steps."""
    last, reference, rows = scale.steps[-1], scale.reference, []

    def cell(label: str, step: int, past: bool = True) -> str:
        if label == reference:
            return f"{math.exp(statistics.fmean(scale.loss(label, step, past))):.2f}"
        return percent(*scale.difference(label, reference, step, past))

    for label in ordered(scale):
        cells = [cell(label, step) for step in scale.steps]
        found = f"{scale.passkeys(label, 0, 'decoys')}, {scale.passkeys(label, last, 'decoys')}"
        rows.append(
            [f"`{label}`", f"{len(scale.results[label])}", *cells, cell(label, last, past=False), found]
        )
    heads = ["", "trainings", *(f"step {step}" for step in scale.steps)]
    heads += [f"below {scale.trained}, step {last}", f"passkeys, steps 0, {last}"]
    return markdown(rows, heads)


def meeting(scale: Scale, label: str, other: str) -> int | None:
    """The first evaluated step from which on two strategies stay within :data:`MEETS`; None: they do not meet."""
    found = None
    for step in reversed(scale.steps):
        against = scale.difference(label, other, step)
        if against is None or abs(math.expm1(against[0])) > MEETS:
            break
        found = step
    return found


def sentences(scale: Scale) -> str:
    """Whether dprope is ahead, whether its threshold matters, and where strategies meet."""
    last, labels = scale.steps[-1], ordered(scale)
    best = labels[0]
    made = [f"After {last} steps `{best}` has the lowest perplexity past {scale.trained}."]
    ours = [label for label in labels if label.partition(":")[0] == "dprope"]
    others = [label for label in labels if label not in ours]
    if ours and others and (against := scale.difference(ours[0], others[0], last)):
        mean, error = against
        verdict = "not separable from" if not abs(mean) > 2 * error else "ahead of" if mean < 0 else "behind"
        made.append(f"`{ours[0]}` is {verdict} the best other, `{others[0]}` ({percent(mean, error)}).")
    for label in ours:
        if label != "dprope" and "dprope" in ours and (against := scale.difference(label, "dprope", last)):
            made.append(f"`{label}` has {percent(*against)} against `dprope`.")
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
        parts.append(f"Extended {heading(scale)}, perplexity of held-out tokens past {scale.trained}:")
        parts += [table(scale), sentences(scale)]
    parts.append(
        "![Perplexity past the trained length while training on](../benchmarks/plots/after_training.svg)"
    )
    bases = sorted({base for scale in found for base, _ in scale.trainings})
    batch, rate = whats[0]["batch"], whats[0]["rate"]
    parts.append(
        f"The row of `{found[0].reference}` has perplexities, the others their differences from it, paired by base, "
        "seed and held-out sample. `python -m benchmarks.quality.after_training`: each base is a LLaMA of "
        f"{found[0].trained} trained tokens (`benchmarks.quality.small_llama`; {', '.join(bases)}), each seed an "
        f"order of the text that it is trained on with: {batch} tokens a step, learning rate {rate:.2g} held "
        f"constant. Read: {'; '.join(texts)}. Passkeys: likelier than each of nine decoys, prompts of the extended "
        "length. Errors are of the held-out samples, and of the trainings too where there are several."
    )
    return "\n\n".join(parts), "; ".join(dict.fromkeys(map(machine_of, record["machines"])))


def heading(scale: Scale) -> str:
    """``2x, to 512 tokens (4 trainings of 2 bases)``"""
    trainings = scale.trainings
    bases = _plural(len({base for base, _ in trainings}), "base")
    return f"{scale.scale}x, to {scale.tokens} tokens ({_plural(len(trainings), 'training')} of {bases})"


def curves(scale: Scale) -> list[TrainingCurve]:
    """Perplexity past the trained length against steps, with the range of the trainings.

    Bases differ more than strategies, and not every strategy has trained every base: a curve is the reference's with
    the difference of the trainings that both have.
    """
    made = []
    for label in ordered(scale):
        curve = TrainingCurve(label, list(scale.steps), [], [], [])
        for step in scale.steps:
            of_reference = statistics.fmean(scale.loss(scale.reference, step))
            apart = [statistics.fmean(parts) for parts in scale.differences(label, scale.reference, step)]
            for values, chosen in (
                (curve.perplexity, statistics.fmean(apart)),
                (curve.lows, min(apart)),
                (curve.highs, max(apart)),
            ):
                values.append(math.exp(of_reference + chosen))
        made.append(curve)
    return made


def panels(found: Sequence[Scale]) -> dict[str, tuple[int, list[TrainingCurve]]]:
    """Of the plot, by title: the trained length and the curves."""
    return {heading(scale): (scale.trained, curves(scale)) for scale in found}


def draw(path: Path, found: Sequence[Scale], note: str) -> None:
    """Write the plot, a panel a scale."""
    plot_training(panels(found), "Perplexity past the trained length while training on", path, note=note)
