"""What README.md says in numbers: its sentences, narrow tables and single values, all from results."""

import math
import re
from pathlib import Path
from typing import Any

from . import results
from .benchmark import figure, find, machine_of
from .figures import dynamic
from .quality.growth import GROWN
from .quality.readings import Readings, load, readings, trained_length
from .results import DEVICES, ROOT, RESULTS
from .tables import markdown
from rope_dist.evaluation.paired import percent

AGAINST = "yarn"
SCALES = (1.5, 2, 4)
ROWS = {
    GROWN: "`auto`, dynamic (default of `enable`)",
    "auto": "`auto`, static (default of exports)",
    "auto-yarn": "`auto-yarn`",
    "ntk": "`ntk`",
    "dprope": "`dprope`",
    "pi": "`pi`",
    "stock": "no extension",
}
"""Label -> its row in the README, in this order."""
SPEEDS = (
    ("RoPE", "rotary", "Llama-3-8B, 8k, bf16"),
    ("RMS norm + RoPE", "norm_rotary", "Qwen3-8B, 8k, bf16"),
    ("projection + RoPE, forward + backward", "projection", "TinyLlama-1.1B, 8k, bf16, forward + backward"),
    ("attention without its matrix products", "attention_rest", "Qwen3-0.6B, 8k, bf16"),
    ("correction of cached keys", "rerotate", "Llama-3-8B, 8k, bf16"),
    ("projection + RoPE, one token", "decode", "Llama-3-8B, 1 token, bf16"),
)
"""What, and which benchmark and case it is."""
OURS = ("rope_dist, in place", "rope_dist.enable", "rope_dist")
"""What `enable()` runs, the first of these that was measured."""
OPERATORS = (
    ("`rotary`, `rotary_at`", "rotary", "yes"),
    ("`norm_rotary`, `norm_rotary_at`", "norm_rotary", "yes"),
    ("`qkv_rotary`, `qkv_norm_rotary`", "projection", "yes"),
    ("`decode_rotary`", "decode", "no"),
    ("`rotary_write_cache`", "cache_write", "no"),
    ("`rerotate_`", "rerotate", "no"),
)
"""Operators, the benchmark that times them, and whether they have gradients."""


def against_yarn(folder: Path, scale: float) -> tuple[Readings, list[str]]:
    """Readings of SmolLM2 planned for ``scale``, the dynamic plan's with them, and the texts that YaRN has read."""
    record = load(folder, "perplexity")
    found = readings(record, int(scale * trained_length(record)))
    if grown := dynamic(folder, found):
        found.losses[GROWN] = grown
    return found, list(found.losses.get(AGAINST, {}))


def compared(mean: float, error: float, other: str) -> str:
    """A difference of losses in words that are true of it."""
    change, margin = 100 * math.expm1(mean), 100 * math.exp(mean) * error
    if abs(mean) <= error:
        return f"a perplexity within one standard error of {other} ({percent(mean, error)})"
    which = "lower" if mean < 0 else "higher"
    return f"a perplexity {abs(change):.1f} ± {margin:.1f} % {which} than {other}"


def claim(folder: Path) -> tuple[str, str]:
    """What the package is for, with its numbers and their errors."""
    record = load(folder, "perplexity")
    parts, trained = [], trained_length(record)
    for scale in (4, 2):
        found, texts = against_yarn(folder, scale)
        label = GROWN if GROWN in found.losses else "auto"
        if texts and label in found.losses:
            both = found.both(label, AGAINST)
            mean, error = found.difference(label, AGAINST, both, *found.past)
            count = f"{len(both)} text{'s' * (len(both) != 1)}"
            parts.append(f"at {scale}x {compared(mean, error, 'with YaRN')} ({count})")
    sentence = f"**{'; '.join(parts)}**"
    text = (
        f"Extended without training, SmolLM2-135M has past its {trained} trained tokens {sentence}; up to "
        f"{trained} tokens it is the trained model. On texts that nothing was tuned on; ± is one standard error."
    )
    row, reference = _row("rotary", SPEEDS[0][2], "cpu")
    if row and reference:
        text += (
            f" On a CPU the rotary embedding of a layer ({SPEEDS[0][2]}) is **{reference['seconds'] / row['seconds']:.0f} "
            "times as fast as Hugging Face's**."
        )
    return f"{text} {gpu()[0]}", ""


