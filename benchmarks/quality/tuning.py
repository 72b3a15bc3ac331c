"""What the constants of ``auto`` were chosen on: one text at twice the trained length, and nothing else.

    python -m benchmarks.quality.tuning

Reads *Emma* with ``auto`` and its constants varied one at a time, beside what it competes with and what other criteria
of the rotary angles choose. As the study, it resumes where it was stopped. Result: ``quality_tuning.json``;
``python -m benchmarks.report`` makes the table.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import rope_dist
from benchmarks.benchmark import Parser
from benchmarks.quality.criteria import by_distance, of_neighbours
from benchmarks.quality.parts import DTYPE, MODEL, TRAINED
from benchmarks.quality.study import line
from rope_dist.evaluation import (
    Record,
    Variant,
    describe,
    load_model,
    measure_perplexity,
    passages,
)
from rope_dist.evaluation.variants import STOCK

TEXT = "emma"
TARGET = 2 * TRAINED
CANDIDATES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("yarn", "yarn", {}),
    ("ntk", "ntk", {}),
    ("auto", "auto", {}),
    ("auto:attention_factor=1", "auto", {"attention_factor": 1}),
    ("auto:attention_factor=1.0693", "auto", {"attention_factor": 1.0693}),  # YaRN's at 2x
    ("auto:fast_periods=256", "auto", {"fast_periods": 256}),
    ("auto:fast_periods=32", "auto", {"fast_periods": 32}),
    ("auto:slow_periods=0.5", "auto", {"slow_periods": 0.5}),
    ("yarn:attention_factor=1.0377", "yarn", {"attention_factor": 1.0377}),  # that of auto
    ("dprope:threshold=0", "dprope", {"threshold": 0}),
    ("dprope:threshold=0,intervals=36", "dprope", {"threshold": 0, "intervals": 36}),
)
"""Label, strategy and its settings, beside the stock model."""
CRITERIA = {"by distance": by_distance, "of neighbours": of_neighbours}


def variants(model: PreTrainedModel) -> list[Variant]:
    """Stock, the candidates, and the plans of other criteria."""
    made = [Variant(STOCK, None)]
    for label, strategy, settings in CANDIDATES:
        plan = rope_dist.plan(model, target_length=TARGET, strategy=strategy, settings=settings)
        made.append(Variant(label, plan))
    inv_freq = rope_dist.plan(model, target_length=TARGET, strategy="extrapolation").inv_freq
    for label, choose in CRITERIA.items():
        settings = {"factors": choose(inv_freq, TRAINED, TARGET), "attention_factor": 1.0}
        plan = rope_dist.plan(model, target_length=TARGET, strategy="longrope", settings=settings)
        made.append(Variant(label, plan))
    return made


def main() -> None:
    """Read what is not yet on record."""
    parser = Parser("python -m benchmarks.quality.tuning", __doc__)
    parser.add_argument("--output", default="benchmarks/results", help="folder (default: %(default)s)")
    output = Path(parser.parse_args().output)
    output.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_model(MODEL, dtype=DTYPE)
    record = Record(output / "quality_tuning.json", "perplexity", describe(model, MODEL))
    options = {"lengths": [TARGET], "methods": ["whole"], "chunk": TARGET, "progress": True}
    texts = passages(tokenizer, [TEXT], TARGET)
    for variant, measurement, finished in measure_perplexity(
        model, texts, variants(model), record, **options
    ):
        print(line(f"{TEXT}, {variant.label}", measurement, finished), flush=True)


if __name__ == "__main__":
    main()
