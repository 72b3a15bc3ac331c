"""LongPPL (Fang et al. 2025, arXiv 2410.23771): perplexity of the tokens that need a long context.

A token is a key token if an evaluator predicts it much better from a long context than from a short one, and well:

    log p(x | long) - log p(x | short) > alpha    and    log p(x | long) > beta

The paper's evaluator is a larger model that reads the whole text. Here there is none that reads past the trained
length, and a plan that did would choose tokens that it reads well itself. The evaluator is therefore by default the
stock model in windows of its trained length: it reads every token of a text of any length, and no compared plan takes
part. Key tokens past the trained length are then those that need between ``short`` and ``window`` tokens of context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..hf import expect_length
from ..model_config import pretrained_rope
from .corpora import Passage
from .memory import check_memory
from .perplexity import reading_result, sliding_window_nll, sliding_windows, token_nll
from .progress import announce, measure_pace
from .records import Record
from .variants import STOCK, Variant

ALPHA, BETA = 2.0, -2.0
"""The paper's thresholds, nats."""
SHORT_SHARE = 8
"""The short context is by default the window divided by this (8192 tokens: 1024; the paper: 32k and 4096)."""
STRIDE_SHARE = 4
"""Windows move by a quarter of the context that they guarantee, as in the authors' code (4096 and 1024)."""


@dataclass(frozen=True)
class Evaluator:
    """What finds the key tokens, for all variants alike.

    Attributes:
        variant: of the model that is evaluated.
        window: tokens of the longest context.
        short: tokens of the short context.
        alpha: least gain of a key token by the long context, nats.
        beta: least log-probability of a key token given the long context, nats.

    Raises:
        ValueError: the short context and a quarter of it are not below the window, ``alpha <= 0`` or ``beta > 0``.
    """

    variant: Variant
    window: int
    short: int
    alpha: float = ALPHA
    beta: float = BETA

    def __post_init__(self) -> None:
        if self.short < 1 or self.short_window >= self.window:
            raise ValueError(
                "the short context must have at least 1 token and, with a quarter of itself, fewer than the window "
                f"of {self.window}, got {self.short}"
            )
        if not self.alpha > 0 or not self.beta <= 0:
            raise ValueError(f"alpha must be above 0 and beta at most 0, got {self.alpha} and {self.beta}")

    @property
    def short_window(self) -> int:
        """Tokens of the windows that give the short context: all but their first ``short`` tokens are scored."""
        return self.short + _stride(self.short)

    @property
    def settings(self) -> dict[str, float]:
        """All but the variant, as JSON types."""
        return {"window": self.window, "short": self.short, "alpha": self.alpha, "beta": self.beta}


