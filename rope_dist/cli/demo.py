"""``rope-dist demo``."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = (
    "Print the paper's Table 3, then let a small real model read a long text with its own frequencies and extended by "
    "auto and DPRoPE, and print perplexity by position. How much is read follows from the speed of the machine."
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo", help="a real model reads past its trained length", description=DESCRIPTION
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help="packaged model, directory or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--text", default="python", help="a corpus or a text file (default: the Python language reference)"
    )
    parser.add_argument(
        "--device", help="where the model reads, e.g. cuda:0 (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="of the model (default: float32 on a CPU, else as it was saved)",
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="about how long all of it may take (default: %(default)g)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        help="tokens to read (default: 1.5 times the trained length, or 1.375 times where that takes too long)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME",
        help="stock and names of strategies (default: stock auto dprope, the last only if there is time)",
    )
    parser.add_argument(
        "--factor", type=float, default=2.0, help="extension of the trained length (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        default="rope-dist-demo",
        help="folder for the plot and the figures (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..demo import run

    run(
        model_name=parsed.model,
        text=parsed.text,
        tokens=parsed.tokens,
        strategies=parsed.strategies,
        factor=parsed.factor,
        minutes=parsed.minutes,
        output=parsed.output,
        device=parsed.device,
        dtype=parsed.dtype,
    )
