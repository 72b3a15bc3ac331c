"""``auto-yarn``: the factors of ``auto`` as YaRN's parameters, which every engine takes by flags alone."""

from __future__ import annotations

import math

import torch

from .auto import SLOW_PERIODS, auto, default_fast_periods
from .base import PretrainedRope, Scaling, check_number, scale_of
from .formulas import yarn

# Bounds of the ramp that are tried on each side of the continuous optimum, in pairs.
_NEIGHBOURS = 3
# From the bound of a ramp to the dimension of its beta, so that rounding outwards gives the bound in any arithmetic.
_MARGIN = 0.25


def auto_yarn(
    rope: PretrainedRope,
    target_length: int,
    *,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> Scaling:
    """YaRN with the parameters that come closest to :func:`auto`.

    Both have a ramp that is linear in the pair index; ``auto`` interpolates between 1 and ``s`` geometrically, YaRN
    harmonically. ``beta_fast`` and ``beta_slow`` minimise the largest ``|ln f_yarn - ln f_auto|`` over the pairs: see
    :func:`fitted_periods`. What remains is 2.8 % of a factor at 2x and 10.6 % at 4x, and with ``truncate`` up to 4.5 %
    and 15 %: its ramp begins and ends at whole pairs. llama.cpp and MLX round it so in any case, and only a ramp that
    rounding does not change is the same in every engine.

    Args:
        beta_fast, beta_slow: periods within the trained length that replace the fitted ones, ``beta_fast > beta_slow``.
        attention_factor: replaces ``sqrt(1 + ln s / ln length)``, that of ``auto``.
        truncate: round the ramp's bounds outwards to whole pairs.

    Raises:
        ValueError: an option out of range.
    """
    s = scale_of(rope, target_length)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    check_number(attention_factor, "auto-yarn's attention_factor", positive=True)
    fast, slow = fitted_periods(s, default_fast_periods(rope.length))
    if truncate is True and s > 1 and None in (beta_fast, beta_slow):
        fast, slow = _whole_pairs(rope, target_length, fast, slow)
    fast, slow = float(f"{fast:.4g}"), float(f"{slow:.4g}")
    try:
        return yarn(
            rope,
            target_length,
            beta_fast=fast if beta_fast is None else beta_fast,
            beta_slow=slow if beta_slow is None else beta_slow,
            attention_factor=attention_factor,
            truncate=truncate,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("yarn", "auto-yarn")) from None


def fitted_periods(scale: float, fast_periods: float) -> tuple[float, float]:
    """``beta_fast`` and ``beta_slow`` of the YaRN ramp nearest to ``auto`` at that scale ``s``, for evenly dense pairs.

    On ``auto``'s ramp, ``x`` from 0 (``fast_periods``) to 1 (one period), the logarithm of its factor is ``x ln s``.
    YaRN's on its own ramp from ``a`` to ``b`` is ``-ln(1 - c (x - a) / (b - a))`` with ``c = 1 - 1/s``. That is convex,
    so the largest difference is least where it is the same, ``E``, at ``x = 0``, at ``x = b`` and (with the other sign)
    where their slopes are equal. ``x = b`` gives ``b = 1 - E / ln s``, ``x = 0`` gives ``a``, and the third, which
    falls with ``E``, is solved by bisection. At 2x the result for 64 periods is 82 and 1.2.
    """
    if scale <= 1:
        return fast_periods, SLOW_PERIODS
    log, c = math.log(scale), 1 - 1 / scale

    def bounds(error: float) -> tuple[float, float]:
        b = 1 - error / log
        y = (1 - math.exp(-error)) / c  # of YaRN's ramp, where auto's begins
        return -y * b / (1 - y), b

    def excess(error: float) -> float:
        """The largest difference below ``auto`` less the one above it."""
        a, b = bounds(error)
        kept = c / ((b - a) * log)  # 1 / factor where the slopes are equal
        x = a + (b - a) * (1 - kept) / c
        return x * log + math.log(kept) - error

    low, high = 0.0, log / 2
    for _ in range(60):
        error = (low + high) / 2
        low, high = (error, high) if excess(error) > 0 else (low, error)
    a, b = bounds((low + high) / 2)
    ratio = SLOW_PERIODS / fast_periods
    return fast_periods * ratio**a, fast_periods * ratio**b


def _whole_pairs(rope: PretrainedRope, target_length: int, fast: float, slow: float) -> tuple[float, float]:
    """The periods next to ``fast`` and ``slow`` whose ramp begins and ends at whole pairs, nearest to ``auto``."""
    wanted = auto(rope, target_length).factors.log()
    step = 2 * math.log(rope.theta) / rope.rotary_dim  # ln of the periods from one pair to the next
    first = math.log(rope.length / (2 * math.pi))

    def near(periods: float) -> range:
        pair = round((first - math.log(periods)) / step)
        return range(max(0, pair - _NEIGHBOURS), max(0, pair) + _NEIGHBOURS + 1)

    s = target_length / rope.length
    pairs = torch.arange(rope.pairs, dtype=torch.float64, device="cpu")
    best = (math.inf, 0, 1)
    for low in near(fast):
        for high in near(slow):
            if not low < high < rope.rotary_dim:
                continue
            ramp = ((pairs - low) / (high - low)).clamp(0, 1)
            error = float((wanted + (ramp / s + 1 - ramp).log()).abs().max())
            best = min(best, (error, low, high))
    _, low, high = best
    return math.exp(first - step * (low + _MARGIN)), math.exp(first - step * (high - _MARGIN))
