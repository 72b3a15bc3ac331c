"""Rotary angle distribution and its disturbance (Wu et al., EMNLP 2024, section 3, eq. 5-8).

Numbers in, numbers out: this module knows no model and no config.

For a rotary pair with frequency ``theta_i`` (radians per token) the angle of position ``m`` is
``m * theta_i mod 2*pi``. Cutting ``[0, 2*pi)`` into equal intervals and counting the positions
``0 .. length - 1`` in each gives the pair's rotary angle distribution; the disturbance of an
extension is the Kullback-Leibler divergence between that distribution in pre-training and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, cast, get_args

import torch
from tqdm import tqdm

Divergence = Literal["pretrained-extended", "extended-pretrained"]
DIVERGENCES: tuple[str, ...] = get_args(Divergence)

DEFAULT_INTERVALS = 360
"""Intervals of ``[0, 2*pi)``; the paper tried 90, 180, 360 and 720 and found 360 best."""

MAX_INTERVALS = 100_000
"""A pair has as many counts; more intervals than positions measure nothing."""

DEFAULT_SMOOTHING = torch.finfo(torch.float16).tiny
"""What every interval's count starts at (6.1e-05 positions), as in the authors' code: it keeps the
logarithm of an interval that no position visits finite."""

# 64 pairs x 32768 positions x 4 bytes = 8 MiB of angles at a time: large enough to amortise the
# launch of each tensor operation, small enough to stay in the last-level cache.
_POSITIONS_AT_ONCE = 32768


def check_intervals(intervals: Any) -> int:
    """Return ``intervals`` if it is a whole number of 2 to ``MAX_INTERVALS``, else raise ``ValueError``."""
    number = isinstance(intervals, Real) and not isinstance(intervals, bool)
    if not number or not 2 <= intervals <= MAX_INTERVALS or int(intervals) != intervals:
        raise ValueError(
            f"intervals must be a whole number of at least 2 and at most {MAX_INTERVALS}, got {intervals!r:.80}"
        )
    return int(intervals)


def check_dtype(dtype: Any) -> torch.dtype:
    """``torch.float32`` or ``torch.float64`` from itself or its name, else ``ValueError``."""
    known = {"float32": torch.float32, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    return known[name]


def rotary_angle_distribution(
    inv_freq: torch.Tensor,
    length: int,
    *,
    intervals: int = DEFAULT_INTERVALS,
    smoothing: float = DEFAULT_SMOOTHING,
    dtype: torch.dtype | str = torch.float32,
) -> torch.Tensor:
    """Share of the positions ``0 .. length - 1`` whose rotary angle falls into each interval (eq. 5-7).

    Args:
        inv_freq: ``[pairs]`` floating, radians per token, one frequency per rotary pair; 0 for a pair that does not
            rotate, which is at angle 0 everywhere.
        length: number of positions, at least 1.
        intervals: number of equal intervals of ``[0, 2*pi)``, at least 2.
        smoothing: what each interval's count starts at, in positions; 0 for the plain histogram.
        dtype: ``torch.float32`` computes the angles as the authors' code (and a model) does and
            reproduces Table 3; ``torch.float64`` is the exact distribution for any practical length.

    Returns:
        ``[pairs, intervals]`` in ``dtype``; each row sums to 1 (but for the smoothing).

    Raises:
        ValueError: ``inv_freq`` is not a vector of finite numbers of at least 0, ``length < 1``,
            ``intervals < 2``, ``smoothing`` below 0 or above 1e9, or another ``dtype``.
    """
    intervals = check_intervals(intervals)
    dtype = check_dtype(dtype)
    if inv_freq.ndim != 1 or inv_freq.numel() == 0:
        raise ValueError(f"inv_freq must be a vector [pairs], got shape {list(inv_freq.shape)}")
    if not bool(torch.all(torch.isfinite(inv_freq) & (inv_freq >= 0))):
        raise ValueError("inv_freq must consist of finite numbers of at least 0")
    if length < 1:
        raise ValueError(f"length must be at least 1 position, got {length}")
    if isinstance(smoothing, bool) or not isinstance(smoothing, Real) or not 0 <= smoothing <= 1e9:
        raise ValueError(f"smoothing must be a finite number from 0 to 1e9, got {smoothing!r}")

    inv_freq = inv_freq.detach().to(device="cpu", dtype=dtype)
    pairs = inv_freq.numel()
    row = torch.arange(0, pairs * intervals, intervals, dtype=torch.int32, device="cpu")[:, None]
    counts = torch.zeros(pairs * intervals, dtype=torch.int64, device="cpu")
    per_radian = intervals / (2 * math.pi)
    starts = range(0, length, _POSITIONS_AT_ONCE)
    for start in tqdm(starts, desc="rotary angles", delay=1.0, disable=None, leave=False):
        end = min(start + _POSITIONS_AT_ONCE, length)
        positions = torch.arange(start, end, dtype=dtype, device="cpu")
        angles = (inv_freq[:, None] * positions).remainder_(2 * math.pi)
        # An angle just under 2*pi can round up into interval b, which does not exist.
        interval = angles.mul_(per_radian).floor_().clamp_(max=intervals - 1)
        index = interval.to(torch.int32).add_(row)
        counts += torch.bincount(index.flatten(), minlength=pairs * intervals)
    return (counts.view(pairs, intervals).to(dtype) + smoothing) / length


def disturbance(
    pretrained: torch.Tensor,
    extended: torch.Tensor,
    *,
    divergence: Divergence = "pretrained-extended",
) -> torch.Tensor:
    """Disturbance of each pair's rotary angle distribution by an extension (eq. 8), in nats.

    The paper prints eq. 8 as KL(extended || pre-trained), but its Table 3 is made with the other
    direction: the authors' code takes KL(pre-trained || extended), and only that one gives the
    published 24.08e-3 for position interpolation to 8k (the printed one is near 185e-3). The
    direction that reproduces the published numbers is the default.

    Args:
        pretrained: ``[pairs, intervals]``, from :func:`rotary_angle_distribution` at the trained length.
        extended: the same shape, at the target length with the extended frequencies.
        divergence: ``"pretrained-extended"`` for ``sum_k P_k log(P_k / Q_k)`` with P pre-trained and
            Q extended (the authors' code), ``"extended-pretrained"`` for eq. 8 as printed.

    Returns:
        ``[pairs]``; the paper's figure for a model is the mean over pairs.

    Raises:
        ValueError: the shapes differ, or ``divergence`` is neither of the two.
    """
    if pretrained.shape != extended.shape or pretrained.ndim != 2:
        raise ValueError(
            "the two distributions must have one shape [pairs, intervals], got "
            f"{list(pretrained.shape)} and {list(extended.shape)}"
        )
    check_divergence(divergence)
    p, q = (pretrained, extended) if divergence == "pretrained-extended" else (extended, pretrained)
    # xlogy: an interval that P leaves empty adds nothing (only possible without smoothing).
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def check_divergence(divergence: Any) -> Divergence:
    """Return ``divergence`` if it names a direction of :func:`disturbance`, else raise ``ValueError``."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    return cast(Divergence, divergence)


def disturbances(
    inv_freq: torch.Tensor,
    length: int,
    factors: Sequence[torch.Tensor],
    target_length: int,
    *,
    intervals: int = DEFAULT_INTERVALS,
    smoothing: float = DEFAULT_SMOOTHING,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
) -> torch.Tensor:
    """Disturbance per pair of several candidate extensions of one pre-trained embedding.

    Args:
        inv_freq: ``[pairs]``, the frequencies of pre-training, radians per token.
        length: the trained length, positions.
        factors: candidates, each ``[pairs]``; pair ``i`` gets the frequency ``inv_freq[i] / factor[i]``.
        target_length: the length to read, positions.
        intervals, smoothing, dtype: as in :func:`rotary_angle_distribution`.
        divergence: as in :func:`disturbance`.

    Returns:
        ``[len(factors), pairs]`` in ``dtype``.
    """

    def distribution(frequencies: torch.Tensor, positions: int) -> torch.Tensor:
        return rotary_angle_distribution(
            frequencies, positions, intervals=intervals, smoothing=smoothing, dtype=dtype
        )

    dtype = check_dtype(dtype)
    inv_freq = inv_freq.to(dtype)
    before = distribution(inv_freq, length)
    rows = [
        disturbance(before, distribution(inv_freq / factor.to(dtype), target_length), divergence=divergence)
        for factor in factors
    ]
    return torch.stack(rows)
