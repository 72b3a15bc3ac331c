"""Make the tables, numbers and plots of README.md and docs/ from ``benchmarks/results``.

    python -m benchmarks.report            rewrite them
    python -m benchmarks.report --check    fail if one is not what the results say
    python -m benchmarks.report --compare FOLDER   whether the speedups of two runs agree

No number is typed by hand. A table or sentence stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, where NAME
is a benchmark and a device (``rotary-cpu``, ``model_prefill-cuda``) or one of :func:`tables`; one value between
``<!-- value: NAME -->`` and ``<!-- end -->`` (:func:`benchmarks.headline.value`). A table is marked where the code that
it measured is not that of this tree any more.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import rope_dist
from rope_dist.files import write_text
from rope_dist.plots import plot_plans

from . import angle_error, headline, results, rollout_distance, roofline
from .benchmark import Parser, machine_of, names
from .figures import PLOTS, digest, plots_of_results
from .quality import after_training_summary, answers, growth_summary, summary
from .results import DEVICES, ROOT
from .tables import markdown, section

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

Table = Callable[[], tuple[str, str]]
"""Its text, and the machine that it was measured on (empty: none, or in the text)."""


def perplexity() -> tuple[str, str]:
    """Perplexity by position of the demonstration, as it prints it."""
    result = json.loads((results.RESULTS / "demo.json").read_text(encoding="utf-8"))
    trained, parts = result["trained_length"], result["by_position"]
    labels = [reading["label"] for reading in result["readings"]]
    below = [part for part in parts if part["end"] <= trained]
    # Of a record that has several parts there: their mean loss by tokens, of which the first token has none.
    tokens = [part["end"] - max(part["start"], 1) for part in below]
    whole = {
        label: math.exp(
            sum(n * math.log(part["perplexity"][label]) for n, part in zip(tokens, below, strict=True))
            / sum(tokens)
        )
        for label in labels
    }
    parts = [{"start": 0, "end": trained, "perplexity": whole}, *parts[len(below) :]]
    marked = [f"{p['start']}-{p['end']}{'*' if p['start'] >= trained else ''}" for p in parts]
    rows = [[label, *(f"{p['perplexity'][label]:.2f}" for p in parts)] for label in labels]
    step = result["rotary_step_seconds"]
    return (
        f"{markdown(rows, ['perplexity by position', *marked])}\n\n\\* past the {trained} tokens the model was "
        f"trained on; every extension is to {result['target_length']}, static, without training. {result['tokens']} "
        f"tokens of {result['text']}. Rotary step of a layer: {step['stock'] / step['rope_dist']:.1f} times as fast as "
        "Hugging Face's."
    ), machine_of(result["machine"])


def tables() -> dict[str, Table]:
    """By the name in the pages' marks."""
    return {
        "claim": lambda: headline.claim(results.RESULTS),
        "headline": lambda: headline.table(results.RESULTS),
        "operators": headline.operators,
        "models": headline.models,
        "angle-error": angle_error.table,
        "auto-yarn": lambda: summary.auto_yarn(results.RESULTS),
        "perplexity": perplexity,
        "quality": lambda: summary.block(results.RESULTS),
        "every-model": lambda: summary.every_model(results.RESULTS),
        "strategies": lambda: summary.strategies(results.RESULTS),
        "window": lambda: summary.windows(results.RESULTS),
        "window-needles": lambda: answers.needles(results.RESULTS),
        "passkeys": lambda: answers.passkeys(results.RESULTS),
        "longppl": lambda: summary.longppl(results.RESULTS),
        "synthetic": lambda: summary.synthetic(results.RESULTS),
        "tuning": lambda: summary.tuning(results.RESULTS),
        "after-training": lambda: after_training_summary.block(results.RESULTS),
        "growth": lambda: growth_summary.block(results.RESULTS),
        "rollout": rollout_distance.table,
        "roofline": lambda: (roofline.table(), ""),
        **{f"speed-{device}": partial(headline.speed, device) for device in DEVICES},
        **{f"{name}-{device}": partial(section, name, device) for name in names() for device in DEVICES},
    }


