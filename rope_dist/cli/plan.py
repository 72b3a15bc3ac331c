"""``rope-dist plan``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..defaults import DEFAULT_STRATEGY, STRATEGY_SETTINGS, THRESHOLD_NAMES
from . import values
from .options import add_length, add_measure, add_model, add_strategy, check_source, numbers

DESCRIPTION = "Plan an extension: print the scaling factor of every rotary pair and its disturbance."
EXAMPLES = """examples:
  rope-dist plan llama2-7b --target 16384
  rope-dist plan ./my-model --factor 4 --strategy yarn --set beta_fast=16 -o plan.json
  rope-dist plan --theta 500000 --head-dim 128 --original 8192 --target 32768 --json"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "plan", help="print the scaling factor of every rotary pair", description=DESCRIPTION, epilog=EXAMPLES
    )
    add_model(parser)
    add_length(parser.add_mutually_exclusive_group(required=True))
    add_strategy(parser)
    parser.add_argument(
        "--threshold",
        type=values.threshold,
        metavar="T",
        help=f"threshold t of dprope (eq. 9), or {', '.join(THRESHOLD_NAMES)} (default: the paper's for the scale)",
    )
    parser.add_argument(
        "--interpolated-dims",
        type=values.whole(0),
        metavar="N",
        help="number of dimensions that dprope interpolates, instead of a threshold",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        type=values.strategy,
        metavar="NAME",
        help="strategies that dprope chooses from, pair by pair (default: extrapolation pi)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=values.setting,
        metavar="KEY=VALUE",
        help="set any setting of the strategy, the value as JSON, e.g. beta_fast=16; repeatable",
    )
    add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "-o", "--output", type=values.output_file, metavar="FILE", help="write the plan as JSON"
    )
    parser.add_argument(
        "--plot",
        type=values.output_file,
        metavar="FILE",
        help="draw the factors and the disturbance of every pair",
    )
    parser.set_defaults(run=_run, check=_check)


def _check(parsed: argparse.Namespace) -> None:
    check_source(parsed)
    parsed.strategy = parsed.strategy or DEFAULT_STRATEGY
    parsed.settings = _settings(parsed, parsed.strategy)


def _settings(parsed: argparse.Namespace, strategy: str) -> dict[str, Any]:
    """The strategy's settings from ``--set`` and the options that are dprope's, checked."""
    given = dict(parsed.set)
    for name in ("threshold", "interpolated_dims", "candidates"):
        value = getattr(parsed, name)
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if name not in STRATEGY_SETTINGS[strategy]:
            raise ValueError(
                f"{option} is a setting of dprope, and the strategy is {strategy}: give --strategy dprope"
            )
        if name in given:
            raise ValueError(f"{name} is given twice: by {option} and by --set")
        given[name] = value
    for name, value in given.items():
        if name in ("intervals", "divergence", "dtype"):
            raise ValueError(f"{name} has an option of its own: give --{name}")
        values.check_setting(strategy, name, value)
    if {"threshold", "interpolated_dims"} <= given.keys():
        raise ValueError("give --threshold or --interpolated-dims, not both")
    return given


def _run(parsed: argparse.Namespace) -> None:
    from ..planning import plan
    from ..plots import plot_plans

    made = plan(
        parsed.source,
        target_length=parsed.target,
        factor=parsed.factor,
        strategy=parsed.strategy,
        settings=parsed.settings,
        **numbers(parsed),
    )
    if parsed.plot:
        plot_plans([made], parsed.plot)
    if parsed.output:
        made.save(parsed.output)
    print(json.dumps(made.to_dict(), indent=2) if parsed.json else made.summary())
