"""Published strategies with a closed form, computed as Hugging Face does where it has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .base import PretrainedRope, Scaling, check_factors, check_number, scale_of

LARGEST = 1e9
"""Limit of a factor or a number of periods: far above any use, far below an overflow."""


def _pair_index(rope: PretrainedRope) -> torch.Tensor:
    return torch.arange(rope.pairs, dtype=torch.float64, device="cpu")


def extrapolation(rope: PretrainedRope, target_length: int) -> Scaling:
    """Keep every trained frequency (direct extrapolation, Press et al. 2022)."""
    scale_of(rope, target_length)
    return Scaling(torch.ones(rope.pairs, dtype=torch.float64, device="cpu"))


def pi(rope: PretrainedRope, target_length: int) -> Scaling:
    """Position interpolation (Chen et al. 2023): every factor is ``s``."""
    s = scale_of(rope, target_length)
    return Scaling(torch.full((rope.pairs,), s, dtype=torch.float64, device="cpu"))


def ntk(rope: PretrainedRope, target_length: int) -> Scaling:
    """NTK-aware scaling (bloc97 2023): the base becomes ``theta * s ** (d / (d - 2))``.

    The fastest pair keeps its frequency, the slowest is interpolated by ``s`` in full, and the
    factor rises geometrically between.
    """
    s = scale_of(rope, target_length)
    return Scaling(_base_change(rope, s))


def dynamic_ntk(rope: PretrainedRope, target_length: int, *, factor: float | None = None) -> Scaling:
    """Dynamic NTK (emozilla 2023) frozen at the target length, as Hugging Face's ``dynamic`` computes it.

    The base becomes ``theta * (factor * s - (factor - 1)) ** (d / (d - 2))``.

    Args:
        factor: Hugging Face's ``factor``, at least 1; by default ``s``. With 1 it equals :func:`ntk`.
    """
    s = scale_of(rope, target_length)
    factor = s if factor is None else check_number(factor, "dynamic-ntk's factor")
    if not 1 <= factor <= LARGEST:
        raise ValueError(f"dynamic-ntk's factor must be from 1 to {LARGEST:g}, got {factor}")
    return Scaling(_base_change(rope, factor * s - (factor - 1)), settings={"factor": factor})


def ntk_mixed(rope: PretrainedRope, target_length: int, *, exponent: float = 0.625) -> Scaling:
    """NTK-RoPE-mixed (Su, July 2023, https://kexue.fm/archives/9706): between position interpolation and NTK.

    Pair ``m = 1 .. d / 2`` gets the factor

        f = exp(a m ** b),  a (d / 2) ** b = ln s

    which is ``s`` for the slowest pair. With ``b = 0`` it is position interpolation, with ``b = 1`` a geometric rise
    over all pairs. cos and sin are not scaled.

    Args:
        exponent: ``b``, from 0 to 1. The article takes 0.625, its author's code for 12x (bojone/rerope) 0.75.
    """
    s = scale_of(rope, target_length)
    exponent = check_number(exponent, "ntk-mixed's exponent")
    if not 0 <= exponent <= 1:
        raise ValueError(f"ntk-mixed's exponent must be from 0 to 1, got {exponent}")
    share = (_pair_index(rope) + 1) / rope.pairs
    return Scaling(s**share**exponent, settings={"exponent": exponent})


def _base_change(rope: PretrainedRope, scale: float) -> torch.Tensor:
    """Factors of ``theta -> theta * scale ** (d / (d - 2))``: pair i gets ``scale ** (2i / (d - 2))``."""
    if rope.rotary_dim == 2:
        # The formula divides by zero for a single pair.
        raise ValueError("NTK-aware scaling needs at least 4 rotary dimensions, got 2")
    return scale ** (2 * _pair_index(rope) / (rope.rotary_dim - 2))


def yarn(
    rope: PretrainedRope,
    target_length: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> Scaling:
    """YaRN (Peng et al. 2023) with the ramp over the dimension index that Hugging Face ships.

    Pairs with more than ``beta_fast`` periods within the trained length keep their frequency, pairs with less
    than ``beta_slow`` are interpolated by ``s``; between, the frequency is mixed linearly in the dimension
    index. cos and sin are multiplied by ``0.1 ln s + 1`` (the paper's temperature, eq. 22).

    Args:
        beta_fast, beta_slow: periods within the trained length, ``beta_fast > beta_slow > 0``.
        attention_factor: replaces ``0.1 ln s + 1``.
        truncate: round the ramp's bounds outwards to whole dimensions, as Hugging Face does.
    """
    s = scale_of(rope, target_length)
    beta_fast = check_number(beta_fast, "yarn's beta_fast")
    beta_slow = check_number(beta_slow, "yarn's beta_slow")
    if not LARGEST >= beta_fast > beta_slow >= 1 / LARGEST:
        raise ValueError(
            f"yarn needs {LARGEST:g} >= beta_fast > beta_slow >= {1 / LARGEST:g}, got {beta_fast} and {beta_slow}"
        )
    if not isinstance(truncate, bool):
        raise ValueError(f"yarn's truncate must be true or false, got {truncate!r}")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(s) + 1.0
    attention_factor = check_number(attention_factor, "yarn's attention_factor", positive=True)

    def dimension_of(periods: float) -> float:
        return rope.rotary_dim * math.log(rope.length / (periods * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((_pair_index(rope) - low) / (high - low)).clamp(0, 1)
    factors = 1 / (interpolated / s + (1 - interpolated))
    settings = {
        "beta_fast": float(beta_fast),
        "beta_slow": float(beta_slow),
        "attention_factor": float(attention_factor),
        "truncate": bool(truncate),
    }
    return Scaling(factors, float(attention_factor), settings)


def llama3(
    rope: PretrainedRope,
    target_length: int,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Scaling:
    """Llama 3.1's scaling (Meta 2024), as Hugging Face's ``llama3`` computes it.

    Pairs with more than ``high_freq_factor`` periods within the trained length keep their frequency, pairs with
    less than ``low_freq_factor`` are interpolated; between, linear in the number of periods.

    Args:
        factor: divides the frequency of slow pairs, at least 1; by default ``s`` (Llama 3.1 itself takes 8
            for 16 times the length).
        low_freq_factor, high_freq_factor: periods within the trained length, the second the larger.
    """
    s = scale_of(rope, target_length)
    factor = s if factor is None else check_number(factor, "llama3's factor")
    if not 1 <= factor <= LARGEST:
        raise ValueError(f"llama3's factor must be from 1 to {LARGEST:g}, got {factor}")
    low_freq_factor = check_number(low_freq_factor, "llama3's low_freq_factor")
    high_freq_factor = check_number(high_freq_factor, "llama3's high_freq_factor")
    if not high_freq_factor > low_freq_factor > 0:
        raise ValueError(
            f"llama3 needs high_freq_factor > low_freq_factor > 0, got {high_freq_factor} and {low_freq_factor}"
        )
    periods = rope.length * rope.inv_freq.double() / (2 * math.pi)
    smooth = ((periods - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    factors = 1 / ((1 - smooth) / factor + smooth)
    settings = {
        "factor": factor,
        "low_freq_factor": float(low_freq_factor),
        "high_freq_factor": float(high_freq_factor),
    }
    return Scaling(factors, settings=settings)


def longrope(
    rope: PretrainedRope,
    target_length: int,
    *,
    factors: Sequence[float] | torch.Tensor | None = None,
    attention_factor: float | None = None,
) -> Scaling:
    """LongRoPE (Ding et al. 2024): per-pair factors from a search on a model, given by the caller.

    Args:
        factors: ``[pairs]``, e.g. the ``long_factor`` of a published config. Required.
        attention_factor: by default ``sqrt(1 + ln s / ln L)``, as Hugging Face's ``longrope``.
    """
    s = scale_of(rope, target_length)
    if factors is None:
        raise ValueError(f"longrope needs factors={rope.pairs} numbers (the config's long_factor)")
    try:
        given = torch.as_tensor(factors, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"longrope's factors must be {rope.pairs} numbers, got {factors!r:.80}") from None
    check_factors(given, rope.pairs)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    attention_factor = check_number(attention_factor, "longrope's attention_factor", positive=True)
    settings = {"factors": given.tolist(), "attention_factor": float(attention_factor)}
    return Scaling(given.clone(), float(attention_factor), settings)


def longrope2(
    rope: PretrainedRope,
    target_length: int,
    *,
    critical_periods: float = 3.0,
    attention_factor: float | None = None,
) -> Scaling:
    """LongRoPE2's critical dimension without its search (Shang et al. 2025, arXiv 2502.20082, section 3, algorithm 1).

    Slow pairs are trained less than the theory of a full period assumes, so that pairs from the *real* critical
    dimension ``c`` on, which comes before the first pair of less than one period, need at least the factor ``s``
    (eq. 10). Faster ones get NTK's factors for the base that gives pair ``c`` the factor ``s``:

        f = s ** min(i / c, 1)

    The paper finds ``c``, and factors of ``s`` to ``2 s`` from there on, by an evolutionary search on a model; both
    are left out here, and a searched result is given to :func:`longrope`. Instead ``c`` is the first pair of fewer
    than ``critical_periods`` periods within the trained length. Three give both of the values that the paper
    publishes: 25 for Phi3-mini (96 dimensions, 2048 tokens) and 30 for LLaMA3-8B, where theory says 31 and 35. The
    paper's YaRN-rcd is ``yarn`` with ``beta_slow`` of as many periods.

    Args:
        critical_periods: above 0. 1 gives the theoretical critical dimension (eq. 7).
        attention_factor: by default LongRoPE's ``sqrt(1 + ln s / ln L)``; the paper does not name another.
    """
    s = scale_of(rope, target_length)
    critical_periods = check_number(critical_periods, "longrope2's critical_periods", positive=True)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    attention_factor = check_number(attention_factor, "longrope2's attention_factor", positive=True)
    periods = rope.length * rope.inv_freq.double() / (2 * math.pi)
    critical = min((i for i, p in enumerate(periods.tolist()) if p < critical_periods), default=rope.pairs)
    share = (_pair_index(rope) / critical).clamp(max=1) if critical else torch.ones_like(periods)
    settings = {"critical_periods": critical_periods, "attention_factor": float(attention_factor)}
    return Scaling(s**share, float(attention_factor), settings)
