"""``refined``: a search for the factor of each pair that disturbs its rotary angle distribution least.

Eq. 9 of Wu et al. (EMNLP 2024) chooses between two factors, 1 and ``s``, which leaves a disturbance above 0 (their
Limitations). Most of it is in pairs near a resonance: a frequency of ``alpha = p / q + delta`` revolutions per token
with a small ``delta``. Positions ``m`` and ``m + q`` then have almost the same angle, and the trained positions cover
``q`` narrow arcs only. Extrapolation widens these arcs by ``s``, position interpolation moves them. Interpolating the
drift ``delta`` alone keeps them:

    alpha' = p / q + (alpha - p / q) / s

Position interpolation is the case ``p / q = 0``. :func:`refined` tries the best rational approximations of every
pair, which changes the frequency of a fast pair by less than a part in a thousand. A slow pair covers every interval,
and its remaining disturbance is the unequal number of positions per interval: for these pairs it searches a grid,
with counts computed from the interval boundaries instead of from every position.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from tqdm import tqdm

from ..distribution import (
    DEFAULT_INTERVALS,
    DEFAULT_SMOOTHING,
    Divergence,
    check_divergence,
    check_dtype,
    check_intervals,
    disturbance,
    rotary_angle_distribution,
)
from .base import PretrainedRope, Scaling, check_number, scale_of

DEFAULT_TOLERANCE = 6e-4
"""Nats per pair: a pair that 1 or ``s`` disturbs by no more is not searched."""

DEFAULT_SLACK = 0.01
"""Relative margin around ``[1, s]``: keeping a resonance may need a slightly higher frequency."""

# A pair with fewer periods than this within the trained length has neighbouring positions in each interval, and few
# enough boundaries for a grid search.
_SLOW = 12.0
# Search around the best factor of a fast pair: (range in intervals at the last position, number of steps).
_NEARBY = ((4.0, 41), (0.4, 17), (0.05, 9))
# The grid: largest number of points, how many of the best are refined, in how many rounds and into how many points
# each, and how many of the best are then measured like every other candidate.
_POINTS, _BEST, _LEVELS, _FINER, _MEASURED = 8192, 24, 4, 33, 6
# Boundaries at a time: 1 MiB, which fits into the L2 cache.
_BOUNDARIES = 1 << 18
# The grid search takes the logarithm of every interval, also of one without positions.
_LEAST_SMOOTHING = 1e-6
# Extra revolutions that are tried at most: a fast pair could have thousands.
_EXTRA_REVOLUTIONS = 256


def refined(
    rope: PretrainedRope,
    target_length: int,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    slack: float = DEFAULT_SLACK,
    intervals: int = DEFAULT_INTERVALS,
    smoothing: float = DEFAULT_SMOOTHING,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
) -> Scaling:
    """The least disturbing factor of each pair: eq. 8 of Wu et al. (EMNLP 2024) minimised beyond eq. 9.

    The candidates are 1, ``s``, the factors that interpolate the drift from a near resonance, and for slow pairs
    a grid over ``[1, s]`` that is refined around its best; the least disturbed wins, of equals the least change.
    The result depends on nothing else, and is the same at every run. It minimises the paper's criterion; whether
    that helps a model is another question, see ``rope-dist eval``.

    Args:
        tolerance: nats per pair, at least 0; a pair that 1 or ``s`` disturbs by no more keeps that factor.
        slack: factors lie in ``[1 - slack, s * (1 + slack)]``; 0 to 0.5.
        intervals, smoothing, divergence, dtype: of the disturbance, see :mod:`rope_dist.distribution`.

    Raises:
        ValueError: an option out of range.
    """
    s = scale_of(rope, target_length)
    check_number(tolerance, "refined's tolerance")
    check_number(slack, "refined's slack")
    if not tolerance >= 0:
        raise ValueError(
            f"tolerance must be a finite number of at least 0 (nats per pair), got {tolerance!r}"
        )
    if not 0 <= slack <= 0.5:
        raise ValueError(f"slack must be 0 to 0.5, got {slack!r}")
    search = _Search(
        rope,
        target_length,
        low=1 - slack,
        high=s * (1 + slack),
        intervals=check_intervals(intervals),
        smoothing=smoothing,
        divergence=check_divergence(divergence),
        dtype=check_dtype(dtype),
    )
    search.try_factors(dict.fromkeys((1.0, s)))
    if s > 1:
        search.try_resonances(search.above(tolerance))
        slow = search.revolutions * rope.length < _SLOW
        search.try_nearby(search.above(tolerance) & ~slow)
        search.try_grid(search.above(tolerance) & slow)
    settings = {
        "tolerance": float(tolerance),
        "slack": float(slack),
        "intervals": search.intervals,
        "smoothing": float(smoothing),
        "divergence": divergence,
        "dtype": str(search.dtype).removeprefix("torch."),
    }
    return Scaling(search.factors, settings=settings, disturbance=search.least.to(search.dtype))


@dataclass
class _Search:
    """The best factor of each pair so far, and how candidates are measured.

    Attributes:
        low, high: bounds of the factors.
        revolutions: ``[pairs]`` float64, trained frequencies in revolutions per token.
        before: ``[pairs, intervals]``, distributions of the trained embedding.
        factors, least: ``[pairs]`` float64, the best factors and their disturbance.
    """

    rope: PretrainedRope
    target_length: int
    low: float
    high: float
    intervals: int
    smoothing: float
    divergence: Divergence
    dtype: torch.dtype
    revolutions: torch.Tensor = field(init=False)
    before: torch.Tensor = field(init=False)
    factors: torch.Tensor = field(init=False)
    least: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.revolutions = self.rope.inv_freq.double() / (2 * math.pi)
        self.before = self._distribution(self.rope.inv_freq, self.rope.length)
        self.factors = torch.ones(self.rope.pairs, dtype=torch.float64, device="cpu")
        self.least = torch.full((self.rope.pairs,), math.inf, dtype=torch.float64, device="cpu")

    def above(self, tolerance: float) -> torch.Tensor:
        """``[pairs]`` bool: which are disturbed more."""
        return self.least > tolerance

    def try_factors(self, factors: Iterable[float]) -> None:
        """The same factors for every pair."""
        pairs = torch.arange(self.rope.pairs, device="cpu")
        for factor in factors:
            self._offer(pairs, torch.full((self.rope.pairs,), factor, dtype=torch.float64, device="cpu"))

    def try_resonances(self, which: torch.Tensor) -> None:
        """Interpolate the drift from the resonances of these pairs."""
        pairs: list[int] = []
        factors: list[float] = []
        for i in which.nonzero().flatten().tolist():
            found = self._resonant_factors(float(self.revolutions[i]))
            pairs += [i] * len(found)
            factors += found
        self._offer(
            torch.tensor(pairs, dtype=torch.int64, device="cpu"),
            torch.tensor(factors, dtype=torch.float64, device="cpu"),
        )

    def try_nearby(self, which: torch.Tensor) -> None:
        """Factors near the best ones of these pairs, in ever smaller ranges."""
        pairs = which.nonzero().flatten()
        for reach, points in _NEARBY:
            steps = torch.linspace(-reach, reach, points, dtype=torch.float64, device="cpu")
            steps /= self.intervals * self.target_length
            candidates = (self.revolutions[pairs] / self.factors[pairs])[:, None] + steps
            factors = (self.revolutions[pairs][:, None] / candidates).clamp(self.low, self.high)
            self._offer(pairs.repeat_interleave(points), factors.flatten())

    def try_grid(self, which: torch.Tensor) -> None:
        """The whole range of factors, for each of these pairs."""
        chosen = which.nonzero().flatten().tolist()
        for i in tqdm(chosen, desc="searching factors", delay=1.0, disable=None, leave=False):
            found = self._best_of_grid(float(self.revolutions[i]), float(self.factors[i]))
            self._offer(torch.full((found.numel(),), i, device="cpu"), found)

    def _offer(self, pairs: torch.Tensor, factors: torch.Tensor) -> None:
        """Measure each pair with its candidate factor, and keep a factor that disturbs less than the best so far."""
        for pair, factor in zip(pairs.split(256), factors.split(256), strict=True):
            if pair.numel() == 0:
                continue
            after = self._distribution(self.rope.inv_freq[pair] / factor.to(self.dtype), self.target_length)
            found = disturbance(self.before[pair], after, divergence=self.divergence)
            for i, f, d in zip(pair.tolist(), factor.tolist(), found.tolist(), strict=True):
                if d < self.least[i]:
                    self.factors[i], self.least[i] = f, d

    def _distribution(self, frequencies: torch.Tensor, length: int) -> torch.Tensor:
        return rotary_angle_distribution(
            frequencies, length, intervals=self.intervals, smoothing=self.smoothing, dtype=self.dtype
        )

    def _resonant_factors(self, revolutions: float) -> list[float]:
        """Factors that interpolate a pair's drift from ``p / q``, the least change first."""
        length, target = self.rope.length, self.target_length
        candidates = [
            p / q + (revolutions - p / q) * length / target for p, q in approximations(revolutions, length)
        ]
        # With k more revolutions the target length ends at the angle of the trained one; 0 is position interpolation.
        extra = min(math.floor((target - length) * revolutions), _EXTRA_REVOLUTIONS)
        candidates += [(revolutions * length + k) / target for k in range(extra + 1)]
        # Two that end within 1/64 of an interval are one candidate.
        factors = {round(64 * self.intervals * target * c): revolutions / c for c in candidates if c > 0}
        within = (f for f in factors.values() if self.low <= f <= self.high)
        return sorted(within, key=lambda f: abs(math.log(f)))

    def _best_of_grid(self, revolutions: float, known: float) -> torch.Tensor:
        """The least disturbing factors of a slow pair on a refined grid, by exact counts: best first."""
        slowest, fastest = revolutions / self.high, revolutions / self.low
        smoothing = max(self.smoothing, _LEAST_SMOOTHING)
        before = interval_shares(
            torch.tensor([revolutions], dtype=torch.float64, device="cpu"),
            self.rope.length,
            self.intervals,
            smoothing,
        )[0]

        def best(candidates: torch.Tensor) -> torch.Tensor:
            after = interval_shares(candidates, self.target_length, self.intervals, smoothing)
            if self.divergence == "pretrained-extended":
                disturbed = -(after.log() @ before)  # up to a constant
            else:
                disturbed = (after * (after / before).log()).sum(1)
            return candidates[torch.argsort(disturbed, stable=True)[:_BEST]]

        # From one point to the next the last position moves by a quarter of an interval, if that is not too many.
        points = math.ceil(4 * self.intervals * self.target_length * (fastest - slowest)) + 2
        points = min(points, _POINTS)
        ends = [revolutions, revolutions * self.rope.length / self.target_length, revolutions / known]
        step = (fastest - slowest) / (points - 1)
        found = best(
            torch.cat(
                (
                    torch.linspace(slowest, fastest, points, dtype=torch.float64, device="cpu"),
                    torch.tensor(ends, dtype=torch.float64, device="cpu"),
                )
            )
        )
        for _ in range(_LEVELS):
            around = step * torch.linspace(-1, 1, _FINER, dtype=torch.float64, device="cpu")
            found = best((found[:, None] + around).flatten().clamp(slowest, fastest))
            step *= 4 / _FINER
        return revolutions / found[:_MEASURED]


