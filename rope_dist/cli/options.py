"""Options that several verbs have."""

from __future__ import annotations

import argparse
from typing import Any


def add_model(parser: argparse.ArgumentParser) -> None:
    from ..presets import PRESETS

    parser.add_argument(
        "source",
        nargs="?",
        metavar="MODEL",
        help=f"a preset ({', '.join(PRESETS)}), a directory with a config.json, or a hub id",
    )
    numbers = parser.add_argument_group("plain numbers instead of a model")
    numbers.add_argument("--theta", type=float, help="RoPE base, e.g. 10000")
    numbers.add_argument("--head-dim", type=int, help="dimensions of an attention head")
    numbers.add_argument("--rotary-dim", type=int, help="rotated dimensions of a head (default: all)")
    numbers.add_argument("--original", type=int, metavar="TOKENS", help="trained length")


def add_measure(parser: argparse.ArgumentParser) -> None:
    from ..distribution import DEFAULT_INTERVALS, DIVERGENCES

    parser.add_argument(
        "--intervals",
        type=int,
        default=DEFAULT_INTERVALS,
        help="intervals of the rotary angle distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--divergence",
        choices=DIVERGENCES,
        default=DIVERGENCES[0],
        help="direction of the Kullback-Leibler divergence: the first reproduces the paper's Table 3, "
        "the second is eq. 8 as printed (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="of the angles: float32 as in the authors' code, float64 exact (default: %(default)s)",
    )


def numbers(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "theta": parsed.theta,
        "head_dim": parsed.head_dim,
        "rotary_dim": parsed.rotary_dim,
        "original_length": parsed.original,
        "intervals": parsed.intervals,
        "divergence": parsed.divergence,
        "dtype": parsed.dtype,
    }


def number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
