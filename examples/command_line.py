"""What the examples share: options of a model and its extension, and errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rope_dist.defaults import DEFAULT_STRATEGY, PACKAGED_MODEL_NAMES, STRATEGY_NAMES


class Parser(argparse.ArgumentParser):
    """argparse with the options that every example has; a wrong one ends it with one line and exit code 2.

    The default strategy is the package's, for models that are not trained further; an example that trains has its own.
    """

    def __init__(self, description: str, strategy: str = DEFAULT_STRATEGY) -> None:
        super().__init__(description=description)
        self.add_argument(
            "--model",
            default=PACKAGED_MODEL_NAMES[0],
            help="packaged model, directory or hub id (default: %(default)s)",
        )
        length = self.add_mutually_exclusive_group()
        length.add_argument(
            "--factor", type=float, help="target as a multiple of the trained length (default: 2)"
        )
        length.add_argument("--target", type=int, metavar="TOKENS", help="length to extend the model to")
        # longrope wants a list of numbers, which is what plans are for.
        names = [name for name in STRATEGY_NAMES if name != "longrope"]
        self.add_argument("--strategy", default=strategy, choices=names, help="default: %(default)s")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def extension(parsed: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`rope_dist.enable` and :func:`rope_dist.plan` that ``parsed`` asks for."""
    if parsed.target is not None:
        return {"target_length": parsed.target, "strategy": parsed.strategy}
    return {"factor": 2.0 if parsed.factor is None else parsed.factor, "strategy": parsed.strategy}


def at_least_one(text: str) -> int:
    """The type of options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def quieten() -> None:
    """Loading notes and length warnings would stand between the lines of an example; bars are for terminals."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def run(main: Callable[[argparse.Namespace], int | None], parser: Parser) -> NoReturn:
    """Parse, call ``main`` and exit: 2 with one line for bad input, 130 when interrupted."""
    parsed = parser.parse_args()
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main(parsed))
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
