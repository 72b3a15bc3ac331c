"""Checks that a plan is made for a given model, as ``enable()`` and every export require."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch

from .layer_types import too_short_a_window
from .model_config import GIVEN, pretrained_rope
from .strategies import PretrainedRope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .dynamic import DynamicPlan
    from .planning import RopePlan

ROUNDING = 2e-6
"""Relative: a few roundings of float32, below which two frequencies are the same."""


def check_same_model(
    plan: RopePlan, rope: PretrainedRope, head_dim: int, *, any_length: bool = False
) -> None:
    """``ValueError`` if ``plan`` was made for another rotary embedding than ``rope``, with what differs.

    Derived numbers are compared up to a few roundings of float32: presets, configs and GGUF files differ in these.

    Args:
        plan: the plan.
        rope, head_dim: the model's rotary embedding and head dimension.
        any_length: do not compare the trained length, which a user may know better than a config.
    """
    for what, planned, own in (
        ("head_dim", plan.head_dim, head_dim),
        ("rotary_dim", plan.rotary_dim, rope.rotary_dim),
        ("theta", plan.theta, rope.theta),
        ("the trained length", plan.original_length, plan.original_length if any_length else rope.length),
    ):
        same = math.isclose(planned, own, rel_tol=ROUNDING) if what == "theta" else planned == own
        if not same:
            raise ValueError(f"the plan is for {what} {planned}, the model has {own}")
    if not _equal(plan.pretrained.base_factors, rope.base_factors):
        raise ValueError(
            "the plan and the model start from different frequencies (one of them is scaled already): make the plan "
            "from this model"
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=ROUNDING, atol=0.0)


def warn_of_window(plan: RopePlan | DynamicPlan, config: PretrainedConfig, stacklevel: int = 2) -> None:
    """Warn where all layers of the model of ``config`` slide and the notes of the plan do not say so."""
    stages: Any = getattr(plan, "stages", (plan,))
    note = too_short_a_window(config, plan.original_length, plan.target_length)
    if note is not None and note not in stages[-1].notes:
        warnings.warn(note, stacklevel=stacklevel + 1)


def check_plan(plan: RopePlan, config: PretrainedConfig, *, any_length: bool = False) -> None:
    """``ValueError`` unless ``plan`` can be applied to the model of ``config``.

    That is a model that the plan was made from, or one that was extended by this very plan already (a run that is
    resumed). A trained length that was given beside the model (``original_length``) is not compared with the config's.
    """
    given = plan.original_length if any_length or plan.original_length_from == GIVEN else None
    rope, head_dim = pretrained_rope(config, original_length=given)
    if not is_applied(plan, config):
        check_same_model(plan, rope, head_dim, any_length=any_length)


def is_applied(plan: RopePlan, config: PretrainedConfig) -> bool:
    """Whether the model of ``config`` is extended by ``plan`` already."""
    rope, head_dim = pretrained_rope(config, original_length=plan.original_length)
    return (
        (head_dim, rope.rotary_dim) == (plan.head_dim, plan.rotary_dim)
        and config.get_text_config(decoder=True).max_position_embeddings >= plan.target_length
        and math.isclose(rope.theta, plan.theta, rel_tol=ROUNDING)
        and math.isclose(rope.attention_scaling, plan.attention_scaling, rel_tol=ROUNDING)
        and _equal(rope.base_factors, torch.tensor(plan.factors, dtype=torch.float64, device="cpu"))
    )
