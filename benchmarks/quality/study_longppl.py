"""LongPPL of the study's strategies: perplexity of the tokens that need a long context.

    python -m benchmarks.quality.study_longppl --losses FOLDER [--strategies auto yarn] [--dtype float32]
        [--seconds 3600] [--quick]

Key tokens are found once for all strategies, by the stock model in windows of its trained length. Their losses are
taken from FOLDER, where ``study --losses FOLDER`` keeps those of all tokens; what is missing there is read. As the
study, it resumes where it was stopped. Result: ``quality_longppl.json`` (``quality_longppl_float32.json``).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.quality.parts import CLOSEST, QUICK, SMOLLM2, Part, StudyModel, planner
from benchmarks.quality.readings import path_of
from benchmarks.quality.study import (
    Reader,
    add_readings,
    begun,
    check_strategies,
    command_line,
    in_dtype,
    line,
    only,
    texts_of,
)
from rope_dist import evaluation
from rope_dist.evaluation import Passage, Record
from rope_dist.evaluation.longppl import Evaluator, key_tokens, longppl_result, make_evaluator, reading_key

PARTS = (Part("2x", 2, CLOSEST, windows=True), Part("4x", 4, CLOSEST, windows=True))


def main() -> None:
    """Measure what is not yet on record."""
    parser = command_line("study_longppl", __doc__, "the beginning of one text: does it run?")
    add_readings(parser)
    arguments = parser.parse_args()
    quick, output, deadline = begun(arguments)
    entry = in_dtype(SMOLLM2, arguments.dtype)
    all_parts = QUICK if quick else PARTS
    check_strategies(parser, arguments.strategies, all_parts, [entry.trained])
    parts = [only(part, arguments.strategies, entry.trained) for part in all_parts]
    if quick:
        entry = replace(entry, texts=("python",))
    for what in measurements(entry, parts, output, arguments.losses):
        print(what, flush=True)
        if time.monotonic() > deadline:
            print("the same command goes on")
            return
    print("all there are")


def measurements(
    entry: StudyModel, parts: Sequence[Part], output: Path, losses: Path | None
) -> Iterator[str]:
    """Measure what is not on record; yields a line a measurement."""
    transformers_logging.set_verbosity_error()
    model, tokenizer = evaluation.load_model(entry.source, dtype=entry.dtype)
    identity = evaluation.describe(model, entry.name)
    record = Record(path_of(output, f"longppl{entry.suffix}"), "longppl", identity)
    reader = Reader(entry, model, record, losses and losses / identity["fingerprint"])
    variant, evaluator, text = planner(model), make_evaluator(model), texts_of(entry, tokenizer)
    for part in parts:
        target = int(part.scale * entry.trained)
        tokens = part.tokens or target
        for whole in filter(None, map(text, entry.texts)):
            passage = replace(whole, ids=whole.ids[:, :tokens])
            find = partial(_positions, model, passage, evaluator, entry.trained)
            what = {"measure": "key tokens", **passage.identity, **evaluator.settings}
            _, m, finished = record.measure(what, evaluator.variant, model, find, "finding key tokens")
            yield line(f"{passage.text}, {tokens} tokens, key tokens", m, finished)
            keys = m["result"]["positions"]
            what, of_keys = reading_key(passage, keys), partial(_of_keys, keys=keys)
            for label in part.labels(entry.trained):
                one = variant(label, target)
                m, finished = reader.measure(what, passage.text, passage.ids, one, of_keys)
                yield line(f"{passage.text}, {tokens} tokens, {label}", m, finished)


def _positions(model: Any, passage: Passage, evaluator: Evaluator, chunk: int) -> dict[str, Any]:
    return {"positions": key_tokens(model, passage.ids, evaluator, chunk=chunk).tolist()}


def _of_keys(nll: torch.Tensor, keys: list[int]) -> dict[str, Any]:
    return longppl_result(nll[0], keys)


if __name__ == "__main__":
    main()
