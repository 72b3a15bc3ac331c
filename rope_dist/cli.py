"""``rope-dist``: every verb reads its arguments and makes one call into the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 when interrupted)."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again on closing stdout.
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        print("rope-dist: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"rope-dist: error: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rope-dist",
        description="Plan, compare and try context extensions of LLaMA-like models.",
    )
    parser.add_argument("--version", action="version", version=f"rope-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    _add_plan(verbs)
    _add_compare(verbs)
    _add_demo(verbs)
    _add_info(verbs)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    from .presets import PRESETS

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


def _add_measure(parser: argparse.ArgumentParser) -> None:
    from .distribution import DEFAULT_INTERVALS, DIVERGENCES

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


def _numbers(parsed: argparse.Namespace) -> dict[str, Any]:
    return {
        "theta": parsed.theta,
        "head_dim": parsed.head_dim,
        "rotary_dim": parsed.rotary_dim,
        "original_length": parsed.original,
        "intervals": parsed.intervals,
        "divergence": parsed.divergence,
        "dtype": parsed.dtype,
    }


# --- plan --------------------------------------------------------------------------------------


def _add_plan(verbs: Any) -> None:
    from .strategies import DPROPE_THRESHOLDS, STRATEGIES

    parser = verbs.add_parser("plan", help="the factor of every rotary pair", description=_PLAN)
    _add_model(parser)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--target", type=int, metavar="TOKENS", help="length to read")
    length.add_argument("--factor", type=float, help="length to read, as a multiple of the trained one")
    parser.add_argument(
        "--strategy", default="dprope", metavar="NAME", help=f"{', '.join(STRATEGIES)} (default: dprope)"
    )
    parser.add_argument(
        "--threshold",
        type=_number_or_name,
        metavar="T",
        help=f"of dprope: t in eq. 9, or {', '.join(DPROPE_THRESHOLDS)} (default: by the scale, as the paper)",
    )
    parser.add_argument(
        "--interpolated-dims",
        type=int,
        metavar="N",
        help="of dprope: n instead of t, dimensions to interpolate",
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        metavar="NAME",
        help="of dprope: strategies that compete (default: extrapolation pi)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="any other setting of the strategy, the value as JSON, e.g. beta_fast=16; repeatable",
    )
    _add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw factors and disturbance per pair")
    parser.set_defaults(run=_plan)


_PLAN = (
    "Plan an extension: which factor every rotary pair gets, and how much that disturbs the rotary angles."
)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.replace("-", "_"), value


def _plan(parsed: argparse.Namespace) -> None:
    from .planning import plan
    from .plots import plot_plans

    settings = dict(parsed.set)
    for name in ("threshold", "interpolated_dims", "candidates"):
        if getattr(parsed, name) is not None:
            settings[name] = getattr(parsed, name)
    made = plan(
        parsed.source,
        target_length=parsed.target,
        factor=parsed.factor,
        strategy=parsed.strategy,
        **_numbers(parsed),
        **settings,
    )
    if parsed.output:
        made.save(parsed.output)
    if parsed.plot:
        plot_plans([made], parsed.plot)
    print(json.dumps(made.to_dict(), indent=2) if parsed.json else made.summary())


# --- compare -----------------------------------------------------------------------------------


def _add_compare(verbs: Any) -> None:
    from .comparison import COMPARED

    parser = verbs.add_parser("compare", help="the disturbance of every strategy", description=_COMPARE)
    _add_model(parser)
    parser.add_argument(
        "--target", type=int, nargs="+", required=True, metavar="TOKENS", help="lengths to read"
    )
    parser.add_argument(
        "--strategies", nargs="+", default=COMPARED, metavar="NAME", help=f"default: {' '.join(COMPARED)}"
    )
    parser.add_argument(
        "--threshold",
        type=_number_or_name,
        default=0.0,
        metavar="T",
        help="of dprope (default: 0, as in the paper's Table 3)",
    )
    _add_measure(parser)
    parser.add_argument("--json", action="store_true", help="print a list of plans as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw disturbance and factor per pair")
    parser.set_defaults(run=_compare)


_COMPARE = (
    "Compare strategies by how much they disturb the rotary angle distribution (Wu et al. 2024, Table 3)."
)


def _compare(parsed: argparse.Namespace) -> None:
    from .comparison import compare, table
    from .plots import plot_plans

    plans = compare(
        parsed.source,
        target_lengths=parsed.target,
        strategies=parsed.strategies,
        threshold=parsed.threshold,
        **_numbers(parsed),
    )
    if parsed.plot:
        plot_plans(plans, parsed.plot)
    print(json.dumps([p.to_dict() for p in plans], indent=2) if parsed.json else table(plans))


# --- demo --------------------------------------------------------------------------------------


def _add_demo(verbs: Any) -> None:
    parser = verbs.add_parser("demo", help="a real model reads past its trained length", description=_DEMO)
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
    parser.set_defaults(run=_demo)


_DEMO = (
    "Print the paper's Table 3, then let a small real model read a long text with the stock frequencies, position "
    "interpolation, YaRN and DPRoPE, and print perplexity by position."
)


def _demo(parsed: argparse.Namespace) -> None:
    from .demo import run

    run(
        model_name=parsed.model,
        text=parsed.text,
        tokens=parsed.tokens,
        factor=parsed.factor,
        output=parsed.output,
        device=parsed.device,
    )


# --- info --------------------------------------------------------------------------------------


def _add_info(verbs: Any) -> None:
    parser = verbs.add_parser("info", help="what is built, and what serves each device", description=_INFO)
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_info)


_INFO = (
    "Print versions, the native libraries with their compilers, the backend of each device with its reason, and "
    "the model families."
)


def _info(parsed: argparse.Namespace) -> None:
    from .info import info, text

    print(json.dumps(info(), indent=2) if parsed.json else text())
