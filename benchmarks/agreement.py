"""Whether two runs agree: stock's time over ours, case by case, of two folders of results.

    python -m benchmarks --output again
    python -m benchmarks.agreement again

The exit status is 1 where two ratios are farther apart than ``--within``, and 2 where nothing can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .sources import RESULTS
from .tables import COMPARED, DEVICES, TITLES, load, markdown


def ratios(folder: Path) -> Iterator[tuple[tuple[str, str, str], float]]:
    """``(question and device, case, provider)`` and how many times its time stock takes."""
    for question in TITLES:
        for device in DEVICES:
            if not (folder / f"{question}-{device}.json").exists():
                continue
            for case in load(f"{question}-{device}.json", folder)["cases"]:
                for name in COMPARED[question]:
                    share = case["results"].get(name, {}).get("to stock")
                    if share:
                        yield (f"{question}-{device}", case["name"], name), 1 / share


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="results of one run")
    parser.add_argument("other", type=Path, nargs="?", default=RESULTS, help="(default: benchmarks/results)")
    parser.add_argument("--within", type=float, default=0.1, help="share of the ratio (default: %(default)g)")
    parsed = parser.parse_args(arguments)
    first, second = dict(ratios(parsed.folder)), dict(ratios(parsed.other))
    both = [key for key in first if key in second]
    if not both:
        print(
            f"benchmarks.agreement: error: {parsed.folder} and {parsed.other} share no case", file=sys.stderr
        )
        return 2
    apart = {key: abs(first[key] / second[key] - 1) for key in both}
    rows = [[*key, f"{first[key]:.2f}", f"{second[key]:.2f}", f"{apart[key]:.1%}"] for key in both]
    print(markdown(rows, ["", "case", "stock's time over", "first", "second", "apart"], text=3))
    over = sum(value > parsed.within for value in apart.values())
    print(f"\n{len(both) - over} of {len(both)} ratios agree within {parsed.within:.0%}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
