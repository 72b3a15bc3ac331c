"""Rotary angles in fixed point: right to 2e-7 at every position to a million and beyond.

A float32 product ``position * inv_freq`` loses the angle as the position grows (3e-2 radians at one
million). Measured in revolutions the whole part does not matter, so integers that wrap lose nothing:
``inv_freq_q64`` is a frequency in Q0.64 revolutions a token, ``inv_freq / 2 pi * 2^64`` modulo 2^64, stored as two
int32. The angle of a position is the upper half of ``position * inv_freq_q64`` modulo 2^64, in units of 2^-32
revolutions. The kernels compute it with two multiplications a frequency.
"""

from __future__ import annotations

import math

import torch


def to_fixed_point(inv_freq: torch.Tensor) -> torch.Tensor:
    """Frequencies in Q0.64 revolutions a token, as two int32 each.

    Computed on the device of ``inv_freq`` without synchronisation; make it once a model, it is a
    handful of tiny launches. Float64 carries 53 bits, so at position 2^20 the error is below 2^-33 revolutions.

    Args:
        inv_freq: ``[R/2]`` floating, radians a token.

    Returns:
        ``[2, R/2]`` int32: the upper halves, then the lower. Both are signed (the value is
        ``upper * 2^32 + lower``), so that signed multiplication serves positions of either sign.
    """
    fraction = inv_freq.detach().to(torch.float64) / (2 * math.pi)
    scaled = (fraction - fraction.round()) * 2.0**32
    upper = scaled.round()
    lower = ((scaled - upper) * 2.0**32).clamp(-(2.0**31), 2.0**31 - 1)
    # Half a revolution up and down are the same angle; int32 holds only the latter.
    upper = torch.where(upper >= 2.0**31, upper - 2.0**32, upper)
    return torch.stack((upper, lower)).to(torch.int64).to(torch.int32)


def as_fixed_point(inv_freq: torch.Tensor) -> torch.Tensor:
    """:func:`to_fixed_point` of floating frequencies; what it made is returned as it is."""
    return inv_freq if inv_freq.dtype == torch.int32 else to_fixed_point(inv_freq)


def angles(inv_freq_q64: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Angles in 2^-32 revolutions, as the kernels compute them.

    Args:
        inv_freq_q64: ``[2, R/2]`` int32 from :func:`to_fixed_point`.
        positions: integers of any shape, each within int32.

    Returns:
        ``[*positions.shape, R/2]`` int64 within ``[-2^31, 2^31)``.
    """
    high = inv_freq_q64[0].to(torch.int64)
    low = inv_freq_q64[1].to(torch.int64)
    positions = positions.to(torch.int64)[..., None]
    # Both factors are within 32 bits, so no product leaves 64; >> is a floor.
    angle = (positions * high + ((positions * low) >> 32)) & 0xFFFFFFFF
    return torch.where(angle >= 2**31, angle - 2**32, angle)


def tables(
    inv_freq_q64: torch.Tensor,
    positions: torch.Tensor,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin`` of :func:`angles`, times ``scaling``, computed in float64 and rounded once.

    Returns:
        Two tensors ``[*positions.shape, R/2]`` in ``dtype``.
    """
    radians = angles(inv_freq_q64, positions).to(torch.float64) * (math.pi / 2**31)
    return (radians.cos() * scaling).to(dtype), (radians.sin() * scaling).to(dtype)
