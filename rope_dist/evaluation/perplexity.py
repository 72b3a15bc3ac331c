"""Perplexity by position: how well a model predicts each token of one long text from all before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from ..planning import RopePlan
from .models import cache_option
from .progress import Progress, work
from .variants import make_variants


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the predicted tokens at positions ``start <= position < end``."""

    start: int
    end: int
    perplexity: float


@dataclass(frozen=True)
class Reading:
    """One model's reading of one text.

    Attributes:
        label: what was read with, e.g. a strategy's name.
        plan: the plan in force, or None for the stock model.
        nll: ``[S - 1]`` float32, nats; entry ``i`` is of the token at position ``i + 1``.
    """

    label: str
    plan: RopePlan | None
    nll: torch.Tensor

    @property
    def perplexity(self) -> float:
        """Over the whole text."""
        return math.exp(self.nll.double().mean().item())

    def buckets(self, width: int) -> list[Bucket]:
        """Perplexity of every ``width`` positions; the last may be shorter. Position 0 has no prediction."""
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
        """Of the tokens at positions ``start <= position < end``."""
        return math.exp(self.nll[max(start - 1, 0) : end - 1].double().mean().item())

    def to_dict(self, width: int) -> dict[str, Any]:
        """JSON types; the plan in full."""
        return {
            "label": self.label,
            "perplexity": self.perplexity,
            "by_position": [vars(bucket) for bucket in self.buckets(width)],
            "plan": self.plan.to_dict() if self.plan else None,
        }


def token_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, *, chunk: int = 512, description: str | None = None
) -> torch.Tensor:
    """Negative log-likelihood of every token given all before it, in one pass with a key/value cache.

    Args:
        model: a causal language model.
        input_ids: ``[1, S]`` or ``[S]``, at least 2 tokens.
        chunk: tokens a step. The result does not depend on it; memory for the logits does.
        description: of the progress bar; None shows none.

    Returns:
        ``[S - 1]`` float32 on the CPU, nats.

    Raises:
        ValueError: not one sequence of at least 2 tokens, or ``chunk < 1``.
    """
    ids = _one_sequence(input_ids, chunk).to(model.device)
    with _evaluating(model), Progress(description, work(model, 0, ids.shape[1] - 1)) as progress:
        return _nll(model, ids, 1, chunk, progress)


def sliding_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows of :func:`sliding_window_nll` as ``(begin, end, first)``: it scores ``first <= i < end``."""
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
    that every one of them has at least ``window - stride`` tokens before it. The last window ends with the
    text and scores what is left. Each window is read anew from its own position 0: nothing before it is seen.

    Args:
        model: a causal language model.
        input_ids: ``[1, S]`` or ``[S]``, ``S >= window``.
        window: tokens a window, the evaluated length.
        stride: tokens from one window to the next, below ``window``.
        chunk: tokens a step. The result does not depend on it.
        description: of the progress bar; None shows none.

    Returns:
        ``[S - 1]`` float32 on the CPU, nats; entry ``i`` is of the token at position ``i + 1``.

    Raises:
        ValueError: a text shorter than the window, a bad stride or chunk, not one sequence.
    """
    ids = _one_sequence(input_ids, chunk)
    windows = sliding_windows(ids.shape[1], window, stride)
    ids = ids.to(model.device)
    result = []
    with _evaluating(model), Progress(description, len(windows) * work(model, 0, window - 1)) as progress:
        for begin, end, first in windows:
            result.append(_nll(model, ids[:, begin:end], first - begin, chunk, progress))
    return torch.cat(result)


@torch.inference_mode()
def _nll(
    model: PreTrainedModel, ids: torch.Tensor, first: int, chunk: int, progress: Progress
) -> torch.Tensor:
    """``[S - first]``: of the tokens ``first`` to the last of ``ids [1, S]``, each given all before it."""
    length = ids.shape[1]
    cache = DynamicCache(config=model.config)
    result = torch.empty(length - first)
    for start in range(0, length - 1, chunk):
        end = min(start + chunk, length - 1)
        scored = end - max(start, first - 1)
        # Logits are as wide as the vocabulary: only of what is scored, and never none (0 asks for all).
        logits = model(
            ids[:, start:end], **cache_option(model, cache), use_cache=True, logits_to_keep=max(scored, 1)
        ).logits[0]
        if scored > 0:
            targets = ids[0, end + 1 - scored : end + 1]
            nll = F.cross_entropy(logits.float(), targets, reduction="none")
            result[end + 1 - scored - first : end + 1 - first] = nll.cpu()
        progress.update(work(model, start, end))
    return result


def _one_sequence(input_ids: torch.Tensor, chunk: int) -> torch.Tensor:
    ids = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"input_ids must be one sequence [1, S] with S >= 2, got {list(input_ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return ids


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def read_with_strategies(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    strategies: Sequence[str],
    target_length: int,
    *,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[Reading]:
    """Read one text with the stock model and with extensions of it, one reading at a time.

    The model is extended while a reading is made, and stock between two.

    Args:
        model: of a supported family; afterwards as before.
        input_ids: ``[1, S]``.
        strategies: as in :func:`rope_dist.evaluation.variants.make_variants`.
        target_length: tokens each extension is planned for.
        chunk: as in :func:`token_nll`.
        progress: show a bar for each reading.

    Raises:
        ValueError: the model's family is not supported, or the target is below its trained length.
    """
    for variant in make_variants(model, strategies, target_length):
        description = f"reading with {variant.label}" if progress else None
        with variant.applied(model):
            nll = token_nll(model, input_ids, chunk=chunk, description=description)
        yield Reading(variant.label, variant.plan, nll)
