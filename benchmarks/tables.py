"""Markdown tables and pictures of one result file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from rope_dist.plots import Curve, plot_curves
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


def machine(record: dict[str, Any]) -> str:
    """The machine in a few words."""
    m = record["machine"]
    threads = f"{m['threads']} thread{'' if m['threads'] == '1' else 's'}"
    where = m["gpu"] if record.get("device") == "cuda" else f"{m['processor']}, {threads}"
    triton = f", Triton {m['triton']}" if record.get("device") == "cuda" else ""
    return f"{where}, torch {m['torch']}, transformers {m['transformers']}{triton}"


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
    """A row a case, a column a provider that was timed; medians."""
    cases, unit = record["cases"], record["unit"]
    kinds: dict[str, str] = {}
    for case in cases:
        for name, result in case["results"].items():
            if "seconds" in result:
                kinds.setdefault(name, result["kind"])
    order = {"stock": 0, "ours": 1, "peer": 2, "limit": 3}
    names = sorted(kinds, key=lambda name: order[kinds[name]])
    compared = [name for name in COMPARED[record["question"]] if name in kinds]
    whole = unit == "tokens/s"
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
        if whole:
            row += [_peak(results.get(name, {})) for name in names if kinds[name] in ("stock", "ours")]
        rows.append(row)
    headers = ["", *(f"{name} (limit)" if kinds[name] == "limit" else name for name in names)]
    headers[1:2] = [f"{headers[1]}, {unit}"] if len(headers) > 1 else []
    headers += [f"stock's time / {name}" for name in compared]
    headers += [f"limit's time / {name}" for name in compared[-1:]]
    if whole:
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
        f"`{record['command']}` at {record['commit'] or 'no commit'}: {machine(record)}. Medians of "
        f"{min(s['rounds'] for s in timed)} to {max(s['rounds'] for s in timed)} interleaved rounds; the 20th and "
        f"80th percentile of a half of them are within {apart[len(apart) // 2]:.0%} of the median."
        if timed
        else f"`{record['command']}`: nothing could be timed."
    )
    absent: dict[str, str] = {}
    for case in record["cases"]:
        for name, result in case["results"].items():
            for reason in REASONS:
                if reason in result:
                    absent.setdefault(name, result[reason])
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


def digest(record: dict[str, Any]) -> str:
    """What a picture was made from, so that one of other figures is found."""
    return hashlib.sha256(json.dumps(record["cases"], sort_keys=True).encode()).hexdigest()[:16]


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
            Curve(name, *list(zip(*points, strict=True))[:4], points[0][4]) for name, points in curves.items()
        ]
        for title, curves in found.items()
        if any(len(points) > 1 for points in curves.values())
    }


def plot_path(question: str, device: str, record: dict[str, Any]) -> Path | None:
    """Where the picture of that record is, or None where it has nothing to draw."""
    return PLOTS / f"{question}-{device}.svg" if panels(record) else None


def plot_is_current(path: Path, record: dict[str, Any]) -> bool:
    """Whether the picture was made from these figures."""
    return path.exists() and digest(record) in path.read_text(encoding="utf-8")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Write the picture of a record."""
    plot_curves(panels(record), "tokens", record["unit"], path, note=digest(record))
