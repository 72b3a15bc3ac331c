"""Perplexity by position: how well a model predicts each token of one long text from all before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from ..planning import RopePlan
from ..transformers import enable


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
            part = self.nll[max(start - 1, 0) : end - 1].double()
            if part.numel():
                result.append(Bucket(start, end, math.exp(part.mean().item())))
        return result

    def to_dict(self, width: int) -> dict[str, Any]:
        """JSON types; the plan in full."""
        return {
            "label": self.label,
            "perplexity": self.perplexity,
            "by_position": [vars(bucket) for bucket in self.buckets(width)],
            "plan": self.plan.to_dict() if self.plan else None,
        }


@torch.inference_mode()
def token_nll(
    model: PreTrainedModel, input_ids: torch.Tensor, *, chunk: int = 512, description: str | None = None
) -> torch.Tensor:
    """Negative log-likelihood of every token given all before it, in one pass with a key/value cache.

    Args:
        model: a causal language model.
        input_ids: ``[1, S]`` or ``[S]``, at least 2 tokens.
        chunk: tokens a step. The result does not depend on it; memory for the logits does.
        description: shows a progress bar with these words; None shows none.

    Returns:
        ``[S - 1]`` float32 on the CPU, nats.

    Raises:
        ValueError: not one sequence of at least 2 tokens, or ``chunk < 1``.
    """
    ids = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"input_ids must be one sequence [1, S] with S >= 2, got {list(input_ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    ids = ids.to(model.device)
    length = ids.shape[1]
    was_training = model.training
    model.eval()
    cache = DynamicCache(config=model.config)
    result = torch.empty(length - 1)
    hidden = description is None or None  # None: shown on a terminal only
    try:
        with tqdm(total=length, desc=description, unit="tok", disable=hidden, leave=False) as progress:
            for start in range(0, length - 1, chunk):
                end = min(start + chunk, length - 1)
                logits = model(ids[:, start:end], past_key_values=cache, use_cache=True).logits[0]
                nll = F.cross_entropy(logits.float(), ids[0, start + 1 : end + 1], reduction="none")
                result[start:end] = nll.cpu()
                progress.update(end - start)
    finally:
        model.train(was_training)
    return result


STOCK = "stock"
"""The label of the unchanged model in :func:`read_with_strategies`."""


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
        strategies: names of :data:`rope_dist.strategies.STRATEGIES`, or ``"stock"``.
        target_length: tokens each extension is planned for.
        chunk: as in :func:`token_nll`.
        progress: show a bar for each reading.

    Raises:
        ValueError: the model's family is not supported, or the target is below its trained length.
    """
    # Planned before the first reading: a model or a length that does not go is refused at once.
    plans = {}
    for strategy in strategies:
        if strategy != STOCK:
            with enable(model, target_length=target_length, strategy=strategy) as enabled:
                plans[strategy] = enabled.plan
    for strategy in strategies:
        plan = plans.get(strategy)
        description = f"reading with {strategy}" if progress else None
        with enable(model, plan=plan) if plan else nullcontext():
            nll = token_nll(model, input_ids, chunk=chunk, description=description)
        yield Reading(strategy, plan, nll)
