"""Errors of comparisons: differences between two readings of the same tokens, and shares of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Standard errors on either side of a mean that make a 95 % interval."""


def paired_difference(
    parts_a: Sequence[float], parts_b: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Mean of ``a - b`` and its standard error, from two measurements of the same parts.

    Neighbouring tokens have similar losses, so the unit is not the token but the part: what two variants share, a hard
    or an easy passage, drops out of the difference. Parts are taken as independent of each other.

    Args:
        parts_a, parts_b: a number a part, in the same order: the mean loss in nats of 256 tokens as a record of
            ``eval perplexity`` keeps it (``nll_by_position``), or of any other unit, e.g. 0 and 1 for the answers to
            the same prompts. Join the lists of several texts.
        weights: tokens a part, where the parts differ; all above 0. The mean is then that of all tokens, its error
            that of a ratio of two sums over parts.

    Returns:
        Mean and standard error, in the unit of the parts; the error of a single part is not a number.

    Raises:
        ValueError: no parts, other numbers of parts, a weight that is not above 0.
    """
    if not parts_a or len(parts_a) != len(parts_b):
        raise ValueError(
            "a paired difference needs two measurements of the same parts, "
            f"got {len(parts_a)} and {len(parts_b)} of them"
        )
    weights = [1.0] * len(parts_a) if weights is None else weights
    if len(weights) != len(parts_a) or not all(weight > 0 for weight in weights):
        raise ValueError(f"give a weight above 0 for each of the {len(parts_a)} parts")
    differences = [a - b for a, b in zip(parts_a, parts_b, strict=True)]
    whole, parts = math.fsum(weights), len(differences)
    mean = math.fsum(w * d for w, d in zip(weights, differences, strict=True)) / whole
    if parts == 1:
        return mean, math.nan
    squares = math.fsum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    return mean, math.sqrt(parts / (parts - 1) * squares) / whole


def percent(mean: float, error: float) -> str:
    """A difference of losses in nats as one of perplexities, ``+0.36 ± 0.08 %``.

    An error that is not a number (a single part) is left out.
    """
    change = f"{100 * math.expm1(mean):+.2f}"
    return f"{change} %" if math.isnan(error) else f"{change} ± {100 * math.exp(mean) * error:.2f} %"


def wilson_interval(correct: int, prompts: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share of right answers (Wilson 1927), by default of 95 %.

    It stays within 0 and 1, and does not shrink to a point where all answers are right.

    Args:
        correct: right answers, from 0 to ``prompts``.
        prompts: at least 1.
        z: standard errors on either side.

    Raises:
        ValueError: a number out of its range.
    """
    if not 0 <= correct <= prompts or prompts < 1:
        raise ValueError(f"a share needs 0 to n right answers of n >= 1 prompts, got {correct} of {prompts}")
    share, z2 = correct / prompts, z * z / prompts
    centre = share + z2 / 2
    spread = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max((centre - spread) / (1 + z2), 0.0), min((centre + spread) / (1 + z2), 1.0)
