"""Logits scaled by the logarithm of the query's position, on top of a plan: what a study compares, and no feature.

``q`` is multiplied by ``max(1, ln(m + 1) / ln L)`` at position ``m`` of a model trained to ``L`` tokens, as Entropy-ABF
does (Zhang et al. 2024; log n: Chiang and Cholak 2022). docs/quality.md shows it: with the temperature of ``auto``
it reads worse, so that no kernel and no plan has it.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rope_dist.evaluation import Variant
from rope_dist.planning import RopePlan


@dataclass(frozen=True)
class LogScaledVariant(Variant):
    """A variant whose queries are scaled by their own position; for LLaMA's attention."""

    @property
    def fingerprint(self) -> str:
        """That of the plan, marked: the frequencies alone are not what reads."""
        return f"{super().fingerprint}-log-n"

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """As :meth:`Variant.applied`, with the queries' projections scaled inside it."""
        if not isinstance(self.plan, RopePlan):
            raise ValueError("queries are scaled on top of a static plan")
        return self._applied(model, self.plan.original_length)

    @contextmanager
    def _applied(self, model: PreTrainedModel, trained: int) -> Iterator[None]:
        first = 0

        def begin(module: Any, arguments: Any, options: dict[str, Any]) -> None:
            nonlocal first
            cache = options.get("past_key_values", options.get("cache"))
            first = cache.get_seq_length() if cache is not None else 0

        def scale(module: Any, arguments: Any, queries: torch.Tensor) -> torch.Tensor:
            # A rotation is linear: scaled before it is scaled after it.
            positions = torch.arange(first, first + queries.shape[1], device=queries.device)
            return queries * log_scale(positions, trained)[:, None].to(queries.dtype)

        decoder = model.get_decoder()
        hooks = [decoder.register_forward_pre_hook(begin, with_kwargs=True)]
        hooks += [layer.self_attn.q_proj.register_forward_hook(scale) for layer in decoder.layers]
        try:
            with super().applied(model):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def log_scale(positions: torch.Tensor, trained: int) -> torch.Tensor:
    """``max(1, ln(m + 1) / ln L)`` float32 for positions ``m``."""
    return (torch.log(positions + 1.0) / math.log(trained)).clamp(min=1)
