"""Does a model read longer texts? Every strategy, without training.

    python -m benchmarks.quality.study [--model smollm2-135m DIR] [--parts 2x 4x] [--strategies auto yarn]
        [--dtype float32] [--seconds 7200] [--quick]

Reads four texts that nothing was tuned on to 1.5x, 2x and 4x of the trained length: perplexity by position. Models are
SmolLM2-135M (trained to 8192 tokens) and the directory of a small LLaMA (``benchmarks/quality/small_llama.py`` trains
one). It takes hours on a CPU, so it may be stopped at any time, or by ``--seconds``: the same command goes on where it
stopped. A text that is not installed is left out and named. Results: ``quality_perplexity.json`` (``_float32.json``,
``_small.json``); ``python -m benchmarks.report`` makes tables and plots of them.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.benchmark import Parser, positive
from benchmarks.quality.parts import (
    PARTS,
    QUICK,
    SMOLLM2,
    SMOLLM2_FLOAT32,
    Part,
    StudyModel,
    planner,
    study_model,
)
from benchmarks.quality.readings import newest, path_of, summarise, superseded
from rope_dist import evaluation
from rope_dist.evaluation import Passage, Record, Variant, token_nll
from rope_dist.evaluation.memory import check_memory
from rope_dist.files import new_file
from rope_dist.optional import MissingPackageError

SEED = 0


def command_line(name: str, doc: str | None, quick: str) -> Parser:
    """The options that every study has: see :func:`begin`."""
    parser = Parser(f"python -m benchmarks.quality.{name}", doc or "")
    add = parser.add_argument
    add("--seconds", type=positive(float), help="begin no new measurement after this time")
    add("--quick", action="store_true", help=quick)
    add("--output", help="folder (default: benchmarks/results; with --quick rope-dist-eval)")
    return parser


def begun(arguments: argparse.Namespace) -> tuple[bool, Path, float]:
    """Whether it is a quick run, its folder, which is made, and when it has to stop."""
    output = Path(arguments.output or ("rope-dist-eval" if arguments.quick else "benchmarks/results"))
    output.mkdir(parents=True, exist_ok=True)
    return arguments.quick, output, time.monotonic() + (arguments.seconds or float("inf"))


def begin(name: str, doc: str | None, quick: str) -> tuple[bool, Path, float]:
    """Read the command line of a study that resumes: whether it is a quick run, its folder, and when it has to stop.

    Args:
        name: of the module in this package.
        doc: its docstring.
        quick: what ``--quick`` does.
    """
    return begun(command_line(name, doc, quick).parse_args())


def add_models(parser: Parser) -> None:
    """The option ``--model`` of a study that several models read: see :func:`chosen_models`."""
    text = "packaged model or directories (default: %(default)s)"
    parser.add_argument("--model", nargs="+", default=[SMOLLM2.name], help=text)


def chosen_models(parser: Parser, arguments: argparse.Namespace) -> list[StudyModel]:
    """Of the option ``--model``; one line and exit code 2 where one does not exist."""
    try:
        return list(map(study_model, arguments.model))
    except ValueError as error:
        parser.error(str(error))


def add_readings(parser: Parser) -> None:
    """The options of the studies that read: which strategies, the dtype of SmolLM2, and where losses are kept."""
    add = parser.add_argument
    add("--strategies", nargs="+", metavar="NAME", help="only these of every part (default: all)")
    text = (
        "of SmolLM2-135M; float32 has a record of its own, and is faster on a CPU without bfloat16 products "
    )
    dtypes = SMOLLM2.dtype, SMOLLM2_FLOAT32.dtype
    add("--dtype", choices=dtypes, default=SMOLLM2.dtype, help=text + "(default: %(default)s)")
    add("--losses", type=Path, metavar="FOLDER", help="keep the losses of every token there, for LongPPL")


def in_dtype(entry: StudyModel, dtype: str) -> StudyModel:
    """SmolLM2 in ``dtype``; another model as it is."""
    return SMOLLM2_FLOAT32 if entry == SMOLLM2 and dtype == SMOLLM2_FLOAT32.dtype else entry


def only(part: Part, strategies: Sequence[str] | None, trained: int) -> Part:
    """A part with those of its labels that are among ``strategies``; None: all."""
    labels = part.labels(trained)
    return replace(
        part,
        strategies=tuple(label for label in labels if strategies is None or label in strategies),
        windows=False,
    )


def check_strategies(
    parser: Parser, strategies: Sequence[str] | None, parts: Sequence[Part], trained: Iterable[int]
) -> None:
    """One line and exit code 2 where ``--strategies`` names one that no part has, for models of these lengths."""
    known = list(
        dict.fromkeys(label for length in trained for part in parts for label in part.labels(length))
    )
    if missing := [name for name in strategies or () if name not in known]:
        parser.error(f"--strategies: no part has {', '.join(missing)}; they have {', '.join(known)}")


def main() -> None:
    """Run what is not yet on record."""
    parser = command_line("study", __doc__, "a few hundred tokens: does the study run?")
    add_models(parser)
    add_readings(parser)
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--parts", nargs="+", choices=names, default=names, help="(default: all, in this order)")
    arguments = parser.parse_args()
    models = [in_dtype(model, arguments.dtype) for model in chosen_models(parser, arguments)]
    quick, output, deadline = begun(arguments)
    parts = [part for part in PARTS if part.name in arguments.parts]
    if quick:
        parts, models = QUICK, [replace(model, texts=("python",)) for model in models]
    check_strategies(parser, arguments.strategies, parts, [model.trained for model in models])
    chosen = {model: [only(part, arguments.strategies, model.trained) for part in parts] for model in models}
    done, rest = 0, "all there are"
    for what in itertools.chain.from_iterable(
        measurements(model, own, output, arguments.losses) for model, own in chosen.items()
    ):
        print(what, flush=True)
        done += 1
        if time.monotonic() > deadline:
            rest = "the same command goes on"
            break
    print(f"{done} measurements on record, {rest}")


@dataclass(frozen=True)
class Reader:
    """A model that reads, and its record.

    Attributes:
        entry: of the study.
        model: as loaded.
        record: of its perplexities.
        losses: folder that keeps the losses of every token, of a reading by its digest and frequencies; None: none is.
    """

    entry: StudyModel
    model: Any
    record: Record
    losses: Path | None = None

    def kept(self, text: str, ids: torch.Tensor, variant: Variant) -> Path | None:
        """The file that keeps the losses of ``ids [passages, S]``, or will; None where none are kept."""
        name = f"{Passage(text, 0, ids).identity['digest']}-{variant.fingerprint}.pt"
        return self.losses and self.losses / name

    def nll(self, text: str, ids: torch.Tensor, variant: Variant) -> torch.Tensor:
        """Losses ``[passages, S - 1]`` of ``ids [passages, S]`` by a variant that is applied to the model."""
        kept = self.kept(text, ids, variant)
        if kept and kept.exists():
            return torch.load(kept, weights_only=True)
        # At once: half the time of 512 at a time, and attention needs no mask.
        options = {
            "chunk": ids.shape[1],
            "description": f"{text}, {variant.label}",
        }
        nll = torch.stack([token_nll(self.model, one, **options) for one in ids])
        if kept:
            self.losses.mkdir(parents=True, exist_ok=True)
            with new_file(kept) as temporary:
                torch.save(nll, temporary)
        return nll

    def measure(
        self,
        what: dict[str, Any],
        text: str,
        ids: torch.Tensor,
        variant: Variant,
        result_of: Callable[[torch.Tensor], dict[str, Any]],
    ) -> tuple[dict[str, Any], bool]:
        """The measurement of a reading, as ``result_of(losses)``, and whether it was on record."""
        kept = self.kept(text, ids, variant)
        if kept and kept.exists() and self.record.get(what | variant.identity) is None:
            # Without seconds: nothing is read.
            result = result_of(self.nll(text, ids, variant))
            self.record.put(what | variant.identity, result, variant)
            return {"what": what | variant.identity, "result": result}, False

        def compute() -> dict[str, Any]:
            return result_of(self.nll(text, ids, variant))

        doing = f"evaluating {ids.shape[1]} tokens"
        return self.record.measure(what, variant, self.model, compute, doing)[1:]

    def read(self, text: str, ids: torch.Tensor, variant: Variant) -> tuple[dict[str, Any], bool]:
        """The measurement of ``ids [passages, S]``, and whether it was on record under whatever label."""
        what = {"method": "whole", **Passage(text, 0, ids).identity}
        if len(ids) > 1:
            what["passages"] = len(ids)
        own, label = what | variant.identity, {"variant": variant.label}
        same = [m["result"] for m in self.record if m["what"] | label == own]
        if same:
            # The newest of a label is what the tables show.
            current = newest(self.record)[variant.label, ids.shape[1]] if self.record.get(own) else None
            if current != variant.fingerprint:
                self.record.put(own, same[-1], variant)
            return {"what": own, "result": same[-1]}, True
        return self.measure(what, text, ids, variant, functools.partial(summarise, width=self.entry.width))


def texts_of(entry: StudyModel, tokenizer: Any) -> Callable[[str], Passage | None]:
    """A function that tokenises a text once and returns all its passages as one; None where it is not installed."""

    @functools.cache
    def text(name: str) -> Passage | None:
        try:
            return evaluation.passages(tokenizer, [name], 4 * entry.trained * entry.passages)[0]
        except MissingPackageError as error:
            tqdm.write(f"left out: {error}")
            return None

    return text


def measurements(
    entry: StudyModel, parts: Sequence[Part], output: Path, losses: Path | None = None
) -> Iterator[str]:
    """Measure what is not on record; yields a line a measurement."""
    transformers_logging.set_verbosity_error()
    model, tokenizer = evaluation.load_model(entry.source, dtype=entry.dtype)
    identity = evaluation.describe(model, entry.name)
    record = Record(path_of(output, entry.kind), "perplexity", identity)
    losses = losses and losses / identity["fingerprint"]
    reader, variant = Reader(entry, model, record, losses), planner(model)
    text = texts_of(entry, tokenizer)
    for part in parts:
        target = int(part.scale * entry.trained)
        tokens = part.tokens or target
        check_memory(model, tokens, tokens)
        for passage in filter(None, map(text, entry.texts)):
            ids = passage.ids.reshape(entry.passages, -1)[:, :tokens]
            for label in part.labels(entry.trained):
                m, finished = reader.read(passage.text, ids, variant(label, target))
                yield line(f"{passage.text}, {tokens} tokens, {label}", m, finished)
    for label, tokens, texts in superseded(record):
        print(f"left out: readings of {tokens} tokens by {label} with other frequencies ({'; '.join(texts)})")


def line(what: str, measurement: dict[str, Any], finished: bool) -> str:
    """What was measured, and the seconds that it took unless it was on record, or its losses were kept."""
    if finished:
        return f"{what}: on record"
    seconds = measurement["result"].get("seconds")
    return f"{what}: from kept losses" if seconds is None else f"{what}: {seconds} s"


if __name__ == "__main__":
    main()
