"""Options that several verbs have. Nothing here needs torch."""

from __future__ import annotations

import argparse
from typing import Any

from ..defaults import DEFAULT_STRATEGY, DIVERGENCE_NAMES, INTERVALS, MEASURE_DTYPES, PRESETS, STRATEGY_NAMES
from . import values


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        type=values.model,
        metavar="MODEL",
        help=f"a preset ({', '.join(PRESETS)}), a directory with a config.json, or a hub id (owner/name)",
    )
    numbers = parser.add_argument_group("plain numbers instead of a model")
    numbers.add_argument("--theta", type=values.theta, help="base of RoPE, e.g. 10000")
    numbers.add_argument("--head-dim", type=values.even, metavar="N", help="dimensions of an attention head")
    numbers.add_argument(
        "--rotary-dim",
        type=values.even,
        metavar="N",
        help="dimensions of a head that are rotated (default: all)",
    )
    numbers.add_argument(
        "--original", type=values.tokens, metavar="TOKENS", help="length of the training context"
    )


def add_length(parser: Any, default: str = "") -> None:
    """``--target`` and ``--factor``, into a group of which one is given."""
    parser.add_argument("--target", type=values.tokens, metavar="TOKENS", help="context length to extend to")
    parser.add_argument(
        "--factor",
        type=values.scaling_factor,
        metavar="S",
        help=f"scaling factor: that length as a multiple of the trained one{default}",
    )


def add_strategy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategy",
        type=values.strategy,
        metavar="NAME",
        help=f"how the frequencies are rescaled: {', '.join(STRATEGY_NAMES)} (default: {DEFAULT_STRATEGY})",
    )


def add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--intervals",
        type=values.whole(2),
        default=INTERVALS,
        metavar="N",
        help="number of intervals of the rotary angle distribution (default: %(default)s)",
    )
    parser.add_argument(
        "--divergence",
        choices=DIVERGENCE_NAMES,
        default=DIVERGENCE_NAMES[0],
        help="direction of the Kullback-Leibler divergence: the first reproduces the paper's Table 3, "
        "the second is eq. 8 as printed (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=MEASURE_DTYPES,
        default=MEASURE_DTYPES[0],
        help="precision of the angles: float32 as in the authors' code, float64 exact (default: %(default)s)",
    )


def check_source(parsed: argparse.Namespace) -> None:
    """``ValueError`` unless there is a model or all plain numbers, and not both."""
    numbers = {"--theta": parsed.theta, "--head-dim": parsed.head_dim, "--original": parsed.original}
    given = [
        name for name, value in {**numbers, "--rotary-dim": parsed.rotary_dim}.items() if value is not None
    ]
    missing = [name for name, value in numbers.items() if value is None]
    if parsed.source is not None and given:
        raise ValueError(f"give a model or plain numbers, not both: {', '.join(given)}")
    if parsed.source is None and missing:
        raise ValueError(
            f"give a model, or --theta, --head-dim and --original in its place; missing: {', '.join(missing)}"
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
