"""``rope-dist compare``."""

from __future__ import annotations

import json
from typing import Annotated

from ..defaults import COMPARED_STRATEGIES, DIVERGENCE_NAMES, INTERVALS, MEASURE_DTYPES, STRATEGY_NAMES
from . import options, values
from .options import option


def run(
    target: Annotated[list[int], option(values.tokens, "TOKENS...", "Context lengths to extend to.")],
    source: options.Source = None,
    theta: options.Theta = None,
    head_dim: options.HeadDim = None,
    rotary_dim: options.RotaryDim = None,
    original: options.Original = None,
    strategies: Annotated[
        list[str] | None,
        option(
            values.strategy,
            "NAME...",
            f"Strategies, of {', '.join(STRATEGY_NAMES)} (default: all but longrope).",
        ),
    ] = None,
    threshold: options.Threshold = 0.0,
    intervals: options.Intervals = INTERVALS,
    divergence: options.Divergence = DIVERGENCE_NAMES[0],
    dtype: options.MeasureDtype = MEASURE_DTYPES[0],
    as_json: options.Json = False,
    plot: options.Plot = None,
) -> None:
    """Compare strategies by the disturbance of the angles.

    The measure is that of Wu et al. 2024, Table 3: the divergence of the rotary angle distribution from the
    pre-trained one.

    \b
    Examples:
      rope-dist compare llama2-7b --target 8192 16384
      rope-dist compare ./my-model --target 32768 --strategies pi yarn dprope auto --plot compare.png
    """
    numbers = {"theta": theta, "head_dim": head_dim, "rotary_dim": rotary_dim, "original_length": original}
    rope = options.rope(source, **numbers)

    from ..comparison import compare, table
    from ..plots import plot_plans

    plans = compare(
        **rope,
        target_lengths=target,
        strategies=strategies or COMPARED_STRATEGIES,
        threshold=threshold,
        intervals=intervals,
        divergence=divergence,
        dtype=dtype,
    )
    if plot:
        plot_plans(plans, plot)
    print(json.dumps([plan.to_dict() for plan in plans], indent=2) if as_json else table(plans))