def approximations(number: float, most: int) -> list[tuple[int, int]]:
    """The best rational approximations of a positive number: convergents and semiconvergents.

    Args:
        number: to approximate.
        most: the largest denominator.

    Returns:
        Pairs ``(p, q)`` with ``p / q`` close to it, ``q`` rising from 1.
    """
    rest = Fraction(number)
    before, last = (1, 0), (math.floor(rest), 1)
    found = [last]
    rest -= last[0]
    while rest:
        rest = 1 / rest
        steps = math.floor(rest)
        rest -= steps
        for step in range(1, steps + 1):
            p, q = before[0] + step * last[0], before[1] + step * last[1]
            if q > most:
                return found
            found.append((p, q))
        before, last = last, found[-1]
    return found


def interval_shares(revolutions: torch.Tensor, length: int, intervals: int, smoothing: float) -> torch.Tensor:
    """Rotary angle distributions computed from the positions at which an angle crosses an interval boundary.

    With intervals numbered on over all revolutions, the angle enters interval ``k`` at position
    ``ceil(k / (revolutions * intervals))``: a few operations per boundary, whatever the length. Boundaries are
    float32: a position within a relative 1e-7 of a boundary may be counted on its other side.

    Args:
        revolutions: ``[candidates]`` float64, revolutions per token; rising order is fastest.
        length, intervals, smoothing: as in :func:`rope_dist.distribution.rotary_angle_distribution`.

    Returns:
        ``[candidates, intervals]`` float32.
    """
    rows = []
    # Sorted candidates of one part have about as many boundaries.
    for part in revolutions.split(64):
        whole = math.floor(float(part.min()) * length)
        circles = math.ceil(float(part.max()) * length) + 1
        boundary = torch.arange(circles * intervals, dtype=torch.float32, device="cpu")
        tokens = (1 / (part * intervals)).float()[:, None]
        for some in tokens.split(max(1, _BOUNDARIES // boundary.numel())):
            first = (boundary * some).ceil_()
            first[:, whole * intervals :].clamp_(max=length)
            # The positions of an interval are differences of neighbouring entries; summed over revolutions first.
            passed = first.view(-1, circles, intervals).sum(1)
            rows.append(torch.cat((passed, passed[:, :1] + length), dim=1).diff(dim=1))
    return (torch.cat(rows) + smoothing) / length