def table(folder: Path) -> tuple[str, str]:
    """Perplexity past the trained length against YaRN, a column a scale."""
    cells: dict[str, dict[float, str]] = {label: {} for label in ROWS}
    counts, grown, trained = {}, {}, 0
    for scale in SCALES:
        found, texts = against_yarn(folder, scale)
        trained = found.trained
        if not texts:
            continue
        counts[scale] = len(texts)
        for label in ROWS:
            both = found.both(label, AGAINST)
            # Only those that have read all texts can be compared down a column; the dynamic plan says how many.
            if both and (label == GROWN or len(both) == len(texts)):
                cells[label][scale] = percent(*found.difference(label, AGAINST, both, *found.past))
                if label == GROWN:
                    grown[scale] = len(both)
    rows = [[ROWS[label], *(own.get(scale, "") for scale in counts)] for label, own in cells.items() if own]
    heads = [f"perplexity past {trained}, against YaRN", *(f"{scale:g}x" for scale in counts)]
    note = f"Texts: {_listed(counts)}"
    if any(counts[scale] != n for scale, n in grown.items()):
        note += f" (dynamic: {_listed(grown)})"
    return f"{markdown(rows, heads)}\n\n{note}.", ""


def _listed(counts: dict[float, int]) -> str:
    return ", ".join(f"{n} at {scale:g}x" for scale, n in counts.items())


def _row(name: str, case: str, device: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What `enable()` runs in a case of a benchmark, and Hugging Face's; None: not measured."""
    rows = [row for row in results.of(name, device) if row["case"] == case and "seconds" in row]
    ours = (row for known in OURS for row in rows if row["implementation"] == known)
    return next(ours, None), next((row for row in rows if row["kind"] == "reference"), None)


def speed(device: str) -> tuple[str, str]:
    """Times of a layer's parts beside Hugging Face's."""
    rows, machine, stale = [], "", False
    for title, name, case in SPEEDS:
        row, reference = _row(name, case, device)
        if row and reference:
            unit = find(name).unit
            times = [figure(one["seconds"], unit, one.get("tokens")) + f" {unit}" for one in (reference, row)]
            rows.append([f"{title}: {case.partition(', forward')[0]}", *times, f"{1 / row['ratio']:.1f}x"])
            machine, stale = machine_of(row), stale or row["code"] != find(name).code
    if not rows:
        return f"Not measured on a {DEVICES[device]} yet.", ""
    text = markdown(rows, ["one layer, median", "Hugging Face", "rope_dist", "speedup"])
    return text + "\n\n**Older than the code.**" * stale, machine


def operators() -> tuple[str, str]:
    """Operator x device x tested or timed."""
    rows = []
    for names, benchmark, gradients in OPERATORS:
        cells = []
        for device, tested in (("cpu", "tested"), ("cuda", "compiled, interpreted")):
            timed = any("seconds" in row for row in results.of(benchmark, device))
            cells.append("tested, timed" if timed else tested)
        rows.append([names, *cells, gradients])
    return markdown(rows, ["operator of `rope_dist.ops`", "CPU (C++)", "GPU (Triton)", "gradients"]), ""


def gpu() -> tuple[str, str]:
    """Whether a GPU was measured."""
    rows = [row for row in results.read("cuda") if "seconds" in row]
    if not rows:
        return "No GPU has run or timed it yet.", ""
    return f"GPU timings are of: {'; '.join(dict.fromkeys(map(machine_of, rows)))}.", ""


def model_types() -> dict[str, str]:
    """Of docs/models.md: model types that can be enabled and the version of transformers."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    paths = re.findall(r"^\| `[^`]+` *\| ([^|]+?) *\|", text, re.MULTILINE)
    version = re.search(r"transformers (\d+\.\d+)", text)
    if not paths or not version:
        raise ValueError("docs/models.md has no table of model types: python -m tools.models_page")
    known = {"model-types": len(paths), "enabled-types": sum(path != "refused" for path in paths)}
    return {**{name: str(n) for name, n in known.items()}, "transformers": version[1]}


KINDS = ("perplexity", "tuning")


def value(name: str, folder: Path = RESULTS) -> str:
    """One value of a sentence.

    Args:
        name: ``KIND:SCALE:LABEL:AGAINST``, a difference in perplexity past the trained length (below it with a fifth
            part ``below``), spaces of labels written as ``_``; or a name of :func:`model_types`.

    Raises:
        ValueError: no such value.
    """
    kind, *parts = name.replace("_", " ").split(":")
    if kind in KINDS and len(parts) in (3, 4):
        record = load(folder, kind)
        scale, label, against, *where = parts
        found = readings(record, int(float(scale) * trained_length(record)))
        both = found.both(label, against)
        if not both:
            raise ValueError(f"no text was read by both {label!r} and {against!r} at {scale}x ({kind})")
        span = found.below if where == ["below"] else found.past
        return percent(*found.difference(label, against, both, *span))
    types = model_types()
    if name not in types:
        raise ValueError(f"a page marks an unknown value {name!r}; known: {', '.join(types)}, KIND:SCALE:LABEL:AGAINST")
    return types[name]
