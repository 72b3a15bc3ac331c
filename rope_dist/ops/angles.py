"""Rotary angles as fixed-point turns: right to 2e-7 at every position to a million and beyond.

A float32 product ``position * inv_freq`` loses the angle as the position grows (3e-2 radians at one
million). Measured in turns the whole part does not matter, so integers that wrap lose nothing:
``turns = floor(frac(inv_freq / 2 pi) * 2^64)`` held as two 32-bit words, and the angle of a position is
the upper word of ``position * turns`` modulo 2^64, in units of 2^-32 turns. The kernels compute it with
one multiplication and one high multiplication a frequency.
"""

from __future__ import annotations

import math

import torch


def turns(inv_freq: torch.Tensor) -> torch.Tensor:
    """Frequencies as 64-bit fixed-point turns a token, in two 32-bit words.

    Computed on the device of ``inv_freq`` without synchronisation; make it once a model, it is a
    handful of tiny launches. Float64 carries 53 bits, so at position 2^20 the error is below 2^-33 turns.

    Args:
        inv_freq: ``[R/2]`` floating, radians a token.

    Returns:
        ``[2, R/2]`` int32: the upper words, then the lower words (as bit patterns).
    """
    fraction = inv_freq.detach().to(torch.float64) / (2 * math.pi)
    high = (fraction - fraction.floor()) * 2.0**32
    low = (high - high.floor()) * 2.0**32
    words = torch.stack((high.floor(), low.floor())).to(torch.int64)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def angles(words: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Angles in 2^-32 turns, as the kernels compute them.

    Args:
        words: ``[2, R/2]`` int32 from :func:`turns`.
        positions: integers of any shape, each within int32.

    Returns:
        ``[*positions.shape, R/2]`` int64 within ``[-2^31, 2^31)``.
    """
    high = words[0].to(torch.int64)
    low = words[1].to(torch.int64) & 0xFFFFFFFF
    positions = positions.to(torch.int64)[..., None]
    # |position| < 2^31 and low < 2^32, so neither product leaves 64 bits; >> is a floor.
    angle = (positions * high + ((positions * low) >> 32)) & 0xFFFFFFFF
    return torch.where(angle >= 2**31, angle - 2**32, angle)


def tables(
    words: torch.Tensor, positions: torch.Tensor, scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin`` of :func:`angles`, times ``scaling``, computed in float64 and rounded once.

    Returns:
        Two tensors ``[*positions.shape, R/2]`` in ``dtype``.
    """
    radians = angles(words, positions).to(torch.float64) * (math.pi / 2**31)
    return (radians.cos() * scaling).to(dtype), (radians.sin() * scaling).to(dtype)
