"""``rope-dist compare``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_measure, add_model, number_or_name, numbers

DESCRIPTION = (
    "Compare strategies by how much they disturb the rotary angle distribution (Wu et al. 2024, Table 3)."
)


def add(verbs: Any) -> None:
    from ..comparison import COMPARED

    parser = verbs.add_parser("compare", help="the disturbance of every strategy", description=DESCRIPTION)
    add_model(parser)
    parser.add_argument(
        "--target", type=int, nargs="+", required=True, metavar="TOKENS", help="lengths to read"
    )
    parser.add_argument(
        "--strategies", nargs="+", default=COMPARED, metavar="NAME", help=f"default: {' '.join(COMPARED)}"
    )
    parser.add_argument(
        "--threshold",
        type=number_or_name,
        default=0.0,
        metavar="T",
        help="of dprope (default: 0, as in the paper's Table 3)",
    )
    add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print a list of plans as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw disturbance and factor per pair")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..comparison import compare, table
    from ..plots import plot_plans

    plans = compare(
        parsed.source,
        target_lengths=parsed.target,
        strategies=parsed.strategies,
        threshold=parsed.threshold,
        **numbers(parsed),
    )
    if parsed.plot:
        plot_plans(plans, parsed.plot)
    print(json.dumps([p.to_dict() for p in plans], indent=2) if parsed.json else table(plans))
