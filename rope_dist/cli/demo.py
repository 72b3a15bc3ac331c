"""``rope-dist demo``."""

from __future__ import annotations

import argparse
from typing import Any

from ..defaults import CORPUS_NAMES, PACKAGED_MODEL_NAMES
from . import values

DESCRIPTION = (
    "Print the paper's Table 3, then let a small real model read a long text with the stock frequencies, position "
    "interpolation, YaRN, DPRoPE and auto, and print perplexity by position."
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
        "--tokens",
        type=values.tokens,
        default=12288,
        metavar="N",
        help="number of tokens to read (default: %(default)s)",
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
        factor=parsed.factor,
        output=parsed.output,
        device=parsed.device,
    )
