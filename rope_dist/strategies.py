"""Context-extension strategies: a pre-trained rotary embedding in, one factor a pair out.

Every strategy is a plain function of one signature,

    ``strategy(rope: PretrainedRope, target_length: int, **settings) -> Scaling``

and :data:`STRATEGIES` holds them under their names. A factor ``f_i >= 1`` slows pair ``i`` down:
it turns at ``theta_i / f_i`` radians a token after the extension. ``s`` is always
``target_length / rope.length``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .distribution import (
    DEFAULT_INTERVALS,
    DEFAULT_SMOOTHING,
    Divergence,
    check_divergence,
    check_dtype,
    check_intervals,
    disturbances,
)


def default_inv_freq(theta: float, rotary_dim: int, factors: torch.Tensor | None = None) -> torch.Tensor:
    """``1 / (factors * theta ** (2i / rotary_dim))`` in float32, in Hugging Face's order of operations.

    Where a factor is 1 the result equals a stock model's ``inv_freq`` bit for bit, and with factors it
    equals what stock ``longrope`` computes from them.

    Args:
        theta: RoPE base, e.g. 10000.0.
        rotary_dim: even number of rotated dimensions of a head.
        factors: ``[rotary_dim / 2]``, or None for all ones.

    Returns:
        ``[rotary_dim / 2]`` float32, radians a token.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    wavelengths = theta**exponents
    if factors is not None:
        wavelengths = factors.to(torch.float32) * wavelengths
    return 1.0 / wavelengths


@dataclass(frozen=True)
class PretrainedRope:
    """The rotary embedding that a model was trained with.

    Attributes:
        theta: RoPE base, above 1.
        rotary_dim: rotated dimensions of a head, even.
        length: trained length in tokens (``max_position_embeddings``).
        factors: per-pair factors that are part of the trained model already (Llama 3.1's
            scaling, a YaRN checkpoint), or None for all ones.
        attention_scaling: what the trained model multiplies cos and sin by.

    Raises:
        ValueError: a number out of range, or factors of another length.
    """

    theta: float
    rotary_dim: int
    length: int
    factors: tuple[float, ...] | None = None
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 1):
            raise ValueError(f"theta (the RoPE base) must be a finite number above 1, got {self.theta!r}")
        check_rotary_dim(self.rotary_dim, "head_dim")
        check_length(self.length, "the original length")
        if self.factors is not None:
            check_factors(torch.tensor(self.factors, dtype=torch.float64), self.pairs)
        if not (math.isfinite(self.attention_scaling) and self.attention_scaling > 0):
            raise ValueError(f"attention_scaling must be positive, got {self.attention_scaling!r}")

    @property
    def pairs(self) -> int:
        """Number of rotary pairs, ``rotary_dim / 2``."""
        return self.rotary_dim // 2

    @property
    def base_factors(self) -> torch.Tensor:
        """``[pairs]`` float64, the factors of the trained model (ones where it has none)."""
        if self.factors is None:
            return torch.ones(self.pairs, dtype=torch.float64)
        return torch.tensor(self.factors, dtype=torch.float64)

    @property
    def inv_freq(self) -> torch.Tensor:
        """``[pairs]`` float32, radians a token."""
        return default_inv_freq(self.theta, self.rotary_dim, self.base_factors if self.factors else None)


@dataclass(frozen=True)
class Scaling:
    """What a strategy decides.

    Attributes:
        factors: ``[pairs]`` float64, relative to the trained frequencies; all finite and positive.
        attention_scaling: what cos and sin are to be multiplied by, relative to the trained model.
        settings: every setting the strategy ran with, defaults included; JSON types only.
        disturbance: ``[pairs]``, where the strategy had to compute it; None otherwise.
    """

    factors: torch.Tensor
    attention_scaling: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    disturbance: torch.Tensor | None = None


Strategy = Callable[..., Scaling]


def check_rotary_dim(rotary_dim: int, name: str) -> int:
    """Return ``rotary_dim`` if it is a positive even whole number, else raise ``ValueError``."""
    if isinstance(rotary_dim, bool) or int(rotary_dim) != rotary_dim or rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"{name} must be a positive even number (rotary pairs), got {rotary_dim!r}")
    return int(rotary_dim)


def check_length(length: int, name: str) -> int:
    """Return ``length`` if it is a whole number of at least 2 tokens, else raise ``ValueError``."""
    if isinstance(length, bool) or not math.isfinite(length) or int(length) != length or length < 2:
        raise ValueError(f"{name} must be a whole number of at least 2 tokens, got {length!r}")
    return int(length)


