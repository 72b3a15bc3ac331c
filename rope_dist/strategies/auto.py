"""``auto``: the strategy to take where nothing is known but the config. docs: README, "The strategy auto"."""

from __future__ import annotations

import math

import torch

from .base import PretrainedRope, Scaling, check_number, scale_of

FAST_TURNS = 64.0
"""Pairs that turn more often than this within the trained length keep their frequency."""

SLOW_TURNS = 1.0
"""Pairs that turn less often have angles that were never seen past the trained length: interpolated by ``s``."""


def auto(
    rope: PretrainedRope,
    target_length: int,
    *,
    fast_turns: float = FAST_TURNS,
    slow_turns: float = SLOW_TURNS,
    attention_factor: float | None = None,
) -> Scaling:
    """Change each pair as little as its distribution allows, and no pair much against its neighbours.

    The distribution of a single pair's angles (Wu et al., EMNLP 2024, eq. 5-8) says what has to change: a pair
    that did not come round within the trained length meets unseen angles past it, whatever else is done, and is
    interpolated by ``s``. It cannot say where to stop, because a fast pair's angles are near uniform before and
    after. What a longer text changes there is how the angles of different pairs meet: the phase between neighbours
    comes round more slowly than the pairs themselves, and is sampled densely only where they turn tens of times.
    Between the two the factor of a pair is

        f = s ** x,  x = log(fast_turns / turns) / log(fast_turns / slow_turns), from 0 to 1

    with ``turns = length * theta_i / (2 pi)``. Of all rises from 1 to ``s`` over those pairs the geometric one
    changes the ratio of neighbouring frequencies least where it changes it most: every pair takes an equal part.

    That ramp is the uniform mixed-radix one of MrRoPE (Tian et al., ICLR 2026, arXiv 2601.22181) with other edges.

    cos and sin are multiplied by ``sqrt(1 + ln s / ln length)``, LongRoPE's factor (Ding et al. 2024): about half of
    YaRN's temperature. It does not stand for more tokens: it makes up for the slowed pairs at any length. SmolLM2-135M,
    with the factors of a plan for 32768 tokens, reads 2048 tokens of enwik8, a quarter of its trained length, with a
    perplexity of 16.87 with it and 17.60 without.

    Needs nothing but the config; takes microseconds. Factors rise from pair to pair where the trained frequencies
    fall.

    Args:
        fast_turns, slow_turns: turns within the trained length, ``fast_turns > slow_turns > 0``.
        attention_factor: replaces ``sqrt(1 + ln s / ln length)``.

    Raises:
        ValueError: an option out of range.
    """
    s = scale_of(rope, target_length)
    fast_turns = check_number(fast_turns, "auto's fast_turns")
    slow_turns = check_number(slow_turns, "auto's slow_turns")
    if not fast_turns > slow_turns > 0:
        raise ValueError(f"auto needs fast_turns > slow_turns > 0, got {fast_turns} and {slow_turns}")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    attention_factor = check_number(attention_factor, "auto's attention_factor", positive=True)
    turns = rope.length * rope.inv_freq.double() / (2 * math.pi)
    share = torch.log(fast_turns / turns) / math.log(fast_turns / slow_turns)
    settings = {
        "fast_turns": float(fast_turns),
        "slow_turns": float(slow_turns),
        "attention_factor": float(attention_factor),
    }
    return Scaling(s ** share.clamp(0, 1), float(attention_factor), settings)
