"""``rope-dist``: every verb, a file each, reads its arguments and makes one call into the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..version import __version__
from . import bench, compare, demo, eval, export, info, plan, verify

VERBS = (plan, compare, export, verify, eval, bench, demo, info)


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
        description="Plan, compare, export and try context extensions of LLaMA-like models.",
    )
    parser.add_argument("--version", action="version", version=f"rope-dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb in VERBS:
        verb.add(verbs)
    return parser
