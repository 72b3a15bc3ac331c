"""``auto``, the default strategy: a geometric ramp of the factors over the number of periods of a pair."""

from __future__ import annotations

import math

import torch

from .base import PretrainedRope, Scaling, check_number, scale_of

LOCAL_TOKENS = 128
"""Pairs with a shorter period than this, in tokens, keep their frequency: they tell near tokens apart."""

LEAST_FAST_PERIODS, MOST_FAST_PERIODS = 2.0, 64.0
"""Bounds of that: the ramp keeps some width, and nothing was measured on a model that was trained past 8192 tokens."""

SLOW_PERIODS = 1.0
"""Pairs with fewer periods than this reach angles that training never had: they are interpolated by ``s``."""


def default_fast_periods(length: int) -> float:
    """Periods within the trained length of a pair whose period is 128 tokens; from 2 to 64, its value at 8192.

    Measured at two trained lengths (docs/quality.md): 64 is best at 8192 tokens, 2 to 3 at 256. YaRN's 32, chosen for
    models that were trained to 4096, is the same period.
    """
    return min(max(length / LOCAL_TOKENS, LEAST_FAST_PERIODS), MOST_FAST_PERIODS)


def auto(
    rope: PretrainedRope,
    target_length: int,
    *,
    fast_periods: float | None = None,
    slow_periods: float = SLOW_PERIODS,
    attention_factor: float | None = None,
) -> Scaling:
    """A geometric ramp of the factors from 1 to ``s`` over the number of periods of a pair.

    A pair with less than one period within the trained length reaches unseen angles beyond it and is interpolated by
    ``s``, as the distribution of its angles requires (Wu et al., EMNLP 2024, eq. 5-8). That distribution does not
    say where interpolation may stop: the angles of a fast pair are close to uniform before and after. Beyond the
    trained length it is the phase difference between neighbouring pairs that takes new values; it has a longer
    period than the pairs, and is sampled densely only where they have many periods. Pairs whose period is below 128
    tokens are kept in any case: they tell near tokens apart. Between the two limits the factor is

        f = s ** x,  x = log(fast_periods / periods) / log(fast_periods / slow_periods), clamped to [0, 1]

    with ``periods = length * theta_i / (2 pi)``. Among all ramps from 1 to ``s`` over those pairs the geometric one
    minimises the largest change of the ratio of neighbouring frequencies. It is the uniform mixed-radix ramp of
    MrRoPE (Tian et al., ICLR 2026, arXiv 2601.22181) with other limits.

    cos and sin are multiplied by ``sqrt(1 + ln s / ln length)``, LongRoPE's factor (Ding et al. 2024), about half of
    YaRN's temperature. It compensates for the interpolated pairs at any length: with the factors of a plan for 32768
    tokens SmolLM2-135M reads 2048 tokens of enwik8, a quarter of its trained length, with a perplexity of 16.87 with
    it and 17.60 without.

    Needs only the config and takes microseconds. Where the trained frequencies fall from pair to pair, factors rise.

    Args:
        fast_periods, slow_periods: periods within the trained length, ``fast_periods > slow_periods > 0``; by default
            :func:`default_fast_periods` and 1.
        attention_factor: replaces ``sqrt(1 + ln s / ln length)``.

    Raises:
        ValueError: an option out of range.
    """
    s = scale_of(rope, target_length)
    if fast_periods is None:
        fast_periods = default_fast_periods(rope.length)
    fast_periods = check_number(fast_periods, "auto's fast_periods")
    slow_periods = check_number(slow_periods, "auto's slow_periods")
    if not fast_periods > slow_periods > 0:
        raise ValueError(f"auto needs fast_periods > slow_periods > 0, got {fast_periods} and {slow_periods}")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    attention_factor = check_number(attention_factor, "auto's attention_factor", positive=True)
    periods = rope.length * rope.inv_freq.double() / (2 * math.pi)
    exponent = torch.log(fast_periods / periods) / math.log(fast_periods / slow_periods)
    settings = {
        "fast_periods": float(fast_periods),
        "slow_periods": float(slow_periods),
        "attention_factor": float(attention_factor),
    }
    return Scaling(s ** exponent.clamp(0, 1), float(attention_factor), settings)
