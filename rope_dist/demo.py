"""The demonstration: Table 3 of the paper, then the perplexity of a real model past its trained length."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import bench
from .comparison import table_3
from .defaults import DEMO_STRATEGIES
from .files import write_text
from .machine import describe
from .planning import pretrained_rope
from .plots import plot_perplexity
from .tables import text_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation import PerplexityResult

Log = Callable[[str], None]

LENGTHS = (1.5, 1.375)
"""Lengths to evaluate, as multiples of the trained length: the first that fits into the time. SmolLM2 with its own
frequencies fails from 1.25 on, so that a shorter length would show nothing."""
SHARE = 0.9
"""Share of the remaining time that is planned for: a machine may get slower during the run."""
BUCKET = 1024
"""Positions of one point of the plot and of one entry of ``demo.json``."""


def run(  # noqa: PLR0913  (public)
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
    log: Log = print,
) -> dict[str, Any]:
    """Print the paper's Table 3, the perplexity of a text with several strategies, and the time of the rotary step.

    Args:
        model_name: as in :func:`rope_dist.evaluation.load_model`.
        text: a corpus or a file, as in :func:`rope_dist.evaluation.load_text`.
        tokens: tokens of the text, from its beginning. None: 1.5 or 1.375 times the trained length, whichever fits into
            ``minutes`` by the measured speed of the machine.
        strategies: ``stock`` and names of strategies. None: :data:`rope_dist.defaults.DEMO_STRATEGIES`, without the
            last one if it does not fit into ``minutes``.
        factor: scaling factor of the trained length.
        minutes: time limit. Explicit ``tokens`` and ``strategies`` are evaluated even if they exceed it.
        output: folder of ``perplexity.png`` and ``demo.json``, created if missing.
        device: of the model; by default a GPU if there is one.
        dtype: as in :func:`rope_dist.evaluation.load_model`.
        log: receives the output, line by line.

    Returns:
        The content of ``demo.json``.

    Raises:
        ValueError: no such text or model, a text shorter than ``tokens``, or ``minutes`` not positive.
        MissingPackageError: the model's package is not installed.
    """
    started = time.perf_counter()
    if tokens is not None and tokens < 2:
        raise ValueError(f"tokens must be at least 2, got {tokens}")
    if not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes must be a positive number, got {minutes}")
    machine = describe()
    log(", ".join(f"{key} {value}" for key, value in machine.items()))
    log("\n1. Disturbance of LLaMA2's rotary angles, beside Table 3 of Wu et al. (EMNLP 2024)\n")
    log(table_3())

    from .evaluation import load_text
    from .evaluation.progress import duration

    title, content = load_text(text)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _load(model_name, device, dtype, log)
    trained = pretrained_rope(model.config)[0].length
    target = round(trained * factor)
    ids = tokenizer(content, return_tensors="pt", verbose=False).input_ids
    lengths = _lengths(title, ids.shape[1], trained, factor, tokens)
    deadline = started + 60 * minutes
    length, chosen, seconds = _choose(model, lengths, strategies, deadline - time.perf_counter())
    log(
        f"   {length} tokens of {title}, extended from {trained} to {target} without training;\n"
        f"   {len(chosen)} variants, about {duration(seconds)} each\n"
    )
    if time.perf_counter() + seconds * len(chosen) > deadline:
        why = "as requested" if tokens is not None or strategies else "a shorter run would show nothing"
        log(f"   (more than the {minutes:g} min of --minutes: {why})\n")
    results = _evaluate(model, ids[:, :length], chosen, target, log, None if strategies else deadline)
    _print_results(results, trained, None if strategies else DEMO_STRATEGIES, log)
    plot = output / "perplexity.png"
    curves = {result.label: result.buckets(BUCKET) for result in results}
    plot_perplexity(curves, trained, f"{title}: perplexity by position", plot)

    step = _print_rotary_step(model, length, log)
    result = {
        "machine": machine,
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": title,
        "tokens": length,
        "trained_length": trained,
        "target_length": target,
        "readings": [_without_path(result.to_dict(BUCKET), model_name) for result in results],
        "by_position": table_rows(results, trained),
        "rotary_step_seconds": step,
    }
    write_text(output / "demo.json", json.dumps(result, indent=2) + "\n")
    log(f"\nwrote {plot} and {output / 'demo.json'} ({time.perf_counter() - started:.0f} s)")
    return result


def _load(
    model_name: str, device: torch.device | str | None, dtype: str | None, log: Log
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers.utils import logging as transformers_logging

    from .evaluation import load_model
    from .evaluation.models import packaged_model

    packaged = packaged_model(model_name)
    log(f"\n2. {packaged.title if packaged else model_name}")
    transformers_logging.set_verbosity_error()  # no warnings between the tables
    return load_model(model_name, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)


def _lengths(title: str, available: int, trained: int, factor: float, tokens: int | None) -> list[int]:
    """The lengths to choose from, longest first: ``tokens``, or those of :data:`LENGTHS` that the text has."""
    lengths = [tokens] if tokens else sorted({round(trained * min(x, factor)) for x in LENGTHS}, reverse=True)
    if available < lengths[-1]:
        raise ValueError(
            f"{title} has {available} tokens, fewer than the {lengths[-1]} to be read: give a longer text or --tokens"
        )
    return [length for length in lengths if length <= available]


def _choose(
    model: PreTrainedModel, lengths: Sequence[int], strategies: Sequence[str] | None, left: float
) -> tuple[int, tuple[str, ...], float]:
    """Tokens, strategies and the estimated seconds of each: the most that fits into ``left`` seconds."""
    from .evaluation.progress import measure_pace

    began = time.perf_counter()
    pace = measure_pace(model)
    left = SHARE * (left - (time.perf_counter() - began))
    counts = [len(strategies)] if strategies else [len(DEMO_STRATEGIES), len(DEMO_STRATEGIES) - 1]
    choices = [(count, tokens) for count in counts for tokens in lengths]
    count, tokens = next((c for c in choices if c[0] * pace.seconds(c[1]) <= left), choices[-1])
    return tokens, tuple(strategies or DEMO_STRATEGIES[:count]), pace.seconds(tokens)


def _evaluate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    strategies: Sequence[str],
    target: int,
    log: Log,
    deadline: float | None,
) -> list[PerplexityResult]:
    """Results of all strategies; from the third on only those that should end before the ``deadline``."""
    from .evaluation import perplexity_by_strategy

    results: list[PerplexityResult] = []
    began = time.perf_counter()
    for result in perplexity_by_strategy(model, ids, strategies, target, progress=True):
        now = time.perf_counter()
        results.append(result)
        log(f"   {result.label}: perplexity {result.perplexity:.2f} ({now - began:.0f} s)")
        if deadline is not None and 1 < len(results) < len(strategies) and now + (now - began) > deadline:
            break
        began = time.perf_counter()
    return results


def _print_results(
    results: Sequence[PerplexityResult], trained: int, wanted: Sequence[str] | None, log: Log
) -> None:
    log("\n" + perplexity_table(results, trained) + "\n")
    if wanted and len(results) < len(wanted):
        left_out = ", ".join(wanted[len(results) :])
        log(f"   left out for lack of time: {left_out}; --strategies {' '.join(wanted)} evaluates all\n")
    for result in results:
        if result.plan:
            log(f"   {result.plan!r}")


def _print_rotary_step(model: PreTrainedModel, tokens: int, log: Log) -> dict[str, float]:
    dtype = str(model.dtype).removeprefix("torch.")
    log(f"\n3. RoPE of one layer, {tokens} tokens, {dtype}, on {model.device}\n")
    step = rotary_step(model, tokens)
    rows = [(label, f"{seconds * 1e3:.2f} ms") for label, seconds in step.items()]
    log(text_table(("median, interleaved", "time"), rows))
    log(f"\n   speedup over stock: {step['stock'] / step['rope_dist']:.1f}x")
    return step


def _without_path(result: dict[str, Any], model_name: str) -> dict[str, Any]:
    """``result`` with the model's name as source of its plan, not a local path."""
    if result["plan"]:
        result["plan"]["source"] = model_name
    return result


