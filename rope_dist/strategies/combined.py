"""Strategies that change the frequencies of another one: ``resonance``, ``cope`` and ``clip``.

The other strategy is the setting ``of``; it runs with its defaults, and its factor of cos and sin is taken over. A
target equal to the trained length leaves the trained model as it is.
"""

from __future__ import annotations

import math

import torch

from ..defaults import STRATEGY_SETTINGS
from ..messages import unknown
from .base import STILL, PretrainedRope, Scaling, check_number, check_whole, scale_of

CLIPPED_SHARE = 20 / 64
"""Share of the pairs that CoPE clips in its authors' code: 20 of the 64 of Llama-3-8B."""


def resonance(rope: PretrainedRope, target_length: int, *, of: str = "yarn") -> Scaling:
    """Resonance RoPE: wavelengths of whole tokens (Wang et al. 2024, arXiv 2403.00071, section 4).

    A pair whose wavelength is a whole number of tokens meets the same angles in every period, so that positions past
    the trained length have angles that training had. The wavelengths ``2 pi / theta_i`` of the other strategy are
    rounded to whole numbers. All are, as in the authors' code (sheryc/resonance_rope): of pairs longer than the
    trained length rounding changes less than ``1 / (2 length)``. Fast pairs change by up to 5 %, the first from 6.28
    to 6 tokens.

    Args:
        of: the other strategy; ``yarn`` is the paper's Resonance YaRN.

    Raises:
        ValueError: ``of`` is no strategy that has defaults.
    """
    s, scaling = scale_of(rope, target_length), _other("resonance", of, rope, target_length)
    if s == 1:
        return _of_trained(rope, {"of": of})
    trained = 2 * math.pi / rope.inv_freq.double()
    rounded = (trained * scaling.factors).round().clamp(min=1) / trained
    factors = torch.where(scaling.factors < STILL, rounded, scaling.factors)
    return Scaling(factors, scaling.attention_scaling, {"of": of})


def cope(
    rope: PretrainedRope, target_length: int, *, of: str = "yarn", clipped_pairs: int | None = None
) -> Scaling:
    """CoPE, clipped RoPE: the slowest pairs fade out (Li et al. 2026, arXiv 2602.05258).

    Of the ``c`` slowest pairs the frequencies of the other strategy are multiplied by a cosine taper from 1 to 0,

        (1 + cos(pi j / (c - 1))) / 2,  j = 0 .. c - 1

    so that the slowest pair does not rotate (a factor of :data:`base.STILL`): it compares contents, whatever the
    distance. The authors train with it, and read past the trained length with YaRN's frequencies tapered.

    Args:
        of: the other strategy.
        clipped_pairs: ``c``, up to the number of pairs; 0 and 1 change none. By default the authors' share, 20 of 64.

    Raises:
        ValueError: ``of`` is no strategy that has defaults, ``clipped_pairs`` is out of range.
    """
    s, scaling = scale_of(rope, target_length), _other("cope", of, rope, target_length)
    if clipped_pairs is None:
        clipped_pairs = round(CLIPPED_SHARE * rope.pairs)
    clipped_pairs = check_whole(clipped_pairs, "cope's clipped_pairs", 0, rope.pairs)
    settings = {"of": of, "clipped_pairs": clipped_pairs}
    if s == 1:
        return _of_trained(rope, settings)
    taper = torch.ones(rope.pairs, dtype=torch.float64, device="cpu")
    angles = torch.linspace(0, math.pi, clipped_pairs, dtype=torch.float64, device="cpu")
    taper[rope.pairs - clipped_pairs :] = (1 + torch.cos(angles)) / 2
    return Scaling((scaling.factors / taper).clamp(max=STILL), scaling.attention_scaling, settings)


def clip(rope: PretrainedRope, target_length: int, *, of: str = "yarn", slow_periods: float = 1.0) -> Scaling:
    """Hard clip: pairs that never came round in training do not rotate (HardClip of Li et al. 2026, arXiv 2602.05258).

    A pair of fewer than ``slow_periods`` periods within the trained length meets unseen angles beyond it; without
    rotation (a factor of :data:`base.STILL`) it meets one angle only. Other pairs have the frequencies of the other
    strategy. The paper's code clips the last 20 of 64 pairs; here it is those that its text means, the ones with a
    period above the trained length. The fastest pair always rotates.

    Args:
        of: the other strategy.
        slow_periods: periods within the trained length, above 0.

    Raises:
        ValueError: ``of`` is no strategy that has defaults, ``slow_periods`` is not positive.
    """
    s, scaling = scale_of(rope, target_length), _other("clip", of, rope, target_length)
    slow_periods = check_number(slow_periods, "clip's slow_periods", positive=True)
    settings = {"of": of, "slow_periods": slow_periods}
    if s == 1:
        return _of_trained(rope, settings)
    slow = rope.length * rope.inv_freq.double() / (2 * math.pi) < slow_periods
    slow[0] = False
    still = slow.flip(0).long().cumprod(0).flip(0).bool()  # the last pairs, up to one that is fast enough
    return Scaling(scaling.factors.masked_fill(still, STILL), scaling.attention_scaling, settings)


def _of_trained(rope: PretrainedRope, settings: dict[str, object]) -> Scaling:
    return Scaling(torch.ones(rope.pairs, dtype=torch.float64, device="cpu"), settings=settings)


def _other(name: str, of: str, rope: PretrainedRope, target_length: int) -> Scaling:
    from . import get_strategy  # not at the top: that package imports this module

    others = [other for other in STRATEGY_SETTINGS if other not in (name, "longrope")]
    if of not in others:
        raise ValueError(f"{name}'s of: {unknown('strategy', of, others)}")
    return get_strategy(of)(rope, target_length)
