"""Does a model read longer texts? Every strategy on SmolLM2-135M (trained to 8192 tokens), without training.

    python -m benchmarks.quality.study [--seconds 7200] [--quick]

Reads several texts to 1.5x, 2x and 4x of the trained length (perplexity by position) and asks for passkeys at
lengths up to there. It takes hours on a CPU, so it may be stopped at any time, or by ``--seconds``:
the same command goes on where it stopped. What is not installed of the texts is left out and named.
Results: ``quality_perplexity.json``, ``quality_passkey.json`` and ``quality.png``; ``python -m benchmarks.report``
makes the README's tables of them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.benchmark import Parser, positive
from benchmarks.quality.summary import TRAINED, finished_curves, load
from rope_dist import evaluation
from rope_dist.evaluation import Record, load_text
from rope_dist.optional import MissingPackageError
from rope_dist.plots import plot_relative_perplexity

MODEL = "smollm2-135m"
STRATEGIES = ("stock", "pi", "ntk", "yarn", "dprope:threshold=5e-4", "refined", "auto", "auto-yarn")
CLOSEST = ("stock", "ntk", "yarn", "auto")
SERVED = (*CLOSEST, "auto-yarn")
# Those of the first two groups are of different kinds: a study that is stopped early has them. The constants of "auto"
# were chosen on emma, which is therefore the last.
FIRST, SECOND = ("persuasion", "state-of-the-union"), ("moby-dick", "python")
REST = ("pride-and-prejudice", "northanger-abbey", "mansfield-park", "sense-and-sensibility", "emma")
SEED = 0
# What models are run in, and half the time of float32.
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Part:
    """Strategies planned for ``target`` tokens read ``texts`` to the target, and ask for passkeys."""

    target: int
    texts: tuple[str, ...]
    tokens: int
    passkey_lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    strategies: tuple[str, ...] = STRATEGIES


DEPTHS = (0.1, 0.5, 0.9)
PARTS = (
    Part(2 * TRAINED, FIRST, 2 * TRAINED),
    Part(2 * TRAINED, (), 0, (12288, 16384), DEPTHS, CLOSEST),
    Part(4 * TRAINED, FIRST[:1], 4 * TRAINED, strategies=SERVED),
    Part(3 * TRAINED // 2, FIRST, 3 * TRAINED // 2, strategies=CLOSEST),
    Part(2 * TRAINED, SECOND, 2 * TRAINED),
    Part(4 * TRAINED, FIRST[1:], 4 * TRAINED, strategies=SERVED),
    Part(2 * TRAINED, REST, 2 * TRAINED),
    Part(3 * TRAINED // 2, SECOND + REST, 3 * TRAINED // 2, strategies=CLOSEST),
    Part(4 * TRAINED, SECOND[:1], 4 * TRAINED, strategies=SERVED),
    Part(4 * TRAINED, (), 0, (32768,), DEPTHS, CLOSEST),
)
QUICK = (Part(2 * TRAINED, ("python",), 600, (400,), (0, 1), ("stock", "yarn")),)


def begin(name: str, doc: str | None, quick: str) -> tuple[bool, Path, float]:
    """Read the command line of a study that resumes: whether it is a quick run, its folder, and when it has to stop.

    Args:
        name: of the module in this package.
        doc: its docstring.
        quick: what ``--quick`` does.
    """
    parser = Parser(f"python -m benchmarks.quality.{name}", doc or "")
    add = parser.add_argument
    add("--seconds", type=positive(float), help="begin no new measurement after this time")
    add("--quick", action="store_true", help=quick)
    add("--output", help="folder (default: benchmarks/results; with --quick rope-dist-eval)")
    arguments = parser.parse_args()
    output = Path(arguments.output or ("rope-dist-eval" if arguments.quick else "benchmarks/results"))
    output.mkdir(parents=True, exist_ok=True)
    return arguments.quick, output, time.monotonic() + (arguments.seconds or float("inf"))


def main() -> None:
    """Run what is not yet on record, and draw what is complete."""
    quick, output, deadline = begin("study", __doc__, "a few hundred tokens: does the study run?")
    done, rest = 0, "all there are"
    for what in _measurements(QUICK if quick else PARTS, output):
        print(what, flush=True)
        done += 1
        if time.monotonic() > deadline:
            rest = "the same command goes on"
            break
    print(f"{done} measurements on record, {rest}")
    record, panels = load(output, "perplexity"), {}
    for part in sorted(PARTS, key=lambda part: part.target):
        curves, texts = finished_curves(record, part.tokens)
        if "yarn" in curves:
            plural = "s" if texts > 1 else ""
            panels[f"extended to {part.target} ({part.target / TRAINED:g}x), {texts} text{plural}"] = curves
    if panels:
        title = f"{MODEL}, without training: perplexity (lower is better)"
        plot_relative_perplexity(panels, TRAINED, title, output / "quality.png")


def _measurements(parts: tuple[Part, ...], output: Path) -> Iterator[str]:
    transformers_logging.set_verbosity_error()
    model, tokenizer = evaluation.load_model(MODEL, dtype=DTYPE)
    identity = evaluation.describe(model, MODEL)
    perplexity = Record(output / "quality_perplexity.json", "perplexity", identity)
    passkey = Record(output / "quality_passkey.json", "passkey", identity)
    for part in parts:
        variants = evaluation.make_variants(model, part.strategies, part.target)
        if names := list(filter(_installed, part.texts)):
            texts = evaluation.passages(tokenizer, names, part.tokens)
            # At once: half the time of 512 at a time, and gigabytes of logits.
            options = {"lengths": [part.tokens], "methods": ["whole"], "chunk": min(part.tokens, 2 * TRAINED)}
            options["progress"] = True
            readings = evaluation.measure_perplexity(model, texts, variants, perplexity, **options)
            for variant, m, finished in readings:
                yield line(f"{m['what']['text']}, {part.tokens} tokens, {variant.label}", m, finished)
        if part.passkey_lengths:
            cases = evaluation.make_cases(part.passkey_lengths, part.depths, seed=SEED)
            options = {"scorings": ["generate", "decoys"], "progress": True}
            answers = evaluation.measure_passkey(model, tokenizer, cases, variants, passkey, **options)
            for variant, m, finished in answers:
                what = f"passkey, {m['what']['length']} tokens, depth {m['what']['depth']:g}, {variant.label}"
                yield line(what, m, finished)


def line(what: str, measurement: dict[str, Any], finished: bool) -> str:
    """What was measured, and the seconds that it took unless it was on record."""
    return f"{what}: {'on record' if finished else str(measurement['result']['seconds']) + ' s'}"


def _installed(name: str) -> bool:
    try:
        load_text(name)
    except MissingPackageError as error:
        tqdm.write(f"left out: {error}")
        return False
    return True


if __name__ == "__main__":
    main()
