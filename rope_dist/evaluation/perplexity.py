"""Perplexity of long texts, by position and in sliding windows, for several variants of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from ..dynamic import DynamicPlan
from ..hf import expect_length
from ..messages import unknown
from ..model_config import pretrained_rope
from ..planning import RopePlan
from .corpora import Passage
from .memory import check_memory
from .models import cache_option
from .progress import Progress, announce, measure_pace, work
from .records import Record
from .variants import Variant, make_variants

METHODS = ("whole", "sliding", "grown")
PIECE = 1024
"""Tokens at a time by which a text grows past the trained length."""
WIDTH = 256
"""Positions of one mean in a record; wider buckets are averages of them."""
_LOSSES = 512
"""Tokens whose losses are computed at once."""


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the predicted tokens at positions ``start <= position < end``."""

    start: int
    end: int
    perplexity: float


@dataclass(frozen=True)
class PerplexityResult:
    """Token losses of one variant of a model on one text.

    Attributes:
        label: of the variant, e.g. a strategy's name.
        plan: the plan that was applied, or None for the stock model.
        nll: ``[S - 1]`` float32, nats; entry ``i`` is the loss of the token at position ``i + 1``.
    """

    label: str
    plan: RopePlan | DynamicPlan | None
    nll: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Of the whole text."""
        return math.exp(self.nll.double().mean().item())

    def buckets(self, width: int) -> list[Bucket]:
        """Perplexity of every ``width`` positions; the last bucket may be shorter. Position 0 has no prediction."""
        if width < 1:
            raise ValueError(f"the width of a bucket must be at least 1 token, got {width}")
        length = self.nll.numel() + 1
        result = []
        for start in range(0, length, width):
            end = min(start + width, length)
            if end > 1:
                result.append(Bucket(start, end, self.perplexity_of(start, end)))
        return result

    def perplexity_of(self, start: int, end: int) -> float:
        """Perplexity of the tokens at positions ``start <= position < end``."""
        return math.exp(self.nll[max(start - 1, 0) : end - 1].double().mean().item())

    def to_dict(self, width: int) -> dict[str, Any]:
        """As JSON types, with the plan."""
        return {
            "label": self.label,
            "perplexity": self.perplexity,
            "by_position": [vars(bucket) for bucket in self.buckets(width)],
            "plan": self.plan.to_dict() if self.plan else None,
        }


def token_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    chunk: int = 512,
    first: int | None = None,
    description: str | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of every token given all before it, with a key/value cache.

    Args:
        model: a causal language model.
        input_ids: ``[1, S]`` or ``[S]``, at least 2 tokens.
        chunk: tokens a forward pass. It changes memory and speed; the result only of a model with a dynamic plan,
            which reads each by the stage for the text so far.
        first: tokens of the first forward pass, where it is another number.
        description: of the progress bar; None shows none.

    Returns:
        ``[S - 1]`` float32 on the CPU, nats.

    Raises:
        ValueError: ``input_ids`` is not one sequence of at least 2 tokens, or ``chunk < 1``.
    """
    ids = _one_sequence(input_ids, chunk).to(model.device)
    with _eval_mode(model), Progress(description, work(model, 0, ids.shape[1] - 1)) as progress:
        return _nll(model, ids, 1, chunk, progress, first)


