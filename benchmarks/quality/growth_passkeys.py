"""Passkeys found by a plan that grows with the text, and by static ones: SmolLM2-135M, without training.

    python -m benchmarks.quality.growth_passkeys [--seconds 3600] [--quick]

Twenty prompts a length below and past the trained length. Every prompt is read as a server would read it, by the stage
for its length. As the study, it resumes where it was stopped. Result: ``quality_growth_passkey.json``.
"""

import time

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.quality.growth import GROWN, STRATEGY, dynamic
from benchmarks.quality.parts import DTYPE, MODEL, TRAINED
from benchmarks.quality.study import SEED, begin, line
from rope_dist import evaluation
from rope_dist.evaluation import Record, Variant
from rope_dist.evaluation.passkey import SCORINGS
from rope_dist.evaluation.variants import STOCK

DEPTHS, TRIALS = (0.25, 0.5, 0.75, 0.9), 5


def parts(model: PreTrainedModel) -> list[tuple[int, tuple[Variant, ...]]]:
    """Lengths of prompts and the variants that are asked at each, what matters most first."""
    plan = dynamic(model, 4 * TRAINED)
    grown = Variant(GROWN, plan)
    static = {n: Variant(f"{STRATEGY} for {n * TRAINED}", plan.at(n * TRAINED)) for n in (2, 4)}
    past = 3 * TRAINED // 2, 2 * TRAINED
    return [
        (past[0], (grown, static[4])),
        (TRAINED, (Variant(STOCK, None), static[4])),
        (past[1], (grown, static[4])),
        (TRAINED, (grown,)),
        *((length, (static[2],)) for length in (past[0], TRAINED, past[1])),
    ]


def main() -> None:
    """Ask what is not yet on record."""
    quick, output, deadline = begin(
        "growth_passkeys", __doc__, "one prompt of a few hundred tokens: does it run?"
    )
    transformers_logging.set_verbosity_error()
    model, tokenizer = evaluation.load_model(MODEL, dtype=DTYPE)
    record = Record(output / "quality_growth_passkey.json", "passkey", evaluation.describe(model, MODEL))
    asked, depths, trials = parts(model), DEPTHS, TRIALS
    if quick:
        asked, depths, trials = [(400, asked[0][1][:1])], DEPTHS[:1], 1
    for length, variants in asked:
        cases = evaluation.make_cases((length,), depths, trials=trials, seed=SEED)
        for variant, m, finished in evaluation.measure_passkey(
            model, tokenizer, cases, variants, record, scorings=SCORINGS, chunk=1024
        ):
            found = "found" if m["result"]["correct"] else "not found"
            what = f"{length} tokens, depth {m['what']['depth']:g}, {variant.label}, {m['what']['scoring']}, {found}"
            print(line(what, m, finished), flush=True)
            if time.monotonic() > deadline:
                print("the same command goes on")
                return
    print("all there are")


if __name__ == "__main__":
    main()
