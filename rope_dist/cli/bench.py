"""``rope-dist bench``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import values

DESCRIPTION = (
    "Time the rotary step of one Llama-3-8B layer against Hugging Face's implementation on this machine, beside a copy "
    "of the same bytes."
)
EXAMPLES = """examples:
  rope-dist bench
  rope-dist bench --device cuda:0 --tokens 4096 32768 --dtype float16"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench", help="time the rotary step against Hugging Face's", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "--device",
        type=values.device,
        help="device to measure: cpu, cuda or cuda:N (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--tokens",
        type=values.whole(1),
        nargs="+",
        default=[8192, 16384],
        metavar="N",
        help="sequence lengths to measure (default: 8192 16384)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of queries and keys (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=values.positive,
        default=30.0,
        metavar="S",
        help="time that the measurement takes, approximately (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..bench import bench, text

    result = bench(tokens=parsed.tokens, dtype=parsed.dtype, device=parsed.device, seconds=parsed.seconds)
    print(json.dumps(result, indent=2) if parsed.json else text(result))