def sliding_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of :func:`sliding_window_nll` as ``(begin, end, first)``; tokens ``first <= i < end`` are scored."""
    if not 1 <= stride < window:
        raise ValueError(f"the stride must be at least 1 and below the window of {window}, got {stride}")
    if length < window:
        raise ValueError(
            f"the text has {length} tokens, fewer than the window of {window}: "
            "give a longer text or a shorter window"
        )
    ends = [*range(window, length, stride), length]
    firsts = [1, *ends[:-1]]
    return [(end - window, end, first) for end, first in zip(ends, firsts, strict=True)]


def sliding_window_nll(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    window: int,
    stride: int = 256,
    chunk: int = 512,
    description: str | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of every token within windows of fixed length (Press et al. 2022).

    The evaluation of the paper (Wu et al. 2024, S = 256): the window has the evaluated length and moves by
    ``stride`` tokens. The first is scored whole; of each later one only the last ``stride`` tokens are, so
    that each of them has at least ``window - stride`` tokens of context. The last window ends with the text and
    scores the rest. Every window is a forward pass of its own that starts at position 0.

    Args:
        model: a causal language model.
        input_ids: ``[1, S]`` or ``[S]``, ``S >= window``.
        window: tokens a window, the evaluated length.
        stride: tokens from one window to the next, below ``window``.
        chunk: tokens a forward pass. It changes memory and speed; the result only as in :func:`token_nll`.
        description: of the progress bar; None shows none.

    Returns:
        ``[S - 1]`` float32 on the CPU, nats; entry ``i`` is of the token at position ``i + 1``.

    Raises:
        ValueError: ``input_ids`` is not one sequence or shorter than the window, or a bad stride or chunk.
    """
    ids = _one_sequence(input_ids, chunk)
    windows = sliding_windows(ids.shape[1], window, stride)
    ids = ids.to(model.device)
    result = []
    with _eval_mode(model), Progress(description, len(windows) * work(model, 0, window - 1)) as progress:
        for begin, end, first in windows:
            result.append(_nll(model, ids[:, begin:end], first - begin, chunk, progress))
    return torch.cat(result)


@torch.inference_mode()
def _nll(
    model: PreTrainedModel,
    ids: torch.Tensor,
    first: int,
    chunk: int,
    progress: Progress,
    opening: int | None = None,
) -> torch.Tensor:
    """Losses ``[S - first]`` of the tokens from ``first`` on of ``ids [1, S]``, each given all tokens before it."""
    length = ids.shape[1]
    cache = DynamicCache(config=model.config)
    result = torch.empty(length - first)
    start = 0
    while start < length - 1:
        end = min(start + (opening if opening and start == 0 else chunk), length - 1)
        scored = end - max(start, first - 1)
        # Logits of the scored tokens only, to save memory; logits_to_keep=0 would return all.
        logits = model(
            ids[:, start:end], **cache_option(model, cache), use_cache=True, logits_to_keep=max(scored, 1)
        ).logits[0]
        if scored > 0:
            targets = ids[0, end + 1 - scored : end + 1]
            # Not all at once: in float32 the logits of 16384 tokens of a vocabulary of 49152 are 3 GB, and twice that.
            pieces = zip(logits.split(_LOSSES), targets.split(_LOSSES), strict=True)
            nll = torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces])
            result[end + 1 - scored - first : end + 1 - first] = nll.cpu()
        progress.update(work(model, start, end))
        start = end
    return result


