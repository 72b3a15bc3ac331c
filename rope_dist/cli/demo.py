"""``rope-dist demo``."""

from __future__ import annotations

import argparse
from typing import Any

from ..defaults import CORPUS_NAMES, DEMO_STRATEGIES, PACKAGED_MODEL_NAMES
from . import values

DESCRIPTION = (
    "Print the paper's Table 3, then let a small real model read a long text with its own frequencies and extended by "
    "auto and DPRoPE, and print perplexity by position. How much is read follows from the speed of the machine."
)
EXAMPLES = """examples:
  rope-dist demo
  rope-dist demo --model ./my-model --text book.txt --tokens 16384 --factor 4 -o results"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo",
        help="read a text past the trained length of a real model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--model",
        type=values.weights,
        default=PACKAGED_MODEL_NAMES[0],
        help="packaged model, directory or hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=values.corpus,
        default=CORPUS_NAMES[0],
        help=f"a text file, or a corpus: {', '.join(CORPUS_NAMES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=values.device,
        help="device of the model, e.g. cuda:0 (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="dtype of the model; auto keeps the one it was saved in (default: float32 on a CPU, else auto)",
    )
    parser.add_argument(
        "--minutes",
        type=values.positive,
        default=4.0,
        metavar="M",
        help="time that all of it may take, approximately (default: %(default)g)",
    )
    parser.add_argument(
        "--tokens",
        type=values.tokens,
        metavar="N",
        help="tokens to read (default: 1.5 times the trained length, or 1.375 times where that takes too long)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        type=values.stock_or_strategy,
        metavar="NAME",
        help=f"what to read with: stock, and strategies (default: {' '.join(DEMO_STRATEGIES)}, the last only if there "
        "is time)",
    )
    parser.add_argument(
        "--factor",
        type=values.scaling_factor,
        default=2.0,
        metavar="S",
        help="context length to extend to, as a multiple of the trained one (default: %(default)s)",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="rope-dist-demo",
        metavar="DIR",
        help="folder for the plot and the results (default: %(default)s)",
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
