"""What a plan that grows with the text is worth: SmolLM2-135M (trained to 8192 tokens), without training.

    python -m benchmarks.quality.growth [--seconds 3600] [--quick]

Reads texts to 2x and 4x of the trained length, past it in pieces as a conversation grows: by a dynamic plan, by the
same without the correction of cached keys (what it would be to change frequencies alone), and by static plans for the
whole length. Whole texts of lengths in between are read by the plan of their stage, which is what a dynamic plan does
with a prompt. Ladders of other ratios tell how many stages are worth it. As the study, it resumes where it was
stopped, and takes readings of stock and static plans from it. Result: ``quality_growth.json``.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import rope_dist
from benchmarks.quality.parts import DTYPE, FIRST, MODEL, SECOND, TRAINED
from benchmarks.quality.study import begin, line
from rope_dist import evaluation
from rope_dist.dynamic import DynamicPlan, ladder
from rope_dist.evaluation import Record, Variant
from rope_dist.hf import growing

STRATEGY = "auto"
GROWN = f"{STRATEGY}+dynamic"
STALE = f"{GROWN}, keys not corrected"
RATIOS = {"1 stage": 2.0, "2 stages": 2**0.5, "6 stages": 2 ** (1 / 6)}
"""Ladders to 2x, by their number of stages past the trained length."""


class Stale(Variant):
    """A dynamic plan that changes frequencies and leaves cached keys as they are."""

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[Any]:
        """Context manager: the plan is applied to ``model`` inside it and removed after it."""

        def change_stage(decoder: Any, cache: Any, record: Any, past: int, stage: int) -> None:
            record.stage = stage

        with mock.patch.object(growing, "change_stage", change_stage), super().applied(model):
            yield

    @property
    def fingerprint(self) -> str:
        """Of the frequencies, and that keys are not corrected."""
        return f"{super().fingerprint}-stale"


@dataclass(frozen=True)
class Reading:
    """Variants read the first ``tokens`` of ``texts``, whole or grown."""

    method: str
    tokens: int
    texts: tuple[str, ...]
    variants: tuple[Variant, ...]


def dynamic(model: Any, target: int, ratio: float | None = None) -> DynamicPlan:
    """A dynamic plan to ``target`` tokens, with stages at most ``ratio`` apart."""
    stages = None if ratio is None else ladder(TRAINED, target, ratio)
    return rope_dist.dynamic_plan(model, target_length=target, strategy=STRATEGY, stages=stages)


def readings(model: Any) -> list[Reading]:
    """All of them, what matters most first."""
    longest = dynamic(model, 4 * TRAINED)
    to_2x = dynamic(model, 2 * TRAINED)
    both = (Variant(GROWN, to_2x), Stale(STALE, to_2x))

    def at(tokens: int) -> tuple[Variant, ...]:
        return (Variant(f"{STRATEGY} for {longest.at(tokens).target_length}", longest.at(tokens)),)

    ladders = tuple(Variant(f"{GROWN}, {name}", dynamic(model, 2 * TRAINED, r)) for name, r in RATIOS.items())
    texts = FIRST + SECOND
    return [
        Reading("grown", 2 * TRAINED, FIRST, both),
        Reading("grown", 2 * TRAINED, SECOND, both),
        Reading("whole", 3 * TRAINED // 2, texts, at(3 * TRAINED // 2)),
        Reading("whole", 2 * TRAINED, texts, at(4 * TRAINED)),
        Reading("grown", 2 * TRAINED, FIRST, ladders),
        Reading("grown", 4 * TRAINED, FIRST[:1], (Variant(GROWN, longest),)),
        Reading("whole", 3 * TRAINED, FIRST[:1], at(3 * TRAINED)),
        Reading("grown", 2 * TRAINED, SECOND, ladders),
        Reading("grown", 4 * TRAINED, FIRST[1:], (Variant(GROWN, longest),)),
        Reading("whole", 3 * TRAINED, FIRST[1:], at(3 * TRAINED)),
        Reading("grown", 4 * TRAINED, FIRST, (Stale(STALE, longest),)),
    ]


def main() -> None:
    """Run what is not yet on record."""
    quick, output, deadline = begin(
        "growth", __doc__, "the first reading of a short text: does the study run?"
    )
    transformers_logging.set_verbosity_error()
    model, tokenizer = evaluation.load_model(MODEL, dtype=DTYPE)
    record = Record(output / "quality_growth.json", "perplexity", evaluation.describe(model, MODEL))
    wanted = readings(model)
    if quick:
        wanted = [Reading("grown", TRAINED + 300, ("python",), wanted[0].variants[:1])]
    for reading in wanted:
        texts = evaluation.passages(tokenizer, reading.texts, reading.tokens)
        options = {
            "lengths": [reading.tokens],
            "methods": [reading.method],
            "chunk": min(reading.tokens, 2 * TRAINED),
        }
        for variant, m, finished in evaluation.measure_perplexity(
            model, texts, reading.variants, record, **options
        ):
            what = f"{m['what']['text']}, {reading.tokens} tokens {reading.method}, {variant.label}"
            print(line(what, m, finished), flush=True)
            if time.monotonic() > deadline:
                print("the same command goes on")
                return
    print("all there are")


if __name__ == "__main__":
    main()
