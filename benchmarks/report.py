"""Make the README's tables from ``benchmarks/results/*.json``: no figure in it is typed by hand.

    python -m benchmarks.report            rewrite the tables in README.md
    python -m benchmarks.report --check    fail if a table is not what the results say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rope_dist.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    threads = f"{m['threads']} thread{'' if m['threads'] == '1' else 's'}"
    return f"{m['processor']}, {threads}, torch {m['torch']}, transformers {m['transformers']}"


def _markdown(rows: list[list[str]], headers: list[str]) -> str:
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def planning() -> str:
    """Planning times."""
    result = _result("planning.json")
    rows = [
        [name, f"{case['median_s'] * 1e3:.0f}", f"{case['p20_s'] * 1e3:.0f} - {case['p80_s'] * 1e3:.0f}"]
        for name, case in result["results"].items()
    ]
    table = _markdown(rows, ["plan", "median, ms", "20 - 80 %"])
    return f"{table}\n\n`{result['command']}`: {result['repeats']} repeats, {_machine(result)}."


def perplexity() -> str:
    """Perplexity by position of the demonstration."""
    result = _result("demo.json")
    trained = result["trained_length"]
    first = result["readings"][0]["by_position"]
    marked = [f"{b['start']}-{b['end']}{'*' if b['start'] >= trained else ''}" for b in first]
    rows = [
        [r["label"], f"{r['perplexity']:.2f}", *(f"{b['perplexity']:.2f}" for b in r["by_position"])]
        for r in result["readings"]
    ]
    table = _markdown(rows, ["", "all", *marked])
    step = result["rotary_step_seconds"]
    return (
        f"{table}\n\n\\* past the {trained} tokens the model was trained on; every extension is to "
        f"{result['target_length']}, without training. {result['tokens']} tokens of {result['text']}; "
        f"{_machine(result)}. In the same run the rotary step of a layer took "
        f"{step['rope_dist'] / step['stock']:.2f} of stock's time."
    )


def cpu_rotary() -> str:
    """The rotary step on a CPU."""
    result = _result("cpu_rotary.json")
    rows = []
    for name, case in result["results"].items():
        seconds = case["seconds"]
        rows.append(
            [
                name,
                *(
                    f"{seconds[p] * 1e3:.0f}"
                    for p in ("ours, in place", "pass", "ours", "torch.compile", "Hugging Face")
                ),
                *(f"{case[r]:.2f}" for r in ("pass / ours",)),
                *(f"{case[r]:.1f}" for r in ("torch.compile / ours", "Hugging Face / ours")),
            ]
        )
    headers = [
        "",
        "in place, ms",
        "memory pass",
        "new tensors",
        "torch.compile",
        "Hugging Face",
        "pass / in place",
        "torch.compile / in place",
        "Hugging Face / in place",
    ]
    built = result["built"]["CPU library"].removeprefix("yes, ")
    return (
        f"{_markdown(rows, headers)}\n\n`{result['command']}`: medians of {result['repeats']} interleaved repeats, "
        f"{_machine(result)}; {built}."
    )


def quality() -> str:
    """What every strategy does to a real model that is not trained further."""
    from benchmarks.quality.summary import block

    return block(RESULTS)


TABLES: dict[str, Callable[[], str]] = {
    "planning": planning,
    "perplexity": perplexity,
    "cpu_rotary": cpu_rotary,
    "quality": quality,
}


def fill(text: str) -> str:
    """``text`` with every marked table made anew; ``ValueError`` for a name that is not known."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"README.md marks an unknown table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check README.md; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail if README.md is out of date"
    )
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before)
    if arguments.check:
        if before != after:
            print(
                "README.md is not what benchmarks/results says: python -m benchmarks.report", file=sys.stderr
            )
        return int(before != after)
    write_text(readme, after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
