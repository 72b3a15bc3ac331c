"""Every benchmark in turn within a time limit, each in a process of its own; or one of them.

    python -m benchmarks [--device cpu] [--seconds 540] [--output benchmarks/results]
    python -m benchmarks --only rotary decode -- --baselines torch.compile
    python -m benchmarks rotary --models Llama-3-8B --lengths 8192    (see python -m benchmarks rotary --help)

What stands after ``--`` is handed to each benchmark. One that crashes or outlasts its share leaves what it has
written, and the others go on. The exit status is 1 if one did, and 2 if nothing could be begun.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .benchmark import SUITE_SECONDS, Parser, find, names, positive

STARTUP, GRACE = 7, 15
"""Seconds that a benchmark's process takes to begin (no part of its share), and that its last case may overrun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite or one benchmark; the exit status (1: one did not finish, 2: asked for what cannot be)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser("python -m benchmarks", __doc__)
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in names():
            parser.error(f"no benchmark {arguments[0]!r}; there are {', '.join(names())}")
        return find(arguments[0]).main(arguments[1:])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--seconds", type=positive(float), default=SUITE_SECONDS, help="for all (default: %(default)g)")
    add("--output", type=Path, help="folder of DEVICE.jsonl (default: benchmarks/results)")
    add("--quick", action="store_true", help="small cases: no results")
    add("--only", nargs="+", metavar="NAME", help="these, in the usual order (default: all)")
    add("options", nargs="*", metavar="-- OPTION ...", help="of every benchmark (see its --help)")
    parsed = parser.parse_args(arguments)
    shares = {name: find(name).share.get(parsed.device, 0.0) for name in names()}
    # Short ones first: a long one may outlast its share, and adapts to what is left.
    shares = {name: share for name, share in sorted(shares.items(), key=lambda item: item[1]) if share}
    if unknown := set(parsed.only or ()) - shares.keys():
        there = ", ".join(shares)
        parser.error(
            f"--only: no {', '.join(map(repr, sorted(unknown)))} on {parsed.device}; there are {there}"
        )
    if parsed.options and not parsed.options[0].startswith("-"):
        parser.error(f"no {parsed.options[0]!r}: name benchmarks after --only, and options of them after --")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
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
        options = ["--device", parsed.device, "--seconds", f"{max(seconds, 1):.0f}"]
        options += ["--output", str(parsed.output)] if parsed.output else []
        options += ["--quick"] * parsed.quick + parsed.options
        # One that overruns may take from the others' time, but not all of it.
        status = _run(name, options, min(left, 1.5 * seconds + 5) + GRACE)
        if status:
            failed.append(f"{name} ({status})")
    if failed:
        print(f"\nnot finished: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _run(name: str, arguments: list[str], limit: float) -> str | None:
    """Why the benchmark did not finish, or None."""
    try:
        # A process of its own: what a kernel breaks on a GPU stays broken for its process.
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, *arguments], timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