def make_evaluator(
    model: PreTrainedModel,
    variant: Variant | None = None,
    *,
    window: int | None = None,
    short: int | None = None,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Evaluator:
    """An evaluator, by default the stock model.

    Args:
        model: of a supported family.
        variant: None: the stock model.
        window: None: what the variant was made for, the trained length or the target length of its plan.
        short: None: an eighth of the window.
        alpha, beta: as in :class:`Evaluator`.
    """
    variant = Variant(STOCK, None) if variant is None else variant
    if window is None:
        window = variant.plan.target_length if variant.plan else pretrained_rope(model.config)[0].length
    return Evaluator(variant, window, window // SHORT_SHARE if short is None else short, alpha, beta)


def _stride(context: int) -> int:
    return max(context // STRIDE_SHARE, 1)


def key_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    evaluator: Evaluator,
    *,
    chunk: int = 512,
    description: str | None = None,
) -> torch.Tensor:
    """Positions of the key tokens of a text.

    The first ``window`` tokens are read whole. Each later token has between ``3/4 window`` and ``window`` tokens of
    long context, and each token past the first ``5/4 short`` between ``short`` and ``5/4 short`` tokens of short
    context (:func:`rope_dist.evaluation.sliding_window_nll`).

    Args:
        model: as the evaluator reads it; the evaluator's variant is *not* applied.
        input_ids: ``[1, S]``.
        evaluator: the contexts and thresholds.
        chunk: tokens a forward pass.
        description: of the progress bars; None shows none.

    Returns:
        ``[n]`` int64, rising positions in the text; empty where it is no longer than a short context.

    Raises:
        ValueError: ``input_ids`` is not one sequence of at least 2 tokens, or ``chunk < 1``.
    """
    options: dict[str, Any] = {"chunk": chunk, "description": description}
    tokens, window, stride = input_ids.shape[-1], evaluator.window, _stride(evaluator.short)
    if tokens <= evaluator.short_window:
        return torch.empty(0, dtype=torch.long)
    if tokens <= window:
        long = token_nll(model, input_ids, **options)
    else:
        long = sliding_window_nll(model, input_ids, window=window, stride=_stride(window), **options)
    brief = sliding_window_nll(model, input_ids, window=evaluator.short_window, stride=stride, **options)
    keys = (brief - long > evaluator.alpha) & (long < -evaluator.beta)
    return keys.nonzero()[:, 0] + 1


def measure_longppl(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    variants: Sequence[Variant],
    record: Record,
    *,
    evaluator: Evaluator | None = None,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Find the key tokens of every passage once, and read it with every variant, except for what is in ``record``.

    Args:
        model: of a supported family; every variant is applied to it in turn.
        passages: texts, read whole by the variants.
        variants: from :func:`rope_dist.evaluation.make_variants`.
        record: results of earlier runs; new ones are added.
        evaluator: from :func:`make_evaluator`; None: its defaults.
        chunk: tokens a forward pass.
        progress: print an estimate of the time, and show progress bars.

    Yields:
        Variant, measurement and whether it was in the record already; results are saved before they are yielded.
        First one measurement of ``"measure": "key tokens"`` a passage (``positions``), then one of ``"measure":
        "longppl"`` a passage and variant: what a record of perplexity keeps, and ``key_nll``, the losses in nats of
        the key tokens in their order.

    Raises:
        ValueError: no passage, too little memory, texts without any key token.
    """
    if not passages:
        raise ValueError("give at least one passage")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    evaluator = evaluator or make_evaluator(model)
    check_memory(model, max(passage.ids.shape[1] for passage in passages), chunk)
    finding = [(p, {"measure": "key tokens", **p.identity, **evaluator.settings}) for p in passages]
    if progress:
        _announce(model, finding, evaluator, variants, record)
    keys: list[tuple[Passage, list[int]]] = []
    for passage, what in finding:
        description = f"key tokens, {passage.text}" if progress else None
        find = partial(key_tokens, model, passage.ids, evaluator, chunk=chunk, description=description)
        found = record.measure(
            what, evaluator.variant, model, partial(_positions, find), "finding key tokens"
        )
        keys.append((passage, found[1]["result"]["positions"]))
        yield found
    if not any(positions for _, positions in keys):
        raise ValueError(
            f"no token of these texts gains more than {evaluator.alpha:g} nats by a context of {evaluator.window} "
            f"tokens instead of {evaluator.short}: give longer or other texts, or a lower alpha"
        )
    for passage, positions in keys:
        what = reading_key(passage, positions)
        for variant in variants:
            description = f"{passage.text}, {variant.label}" if progress else None
            read = partial(token_nll, model, passage.ids, chunk=chunk, description=description)
            doing = f"evaluating {passage.ids.shape[1]} tokens"
            yield record.measure(
                what, variant, model, partial(_losses, read, positions, passage.ids.shape[1]), doing
            )


def reading_key(passage: Passage, positions: Sequence[int]) -> dict[str, Any]:
    """What a record finds a reading with these key tokens by, without the variant."""
    digest = hashlib.sha256(json.dumps(positions).encode()).hexdigest()[:12]
    return {"measure": "longppl", **passage.identity, "keys": digest}


def _positions(find: Callable[[], torch.Tensor]) -> dict[str, Any]:
    return {"positions": find().tolist()}


def _losses(read: Callable[[], torch.Tensor], positions: Sequence[int], length: int) -> dict[str, Any]:
    with expect_length(length):  # a dynamic plan reads a whole text by the stage for it
        return longppl_result(read(), positions)


def longppl_result(nll: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
    """What a record keeps of token losses ``[S - 1]``: that of perplexity, and the losses of the key tokens."""
    keys = nll[torch.tensor(positions, dtype=torch.long) - 1].tolist()
    return {**reading_result(nll), "key_nll": [round(loss, 4) for loss in keys]}


def _announce(
    model: PreTrainedModel,
    finding: Sequence[tuple[Passage, dict[str, Any]]],
    evaluator: Evaluator,
    variants: Sequence[Variant],
    record: Record,
) -> None:
    """Print the estimated time of what is not in ``record``."""
    missing: list[tuple[int, int]] = []  # tokens of a window, and how many windows
    for passage, what in finding:
        tokens = passage.ids.shape[1]
        found = record.get(what | evaluator.variant.identity)
        if found is None:
            for window, context in (
                (evaluator.window, evaluator.window),
                (evaluator.short_window, evaluator.short),
            ):
                whole = tokens <= window
                missing.append(
                    (tokens, 1) if whole else (window, len(sliding_windows(tokens, window, _stride(context))))
                )
        for variant in variants:
            if found is None or not record.get(reading_key(passage, found["positions"]) | variant.identity):
                missing.append((tokens, 1))
    if missing:
        pace = measure_pace(model)
        announce(sum(windows * pace.seconds(window) for window, windows in missing))
