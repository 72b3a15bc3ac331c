"""Every question in turn within a time limit, each in a process of its own.

    python -m benchmarks [--device cpu] [--seconds 540] [--output benchmarks/results]
    python -m benchmarks --only rotary decode -- --peers torch.compile

What stands after ``--`` is handed to each script. A question that crashes or outlasts its share leaves what it has
written, and the others go on. The exit status is 1 if one did, and 2 if nothing could be begun.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

SHARES = {
    "cpu": {
        "rotary": 32,
        "decode": 4,
        "planning": 6,
        "projection": 22,
        "attention_block": 12,
        "model_prefill": 10,
        "model_train_step": 14,
    },
    "cuda": {
        "rotary": 23,
        "projection": 28,
        "decode": 10,
        "model_prefill": 14,
        "model_decode": 7,
        "attention_block": 11,
        "model_train_step": 7,
    },
}
"""By device, the questions with their share of the time in percent. On a CPU the last ones take longer than they
should where one round of a case is longer than its share, so the short ones come first."""

STARTUP = 7
"""Seconds that a question's process takes to begin: not part of its share."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status (1: a question did not finish, 2: asked for what cannot be)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=tuple(SHARES), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: %(default)g)")
    parser.add_argument("--output", type=Path, help="folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="one small case each: no results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, in the usual order (default: all)")
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION ...", help="of every script (see its --help)"
    )
    parsed = parser.parse_args(arguments)
    shares = SHARES[parsed.device]
    # Once for all: every question would say the same.
    problem = None if parsed.seconds > 0 else f"--seconds must be positive, got {parsed.seconds:g}"
    for name in parsed.only or ():
        if name not in shares:
            problem = f"--only: no {name!r} on {parsed.device}; there are {', '.join(shares)}"
    if parsed.options and not parsed.options[0].startswith("-"):
        problem = f"no {parsed.options[0]!r}: name benchmarks after --only, and options of them after --"
    if parsed.device == "cuda" and not torch.cuda.is_available():
        problem = "--device cuda: torch sees no GPU"
    if problem:
        print(f"benchmarks: error: {problem}", file=sys.stderr)
        return 2
    deadline = time.monotonic() + parsed.seconds
    failed = []
    shares = {name: share for name, share in shares.items() if not parsed.only or name in parsed.only}
    for index, (name, share) in enumerate(shares.items()):
        left = deadline - time.monotonic()
        if left <= 0:
            failed.append(f"{name} (not begun)")
            continue
        rest = list(shares.values())[index:]
        seconds = max(left - STARTUP * len(rest), 1) * share / sum(rest)
        print(f"\n== {name}, {seconds:.0f} s", flush=True)
        asked = ["--device", parsed.device, "--seconds", f"{max(seconds, 1):.0f}"]
        asked += ["--output", str(parsed.output)] if parsed.output else []
        asked += ["--quick"] if parsed.quick else []
        asked += parsed.options
        # One that overruns may take from the others' time, but not all of it.
        status = _run(name, asked, min(left, 1.5 * seconds + 20))
        if status:
            failed.append(f"{name} ({status})")
    if failed:
        print(f"\nnot finished: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _run(name: str, arguments: list[str], limit: float) -> str | None:
    """Why the question did not finish, or None."""
    try:
        # A process of its own: what a kernel breaks on a GPU stays broken for its process.
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
