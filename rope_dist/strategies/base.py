"""Arguments and results of every strategy (:class:`PretrainedRope`, :class:`Scaling`), and the checks they share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch


def default_inv_freq(theta: float, rotary_dim: int, factors: torch.Tensor | None = None) -> torch.Tensor:
    """``1 / (factors * theta ** (2i / rotary_dim))`` in float32, in Hugging Face's order of operations.

    Where a factor is 1 the result equals a stock model's ``inv_freq`` bit for bit, and with factors it
    equals what stock ``longrope`` computes from them.

    Args:
        theta: RoPE base, e.g. 10000.0.
        rotary_dim: even number of rotated dimensions of a head.
        factors: ``[rotary_dim / 2]``, or None for all ones.

    Returns:
        ``[rotary_dim / 2]`` float32, radians per token.
    """
    # On the CPU even where a model is being built on the meta device.
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / rotary_dim
    wavelengths = theta**exponents
    if factors is not None:
        wavelengths = factors.to(torch.float32) * wavelengths
    return 1.0 / wavelengths


STILL = float(torch.finfo(torch.float32).max)
"""Factor of a pair that does not rotate (Gemma 4): its wavelength overflows in float32 and its frequency is exactly 0.
A finite number, unlike infinity, is in the JSON of every engine."""


@dataclass(frozen=True)
class PretrainedRope:
    """The rotary embedding that a model was trained with.

    Attributes:
        theta: RoPE base, above 1.
        rotary_dim: rotated dimensions of a head, even.
        length: trained length in tokens (``max_position_embeddings``).
        factors: per-pair factors that are part of the trained model already (Llama 3.1's
            scaling, a YaRN checkpoint), or None for all ones; :data:`STILL` for the last pairs where they do
            not rotate.
        attention_scaling: the factor of cos and sin in the trained model.

    Raises:
        ValueError: a number out of range, or factors of another length.
    """

    theta: float
    rotary_dim: int
    length: int
    factors: tuple[float, ...] | None = None
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.theta, "theta (the RoPE base)")
        if not 1 < self.theta <= MAX_THETA:
            raise ValueError(
                f"theta (the RoPE base) must be a number above 1 and at most {MAX_THETA:g}, got {self.theta!r}"
            )
        check_rotary_dim(self.rotary_dim, "head_dim")
        check_length(self.length, "the original length")
        if self.factors is not None:
            check_factors(torch.tensor(self.factors, dtype=torch.float64, device="cpu"), self.pairs)
            rotating = [i for i, factor in enumerate(self.factors) if factor != STILL]
            if rotating != list(range(max(len(rotating), 1))):
                raise ValueError("pairs that do not rotate must be the last ones, and the first must rotate")
        check_number(self.attention_scaling, "attention_scaling", positive=True)

    @property
    def pairs(self) -> int:
        """Number of rotary pairs, ``rotary_dim / 2``."""
        return self.rotary_dim // 2

    @property
    def base_factors(self) -> torch.Tensor:
        """``[pairs]`` float64, the factors of the trained model (ones where it has none)."""
        if self.factors is None:
            return torch.ones(self.pairs, dtype=torch.float64, device="cpu")
        return torch.tensor(self.factors, dtype=torch.float64, device="cpu")

    @property
    def inv_freq(self) -> torch.Tensor:
        """``[pairs]`` float32, radians per token."""
        return default_inv_freq(self.theta, self.rotary_dim, self.base_factors if self.factors else None)

    def rotating(self) -> PretrainedRope:
        """The pairs that rotate, alone: they have these frequencies by a smaller base."""
        pairs = sum(f != STILL for f in self.factors or ()) or self.pairs
        if pairs == self.pairs:
            return self
        base = self.theta ** (pairs / self.pairs)
        factors = None if self.factors is None else self.factors[:pairs]
        return PretrainedRope(base, 2 * pairs, self.length, factors, self.attention_scaling)


@dataclass(frozen=True)
class Scaling:
    """The result of a strategy.

    Attributes:
        factors: ``[pairs]`` float64, relative to the trained frequencies; all finite and positive.
        attention_scaling: factor of cos and sin, relative to the trained model.
        settings: every setting the strategy ran with, defaults included; JSON types only.
        disturbance: ``[pairs]``, where the strategy had to compute it; None otherwise.
    """

    factors: torch.Tensor
    attention_scaling: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    disturbance: torch.Tensor | None = None


Strategy = Callable[..., Scaling]
"""``(rope: PretrainedRope, target_length: int, *, setting=default, ...) -> Scaling``, as :mod:`rope_dist.strategies`
describes it."""


MAX_LENGTH = 2**31 - 1
"""Tokens: positions are 32-bit integers in most engines."""

MAX_THETA = 1e30
"""Frequencies of a larger base leave float32's range."""


def check_number(value: Any, name: str, *, positive: bool = False) -> float:
    """``float(value)`` if it is a finite number (above 0 where ``positive``), else ``ValueError``."""
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        what = "positive number" if positive else "finite number"
        raise ValueError(f"{name} must be a {what}, got {value!r:.80}")
    return number


def check_whole(value: Any, name: str, least: int, most: int) -> int:
    """``int(value)`` if it is a whole number from ``least`` to ``most``, else ``ValueError``."""
    number = check_number(value, name)
    if number != math.floor(number) or not least <= number <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}")
    return int(value)


def check_rotary_dim(rotary_dim: Any, name: str) -> int:
    """Return ``rotary_dim`` if it is a positive even whole number, else raise ``ValueError``."""
    number = check_number(rotary_dim, name)
    if number != math.floor(number) or not 2 <= number <= 65536 or number % 2:
        raise ValueError(
            f"{name} must be a positive even number of at most 65536 (rotary pairs), got {rotary_dim!r}"
        )
    return int(rotary_dim)


def check_length(length: Any, name: str) -> int:
    """Return ``length`` if it is a whole number of 2 to ``MAX_LENGTH`` tokens, else raise ``ValueError``."""
    number = check_number(length, name)
    if number != math.floor(number) or not 2 <= number <= MAX_LENGTH:
        raise ValueError(
            f"{name} must be a whole number of at least 2 tokens and at most {MAX_LENGTH}, got {length!r:.80}"
        )
    return int(length)


def check_factors(factors: torch.Tensor, pairs: int) -> torch.Tensor:
    """Return ``factors`` if it is ``[pairs]`` finite positive numbers, else raise ``ValueError``."""
    if factors.ndim != 1 or factors.numel() != pairs:
        raise ValueError(
            f"factors must be {pairs} numbers, one per rotary pair, got shape {list(factors.shape)}"
        )
    bad = torch.nonzero(~(torch.isfinite(factors) & (factors > 0))).flatten()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(f"factors must be finite and positive, got {float(factors[i])} for pair {i}")
    return factors


def scale_of(rope: PretrainedRope, target_length: int) -> float:
    """``s = target_length / rope.length``; ``ValueError`` unless the target is a length of at least ``rope.length``."""
    check_length(target_length, "the target length")
    if target_length < rope.length:
        raise ValueError(
            f"the target length {target_length} is below the original length {rope.length}: "
            "a strategy only extends, give a target of at least the original length"
        )
    return target_length / rope.length
