"""``rope-dist plan``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_measure, add_model, number_or_name, numbers

DESCRIPTION = (
    "Plan an extension: which factor every rotary pair gets, and how much that disturbs the rotary angles."
)


def add(verbs: Any) -> None:
    from ..strategies import DPROPE_THRESHOLDS, STRATEGIES

    parser = verbs.add_parser("plan", help="the factor of every rotary pair", description=DESCRIPTION)
    add_model(parser)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--target", type=int, metavar="TOKENS", help="length to read")
    length.add_argument("--factor", type=float, help="length to read, as a multiple of the trained one")
    parser.add_argument(
        "--strategy", default="dprope", metavar="NAME", help=f"{', '.join(STRATEGIES)} (default: dprope)"
    )
    parser.add_argument(
        "--threshold",
        type=number_or_name,
        metavar="T",
        help=f"of dprope: t in eq. 9, or {', '.join(DPROPE_THRESHOLDS)} (default: by the scale, as the paper)",
    )
    parser.add_argument(
        "--interpolated-dims",
        type=int,
        metavar="N",
        help="of dprope: n instead of t, dimensions to interpolate",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="NAME",
        help="of dprope: strategies that compete (default: extrapolation pi)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="any other setting of the strategy, the value as JSON, e.g. beta_fast=16; repeatable",
    )
    add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw factors and disturbance per pair")
    parser.set_defaults(run=_run)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.replace("-", "_"), value


def _run(parsed: argparse.Namespace) -> None:
    from ..planning import plan
    from ..plots import plot_plans

    settings = dict(parsed.set)
    for name in ("threshold", "interpolated_dims", "candidates"):
        if getattr(parsed, name) is not None:
            settings[name] = getattr(parsed, name)
    made = plan(
        parsed.source,
        target_length=parsed.target,
        factor=parsed.factor,
        strategy=parsed.strategy,
        **numbers(parsed),
        **settings,
    )
    if parsed.output:
        made.save(parsed.output)
    if parsed.plot:
        plot_plans([made], parsed.plot)
    print(json.dumps(made.to_dict(), indent=2) if parsed.json else made.summary())
