"""Synthetic long-context tasks: every variant answers every question, by generation and among decoys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..dynamic import DynamicPlan
from ..hf import expect_length
from .memory import check_memory
from .prefix_cache import PrefixCachingModel, announce_prompts
from .progress import Progress
from .records import Record
from .synthetic_prompts import SyntheticPrompt
from .variants import Variant


def measure_synthetic(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[SyntheticPrompt],
    variants: Sequence[Variant],
    record: Record,
    *,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Answer every prompt with every variant, except for results that are in ``record``.

    Args:
        model: of a supported family; every variant is applied to it in turn.
        tokenizer: the model's.
        prompts: from :func:`rope_dist.evaluation.synthetic_prompts`; those about one context stand together.
        variants: from :func:`rope_dist.evaluation.make_variants`.
        record: results of earlier runs; new ones are added.
        chunk: tokens a forward pass.
        progress: print an estimate of the time, and show progress bars.

    Yields:
        Variant, measurement and whether it was in the record already. Results are saved before they are yielded:
        ``generated`` (the greedy continuation begins with the answer), ``decoys`` (the answer is likelier than each
        decoy), ``log_probability`` of the answer and ``best_decoy`` in nats, and the ``continuation``.

    Raises:
        ValueError: no prompts, too little memory.
    """
    if not prompts:
        raise ValueError("give at least one prompt")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    check_memory(model, max(prompt.case.length for prompt in prompts), chunk)
    if progress:
        missing = [
            [p.text for p in prompts if record.get(_key(p) | variant.identity) is None]
            for variant in variants
        ]
        announce_prompts(model, tokenizer, missing)
    for variant in variants:
        cached, length = PrefixCachingModel(model, tokenizer, chunk=chunk), 0
        for prompt in prompts:
            case = prompt.case
            if isinstance(variant.plan, DynamicPlan) and case.length != length:
                # Another stage of the plan reads prompts of another length.
                cached, length = PrefixCachingModel(model, tokenizer, chunk=chunk), case.length
            description = f"{variant.label}, {case.task}, {case.length} tokens" if progress else None
            answer = partial(_answer, cached, prompt, description)
            yield record.measure(_key(prompt), variant, model, answer, f"evaluating {case.length} tokens")


def first_word(continuation: str) -> str | None:
    """The first word or number of a continuation, with all its letters and digits; None if there is none."""
    found = re.search(r"\w+", continuation)
    return found and found[0]


def _key(prompt: SyntheticPrompt) -> dict[str, Any]:
    """The key of a measurement, without the variant."""
    return {
        **vars(prompt.case),
        "digest": prompt.digest,
        "answer": prompt.answer,
        "decoys": list(prompt.decoys),
    }


def _answer(cached: PrefixCachingModel, prompt: SyntheticPrompt, description: str | None) -> dict[str, Any]:
    with Progress(description, cached.prefill_work(prompt.text)) as bar, expect_length(prompt.case.length):
        right, *wrong = cached.log_probabilities(prompt.text, [prompt.answer, *prompt.decoys], bar)
        # Enough for the answer in any tokenizer, and a word before it.
        continuation = cached.generate(prompt.text, len(prompt.answer) + 3)
    return {
        "generated": first_word(continuation) == prompt.answer,
        "decoys": right > max(wrong),
        "log_probability": round(right, 4),
        "best_decoy": round(max(wrong), 4),
        "continuation": continuation,
    }
