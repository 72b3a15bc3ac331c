"""The main job on real input: Table 3, then a real model reading past its trained length."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from . import ops
from .comparison import table_3
from .defaults import DEMO_STRATEGIES
from .files import write_text
from .machine import describe
from .planning import pretrained_rope
from .plots import plot_perplexity
from .timing import sample, spread, timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .evaluation import Reading

LENGTHS = (1.5, 1.375)
"""Multiples of the trained length that are read, the first that fits into the time. Below the smaller one a model
still reads well with its own frequencies (SmolLM2 fails from 1.25 on), so that a table would show nothing."""
SHARE = 0.9
"""Of the time left that readings are planned to take: a machine may get slower while they run."""
BUCKET = 1024
"""Positions of one point of the picture and of one entry of ``demo.json``."""


def run(
    *,
    model_name: str = "smollm2-135m",
    text: str = "python",
    tokens: int | None = None,
    strategies: Sequence[str] | None = None,
    factor: float = 2.0,
    minutes: float = 4.0,
    output: str | Path = "rope-dist-demo",
    device: torch.device | str | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Print the paper's Table 3, read a text with several strategies, time the rotary step.

    Args:
        model_name: as in :func:`rope_dist.evaluation.load_model`.
        text: a corpus or a file, as in :func:`rope_dist.evaluation.load_text`.
        tokens: how much of the text is read, from its beginning. None: 1.5 or 1.375 times the trained length, by what
            fits into ``minutes``; the speed of this machine is measured first.
        strategies: what it is read with (``stock`` and names of strategies). None:
            :data:`rope_dist.defaults.DEMO_STRATEGIES`, the last of which is left out where it does not fit into
            ``minutes``.
        factor: how far the model's trained length is extended.
        minutes: about how long all of it may take. What was asked for is read even if it takes longer; a line says so.
        output: folder for ``perplexity.png`` and ``demo.json``, made if missing.
        device: where the model reads, by default a GPU if there is one.
        dtype: as in :func:`rope_dist.evaluation.load_model`.
        say: where the tables go.

    Returns:
        What ``demo.json`` holds.

    Raises:
        ValueError: no such text or model, a text shorter than ``tokens``, or ``minutes`` not positive.
        MissingPackageError: the model's package is not installed.
    """
    started = time.perf_counter()
    if tokens is not None and tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes must be a positive number, got {minutes}")
    here = describe()
    say(", ".join(f"{key} {value}" for key, value in here.items()))
    say("\n1. Disturbance of LLaMA2's rotary angles, beside Table 3 of Wu et al. (EMNLP 2024)\n")
    say(table_3())

    from transformers.utils import logging as transformers_logging

    from .evaluation import PACKAGED_MODELS, load_model, load_text
    from .evaluation.progress import duration

    title, content = load_text(text)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    packaged = PACKAGED_MODELS.get(model_name)
    say(f"\n2. {packaged.title if packaged else model_name}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    transformers_logging.set_verbosity_error()  # its notes would stand between the tables
    model, tokenizer = load_model(model_name, device, dtype)
    trained = pretrained_rope(model.config)[0].length
    target = round(trained * factor)
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids
    left = 60 * minutes - (time.perf_counter() - started)
    asked = tokens is not None
    lengths = [tokens] if asked else sorted({round(trained * min(x, factor)) for x in LENGTHS}, reverse=True)
    if ids.shape[1] < lengths[-1]:
        raise ValueError(
            f"{title} has {ids.shape[1]} tokens, fewer than the {lengths[-1]} to be read: give a longer text or "
            "--tokens"
        )
    lengths = [length for length in lengths if length <= ids.shape[1]]
    tokens, chosen, seconds = _choose(model, lengths, strategies, left)
    ids = ids[:, :tokens]
    say(
        f"   reads {tokens} tokens of {title}, extended from {trained} to {target} without training;\n"
        f"   {len(chosen)} readings of about {duration(seconds)} each\n"
    )
    if seconds * len(chosen) > left:
        why = "as asked for" if asked or strategies else "less would show nothing"
        say(f"   (more than the {minutes:g} min of --minutes: {why})\n")
    readings = _read(model, ids, chosen, target, say, None if strategies else started + 60 * minutes)
    say("\n" + perplexity_table(readings, trained) + "\n")
    if strategies is None and len(readings) < len(DEMO_STRATEGIES):
        left_out = ", ".join(DEMO_STRATEGIES[len(readings) :])
        say(f"   left out for lack of time: {left_out}; --strategies {' '.join(DEMO_STRATEGIES)} reads all\n")
    for reading in readings:
        if reading.plan:
            say(f"   {reading.plan!r}")
    picture = output / "perplexity.png"
    curves = {reading.label: reading.buckets(BUCKET) for reading in readings}
    plot_perplexity(curves, trained, f"{title}: perplexity by position", picture)

    name = str(model.dtype).removeprefix("torch.")
    say(f"\n3. The rotary step of one layer, {tokens} tokens, {name}, on {device}\n")
    step = rotary_step(model, tokens)
    milliseconds = {name: f"{seconds * 1e3:.2f} ms" for name, seconds in step.items()}
    say(tabulate(milliseconds.items(), ("median of 10, interleaved", "time"), colalign=("left", "right")))
    say(f"\n   this package's step is {step['stock'] / step['rope_dist']:.1f} times as fast as stock's here")

    result = {
        "machine": here,
        "model": model_name,
        "dtype": name,
        "text": title,
        "tokens": tokens,
        "trained_length": trained,
        "target_length": target,
        "readings": [_without_paths(reading.to_dict(BUCKET), model_name) for reading in readings],
        "by_position": table_rows(readings, trained),
        "rotary_step_seconds": step,
    }
    write_text(output / "demo.json", json.dumps(result, indent=2) + "\n")
    say(f"\nwrote {picture} and {output / 'demo.json'} ({time.perf_counter() - started:.0f} s)")
    return result


def _choose(
    model: PreTrainedModel, lengths: Sequence[int], strategies: Sequence[str] | None, left: float
) -> tuple[int, tuple[str, ...], float]:
    """How many tokens, with what, and the seconds that one reading takes: as much as fits into ``left`` seconds."""
    from .evaluation.progress import measure_pace

    began = time.perf_counter()
    pace = measure_pace(model)
    left = SHARE * (left - (time.perf_counter() - began))
    counts = [len(strategies)] if strategies else [len(DEMO_STRATEGIES), len(DEMO_STRATEGIES) - 1]
    choices = [(count, tokens) for count in counts for tokens in lengths]
    count, tokens = next((c for c in choices if c[0] * pace.seconds(c[1]) <= left), choices[-1])
    return tokens, tuple(strategies or DEMO_STRATEGIES[:count]), pace.seconds(tokens)


def _read(
    model: PreTrainedModel,
    ids: torch.Tensor,
    strategies: Sequence[str],
    target: int,
    say: Callable[[str], None],
    end: float | None,
) -> list[Reading]:
    """The readings, each announced when it is done. With an ``end``, the third and later ones have to fit before it."""
    from .evaluation import read_with_strategies

    readings: list[Reading] = []
    began = time.perf_counter()
    for reading in read_with_strategies(model, ids, strategies, target, progress=True):
        now = time.perf_counter()
        readings.append(reading)
        say(f"   {reading.label}: perplexity {reading.perplexity:.2f} ({now - began:.0f} s)")
        if end is not None and 1 < len(readings) < len(strategies) and now + (now - began) > end:
            break
        began = time.perf_counter()
    return readings


def _without_paths(reading: dict[str, Any], model_name: str) -> dict[str, Any]:
    """The reading with its plan's source by the model's name: where it lies on this machine is no result."""
    if reading["plan"]:
        reading["plan"]["source"] = model_name
    return reading


def table_rows(readings: Sequence[Reading], trained_length: int) -> list[dict[str, Any]]:
    """Perplexity by position as the tables show it: two halves of the trained length, then steps of an eighth.

    Returns:
        For every part ``start``, ``end`` (positions) and ``perplexity``, a dictionary by label.
    """
    tokens = readings[0].nll.numel() + 1
    half, eighth = max(trained_length // 2, 1), max(trained_length // 8, 1)
    edges = [0, half, *range(trained_length, tokens, eighth)]
    edges = [*(e for e in edges if e < tokens - 1), tokens]
    return [
        {"start": start, "end": end, "perplexity": {r.label: r.perplexity_of(start, end) for r in readings}}
        for start, end in itertools.pairwise(edges)
    ]


def perplexity_table(readings: Sequence[Reading], trained_length: int) -> str:
    """:func:`table_rows` as text: a row a strategy, a column a part of the text; ``*`` past the trained length."""
    parts = table_rows(readings, trained_length)
    headers = ["perplexity by position"]
    headers += [f"{p['start']}-{p['end']}{'*' if p['start'] >= trained_length else ''}" for p in parts]
    rows = [[r.label, *(f"{p['perplexity'][r.label]:.2f}" for p in parts)] for r in readings]
    align = ("left", *("right",) * len(parts))
    table = tabulate(rows, headers, disable_numparse=True, colalign=align)
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
