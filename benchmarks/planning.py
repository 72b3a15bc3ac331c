"""How long planning takes: one core, from numbers to a finished plan.

    python -m benchmarks.planning [--repeats 20] [--output benchmarks/results/planning.json]

Planning happens once, before inference; nothing is added per token.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from statistics import quantiles

import torch
from tabulate import tabulate

from rope_dist.files import write_text
from rope_dist.planning import plan
from rope_dist.timing import machine, time_interleaved

CASES: dict[str, Callable[[], object]] = {
    "llama2-7b 4k -> 8k": partial(plan, "llama2-7b", target_length=8192),
    "llama2-7b 4k -> 16k": partial(plan, "llama2-7b", target_length=16384),
    "llama2-7b 4k -> 16k, float64": partial(plan, "llama2-7b", target_length=16384, dtype="float64"),
    "llama2-7b 4k -> 16k, six candidates": partial(
        plan,
        "llama2-7b",
        target_length=16384,
        candidates=["extrapolation", "pi", "ntk", "dynamic-ntk", "yarn", "llama3"],
    ),
    "llama3-8b 8k -> 32k": partial(plan, "llama3-8b", target_length=32768),
    "llama3.1-8b 128k -> 256k": partial(plan, "llama3.1-8b", target_length=262144),
}


def main() -> None:
    """Time every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed runs of each case (default: %(default)s)"
    )
    parser.add_argument("--output", help="JSON file to write", default="benchmarks/results/planning.json")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    torch.set_num_threads(1)
    times = time_interleaved(CASES, repeats=arguments.repeats)
    rows = []
    results = {}
    for name, seconds in times.items():
        p20, p50, p80 = (quantiles(seconds, n=10)[i] for i in (1, 4, 7))
        results[name] = {"p20_s": p20, "median_s": p50, "p80_s": p80}
        rows.append((name, f"{p50 * 1e3:.1f}", f"{p20 * 1e3:.1f} - {p80 * 1e3:.1f}"))
    here = machine()
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    print(tabulate(rows, ("plan", "median, ms", "20 - 80 %"), colalign=("left", "right", "right")))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.planning", *sys.argv[1:]]),
        "machine": here,
        "repeats": arguments.repeats,
        "results": results,
    }
    write_text(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
