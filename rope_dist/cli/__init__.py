"""``rope-dist``: every verb, a file each, reads its arguments and makes one call into the package.

Nothing here or at the top of those files needs torch: help and errors in the arguments come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..messages import one_line, unknown
from ..version import __version__
from . import bench, compare, demo, eval, export, info, plan, verify

LONGEST = 1000
VERBS = (plan, compare, export, verify, eval, bench, demo, info)


class _Formatter(argparse.HelpFormatter):
    """argparse's, but examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and names the nearest choice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own hides that the disk is full.
        if message and file is not None:
            file.write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(action, unknown(what, str(value), map(str, action.choices)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for bad input, 130 when interrupted)."""
    try:
        return _main(sys.argv[1:] if arguments is None else arguments)
    finally:
        _flush()


def _main(arguments: Sequence[str]) -> int:
    try:
        try:
            _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as ended:
        # argparse's own end: help and version, or an error in the arguments.
        return int(ended.code or 0)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except (ValueError, OSError, ImportError) as error:
        about = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        _complain(f"error: {about}{one_line(error, LONGEST)}")
        return 2
    return 0


def _run(arguments: Sequence[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot print is printed in escapes, as Python does for errors.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    if not arguments:
        parser.print_help()
        return
    parsed = parser.parse_args(arguments)
    if "check" in parsed:
        # What arguments say together, still without torch.
        try:
            parsed.check(parsed)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
    parsed.run(parsed)


def _complain(message: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"rope-dist: {message}", file=sys.stderr)


def _flush() -> None:
    """Write what is left; a stream that takes no more (a closed pipe, a full disk) is sent nowhere.

    Otherwise Python tries again when it exits, prints a traceback and changes the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rope-dist",
        description="Plan, compare, export and try context extensions of LLaMA-like models.",
        epilog="rope-dist COMMAND --help shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"rope-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND", parser_class=_Parser)
    for verb in VERBS:
        verb.add(verbs)
    return parser
