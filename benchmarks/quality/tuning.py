"""What the constants of ``auto`` were chosen on: one text at twice the trained length, and nothing else.

    python -m benchmarks.quality.tuning

Reads *Emma* with ``auto`` and its constants varied one at a time, beside what it competes with. As the study, it
goes on where it was stopped. Result: ``quality_tuning.json``; ``python -m benchmarks.report`` makes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.quality.study import DTYPE, MODEL
from benchmarks.quality.summary import TRAINED
from rope_dist.evaluation import Record, describe, load_model, make_variants, measure_perplexity, passages

TEXT = "emma"
STRATEGIES = (
    "stock",
    "yarn",
    "ntk",
    "auto",
    "auto:attention_factor=1",
    "auto:attention_factor=1.0693",  # YaRN's at 2x
    "auto:fast_turns=256",
    "auto:fast_turns=32",
    "auto:slow_turns=0.5",
    "yarn:attention_factor=1.0377",  # that of auto
)


def main() -> None:
    """Read what is not yet on record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results", help="folder (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME", help="to read with")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_model(MODEL, dtype=DTYPE)
    record = Record(output / "quality_tuning.json", "perplexity", describe(model, MODEL))
    readings = measure_perplexity(
        model,
        passages(tokenizer, [TEXT], 2 * TRAINED),
        make_variants(model, arguments.strategies, 2 * TRAINED),
        record,
        lengths=[2 * TRAINED],
        methods=["whole"],
        chunk=2 * TRAINED,
        progress=True,
    )
    for variant, measurement, finished in readings:
        seconds = "on record" if finished else f"{measurement['result']['seconds']} s"
        print(f"{TEXT}, {variant.label}: {seconds}", flush=True)


if __name__ == "__main__":
    main()