def check_factors(factors: torch.Tensor, pairs: int) -> torch.Tensor:
    """Return ``factors`` if it is ``[pairs]`` finite positive numbers, else raise ``ValueError``."""
    if factors.ndim != 1 or factors.numel() != pairs:
        raise ValueError(
            f"factors must be {pairs} numbers, one a rotary pair, got shape {list(factors.shape)}"
        )
    bad = torch.nonzero(~(torch.isfinite(factors) & (factors > 0))).flatten()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(f"factors must be finite and positive, got {float(factors[i])} for pair {i}")
    return factors


def scale_of(rope: PretrainedRope, target_length: int) -> float:
    """``s = target_length / rope.length``; ``ValueError`` where the target is not a length or below 1."""
    check_length(target_length, "the target length")
    if target_length < rope.length:
        raise ValueError(
            f"the target length {target_length} is below the original length {rope.length}: "
            "a strategy only extends, give a target of at least the original length"
        )
    return target_length / rope.length


def _pair_index(rope: PretrainedRope) -> torch.Tensor:
    return torch.arange(rope.pairs, dtype=torch.float64)


def extrapolation(rope: PretrainedRope, target_length: int) -> Scaling:
    """Leave every frequency as trained and read on (Press et al. 2022 call it direct extrapolation)."""
    scale_of(rope, target_length)
    return Scaling(torch.ones(rope.pairs, dtype=torch.float64))


def pi(rope: PretrainedRope, target_length: int) -> Scaling:
    """Position interpolation (Chen et al. 2023): every factor is ``s``."""
    s = scale_of(rope, target_length)
    return Scaling(torch.full((rope.pairs,), s, dtype=torch.float64))


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
    factor = s if factor is None else float(factor)
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"dynamic-ntk's factor must be at least 1, got {factor}")
    return Scaling(_base_change(rope, factor * s - (factor - 1)), settings={"factor": factor})


def _base_change(rope: PretrainedRope, scale: float) -> torch.Tensor:
    """Factors of ``theta -> theta * scale ** (d / (d - 2))``: pair i gets ``scale ** (2i / (d - 2))``."""
    if rope.rotary_dim == 2:
        # One pair is fastest and slowest at once; the formula divides by zero there.
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

    Pairs that turn more than ``beta_fast`` times within the trained length stay, pairs that turn less
    than ``beta_slow`` times are interpolated by ``s``; between, the frequency is mixed linearly in the
    dimension index. cos and sin are multiplied by ``0.1 ln s + 1`` (the paper's temperature, eq. 22).

    Args:
        beta_fast, beta_slow: turns within the trained length, ``beta_fast > beta_slow > 0``.
        attention_factor: replaces ``0.1 ln s + 1``.
        truncate: round the ramp's bounds outwards to whole dimensions, as Hugging Face does.
    """
    s = scale_of(rope, target_length)
    if not (math.isfinite(beta_fast) and beta_fast > beta_slow > 0):
        raise ValueError(f"yarn needs beta_fast > beta_slow > 0, got {beta_fast} and {beta_slow}")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(s) + 1.0
    if not (math.isfinite(attention_factor) and attention_factor > 0):
        raise ValueError(f"yarn's attention_factor must be positive, got {attention_factor}")

    def dimension_of(turns: float) -> float:
        return rope.rotary_dim * math.log(rope.length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

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

    Pairs that turn more than ``high_freq_factor`` times within the trained length stay, pairs that turn
    less than ``low_freq_factor`` times are interpolated; between, linear in the number of turns.

    Args:
        factor: what slow pairs are divided by, at least 1; by default ``s`` (Llama 3.1 itself takes 8
            for 16 times the length).
        low_freq_factor, high_freq_factor: turns within the trained length, the second the larger.
    """
    s = scale_of(rope, target_length)
    factor = s if factor is None else float(factor)
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"llama3's factor must be at least 1, got {factor}")
    if not (math.isfinite(high_freq_factor) and high_freq_factor > low_freq_factor > 0):
        raise ValueError(
            f"llama3 needs high_freq_factor > low_freq_factor > 0, got {high_freq_factor} and {low_freq_factor}"
        )
    turns = rope.length * rope.inv_freq.double() / (2 * math.pi)
    smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
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
    """LongRoPE (Ding et al. 2024): per-pair factors found elsewhere, here given.

    Args:
        factors: ``[pairs]``, e.g. the ``long_factor`` of a published config. Required.
        attention_factor: by default ``sqrt(1 + ln s / ln L)``, as Hugging Face's ``longrope``.
    """
    s = scale_of(rope, target_length)
    if factors is None:
        raise ValueError(f"longrope needs factors={rope.pairs} numbers (the config's long_factor)")
    given = check_factors(torch.as_tensor(factors, dtype=torch.float64), rope.pairs)
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(s) / math.log(rope.length))
    if not (math.isfinite(attention_factor) and attention_factor > 0):
        raise ValueError(f"longrope's attention_factor must be positive, got {attention_factor}")
    settings = {"factors": given.tolist(), "attention_factor": float(attention_factor)}
    return Scaling(given.clone(), float(attention_factor), settings)


