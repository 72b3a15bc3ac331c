"""``rope-dist bench``."""

from __future__ import annotations

import argparse
import json
from typing import Any

DESCRIPTION = (
    "Time the rotary step of one Llama-3-8B layer at 8k and 16k tokens against Hugging Face's, beside a copy of "
    "the same bytes, on the device at hand."
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser("bench", help="the rotary step against stock, here", description=DESCRIPTION)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 16384], help="lengths (default: 8192 16384)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of queries and keys (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="about how long it takes (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..bench import bench, text

    result = bench(tokens=parsed.tokens, dtype=parsed.dtype, device=parsed.device, seconds=parsed.seconds)
    print(json.dumps(result, indent=2) if parsed.json else text(result))
