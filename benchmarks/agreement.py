"""Whether two runs agree: speedups over the reference, case by case, of two folders of results.

    python -m benchmarks --output again
    python -m benchmarks.agreement again

The exit status is 1 where two speedups are farther apart than ``--within``, and 2 where nothing can be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .benchmark import Parser
from .results import DEVICES, RESULTS, read
from .tables import markdown


def speedups(folder: Path) -> dict[tuple[str, ...], float]:
    """Of this package's implementations, by benchmark, device, case and name."""
    return {
        (f"{row['benchmark']}-{device}", row["case"], row["implementation"]): 1 / row["ratio"]
        for device in DEVICES
        for row in read(device, folder)
        if row.get("kind") == "ours" and row.get("ratio")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = Parser("python -m benchmarks.agreement", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="results of one run")
    add("other", type=Path, nargs="?", default=RESULTS, help="(default: benchmarks/results)")
    add("--within", type=float, default=0.1, help="share of the speedup (default: %(default)g)")
    parsed = parser.parse_args(arguments)
    first, second = speedups(parsed.folder), speedups(parsed.other)
    both = [key for key in first if key in second]
    if not both:
        parser.error(f"{parsed.folder} and {parsed.other} share no case")
    apart = {key: abs(first[key] / second[key] - 1) for key in both}
    rows = [[*key, f"{first[key]:.2f}", f"{second[key]:.2f}", f"{apart[key]:.1%}"] for key in both]
    print(markdown(rows, ["", "case", "speedup of", "first", "second", "apart"], text=3))
    over = sum(value > parsed.within for value in apart.values())
    print(f"\n{len(both) - over} of {len(both)} speedups agree within {parsed.within:.0%}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
