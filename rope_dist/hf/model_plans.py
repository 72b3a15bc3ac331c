"""The plan of each rotary embedding of a model, from the arguments of ``enable``, before any change."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from ..checking import check_plan, is_applied, warn_of_window
from ..dynamic import DynamicPlan, dynamic_plan, trained_config
from ..model_config import GIVEN, pretrained_rope
from ..planning import RopePlan
from ..planning import plan as make_plan
from .finding import Found
from .growing import find_growths
from .stages import Growth
from .window_calls import Window
from .windowing import Windowed, find_windowings


def plans_and_growths(
    model: nn.Module, found: Found, options: dict[str, Any]
) -> tuple[list[RopePlan | DynamicPlan | None], dict[nn.Module, Growth], str]:
    """The plan of each rotary embedding, what decoders keep of dynamic ones, and why there is none where one may be.

    Without ``dynamic`` a new plan is dynamic where the model and the target admit it.
    """
    if options["dynamic"] is None and is_target(options) and options["stages"] is None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                plans = _plans_for(found.rotaries, {**options, "dynamic": True})
                growths = find_growths(model, found, plans)
        except ValueError as error:
            # Raises what is wrong with the target itself.
            return _plans_for(found.rotaries, {**options, "dynamic": False}), {}, str(error)
        for warning in caught:
            warnings.warn(warning.message, stacklevel=3)
        return plans, growths, ""
    plans = _plans_for(found.rotaries, options)
    return plans, find_growths(model, found, plans), ""


def is_target(options: dict[str, Any]) -> bool:
    return any(options[key] is not None for key in ("target_length", "factor", "stages"))


def _plans_for(
    rotaries: list[nn.Module], options: dict[str, Any], window: Window | None = None
) -> list[RopePlan | DynamicPlan | None]:
    """The plan of each rotary embedding; those that have one config share it."""
    made: dict[int, RopePlan | DynamicPlan | None] = {}
    for rotary in rotaries:
        if id(rotary.config) not in made:
            made[id(rotary.config)] = _plan_for(rotary, options, window)
    return [made[id(rotary.config)] for rotary in rotaries]


_NOT_OF_A_PLAN = ("plan", "dynamic", "stages", "tables", "window", "far", "far_scaling")


def _beyond(
    window: Window, made: RopePlan | DynamicPlan, config: Any, options: dict[str, Any]
) -> RopePlan | DynamicPlan:
    """The far plan for the texts of ``made``: with the window before it no angle is larger than the trained ones."""
    if isinstance(made, DynamicPlan):
        return DynamicPlan(
            (made.stages[0], *(_beyond(window, stage, config, options) for stage in made.stages[1:]))
        )
    length = window.far_length(made.target_length, made.original_length)
    if length == made.target_length:
        return made
    # Beside a target it is the strategy's setting of that name.
    factor = options["factor"] if options["target_length"] is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of ``made``
        far = make_plan(config, **{**options, "target_length": length, "factor": factor})
    return dataclasses.replace(far, target_length=made.target_length)


def _plan_for(
    rotary: nn.Module, options: dict[str, Any], window: Window | None = None
) -> RopePlan | DynamicPlan | None:
    """The plan for one rotary embedding, made from or checked against its stock config, before any change."""
    swap = rotary.__dict__.get("_rope_dist_swap")
    plan = options["plan"]
    if plan is None and not is_target(options):
        return swap.plan if swap else None
    config = swap.config_before if swap and swap.plan else rotary.config
    if plan is None:
        own = {k: v for k, v in options.items() if k not in _NOT_OF_A_PLAN}
        made = (
            dynamic_plan(config, stages=options["stages"], **own)
            if options["dynamic"]
            else make_plan(config, **own)
        )
        return _beyond(window, made, config, own) if window and window.far == "plan" else made
    last = plan
    if isinstance(plan, DynamicPlan):
        config, last = trained_config(config), plan.stages[-1]
    check_plan(last, config, any_length=True)
    if not is_applied(last, config) and last.original_length_from != GIVEN:
        length = pretrained_rope(config)[0].length
        if plan.original_length != length:
            warnings.warn(
                f"the plan takes {plan.original_length} tokens as trained, the model's config says {length}",
                stacklevel=4,
            )
    warn_of_window(plan, config, stacklevel=4)
    plan.config_overrides(config)
    return plan


def plans_and_windowings(
    model: nn.Module, found: Found, options: dict[str, Any], window: Window
) -> tuple[list[RopePlan | DynamicPlan | None], dict[nn.Module, Windowed], str]:
    """The far plan of each rotary embedding, what decoders with a window have, and why there is no dynamic plan.

    Cached keys have the trained frequencies at every stage: a model may have a dynamic plan by a window only.
    """

    def made(**changes: Any) -> tuple[list[RopePlan | DynamicPlan | None], dict[nn.Module, Windowed]]:
        plans = _plans_for(found.rotaries, {**options, **changes}, window)
        return plans, find_windowings(model, found, plans, window)

    if options["dynamic"] is None and is_target(options) and options["stages"] is None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                plans, windowings = made(dynamic=True)
        except ValueError as error:
            # Raises what a static one is refused for too.
            return *made(dynamic=False), str(error)
        for warning in caught:
            warnings.warn(warning.message, stacklevel=4)
        return plans, windowings, ""
    return *made(), ""
