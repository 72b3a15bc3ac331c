"""``rope-dist demo``."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = (
    "Print the paper's Table 3, then let a small real model read a long text with the stock frequencies, position "
    "interpolation, YaRN, DPRoPE and auto, and print perplexity by position."
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
    parser.add_argument("--tokens", type=int, default=12288, help="tokens to read (default: %(default)s)")
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
        factor=parsed.factor,
        output=parsed.output,
        device=parsed.device,
    )
