"""Comparison of strategies by the disturbance of the rotary angle distribution (Table 3 of the paper)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .defaults import COMPARED_STRATEGIES as COMPARED
from .distribution import DEFAULT_INTERVALS, Divergence, rotary_angle_distribution
from .model_names import known_name
from .planning import RopePlan, load_config, plan
from .presets import PRESETS
from .tables import text_table

PAPER_TABLE_3: dict[int, dict[str, float]] = {
    8192: {"pi": 24.08e-3, "yarn": 25.55e-3, "dprope": 6.71e-3},
    16384: {"pi": 33.67e-3, "yarn": 35.44e-3, "dprope": 22.92e-3},
}
"""Wu et al. 2024, Table 3: mean disturbance of LLaMA2 (4k) by target length and strategy, nats."""


def compare(
    source: Any = None,
    *,
    target_lengths: Sequence[int],
    strategies: Sequence[str] = COMPARED,
    threshold: float | str = 0.0,
    intervals: int = DEFAULT_INTERVALS,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
    **numbers: Any,
) -> list[RopePlan]:
    """Plan every strategy for every target length.

    Args:
        source: as in :func:`rope_dist.plan`.
        target_lengths: tokens.
        strategies: names, by default all but longrope, whose factors come from a search on the model.
        threshold: of ``dprope``; 0 as in the paper's Table 3 (:func:`rope_dist.plan` has another default).
        intervals, divergence, dtype: of the disturbance, as in :func:`rope_dist.plan`.
        **numbers: ``theta``, ``head_dim``, ``rotary_dim``, ``original_length``, instead of a source.

    Returns:
        A plan per length and strategy, in this order.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _load_once(source)
    cases = [(length, strategy) for length in target_lengths for strategy in strategies]
    plans = []
    for length, strategy in tqdm(cases, desc="comparing", delay=1.0, disable=None, leave=False):
        settings: dict[str, Any] = {"threshold": threshold} if strategy == "dprope" else {}
        plans.append(
            plan(
                source,
                target_length=length,
                strategy=strategy,
                intervals=intervals,
                divergence=divergence,
                dtype=dtype,
                **numbers,
                **settings,
            )
        )
    return plans


def _load_once(source: str | os.PathLike[str]) -> Any:
    return known_name(source, PRESETS) or load_config(source)


def table(plans: Sequence[RopePlan]) -> str:
    """The plans as a table: a row per strategy, with mean disturbance (x 1e-3) and dimensions changed per length."""
    lengths = list(dict.fromkeys(p.target_length for p in plans))
    by_case = {(p.strategy, p.target_length): p for p in plans}
    rows = []
    for strategy in dict.fromkeys(p.strategy for p in plans):
        row: list[Any] = [strategy]
        for length in lengths:
            p = by_case[strategy, length]
            row += [f"{p.disturbance * 1e3:.2f}", p.interpolated_dims]
        rows.append(row)
    first = plans[0]
    headers = ["strategy"]
    for length in lengths:
        headers += [f"{length} ({length / first.original_length:g}x)", "dims"]
    lines = [
        f"{first.source or 'given numbers'}: theta {first.theta:g}, head_dim {first.head_dim}, "
        f"{first.original_length} tokens trained",
        f"disturbance x 1e-3 (nats a pair, KL {_direction(first.divergence)}, {first.intervals} intervals); "
        f"dims: dimensions changed, of {first.rotary_dim}",
        "",
        text_table(headers, rows),
    ]
    thresholds = {p.threshold for p in plans if p.strategy == "dprope" and p.threshold is not None}
    if thresholds == {0.0}:
        lines += [
            "",
            "dprope with threshold 0, as in the paper's Table 3; `rope-dist plan` has another default.",
        ]
    elif thresholds:
        lines += [
            "",
            f"dprope with threshold {', '.join(f'{t:g}' for t in sorted(thresholds))}.",
        ]
    remarks = dict.fromkeys(note for p in plans for note in p.notes)
    if remarks:
        lines += ["", *(f"note: {note}" for note in remarks)]
    notes = [note for note in map(_largest_pair, plans) if note]
    if notes:
        lines += [
            "",
            f"Pairs above {LARGE:g} nat, the largest of each strategy, and how many intervals their angles visit:",
            *notes,
            "Fewer intervals than in training: the pair repeats a few angles near trained ones (its period is close to",
            "a whole number of tokens, or it hardly rotates). More: it reaches angles that training never had.",
        ]
    return "\n".join(lines)


LARGE = 1.0
"""Nats: the table names pairs above this, because one of them can make up most of the mean."""


def _largest_pair(p: RopePlan) -> str | None:
    """A line about the most disturbed pair if it is above :data:`LARGE`, with the intervals that it visits."""
    worst = max(range(len(p.factors)), key=p.disturbance_per_pair.__getitem__)
    disturbance = p.disturbance_per_pair[worst]
    if disturbance <= LARGE:
        return None

    def visited(inv_freq: torch.Tensor, length: int) -> int:
        shares = rotary_angle_distribution(
            inv_freq[[worst]], length, intervals=p.intervals, smoothing=0.0, dtype=p.dtype
        )
        return int((shares > 0).sum())

    before = visited(p.pretrained.inv_freq, p.original_length)
    after = visited(p.inv_freq, p.target_length)
    others = (math.fsum(p.disturbance_per_pair) - disturbance) / max(len(p.factors) - 1, 1)
    return (
        f"  {p.strategy}, {p.target_length}: pair {worst} has {disturbance * 1e3:.2f}, {before} -> {after} intervals; "
        f"the mean of the others is {others * 1e3:.2f}"
    )


def _direction(divergence: str) -> str:
    p, q = divergence.split("-")
    return f"({p} || {q})"


def table_3() -> str:
    """Table 3 of the paper: the disturbance computed here beside the published one."""
    lengths = tuple(PAPER_TABLE_3)
    strategies = ("pi", "yarn", "dprope")
    plans = compare("llama2-7b", target_lengths=lengths, strategies=strategies)
    by_case = {(p.strategy, p.target_length): p for p in plans}
    rows = []
    for strategy in strategies:
        row = [strategy]
        for length in lengths:
            row.append(f"{by_case[strategy, length].disturbance * 1e3:.2f}")
            row.append(f"{PAPER_TABLE_3[length][strategy] * 1e3:.2f}")
        rows.append(row)
    headers = ["disturbance x 1e-3"]
    for length in lengths:
        headers += [f"4096 -> {length}", "paper"]
    return text_table(headers, rows)
