"""``rope-dist plan``."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from ..defaults import DEFAULT_STRATEGY, DIVERGENCE_NAMES, INTERVALS, MEASURE_DTYPES, STRATEGY_SETTINGS
from . import options, values
from .options import flag, option

if TYPE_CHECKING:
    from ..dynamic import DynamicPlan
    from ..planning import RopePlan


def run(
    source: options.Source = None,
    theta: options.Theta = None,
    head_dim: options.HeadDim = None,
    rotary_dim: options.RotaryDim = None,
    original: options.Original = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: options.Strategy = DEFAULT_STRATEGY,
    threshold: options.Threshold = None,
    interpolated_dims: Annotated[
        int | None, option(values.whole(0), "N", "Interpolated dimensions of dprope.")
    ] = None,
    candidates: Annotated[
        list[str] | None,
        option(
            values.strategy, "NAME...", "Strategies that dprope chooses from (default: extrapolation pi)."
        ),
    ] = None,
    settings: options.Settings = None,
    dynamic: Annotated[
        bool,
        flag("--dynamic", "Extend only texts past the trained length, each by the shortest stage for it."),
    ] = False,
    stages: Annotated[
        list[Any] | None,
        option(values.lengths, "TOKENS...", "Lengths of the stages of --dynamic (default: evenly spaced)."),
    ] = None,
    intervals: options.Intervals = INTERVALS,
    divergence: options.Divergence = DIVERGENCE_NAMES[0],
    dtype: options.MeasureDtype = MEASURE_DTYPES[0],
    as_json: options.Json = False,
    output: Annotated[
        str | None, option(values.output_file, "FILE", "Write the plan as JSON.", "-o", "--output")
    ] = None,
    plot: options.Plot = None,
) -> None:
    """Print the scaling factor and disturbance of every rotary pair.

    \b
    Examples:
      rope-dist plan llama2-7b --target 16384
      rope-dist plan ./my-model --factor 4 --strategy yarn --set beta_fast=16 -o plan.json
      rope-dist plan --theta 500000 --head-dim 128 --original 8192 --target 32768 --json
      rope-dist plan ./my-model --dynamic --stages 10240,12288,16384 -o plan.json
    """
    numbers = {"theta": theta, "head_dim": head_dim, "rotary_dim": rotary_dim, "original_length": original}
    rope = options.rope(source, **numbers)
    if stages and not dynamic:
        raise ValueError("--stages are of a dynamic plan: give --dynamic too")
    lengths = [length for given in stages for length in given] if stages else None
    options.at_most_one(lengths is None, target=target, factor=factor)
    dprope = {"threshold": threshold, "interpolated_dims": interpolated_dims, "candidates": candidates}
    checked = _settings(
        strategy, dict(settings or ()), {k: v for k, v in dprope.items() if v not in (None, [])}
    )

    from ..dynamic import DynamicPlan, dynamic_plan
    from ..planning import plan
    from ..plots import plot_plans

    make: Callable[..., RopePlan | DynamicPlan] = plan
    if dynamic:
        make = partial(dynamic_plan, stages=lengths)
    made = make(
        **rope,
        target_length=target,
        factor=factor,
        strategy=strategy,
        settings=checked,
        intervals=intervals,
        divergence=divergence,
        dtype=dtype,
    )
    if plot:
        plot_plans(made.stages[1:] if isinstance(made, DynamicPlan) else [made], plot)
    if output:
        made.save(output)
    print(json.dumps(made.to_dict(), indent=2) if as_json else made.summary())


def _settings(strategy: str, settings: dict[str, Any], dprope: dict[str, Any]) -> dict[str, Any]:
    """The strategy's settings from ``--set`` and the options of dprope, checked."""
    for name in dprope:
        option = f"--{name.replace('_', '-')}"
        if name not in STRATEGY_SETTINGS[strategy]:
            raise ValueError(
                f"{option} is a setting of dprope, and the strategy is {strategy}: give --strategy dprope"
            )
        if name in settings:
            raise ValueError(f"{name} is given twice: by {option} and by --set")
    given = {**settings, **dprope}
    options.settings(strategy, given.items())
    if {"threshold", "interpolated_dims"} <= given.keys():
        raise ValueError("give --threshold or --interpolated-dims, not both")
    return given
