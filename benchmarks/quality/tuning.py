"""What the constants of ``auto`` were chosen on: one text at 2 and 4 times the trained length, and nothing else.

    python -m benchmarks.quality.tuning [--model smollm2-135m DIR]

Reads *Emma* with ``auto`` and its constants varied one at a time, beside what it competes with, what other criteria of
the rotary angles choose, queries that are scaled by their position, and windows of trained frequencies. A small LLaMA
(DIR, by ``benchmarks/quality/small_llama.py``) was trained to a 32nd of the length and shows which constants follow it.
It resumes where it was stopped, as the study. Results: ``quality_tuning.json`` and ``quality_tuning_small.json``;
``python -m benchmarks.report`` makes the tables.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import rope_dist
from benchmarks.benchmark import Parser
from benchmarks.quality.criteria import by_distance, of_neighbours
from benchmarks.quality.logit_scaling import LogScaledVariant
from benchmarks.quality.parts import OF_AUTO, SMOLLM2, TRAINED, StudyModel
from benchmarks.quality.readings import path_of
from benchmarks.quality.study import Reader, add_models, chosen_models, line
from rope_dist.evaluation import Record, Variant, describe, load_model, make_variants, passages
from rope_dist.evaluation.variants import STOCK

TEXT = "emma"
AUTO, LOG_N = "auto", "auto, logits by log n"
CANDIDATES: dict[int, tuple[tuple[str, str, dict[str, Any]], ...]] = {
    2: (
        ("yarn", "yarn", {}),
        ("ntk", "ntk", {}),
        (AUTO, AUTO, {}),
        ("auto:attention_factor=1", "auto", {"attention_factor": 1}),
        ("auto:attention_factor=1.025", "auto", {"attention_factor": 1.025}),
        ("auto:attention_factor=1.05", "auto", {"attention_factor": 1.05}),
        ("auto:attention_factor=1.0693", "auto", {"attention_factor": 1.0693}),  # YaRN's
        ("auto:fast_periods=256", "auto", {"fast_periods": 256}),
        ("auto:fast_periods=32", "auto", {"fast_periods": 32}),
        ("auto:slow_periods=0.5", "auto", {"slow_periods": 0.5}),
        ("dprope:threshold=0", "dprope", {"threshold": 0}),
        ("dprope:threshold=0,intervals=36", "dprope", {"threshold": 0, "intervals": 36}),
    ),
    4: (
        (AUTO, AUTO, {}),
        ("auto:attention_factor=1.05", "auto", {"attention_factor": 1.05}),
        ("auto:attention_factor=1.1", "auto", {"attention_factor": 1.1}),
    ),
}
"""By times the trained length: label, strategy and its settings."""
WINDOWED = {
    2: (
        "auto+window=1024",
        "auto+window=2048",
        "auto+window=4096",
        "auto+window=2048+scaling=far",
        "auto+window=2048+scaling=all",
        "yarn+window=2048",
        "pi+window=2048",
        "grouped+window=2048",
    ),
    4: ("auto+window=2048", "auto+window=2048+scaling=far"),
}
"""Trained frequencies within a window, by times the trained length."""
SMALL = (
    "yarn",
    "ntk",
    "llama3",
    "mrrope-pro",
    AUTO,
    *(f"auto:fast_periods={periods}" for periods in (3, 4, 8, 16, 32, 64)),
    "auto:slow_periods=0.5",
    *(f"auto:attention_factor={factor}" for factor in (1, 1.03, 1.05, 1.1, 1.15, 1.2)),
)
"""What the small model reads with, at both scales: ``auto`` has 2 fast periods at its trained length."""
POWERS = {2: (1.25, 1.5, 2.0)}
"""Of the place between the two ends of the ramp: above 1 fast pairs change less, as in MrRoPE-Pro."""
CRITERIA = {2: {"by distance": by_distance, "of neighbours": of_neighbours}}


def variants(model: PreTrainedModel, scale: int) -> list[Variant]:
    """What reads the text at ``scale`` times the trained length."""
    target = scale * TRAINED
    plan = partial(rope_dist.plan, model, target_length=target)
    auto = plan(strategy=AUTO)
    given = {}
    for power in POWERS.get(scale, ()):
        factors = [scale ** (math.log(f, scale) ** power) for f in auto.factors]
        given[f"auto, ramp to the power {power:g}"] = factors, auto.attention_scaling
    inv_freq = plan(strategy="extrapolation").inv_freq
    for label, choose in CRITERIA.get(scale, {}).items():
        given[label] = choose(inv_freq, TRAINED, target), 1.0
    made = [Variant(STOCK, None)] if scale == min(CANDIDATES) else []
    for label, strategy, settings in CANDIDATES[scale]:
        made.append(Variant(label, plan(strategy=strategy, settings=settings)))
    of_auto = {"attention_factor": auto.attention_scaling}
    made.append(Variant(f"yarn{OF_AUTO}", plan(strategy="yarn", settings=of_auto)))
    made.append(LogScaledVariant(LOG_N, auto))
    made += make_variants(model, WINDOWED.get(scale, ()), target)
    for label, (factors, attention_factor) in given.items():
        settings = {"factors": factors, "attention_factor": attention_factor}
        made.append(Variant(label, plan(strategy="longrope", settings=settings)))
    return made


def of_small(model: PreTrainedModel, trained: int, scale: int) -> list[Variant]:
    """What reads the text with the small model at ``scale`` times the trained length."""
    return make_variants(model, (*[STOCK] * (scale == min(CANDIDATES)), *SMALL), scale * trained)


def measurements(entry: StudyModel, output: Path) -> Iterator[str]:
    """Measure what is not on record; yields a line a measurement."""
    model, tokenizer = load_model(entry.source, dtype=entry.dtype)
    record = Record(path_of(output, f"tuning{entry.suffix}"), "perplexity", describe(model, entry.name))
    reader = Reader(entry, model, record)
    (text,) = passages(tokenizer, [TEXT], max(CANDIDATES) * entry.trained * entry.passages)
    for scale in CANDIDATES:
        target = scale * entry.trained
        ids = text.ids.reshape(entry.passages, -1)[:, :target]
        own = variants(model, scale) if entry == SMOLLM2 else of_small(model, entry.trained, scale)
        for variant in own:
            m, finished = reader.read(text.text, ids, variant)
            yield line(f"{TEXT}, {target} tokens, {variant.label}", m, finished)


def main() -> None:
    """Read what is not yet on record."""
    parser = Parser("python -m benchmarks.quality.tuning", __doc__)
    add_models(parser)
    parser.add_argument("--output", default="benchmarks/results", help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    models = chosen_models(parser, arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    for what in itertools.chain.from_iterable(measurements(model, output) for model in models):
        print(what, flush=True)


if __name__ == "__main__":
    main()