def table_rows(results: Sequence[PerplexityResult], trained_length: int) -> list[dict[str, Any]]:
    """Perplexity in parts of the text: the trained length, then steps of an eighth of it.

    Returns:
        For every part ``start`` and ``end`` (positions), and ``perplexity``, a dictionary by label.
    """
    tokens = results[0].nll.numel() + 1
    eighth = max(trained_length // 8, 1)
    edges = [*(e for e in (0, *range(trained_length, tokens, eighth)) if e < tokens - 1), tokens]
    return [
        {"start": start, "end": end, "perplexity": {r.label: r.perplexity_of(start, end) for r in results}}
        for start, end in itertools.pairwise(edges)
    ]


def perplexity_table(results: Sequence[PerplexityResult], trained_length: int) -> str:
    """:func:`table_rows` as text: a row per strategy, a column per part; ``*`` past the trained length."""
    parts = table_rows(results, trained_length)
    headers = ["perplexity by position"]
    headers += [f"{p['start']}-{p['end']}{'*' if p['start'] >= trained_length else ''}" for p in parts]
    table = text_table(
        headers, [[r.label, *(f"{p['perplexity'][r.label]:.2f}" for p in parts)] for r in results]
    )
    return f"{table}\n\n   * past the {trained_length} tokens that the model was trained on"


@torch.inference_mode()
def rotary_step(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Median seconds of the rotation in one layer, Hugging Face's (``stock``) and ours (in place), interleaved."""
    from .evaluation.models import attention_shape

    # Not model.model.rotary_emb: some families have one per layer type.
    rope, _ = pretrained_rope(model.config)
    *heads, head_dim = attention_shape(model)
    inv_freq = rope.inv_freq.float().to(model.device)
    step = bench.rotary_step(
        (heads[0], heads[1]), head_dim, inv_freq, tokens, dtype=model.dtype,
        attention_scaling=rope.attention_scaling, seconds=5,
    )["seconds"]  # fmt: skip
    return {"stock": step[bench.HUGGINGFACE]["p50"], "rope_dist": step[bench.IN_PLACE]["p50"]}
