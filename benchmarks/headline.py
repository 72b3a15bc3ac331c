"""What README.md says in numbers: its sentences, narrow tables and single values, all from results."""

import math
import re
from pathlib import Path
from typing import Any

from rope_dist.evaluation.paired import percent

from . import results
from .benchmark import figure, find, machine_of
from .figures import dynamic
from .quality import after_training_summary
from .quality.growth import GROWN
from .quality.readings import Readings, load, path_of, readings, trained_length
from .quality.summary import KINDS as MODELS_READ
from .quality.summary import WINDOW_KINDS, lead
from .results import DEVICES, RESULTS, ROOT
from .tables import markdown

AGAINST, AGAINST_NAME = "yarn", "YaRN's"
SCALES = (1.5, 2, 4)
ROWS = {
    GROWN: "`auto`, dynamic (default of `enable`)",
    "auto": "`auto`, static (default of exports)",
    "auto-yarn": "`auto-yarn`",
    "ntk": "`ntk`",
    "dprope": "`dprope`",
    "stock": "no extension",
}
"""Label -> its row in the README, in this order."""
SPEEDS = (
    ("RoPE", "rotary", "Llama-3-8B, 8k, bf16"),
    ("RMS norm + RoPE", "norm_rotary", "Qwen3-8B, 8k, bf16"),
    ("projection + RoPE, with backward", "projection", "TinyLlama-1.1B, 8k, bf16, forward + backward"),
    ("attention without its matrix products", "attention_rest", "Qwen3-0.6B, 8k, bf16"),
    ("correction of cached keys", "rerotate", "Llama-3-8B, 8k, bf16"),
    ("projection + RoPE, one token", "decode", "Llama-3-8B, 1 token, bf16"),
)
"""What, and which benchmark and case it is."""
OURS = ("rope_dist, in place", "rope_dist.enable", "rope_dist")
"""What `enable()` runs, the first of these that was measured."""
MODELS = ROOT / "docs" / "models.md"
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "phi3")
ENGINES = ("vLLM", "SGLang", "mlx-lm")
OPERATORS = (
    ("`rotary`, `rotary_at`", "rotary", "yes"),
    ("`norm_rotary`, `norm_rotary_at`", "norm_rotary", "yes"),
    ("`qkv_rotary`, `qkv_norm_rotary`", "projection", "yes"),
    ("`decode_rotary`", "decode", "no"),
    ("`rotary_write_cache`", "cache_write", "no"),
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
    """A difference of losses as one of perplexities, in words that are true of it."""
    change, margin = 100 * math.expm1(mean), 100 * math.exp(mean) * error
    if not abs(mean) > error:
        return f"within one standard error of {other} ({percent(mean, error)})"
    return f"{abs(change):.1f} ± {margin:.1f} % {'lower' if mean < 0 else 'higher'} than {other}"


def claim(folder: Path) -> tuple[str, str]:
    """What the package does, with its numbers and their errors: by the dynamic plan where it was measured."""
    record = load(folder, "perplexity")
    parts, trained, labels = [], trained_length(record), set()
    for scale in (4, 2):
        found, texts = against_yarn(folder, scale)
        label = GROWN if GROWN in found.losses else "auto"
        if texts and label in found.losses:
            both = found.both(label, AGAINST)
            mean, error = found.difference(label, AGAINST, both, *found.past)
            count = f"{len(both)} text{'s' * (len(both) != 1)}"
            parts.append(f"{compared(mean, error, AGAINST_NAME)} at {scale}x ({count})")
            labels.add(label)
    which = "the default dynamic plan" if labels == {GROWN} else "the default strategy"
    unchanged = f" Up to {trained} tokens it is the trained model." if labels == {GROWN} else ""
    text = (
        f"**Perplexity past the trained length, without training, is {', '.join(parts)}**: {which} beside YaRN "
        f"for the target length, SmolLM2-135M, trained to {trained} tokens, on texts that nothing was tuned on; ± is "
        f"one standard error.{unchanged}"
    )
    row, _ = _row("rotary", SPEEDS[0][2], "cpu")
    if row:
        text += (
            f" RoPE of a layer ({row['case']}) runs **{1 / row['ratio']:.0f} times as fast as Hugging Face's** on a "
            "CPU."
        )
    return text, ""


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
    rows = results.timed(name, device, case)
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
            rows.append(
                [f"{title}: {row['case'].partition(', forward')[0]}", *times, f"{1 / row['ratio']:.1f}x"]
            )
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
        for device, tested in (("cpu", "tested"), ("cuda", "tested in Triton's interpreter")):
            timed = any("seconds" in row for row in results.of(benchmark, device))
            cells.append("tested, timed" if timed else tested)
        rows.append([names, *cells, gradients])
    return markdown(rows, ["operator of `rope_dist.ops`", "CPU (C++)", "GPU (Triton)", "gradients"]), ""


def gpu() -> str:
    """Whether a GPU was measured."""
    rows = [row for row in results.read("cuda") if "seconds" in row]
    if not rows:
        return "No GPU has run or timed them yet."
    return f"GPU timings are of: {'; '.join(dict.fromkeys(map(machine_of, rows)))}."


def quality_limits(folder: Path) -> str:
    """What the study of strategies has not measured."""
    count = sum(path_of(folder, kind).exists() for kind in MODELS_READ)
    models = f"{count} small model{'s' * (count != 1)}"
    rest = (
        "; after training on small models alone."
        if path_of(folder, "after_training").exists()
        else "; training after an extension is not measured yet."
    )
    return f"Quality is measured on {models} without training{rest}"


def model_rows() -> list[list[str]]:
    """The table of docs/models.md, which `python -m tools.models_page` writes: cells of its header and of each type."""
    text = MODELS.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    rows = [rows[0], *(row for row in rows if re.fullmatch("`[^`]+`", row[0]))] if rows else []
    if len(rows) < 2:
        raise ValueError("docs/models.md has no table of model types: python -m tools.models_page")
    return rows


def models() -> tuple[str, str]:
    """Well-known model types: what `enable()` does, and which engines read an extension; equal rows are one."""
    heads, *rows = model_rows()
    shown = [heads.index(head) for head in ("enable()", "dynamic")]
    shown += [i for i, head in enumerate(heads) if head.startswith(ENGINES)]
    of = {row[0].strip("`"): tuple(row[i] or "no" for i in shown) for row in rows}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in MODEL_TYPES:
        groups.setdefault(of[name], []).append(f"`{name}`")
    lines = [[", ".join(names), *cells] for cells, names in groups.items()]
    return markdown(lines, ["model type", *(f"{heads[i]}" for i in shown)], text=len(shown) + 1), ""


def model_types() -> dict[str, str]:
    """How many model types there are and can be enabled, and the version of transformers."""
    paths = [row[1] for row in model_rows()[1:]]
    version = re.search(r"model types of transformers\s+(\d+\.\d+)", MODELS.read_text(encoding="utf-8"))
    known = {"model-types": len(paths), "enabled-types": sum(path != "refused" for path in paths)}
    if not version:
        raise ValueError("docs/models.md does not say of which transformers: python -m tools.models_page")
    return {**{name: str(n) for name, n in known.items()}, "transformers": version[1]}


KINDS = (*WINDOW_KINDS, "tuning", "tuning_small")


def value(name: str, folder: Path = RESULTS) -> str:
    """One value of a sentence.

    Args:
        name: ``KIND/SCALE/LABEL/AGAINST``, a difference in perplexity past the trained length (below it with a fifth
            part ``below``), spaces of labels written as ``_``; ``after_training/SCALE/LABEL/AGAINST/STEP``, the same
            after so many steps of training; or a name of :func:`model_types`.

    Raises:
        ValueError: no such value.
    """
    kind, *parts = name.split("/")
    if kind in KINDS and len(parts) in (3, 4):
        record = load(folder, kind)
        scale, label, against, *where = parts
        # A mark has no spaces; settings have underscores of their own.
        label, against = (one if ":" in one else one.replace("_", " ") for one in (label, against))
        found = readings(record, int(float(scale) * trained_length(record)))
        both = found.both(label, against)
        if not both:
            raise ValueError(f"no text was read by both {label!r} and {against!r} at {scale}x ({kind})")
        span = found.below if where == ["below"] else found.past
        return percent(*found.difference(label, against, both, *span))
    if kind == after_training_summary.KIND and len(parts) == 4:
        return after_training_summary.value(folder, *parts)
    types = {**model_types(), "gpu": gpu(), "quality-limits": quality_limits(folder), "lead": lead(folder)}
    if name not in types:
        raise ValueError(
            f"a page marks an unknown value {name!r}; known: {', '.join(types)}, KIND/SCALE/LABEL/AGAINST"
        )
    return types[name]
