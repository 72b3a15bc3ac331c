"""Markdown tables and pictures of one result file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rope_dist.plots import Curve, mixed_with_white, plot_curves
from rope_dist.timing import three_digits

from .sources import RESULTS, ROOT, changed

PLOTS = ROOT / "benchmarks" / "plots"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
TITLES = {
    "rotary": "Rotary alone",
    "projection": "Projection and rotary",
    "decode": "Decoding: projection and rotary of a few tokens",
    "attention_block": "LLaMA's attention block",
    "model_prefill": "Prefill of a whole model",
    "model_decode": "Decoding with a whole model",
    "model_train_step": "A training step",
    "planning": "Planning",
}
COMPARED = {
    "rotary": ("rope_dist, new tensors", "rope_dist, in place"),
    "projection": ("rope_dist",),
    "decode": ("rope_dist",),
    "attention_block": ("rope_dist.enable, sdpa",),
    "model_prefill": ("rope_dist.enable",),
    "model_decode": ("rope_dist.enable",),
    "model_train_step": ("rope_dist.enable",),
    "planning": (),
}
"""What the last columns of a table compare stock with."""
REASONS = ("skipped", "refused", "failed")


def load(name: str, folder: Path | None = None) -> dict[str, Any]:
    """A result file; by default of ``benchmarks/results``."""
    return json.loads(((folder or RESULTS) / name).read_text(encoding="utf-8"))


def markdown(rows: list[list[str]], headers: list[str], text: int = 1) -> str:
    """A table whose first ``text`` columns are text."""
    align = (*("left",) * text, *("right",) * (len(headers) - text))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def hardware(record: dict[str, Any]) -> str:
    """The machine and its versions in a few words."""
    m, gpu = record["machine"], record.get("device") == "cuda"
    versions = f"torch {m['torch']}, transformers {m['transformers']}" + (
        f", Triton {m['triton']}" if gpu else ""
    )
    return f"{m['gpu'] if gpu else m['processor']}, {versions}"


def machine(record: dict[str, Any]) -> str:
    """:func:`hardware`, on a CPU with the number of threads."""
    threads = record["machine"]["threads"]
    on = "" if record.get("device") == "cuda" else f"{threads} thread{'' if threads == '1' else 's'} on "
    return on + hardware(record)


def figures(question: str, device: str) -> str:
    """The section of one question on one kind of device; says so where nothing is measured."""
    path = RESULTS / f"{question}-{device}.json"
    if not path.exists():
        return f"No figure: this has not been measured on a {DEVICES[device]} yet."
    record = load(path.name)
    parts = [case_table(record)]
    if picture := plot_path(question, device, record):
        alt = f"{TITLES[question]} on a {DEVICES[device]}"
        parts.append(f"![{alt}]({picture.relative_to(ROOT).as_posix()})")
    parts.append(footnote(record))
    return "\n\n".join(parts)


def case_table(record: dict[str, Any]) -> str:
    """A row a case, a column a provider that was timed: medians, times as fast as stock, and how near to the limit."""
    cases, unit = record["cases"], record["unit"]
    kinds: dict[str, str] = {}
    for case in cases:
        for name, result in case["results"].items():
            if "seconds" in result:
                kinds.setdefault(name, result["kind"])
    order = {"stock": 0, "ours": 1, "peer": 2, "limit": 3}
    names = sorted(kinds, key=lambda name: order[kinds[name]])
    compared = [name for name in COMPARED[record["question"]] if name in kinds]
    # On a CPU the process has the memory of a small case already, and its peak says nothing.
    peaks = unit == "tokens/s" and record["device"] == "cuda"
    rows = []
    for case in sorted(cases, key=_place):
        results = case["results"]
        row = [case["name"]]
        for name in names:
            row.append(_median(results.get(name, {}), unit, case.get("tokens")))
        for name in compared:
            share = results.get(name, {}).get("to stock")
            row.append(f"{1 / share:.2f}" if share else "")
        for name in compared[-1:]:
            share = results.get(name, {}).get("limit share")
            row.append(f"{share:.2f}" if share else "")
        if peaks:
            row += [_peak(results.get(name, {})) for name in names if kinds[name] in ("stock", "ours")]
        rows.append(row)
    headers = ["", *(f"{name} (limit)" if kinds[name] == "limit" else name for name in names)]
    headers[1:2] = [f"{headers[1]}, {unit}"] if len(headers) > 1 else []
    headers += [f"speedup, {name}" for name in compared]
    headers += [f"share of the limit, {name}" for name in compared[-1:]]
    if peaks:
        headers += [f"peak MiB, {name}" for name in names if kinds[name] in ("stock", "ours")]
    return markdown(rows, headers)


def _place(case: dict) -> tuple:
    return (case.get("model", ""), case.get("dtype", ""), case.get("pass", ""), case.get("tokens", 0))


def _median(result: dict, unit: str, tokens: int | None) -> str:
    if "seconds" not in result:
        return ""
    seconds = result["seconds"]["p50"]
    return three_digits(tokens / seconds if unit == "tokens/s" else seconds * 1e3)


def _peak(result: dict) -> str:
    peak = result.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**20:.0f}"


def footnote(record: dict[str, Any]) -> str:
    """Command, machine, how far rounds were apart, who did not take part; and whether the code has changed."""
    timed = [r["seconds"] for case in record["cases"] for r in case["results"].values() if "seconds" in r]
    apart = sorted((s["p80"] - s["p20"]) / s["p50"] for s in timed)
    text = (
        f"`{record['command']}` at {record['commit'] or 'no commit'}; {machine(record)}. Medians of "
        f"{min(s['rounds'] for s in timed)} to {max(s['rounds'] for s in timed)} interleaved rounds, median spread "
        f"(p20-p80) {apart[len(apart) // 2]:.0%}."
        if timed
        else f"`{record['command']}`: nothing could be timed."
    )
    absent: dict[str, str] = {}
    versions: dict[str, str] = {}
    for case in record["cases"]:
        for name, result in case["results"].items():
            if "seconds" in result and "package" in result:
                kernel = f" ({result['implementation']})" if "implementation" in result else ""
                versions.setdefault(name, result["package"] + kernel)
            for reason in REASONS:
                if reason in result:
                    absent.setdefault(name, result[reason])
    if versions:
        text += f" Packages: {', '.join(f'{name}: {package}' for name, package in versions.items())}."
    if absent:
        reasons: dict[str, list[str]] = {}
        for name, reason in absent.items():
            reasons.setdefault(reason, []).append(name)
        text += " Not timed: " + "; ".join(f"{', '.join(n)} ({r})" for r, n in reasons.items()) + "."
    if record["left_out"]:
        text += f" Left out for want of time or memory: {', '.join(c['name'] for c in record['left_out'])}."
    if record["quick"]:
        text += " **A quick run, no measurement.**"
    return text + stale(record)


def stale(record: dict[str, Any]) -> str:
    """A mark where the measured code is not the code of this tree."""
    files = changed(record)
    if not files:
        return ""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f" **Older than the code: {', '.join(f'`{f}`' for f in files[:3])}{more} changed since.**"


DRAWING = 2
"""Of pictures; another one makes those that are there out of date."""


def digest(record: dict[str, Any]) -> str:
    """What a picture was made from, so that one of other figures is found."""
    made_from = [DRAWING, record["cases"], record.get("machine")]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def panels(record: dict[str, Any]) -> dict[str, list[Curve]]:
    """Time or speed against length, a panel for every model, type and pass with two lengths or more."""
    found: dict[str, dict[str, list]] = {}
    unit = record["unit"]
    for case in sorted(record["cases"], key=_place):
        title = ", ".join(str(case[key]) for key in ("model", "dtype", "pass") if key in case)
        for name, result in case["results"].items():
            if "seconds" not in result:
                continue
            ends = [
                case["tokens"] / result["seconds"][p] if unit == "tokens/s" else result["seconds"][p] * 1e3
                for p in ("p50", "p20", "p80")
            ]
            points = found.setdefault(title, {}).setdefault(name, [])
            points.append((case["tokens"], *ends, result["kind"] == "limit"))
    return {
        title: [
            Curve(
                name + " (limit)" * points[0][4],
                *list(zip(*points, strict=True))[:4],
                points[0][4],
                *style(name),
            )
            for name, points in curves.items()
        ]
        for title, curves in found.items()
        if any(len(points) > 1 for points in curves.values())
    }


COLOURS = {
    "rope_dist": "#1f77b4",
    "Hugging Face": "#d62728",
    "torch.compile": "#ff7f0e",
    "Liger": "#2ca02c",
    "flash-attn": "#9467bd",
    "FlashInfer": "#8c564b",
    "quack": "#e377c2",
    "vLLM": "#bcbd22",
    "Unsloth": "#17becf",
    # Planning: the strategies.
    "two candidates": "#1f77b4",
    "four candidates": "#6baed6",
    "six candidates": "#9ecae1",
    "two candidates, float64": "#08519c",
    "yarn": "#2ca02c",
    "auto": "#d62728",
    "refined": "#9467bd",
}
"""The same implementation has the same colour in every picture."""
FORMS = {
    "in place, no table": ("s", 0.35),
    "new tensors": ("^", 0.55),
    "native library": ("D", 0.2),
    "eager": ("s", 0.4),
    "flex_attention": ("^", 0.2),
    "flash_attention_2": ("D", 0.3),
    "flash-attn-4": ("v", 0.55),
    "separate": ("s", 0.4),
    "pointers": ("^", 0.2),
    "descriptors": ("D", 0.3),
    "decode": ("v", 0.5),
    "with the cache write": ("P", 0.6),
    "torch.compile": ("s", 0.4),
}
"""Of one implementation the variants: marker, and how far its colour is mixed with white."""


def style(name: str) -> tuple[str | None, str]:
    """Colour (None: any) and marker of an implementation."""
    if name in COLOURS:
        return COLOURS[name], "o"
    base = next((known for known in COLOURS if name.startswith(known)), None)
    rest = name[len(base) :] if base else ""
    if name.startswith("torch.compile of"):  # of our model
        base, rest = "rope_dist", "torch.compile"
    marker, white = next((form for key, form in FORMS.items() if rest.endswith(key)), ("o", 0.0))
    return base and mixed_with_white(COLOURS[base], white), marker


def plot_path(question: str, device: str, record: dict[str, Any]) -> Path | None:
    """Where the picture of that record is, or None where it has nothing to draw."""
    return PLOTS / f"{question}-{device}.svg" if panels(record) else None


def plot_is_current(path: Path, record: dict[str, Any]) -> bool:
    """Whether the picture was made from these figures."""
    return path.exists() and digest(record) in path.read_text(encoding="utf-8")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Write the picture of a record."""
    better = "higher" if record["unit"] == "tokens/s" else "lower"
    plot_curves(
        panels(record),
        "tokens",
        f"median, {record['unit']} ({better} is better)",
        path,
        title=f"{TITLES[record['question']]}\n{machine(record)}",
        note=digest(record),
    )
