"""``rope-dist compare``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..defaults import COMPARED_STRATEGIES, STRATEGY_NAMES
from . import values
from .options import add_measure, add_model, check_source, numbers

DESCRIPTION = (
    "Compare strategies by how much they disturb the rotary angle distribution (Wu et al. 2024, Table 3)."
)
EXAMPLES = """examples:
  rope-dist compare llama2-7b --target 8192 16384
  rope-dist compare ./my-model --target 32768 --strategies pi yarn dprope auto --plot compare.png"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "compare", help="compare the disturbance of strategies", description=DESCRIPTION, epilog=EXAMPLES
    )
    add_model(parser)
    parser.add_argument(
        "--target",
        type=values.tokens,
        nargs="+",
        required=True,
        metavar="TOKENS",
        help="context lengths to extend to",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        type=values.strategy,
        default=COMPARED_STRATEGIES,
        metavar="NAME",
        help=f"strategies to compare, of {', '.join(STRATEGY_NAMES)} (default: all but longrope)",
    )
    parser.add_argument(
        "--threshold",
        type=values.threshold,
        default=0.0,
        metavar="T",
        help="threshold of dprope (default: 0, as in the paper's Table 3)",
    )
    add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print a list of plans as JSON")
    parser.add_argument(
        "--plot",
        type=values.output_file,
        metavar="FILE",
        help="draw the disturbance and the factor of every pair",
    )
    parser.set_defaults(run=_run, check=check_source)


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
