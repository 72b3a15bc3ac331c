"""Passkey retrieval: find a random number in a long text of filler sentences.

The prompt is that of Mohtashami and Jaggi 2023 (Landmark Attention), with five digits as in Wu et al. 2024. An answer
is correct if the first number of the greedy continuation is the key, or, without generation, if the key is likelier
than every decoy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..dynamic import DynamicPlan
from ..hf import expect_length
from ..messages import unknown
from .memory import check_memory
from .prefix_cache import PrefixCachingModel, announce_prompts
from .progress import Progress
from .records import Record
from .variants import Variant

SCORINGS = ("generate", "decoys")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_DIGITS = 18
"""Longest key: the limit of the length of a Python range."""

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Case:
    """One prompt of at most ``length`` tokens with the key at ``depth`` (0: beginning, 1: end)."""

    length: int
    depth: float
    trial: int
    seed: int
    key: str
    decoys: tuple[str, ...]


def make_cases(
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    trials: int = 1,
    digits: int = 5,
    decoys: int = 9,
    seed: int = 0,
) -> list[Case]:
    """Draw a key and decoys for every length, depth and trial.

    The draw depends on the seed and on the case alone, so that all models and variants get the same keys and adding
    a case changes no other.

    Args:
        lengths: of the prompts, tokens.
        depths: positions of the key, from 0 (beginning) to 1 (end).
        trials: keys a length and depth.
        digits: of the keys and decoys.
        decoys: wrong numbers a case, for the scoring ``decoys``.
        seed: of the draw.

    Raises:
        ValueError: a depth outside [0, 1], fewer than one trial, digit or decoy, more decoys than numbers, more
            than :data:`MOST_DIGITS` digits.
    """
    if not lengths or not depths:
        raise ValueError("give at least one length and one depth")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is a share of the text from 0 to 1, got {depth}")
    for name, value in (("trials", trials), ("digits", digits), ("decoys", decoys)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if digits > MOST_DIGITS:
        raise ValueError(f"digits must be at most {MOST_DIGITS}, got {digits}")
    numbers = range(10 ** (digits - 1), 10**digits)
    if decoys + 1 > len(numbers):
        raise ValueError(f"there are only {len(numbers)} numbers of {digits} digits, for {decoys} decoys")
    cases = []
    for length in dict.fromkeys(lengths):
        for depth in dict.fromkeys(map(float, depths)):
            for trial in range(trials):
                drawn = random.Random(f"{seed} {length} {depth} {trial}").sample(numbers, decoys + 1)
                key, *others = map(str, drawn)
                cases.append(Case(length, depth, trial, seed, key, tuple(others)))
    return cases


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, case: Case) -> str:
    """The prompt of a case, with as much filler as fits into ``case.length`` tokens.

    Raises:
        ValueError: the length is too short for the prompt without filler.
    """

    def prompt(fillers: int) -> str:
        before = round(case.depth * fillers)
        lines = (
            TASK,
            " ".join([FILLER] * before),
            NEEDLE.format(key=case.key),
            " ".join([FILLER] * (fillers - before)),
            QUESTION,
        )
        return "\n".join(line for line in lines if line)

    def tokens(fillers: int) -> int:
        return len(tokenizer(prompt(fillers), verbose=False).input_ids)

    least = tokens(0)
    if case.length < least:
        raise ValueError(f"a passkey prompt needs at least {least} tokens, got the length {case.length}")
    each = (tokens(20) - tokens(10)) / 10
    fillers = int((case.length - least) / each) + 2
    while fillers and tokens(fillers) > case.length:
        fillers -= 1
    return prompt(fillers)


def answered_key(answer: str) -> str | None:
    """The first number in an answer, with all its digits; None if there is none."""
    found = re.search(r"\d+", answer)
    return found and found[0]


def measure_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    variants: Sequence[Variant],
    record: Record,
    *,
    scorings: Sequence[str] = ("generate",),
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Evaluate every case with every variant, except for results that are in ``record``.

    Args:
        model: of a supported family; every variant is applied to it in turn.
        tokenizer: the model's.
        cases: from :func:`make_cases`.
        variants: from :func:`rope_dist.evaluation.make_variants`.
        record: results of earlier runs; new ones are added.
        scorings: ``generate`` compares the first number of the greedy continuation with the key; ``decoys`` checks
            whether the key is likelier than every decoy (chance is 1 in ``decoys + 1``).
        chunk: tokens a forward pass.
        progress: print an estimate of the time, and show progress bars.

    Yields:
        Variant, measurement and whether it was in the record already. Results are saved before they are yielded.

    Raises:
        ValueError: an unknown scoring, a length that is too short for the prompt, too little memory.
    """
    for scoring in scorings:
        if scoring not in SCORINGS:
            raise ValueError(unknown("scoring", scoring, SCORINGS))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    check_memory(model, max(case.length for case in cases), chunk)
    # Falling depth: a prompt then shares the filler before its key with the one before it.
    ordered = sorted(cases, key=lambda case: (case.length, -case.depth, case.trial))
    prompts = {case: passkey_prompt(tokenizer, case) for case in ordered}
    runs = [(case, scoring, _key(case, scoring)) for case in ordered for scoring in scorings]
    if progress:
        missing = [
            [prompts[case] for case, _, what in runs if record.get(what | variant.identity) is None]
            for variant in variants
        ]
        announce_prompts(model, tokenizer, missing)
    for variant in variants:
        cached, length = PrefixCachingModel(model, tokenizer, chunk=chunk), 0
        for case, scoring, what in runs:
            if isinstance(variant.plan, DynamicPlan) and case.length != length:
                cached, length = PrefixCachingModel(model, tokenizer, chunk=chunk), case.length
            description = f"{variant.label}, {case.length} tokens, depth {case.depth:g}" if progress else None
            answer = partial(_answer, cached, prompts[case], case, scoring, description)
            yield record.measure(what, variant, model, answer, f"evaluating {case.length} tokens")


def _key(case: Case, scoring: str) -> dict[str, Any]:
    """The key of a measurement, without the variant."""
    what = {"scoring": scoring, "length": case.length, "depth": case.depth, "trial": case.trial}
    what |= {"seed": case.seed, "key": case.key}
    return what | ({"decoys": list(case.decoys)} if scoring == "decoys" else {})


def _answer(
    cached: PrefixCachingModel, prompt: str, case: Case, scoring: str, description: str | None
) -> dict[str, Any]:
    # A dynamic plan reads the filler that prompts of a length share as if the whole prompt came at once.
    with Progress(description, cached.prefill_work(prompt)) as bar, expect_length(case.length):
        if scoring == "decoys":
            key, *others = cached.log_probabilities(prompt, [case.key, *case.decoys], bar)
            return {
                "correct": key > max(others),
                "key_log_probability": round(key, 4),
                "best_decoy": round(max(others), 4),
            }
        # Enough for the key in any tokenizer, and a word before it.
        answer = cached.generate(prompt, len(case.key) + 3, bar)
        return {"correct": answered_key(answer) == case.key, "answer": answer}
