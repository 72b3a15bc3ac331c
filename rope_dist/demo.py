"""The main job on real input: Table 3, then a real model reading past its trained length."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from . import ops
from .comparison import table_3
from .files import write_text
from .plots import plot_perplexity
from .timing import machine, sample, spread, timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .evaluation import Reading

STRATEGIES = ("stock", "pi", "yarn", "dprope", "auto")
BUCKET = 2048


def run(
    *,
    model_name: str = "smollm2-135m",
    text: str = "python",
    tokens: int = 12288,
    factor: float = 2.0,
    output: str | Path = "rope-dist-demo",
    device: torch.device | str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Print the paper's Table 3, read a text with several strategies, time the rotary step.

    Args:
        model_name: as in :func:`rope_dist.evaluation.load_model`.
        text: a corpus or a file, as in :func:`rope_dist.evaluation.load_text`.
        tokens: how much of the text is read, from its beginning.
        factor: how far the model's trained length is extended.
        output: folder for ``perplexity.png`` and ``demo.json``, made if missing.
        device: where the model reads, by default a GPU if there is one.
        say: where the tables go.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ValueError: no such text or model, or a text shorter than ``tokens``.
        MissingPackageError: the model's package is not installed.
    """
    from transformers.utils import logging as transformers_logging

    from .evaluation import PACKAGED_MODELS, load_model, load_text, read_with_strategies

    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    started = time.perf_counter()
    title, content = load_text(text)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    here = machine()
    say(", ".join(f"{key} {value}" for key, value in here.items()))
    say("\n1. Disturbance of LLaMA2's rotary angles, beside Table 3 of Wu et al. (EMNLP 2024)\n")
    say(table_3())

    packaged = PACKAGED_MODELS.get(model_name)
    say(f"\n2. {packaged.title if packaged else model_name}")
    transformers_logging.set_verbosity_error()  # its loading notes would stand between the tables
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer = load_model(model_name, device)
    ids = tokenizer(content, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise ValueError(
            f"{title} has {ids.shape[1]} tokens, fewer than the {tokens} to be read: lower --tokens"
        )
    ids = ids[:, :tokens]
    trained = model.config.max_position_embeddings
    target = round(trained * factor)
    say(f"   reads {tokens} tokens of {title}, extended from {trained} to {target} without training\n")
    readings: list[Reading] = []
    began = time.perf_counter()
    for reading in read_with_strategies(model, ids, STRATEGIES, target, progress=True):
        readings.append(reading)
        say(f"   {reading.label}: perplexity {reading.perplexity:.2f} ({time.perf_counter() - began:.0f} s)")
        began = time.perf_counter()
    say("\n" + perplexity_table(readings, trained) + "\n")
    for reading in readings:
        if reading.plan:
            say(f"   {reading.plan!r}")
    picture = output / "perplexity.png"
    curves = {reading.label: reading.buckets(BUCKET) for reading in readings}
    plot_perplexity(curves, trained, f"{title}: perplexity by position", picture)

    dtype = str(model.dtype).removeprefix("torch.")
    say(f"\n3. The rotary step of one layer, {tokens} tokens, {dtype}, on {device}\n")
    step = rotary_step(model, tokens)
    milliseconds = {name: f"{seconds * 1e3:.2f} ms" for name, seconds in step.items()}
    say(tabulate(milliseconds.items(), ("median of 10, interleaved", "time"), colalign=("left", "right")))
    say(
        f"\n   this package's step takes {step['rope_dist'] / step['stock']:.2f} of stock's time on this machine"
    )

    result = {
        "machine": here,
        "model": model_name,
        "text": title,
        "tokens": tokens,
        "trained_length": trained,
        "target_length": target,
        "readings": [_without_paths(reading.to_dict(BUCKET), model_name) for reading in readings],
        "rotary_step_seconds": step,
    }
    write_text(output / "demo.json", json.dumps(result, indent=2) + "\n")
    say(f"\nwrote {picture} and {output / 'demo.json'} ({time.perf_counter() - started:.0f} s)")
    return result


def _without_paths(reading: dict[str, Any], model_name: str) -> dict[str, Any]:
    """The reading with its plan's source by the model's name: where it lies on this machine is no result."""
    if reading["plan"]:
        reading["plan"]["source"] = model_name
    return reading


def perplexity_table(readings: list[Reading], trained_length: int) -> str:
    """Perplexity as text: a row a strategy, a column a bucket of positions; ``*`` past the trained length."""
    buckets = readings[0].buckets(BUCKET)
    headers = ["perplexity by position", "all"]
    headers += [f"{b.start}-{b.end}{'*' if b.start >= trained_length else ''}" for b in buckets]
    rows = [
        [r.label, f"{r.perplexity:.2f}", *(f"{b.perplexity:.2f}" for b in r.buckets(BUCKET))]
        for r in readings
    ]
    table = tabulate(
        rows, headers, disable_numparse=True, colalign=("left", *("right",) * (len(headers) - 1))
    )
    return f"{table}\n\n   * past the {trained_length} tokens that the model was trained on"


def rotary_step(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Median seconds of one layer's rotation, stock and ours (in place, as a model that reads does), in one run."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, options = model.config, {"dtype": model.dtype, "device": model.device}
    q = torch.randn(1, tokens, config.num_attention_heads, config.head_dim, **options)
    k = torch.randn(1, tokens, config.num_key_value_heads, config.head_dim, **options)
    position_ids = torch.arange(tokens, device=model.device)[None]
    rotary = model.model.rotary_emb
    stock_cos, stock_sin = rotary(q, position_ids)
    cos, sin = ops.cos_sin(rotary.inv_freq, position_ids, rotary.attention_scaling)
    calls = {
        "stock": lambda: apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), stock_cos, stock_sin),
        "rope_dist": lambda: ops.rotary(q, k, cos, sin, inplace=True),
    }
    for call in calls.values():
        call()
    times = sample(calls, timer(model.device), least=10, most=10)
    return {name: spread(seconds).p50 for name, seconds in times.items()}
