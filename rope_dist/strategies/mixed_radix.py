"""MrRoPE (Tian et al., ICLR 2026): positions as numbers of a mixed radix, of which an extension changes some digits."""

from __future__ import annotations

import math

import torch

from .base import PretrainedRope, Scaling, check_number, scale_of

FAST_PERIODS, SLOW_PERIODS = 32.0, 1.0
"""The paper's bounds, which are YaRN's."""


def mrrope_uni(
    rope: PretrainedRope,
    target_length: int,
    *,
    fast_periods: float = FAST_PERIODS,
    slow_periods: float = SLOW_PERIODS,
    attention_factor: float | None = None,
) -> Scaling:
    """MrRoPE-Uni: the digits between two pairs share the extension equally (Tian et al. 2026, arXiv 2601.22181).

    With ``d_l`` the last pair of more than ``fast_periods`` periods within the trained length and ``d_h`` the first
    of fewer than ``slow_periods``, the radix of each pair between them grows by ``s ** (1 / (d_h - d_l))`` (eq. 13-16),
    and the factor of pair ``i`` is the product of those before it:

        f = s ** (t / n),  t = i - d_l clamped to [0, n],  n = d_h - d_l

    :func:`rope_dist.strategies.auto` is this ramp between other bounds, which need not be whole pairs. cos and sin are
    multiplied by YaRN's ``0.1 ln s + 1``. Without a pair that is fast (or slow) enough the ramp starts one pair before
    the first (ends one pair after the last).

    Args:
        fast_periods, slow_periods: periods within the trained length, ``fast_periods > slow_periods > 0``.
        attention_factor: replaces ``0.1 ln s + 1``.

    Raises:
        ValueError: an option out of range.
    """
    return _mixed_radix("mrrope-uni", rope, target_length, fast_periods, slow_periods, attention_factor)


def mrrope_pro(
    rope: PretrainedRope,
    target_length: int,
    *,
    fast_periods: float = FAST_PERIODS,
    slow_periods: float = SLOW_PERIODS,
    attention_factor: float | None = None,
) -> Scaling:
    """MrRoPE-Pro: slower digits take a larger part of the extension (Tian et al. 2026, arXiv 2601.22181).

    As :func:`mrrope_uni`, but the radix of pair ``j`` grows by ``s ** (2 (1 + j - d_l) / ((1 + n) n))``, so that the
    logarithm of the factor is convex in the pair index:

        f = s ** (t (t + 1) / (n (n + 1)))

    Args:
        fast_periods, slow_periods: periods within the trained length, ``fast_periods > slow_periods > 0``.
        attention_factor: replaces ``0.1 ln s + 1``.

    Raises:
        ValueError: an option out of range.
    """
    return _mixed_radix(
        "mrrope-pro", rope, target_length, fast_periods, slow_periods, attention_factor, progressive=True
    )


def _mixed_radix(
    name: str,
    rope: PretrainedRope,
    target_length: int,
    fast_periods: float,
    slow_periods: float,
    attention_factor: float | None,
    *,
    progressive: bool = False,
) -> Scaling:
    s = scale_of(rope, target_length)
    fast_periods = check_number(fast_periods, f"{name}'s fast_periods")
    slow_periods = check_number(slow_periods, f"{name}'s slow_periods")
    if not fast_periods > slow_periods > 0:
        raise ValueError(
            f"{name} needs fast_periods > slow_periods > 0, got {fast_periods} and {slow_periods}"
        )
    if attention_factor is None:
        attention_factor = 0.1 * math.log(s) + 1.0
    attention_factor = check_number(attention_factor, f"{name}'s attention_factor", positive=True)
    periods = rope.length * rope.inv_freq.double() / (2 * math.pi)
    pairs = torch.arange(rope.pairs, dtype=torch.float64, device="cpu")
    first = max((i for i, p in enumerate(periods.tolist()) if p > fast_periods), default=-1)
    slow = (i for i, p in enumerate(periods.tolist()) if i > first and p < slow_periods)
    n = min(slow, default=rope.pairs) - first
    t = (pairs - first).clamp(0, n)
    exponent = t * (t + 1) / (n * (n + 1)) if progressive else t / n
    settings = {
        "fast_periods": float(fast_periods),
        "slow_periods": float(slow_periods),
        "attention_factor": float(attention_factor),
    }
    return Scaling(s**exponent, float(attention_factor), settings)