DPROPE_THRESHOLDS = {"paper-2x": 5e-4, "paper-4x": 2e-3}
"""The paper's defaults "by adjusting t": 80 interpolated dimensions of LLaMA2 at 8k, 64 at 16k."""

Candidate = str | Callable[[PretrainedRope, int], Scaling]


def default_threshold(scale: float) -> float:
    """The threshold :func:`dprope` uses where none is given.

    The paper's 5e-4 at 2x and 2e-3 at 4x; between them linear in ``log scale``, outside held.
    """
    low, high = DPROPE_THRESHOLDS["paper-2x"], DPROPE_THRESHOLDS["paper-4x"]
    position = min(max(math.log2(scale) - 1, 0.0), 1.0)
    return low + (high - low) * position


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
        threshold: ``t`` in nats a pair, at least 0, or ``"paper-2x"`` / ``"paper-4x"``.
        interpolated_dims: the paper's ``n``, instead of ``t``: how many dimensions (two a pair) leave
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
    check_divergence(divergence)
    dtype = check_dtype(dtype)
    if threshold is not None and interpolated_dims is not None:
        raise ValueError("give the threshold t or the number of interpolated dimensions n, not both")
    if isinstance(candidates, str) or len(candidates) < 2:
        raise ValueError(f"dprope needs at least two candidate strategies, got {candidates!r}")
    if interpolated_dims is not None:
        if int(interpolated_dims) != interpolated_dims or not 0 <= interpolated_dims <= rope.rotary_dim:
            raise ValueError(f"interpolated_dims must be 0 to {rope.rotary_dim}, got {interpolated_dims!r}")
        if interpolated_dims % 2:
            raise ValueError(
                f"interpolated_dims must be even (two dimensions a pair), got {interpolated_dims}"
            )
    elif threshold is None:
        threshold = default_threshold(s)
    elif isinstance(threshold, str):
        if threshold not in DPROPE_THRESHOLDS:
            raise ValueError(
                f"threshold must be a number or one of {', '.join(DPROPE_THRESHOLDS)}, got {threshold!r}"
            )
        threshold = DPROPE_THRESHOLDS[threshold]
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold must be a finite number of at least 0, got {threshold!r}")

    functions = [get_strategy(c) if isinstance(c, str) else c for c in candidates]
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
    pair = torch.arange(rope.pairs)
    best = 1 + torch.argmin(mean[1:], dim=0)
    gain = mean[0] - mean[best, pair]
    if interpolated_dims is None:
        chosen = gain > threshold / intervals
    else:
        # Of equal gains the slower pair goes first: it is the one that extrapolation leaves unseen.
        order = torch.argsort(gain.flip(0), descending=True, stable=True)
        chosen = torch.zeros(rope.pairs, dtype=torch.bool)
        chosen[rope.pairs - 1 - order[: interpolated_dims // 2]] = True
    best = torch.where(chosen, best, 0)
    settings = {
        "threshold": None if threshold is None else float(threshold),
        "interpolated_dims": interpolated_dims,
        "candidates": [c if isinstance(c, str) else getattr(c, "__name__", repr(c)) for c in candidates],
        "intervals": intervals,
        "smoothing": float(smoothing),
        "divergence": divergence,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Scaling(factors[best, pair], settings=settings, disturbance=d[best, pair])


STRATEGIES: dict[str, Strategy] = {
    "extrapolation": extrapolation,
    "pi": pi,
    "ntk": ntk,
    "dynamic-ntk": dynamic_ntk,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
    "dprope": dprope,
}


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; ``ValueError`` naming the known ones otherwise."""
    try:
        return STRATEGIES[name]
    except KeyError:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}") from None