def fill(text: str) -> str:
    """``text`` with every marked table and value made anew (``ValueError``: one that is not known).

    A machine is named where it is another one than before.
    """
    known, before = tables(), ""

    def made(match: re.Match[str]) -> str:
        nonlocal before
        name = match["name"]
        if name not in known:
            raise ValueError(f"a page marks an unknown table {name!r}; known: {', '.join(known)}")
        content, machine = known[name]()
        if not content:  # nothing is measured yet
            return f"<!-- table: {name} -->\n\n<!-- end -->"
        if machine and machine != before:
            content, before = f"{content} Machine: {machine}.", machine
        return f"<!-- table: {name} -->\n\n{content}\n\n<!-- end -->"

    text = re.sub(r"<!-- table: (?P<name>\S+) -->.*?<!-- end -->", made, text, flags=re.DOTALL)
    return re.sub(
        r"(?P<mark><!-- value: (?P<name>\S+) -->).*?<!-- end -->",
        lambda match: f"{match['mark']}{headline.value(match['name'], results.RESULTS)}<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def plots() -> Iterator[tuple[Path, str, Callable[[Path], None]]]:
    """Path, digest of the values, and drawing of every plot."""
    asked = [(n, strategy) for n in (8192, 16384) for strategy in ("yarn", "dprope", "auto")]
    plans = [rope_dist.plan("llama2-7b", target_length=n, strategy=strategy) for n, strategy in asked]
    # Six decimals: another CPU's pow may differ in the last of a double.
    shown = digest([[p.strategy, p.target_length, [round(f, 6) for f in p.factors]] for p in plans])
    yield PLOTS / "factors.svg", shown, lambda path: plot_plans(plans, path, shown)
    yield from plots_of_results(results.RESULTS, DEVICES)


def renew(*, check: bool) -> list[Path]:
    """What was not as the results say, and is now unless ``check``; ``ValueError`` where a result is missing."""
    made = [
        (path, path.exists() and values in path.read_text(encoding="utf-8"), make)
        for path, values, make in plots()
    ]
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = fill(before)
        made.append((page, after == before, partial(write_text, text=after)))
    stale = {path: make for path, current, make in made if not current}
    for path, make in () if check else stale.items():
        path.parent.mkdir(exist_ok=True)
        make(path)
    return list(stale)


def speedups(folder: Path) -> dict[tuple[str, ...], float]:
    """Of this package's implementations over the reference, by benchmark, device, case and name."""
    return {
        (f"{row['benchmark']}-{device}", row["case"], row["implementation"]): 1 / row["ratio"]
        for device in DEVICES
        for row in results.read(device, folder)
        if row.get("kind") == "ours" and row.get("ratio")
    }


def compare(folder: Path, other: Path, within: float) -> int:
    """Print two runs' speedups; the number of those farther apart; ``ValueError`` where none is in both."""
    first, second = speedups(folder), speedups(other)
    apart = {key: abs(first[key] / second[key] - 1) for key in first if key in second}
    if not apart:
        raise ValueError(f"{folder} and {other} share no case")
    rows = [[*key, f"{first[key]:.2f}", f"{second[key]:.2f}", f"{far:.1%}"] for key, far in apart.items()]
    print(markdown(rows, ["", "case", "speedup of", "first", "second", "apart"], text=3))
    over = sum(far > within for far in apart.values())
    print(f"\n{len(apart) - over} of {len(apart)} speedups agree within {within:.0%}")
    return over


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status (1: something is out of date or apart, 2: a result that is needed is missing)."""
    parser = Parser("python -m benchmarks.report", __doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing, fail if one is out of date")
    add("--compare", type=Path, metavar="FOLDER", help="results of another run")
    add("--with", dest="other", type=Path, default=results.RESULTS, help="(default: benchmarks/results)")
    add("--within", type=float, default=0.1, help="share of the speedup (default: %(default)g)")
    parsed = parser.parse_args(arguments)
    check = parsed.check
    try:
        if parsed.compare:
            return int(compare(parsed.compare, parsed.other, parsed.within) > 0)
        out_of_date = renew(check=check)
    except ValueError as error:
        parser.error(str(error))
    if check and out_of_date:
        paths = ", ".join(str(path.relative_to(ROOT)) for path in out_of_date)
        print(f"{paths}: not what benchmarks/results says: python -m benchmarks.report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
