"""``dprope``: the strategy of Wu et al. (EMNLP 2024), eq. 9."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..distribution import (
    DEFAULT_INTERVALS,
    DEFAULT_SMOOTHING,
    Divergence,
    check_divergence,
    check_dtype,
    check_intervals,
    disturbances,
)
from .base import PretrainedRope, Scaling, check_factors, check_number, check_whole, scale_of

DPROPE_THRESHOLDS = {"paper-2x": 5e-4, "paper-4x": 2e-3}
"""The paper's defaults "by adjusting t": 80 interpolated dimensions of LLaMA2 at 8k, 64 at 16k."""

Candidate = str | Callable[[PretrainedRope, int], Scaling]


def default_threshold(scale: float) -> float:
    """The threshold :func:`dprope` uses where none is given.

    The paper's 5e-4 at 2x and 2e-3 at 4x, interpolated linearly in ``log scale`` and clamped outside.
    """
    low, high = DPROPE_THRESHOLDS["paper-2x"], DPROPE_THRESHOLDS["paper-4x"]
    position = min(max(math.log2(scale) - 1, 0.0), 1.0)
    return low + (high - low) * position


def _check_threshold(threshold: float | str | None, scale: float) -> float:
    """Nats per pair from a number, a name of :data:`DPROPE_THRESHOLDS`, or None for the scale's default."""
    if threshold is None:
        return default_threshold(scale)
    if isinstance(threshold, str):
        if threshold not in DPROPE_THRESHOLDS:
            raise ValueError(
                f"threshold must be a number or one of {', '.join(DPROPE_THRESHOLDS)}, got {threshold!r}"
            )
        return DPROPE_THRESHOLDS[threshold]
    number = check_number(threshold, "threshold")
    if number < 0:
        raise ValueError(f"threshold must be a finite number of at least 0, got {threshold!r}")
    return number


def _check_interpolated_dims(interpolated_dims: int, rope: PretrainedRope) -> int:
    number = check_whole(interpolated_dims, "interpolated_dims", 0, rope.rotary_dim)
    if number % 2:
        raise ValueError(f"interpolated_dims must be even (two dimensions per pair), got {number}")
    return number


def dprope(
    rope: PretrainedRope,
    target_length: int,
    *,
    threshold: float | str | None = None,
    interpolated_dims: int | None = None,
    candidates: Sequence[Candidate] = ("extrapolation", "pi"),
    intervals: int = DEFAULT_INTERVALS,
    smoothing: float = DEFAULT_SMOOTHING,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
) -> Scaling:
    """Distribution-preserving extension (Wu et al., EMNLP 2024, eq. 9).

    Pair ``i`` is interpolated when ``D_i(extrapolated) > D_i(interpolated) + t``, else left alone;
    ``D_i`` is the disturbance of its rotary angle distribution (eq. 8). With ``threshold=0`` the
    factors equal those of the authors' code. With none given the paper's default for the scale is
    used (:func:`default_threshold`): without a threshold fast pairs, whose two distributions are both
    near uniform, are chosen on sampling noise, and a model that is not trained further pays for it.

    Args:
        threshold: ``t`` in nats per pair, at least 0, or ``"paper-2x"`` / ``"paper-4x"``.
        interpolated_dims: the paper's ``n``, instead of ``t``: how many dimensions (two per pair) leave
            the first candidate, those that gain most. Even, 0 to ``rotary_dim``.
        candidates: strategies that compete, by name or as functions ``(rope, target_length) -> Scaling``.
            A pair keeps the first unless the least disturbed of the others gains more than the
            threshold. Only their factors count; the attention scaling stays the model's.
        intervals, smoothing, divergence, dtype: of the disturbance, see :mod:`rope_dist.distribution`.

    Raises:
        ValueError: both ``threshold`` and ``interpolated_dims``, or either out of range; an unknown
            candidate, fewer than two, or ``intervals < 2``.
    """
    s = scale_of(rope, target_length)
    intervals = check_intervals(intervals)
    divergence = check_divergence(divergence)
    dtype = check_dtype(dtype)
    if threshold is not None and interpolated_dims is not None:
        raise ValueError("give the threshold t or the number of interpolated dimensions n, not both")
    if isinstance(candidates, str) or not isinstance(candidates, Sequence) or len(candidates) < 2:
        raise ValueError(f"dprope needs at least two candidate strategies, got {candidates!r}")
    t = _check_threshold(threshold, s)
    n = None if interpolated_dims is None else _check_interpolated_dims(interpolated_dims, rope)

    from . import get_strategy  # not at the top: that package imports this module

    functions = [c if callable(c) else get_strategy(c) for c in candidates]
    factors = torch.stack([check_factors(f(rope, target_length).factors, rope.pairs) for f in functions])
    d = disturbances(
        rope.inv_freq,
        rope.length,
        list(factors),
        target_length,
        intervals=intervals,
        smoothing=smoothing,
        divergence=divergence,
        dtype=dtype,
    )
    # The authors compare means over the intervals, and the first of equals wins: dividing here merges
    # sums that differ in the last bit just as theirs do.
    mean = d / intervals
    pair = torch.arange(rope.pairs, device="cpu")
    best = 1 + torch.argmin(mean[1:], dim=0)
    gain = mean[0] - mean[best, pair]
    if n is None:
        chosen = gain > t / intervals
    else:
        # Of equal gains the slower pair goes first: its angles are the ones that extrapolation leaves unseen.
        order = torch.argsort(gain.flip(0), descending=True, stable=True)
        chosen = torch.zeros(rope.pairs, dtype=torch.bool, device="cpu")
        chosen[rope.pairs - 1 - order[: n // 2]] = True
    best = torch.where(chosen, best, 0)
    settings = {
        "threshold": t if n is None else None,
        "interpolated_dims": n,
        "candidates": [c if isinstance(c, str) else getattr(c, "__name__", repr(c)) for c in candidates],
        "intervals": intervals,
        "smoothing": float(smoothing),
        "divergence": divergence,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Scaling(factors[best, pair], settings=settings, disturbance=d[best, pair])