def _one_sequence(input_ids: torch.Tensor, chunk: int) -> torch.Tensor:
    ids = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"input_ids must be one sequence [1, S] with S >= 2, got {list(input_ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return ids


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def perplexity_by_strategy(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    strategies: Sequence[str],
    target_length: int,
    *,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[PerplexityResult]:
    """Evaluate one text with several strategies, one after the other.

    Each strategy is applied only while its result is computed; the model is unchanged between two results.

    Args:
        model: of a supported family.
        input_ids: ``[1, S]``.
        strategies: as in :func:`rope_dist.evaluation.make_variants`.
        target_length: tokens that strategies are planned for.
        chunk: as in :func:`token_nll`.
        progress: show a progress bar for each strategy.

    Raises:
        ValueError: the model's family is not supported, or the target is below its trained length.
    """
    for variant in make_variants(model, strategies, target_length):
        description = f"evaluating {variant.label}" if progress else None
        with variant.applied(model):
            nll = token_nll(model, input_ids, chunk=chunk, description=description)
        yield PerplexityResult(variant.label, variant.plan, nll)


def measure_perplexity(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    variants: Sequence[Variant],
    record: Record,
    *,
    lengths: Sequence[int],
    methods: Sequence[str] = METHODS[:2],
    stride: int = 256,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Evaluate every passage with every variant, except for results that are in ``record``.

    ``whole`` evaluates the first ``max(lengths)`` tokens of a passage in one pass: perplexity by position, which
    includes every shorter length. ``sliding`` evaluates the passage in windows of each length
    (:func:`sliding_window_nll`). ``grown`` is as ``whole``, but past the trained length the text comes in pieces of
    :data:`PIECE` tokens, as a conversation does; only a dynamic plan reads it differently.

    A dynamic plan reads a whole text, and a window, by the stage for its length.

    Args:
        model: of a supported family; every variant is applied to it in turn.
        passages: each of at least ``max(lengths)`` tokens.
        variants: from :func:`rope_dist.evaluation.make_variants`.
        record: results of earlier runs; new ones are added.
        lengths: tokens.
        methods: of :data:`METHODS`.
        stride: of the sliding window, tokens.
        chunk: tokens a forward pass.
        progress: print an estimate of the time, and show progress bars.

    Yields:
        Variant, measurement and whether it was in the record already. Results are saved before they are yielded.

    Raises:
        ValueError: a bad setting, a passage that is too short, too little memory.
    """
    longest = _check(passages, lengths, methods, stride, chunk)
    check_memory(model, longest, chunk)
    cases: list[tuple[dict[str, Any], torch.Tensor, int]] = []
    for passage in passages:
        whole = Passage(passage.text, passage.piece, passage.ids[:, :longest])
        if "whole" in methods:
            cases.append(({"method": "whole", **whole.identity}, whole.ids, 0))
        if "grown" in methods:
            cases.append(({"method": "grown", "piece": PIECE, **whole.identity}, whole.ids, 0))
        if "sliding" in methods:
            for length in dict.fromkeys(lengths):
                what = {"method": "sliding", **passage.identity, "length": length, "stride": stride}
                cases.append((what, passage.ids, length))
    runs = [(*case, variant) for case in cases for variant in variants]
    if progress:
        _announce(
            model,
            [(ids.shape[1], window) for what, ids, window, v in runs if not record.get(what | v.identity)],
            stride,
        )
    for what, ids, window, variant in runs:
        # A text that does not grow is read by the stage for its length, whatever the chunks.
        expected = 1 if what["method"] == "grown" else window or ids.shape[1]
        options: dict[str, Any] = {"chunk": chunk}
        if progress:
            options["description"] = f"{what['method']}, {what['text']}, {variant.label}"
        if what["method"] == "grown":
            options |= {"chunk": PIECE, "first": pretrained_rope(model.config)[0].length}
        nll = partial(token_nll, model, ids, **options)
        if window:
            nll = partial(sliding_window_nll, model, ids, window=window, stride=stride, **options)
        doing = f"evaluating {window or longest} tokens"
        yield record.measure(what, variant, model, partial(_result, nll, expected), doing)


def _announce(model: PreTrainedModel, missing: Sequence[tuple[int, int]], stride: int) -> None:
    """Print the estimated time of the ``missing`` runs ``(tokens, window)``; window 0 is the whole text."""
    if missing:
        pace = measure_pace(model)
        announce(
            sum(
                pace.seconds(window or tokens)
                * (len(sliding_windows(tokens, window, stride)) if window else 1)
                for tokens, window in missing
            )
        )


def _check(
    passages: Sequence[Passage], lengths: Sequence[int], methods: Sequence[str], stride: int, chunk: int
) -> int:
    """Check the settings of :func:`measure_perplexity`; returns the longest length."""
    if not passages or not lengths or min(lengths) < 2:
        raise ValueError(f"give at least one passage and lengths of 2 tokens or more, got {list(lengths)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
    longest = max(lengths)
    for passage in passages:
        if passage.ids.shape[1] < longest:
            raise ValueError(
                f"the passage of {passage.text} has {passage.ids.shape[1]} tokens, fewer than the length {longest}"
            )
        if "sliding" in methods:
            for length in lengths:
                sliding_windows(passage.ids.shape[1], length, stride)
    return longest


def _result(evaluate: Callable[[], torch.Tensor], expected: int) -> dict[str, Any]:
    with expect_length(expected):
        return reading_result(evaluate())


def reading_result(nll: torch.Tensor) -> dict[str, Any]:
    """What a record keeps of token losses ``[S - 1]``: the mean, and the mean of every :data:`WIDTH` positions."""
    by_position = [nll[max(start - 1, 0) : start + WIDTH - 1] for start in range(0, len(nll) + 1, WIDTH)]
    return {
        "nll": nll.double().mean().item(),
        "predicted": len(nll),
        "nll_by_position": [round(part.double().mean().item(), 6) for part in by_position if len(part)],
    }
