"""Make the README's tables and pictures and ROOFLINE.md from ``benchmarks/results/*.json``.

    python -m benchmarks.report            rewrite them
    python -m benchmarks.report --check    fail if one is not what the results say

No figure is typed by hand. A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME is a
question and a device (``rotary-cpu``, ``model_prefill-cuda``) or ``perplexity``. A figure is marked where the files it
measured are not those of this tree any more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rope_dist
from rope_dist.files import write_text
from rope_dist.plots import plot_plans

from . import roofline
from .sources import RESULTS, ROOT
from .tables import (
    DEVICES,
    PLOTS,
    TITLES,
    digest,
    draw,
    figures,
    hardware,
    load,
    machine,
    markdown,
    plot_is_current,
    plot_path,
)


def perplexity() -> str:
    """Perplexity by position of the demonstration."""
    result = load("demo.json")
    trained = result["trained_length"]
    parts = result["by_position"]
    marked = [f"{p['start']}-{p['end']}{'*' if p['start'] >= trained else ''}" for p in parts]
    rows = [[r["label"], *(f"{p['perplexity'][r['label']]:.2f}" for p in parts)] for r in result["readings"]]
    table = markdown(rows, ["", *marked])
    step = result["rotary_step_seconds"]
    return (
        f"{table}\n\n\\* past the {trained} tokens the model was trained on; every extension is to "
        f"{result['target_length']}, without training. {result['tokens']} tokens of {result['text']}; "
        f"{machine(result)}. In the same run this package's rotary step of a layer was "
        f"{step['stock'] / step['rope_dist']:.1f} times as fast as stock's."
    )


def quality() -> str:
    """What every strategy does to a real model that is not trained further."""
    from benchmarks.quality.summary import block

    return block(RESULTS)


def tuning() -> str:
    """What the constants of ``auto`` were chosen on."""
    from benchmarks.quality.summary import tuning

    return tuning(RESULTS)


TABLES: dict[str, Callable[[], str]] = {
    "perplexity": perplexity,
    "quality": quality,
    "tuning": tuning,
    **{
        f"{question}-{device}": partial(figures, question, device)
        for question in TITLES
        for device in DEVICES
    },
}


def machines() -> list[str]:
    """In words, every machine that a result names; the longest first, since one may begin like another."""
    found = set()
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        # The records of the quality study have a list of them.
        several = [{"machine": m} for m in record.get("machines", ())]
        found |= {hardware(r) for r in several or ([record] if "machine" in record else [])}
    return sorted(found, key=len, reverse=True)


def fill(text: str) -> str:
    """``text`` with every marked table made anew; ``ValueError`` for a name that is not known.

    A machine is named in full where it is another than that of the table before.
    """
    known, before = machines(), ""

    def made(name: str) -> str:
        nonlocal before
        content = TABLES[name]()
        here = [m for m in known if m in content]
        if here == [before]:
            return content.replace(before, "the same machine")
        if here:
            before = here[0] if len(here) == 1 else ""
        return content

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"README.md marks an unknown table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n\n{made(name)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def factors() -> tuple[Path, dict, Callable[[Path, dict], None]]:
    """Path, figures and drawing of what ``auto`` does pair by pair, beside YaRN and DPRoPE."""
    plans = [
        rope_dist.plan("llama2-7b", target_length=length, strategy=strategy)
        for length in (8192, 16384)
        for strategy in ("yarn", "dprope", "auto")
    ]
    # Six decimals: another CPU's pow may differ in the last of a double.
    shown = [[p.strategy, p.target_length, [round(f, 6) for f in p.factors]] for p in plans]
    return (
        PLOTS / "factors.svg",
        {"cases": shown},
        lambda path, record: plot_plans(plans, path, digest(record)),
    )


def pictures() -> list[tuple]:
    """Path and record of every picture that the results have."""
    found = []
    for question in TITLES:
        for device in DEVICES:
            if (RESULTS / f"{question}-{device}.json").exists():
                record = load(f"{question}-{device}.json")
                if path := plot_path(question, device, record):
                    found.append((path, record))
    return found


def main() -> int:
    """Rewrite or check; the exit status (1: something is out of date, 2: a result that is needed is not there)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail if something is out of date"
    )
    arguments = parser.parse_args()
    try:
        out_of_date = renew(check=arguments.check)
    except ValueError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    if arguments.check and out_of_date:
        names = ", ".join(str(path.relative_to(ROOT)) for path in out_of_date)
        print(f"{names}: not what benchmarks/results says: python -m benchmarks.report", file=sys.stderr)
        return 1
    return 0


def renew(*, check: bool) -> list[Path]:
    """What was not as the results say, and is now unless ``check``; ``ValueError`` where a result is not there."""
    out_of_date = []
    for path, record, make in (factors(), *((*picture, draw) for picture in pictures())):
        if not plot_is_current(path, record):
            out_of_date.append(path)
            if not check:
                path.parent.mkdir(exist_ok=True)
                make(path, record)
    for path, make in ((ROOT / "README.md", fill), (roofline.PAGE, lambda _: roofline.page())):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        after = make(before)
        if before != after:
            out_of_date.append(path)
            if not check:
                write_text(path, after)
    return out_of_date


if __name__ == "__main__":
    raise SystemExit(main())
