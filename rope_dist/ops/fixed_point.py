"""Rotary angles in fixed point: right to 2e-7 at every position to a million and beyond.

A float32 product ``position * inv_freq`` loses the angle as the position grows (3e-2 radians at one
million). Measured in revolutions the whole part does not matter, so integers that wrap lose nothing:
``inv_freq_q64`` is a frequency in Q0.64 revolutions a token, ``inv_freq / 2 pi * 2^64`` modulo 2^64, stored as two
int32. The angle of a position is the upper half of ``position * inv_freq_q64`` modulo 2^64, in units of 2^-32
revolutions. The kernels compute it with two multiplications a frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float64; on the CPU where its device, Apple's MPS, has none."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def to_fixed_point(inv_freq: torch.Tensor) -> torch.Tensor:
    """Frequencies in Q0.64 revolutions a token, as two int32 each.

    Computed on the device of ``inv_freq`` without synchronisation; make it once a model, it is a
    handful of tiny launches. Float64 carries 53 bits, so at position 2^20 the error is below 2^-33 revolutions.

    Args:
        inv_freq: ``[R/2]`` floating, radians a token; or ``[axes, R/2]``, of positions that have several axes (see
            :func:`mrope_frequencies`).

    Returns:
        ``[2, R/2]`` or ``[axes, 2, R/2]`` int32: the upper halves, then the lower. Both are signed (the value is
        ``upper * 2^32 + lower``), so that signed multiplication serves positions of either sign.
    """
    if inv_freq.ndim == 0:
        raise ValueError("inv_freq must be [R/2] or [axes, R/2], got []")
    fraction = to_float64(inv_freq.detach()) / (2 * math.pi)
    scaled = (fraction - fraction.round()) * 2.0**32
    upper = scaled.round()
    lower = ((scaled - upper) * 2.0**32).clamp(-(2.0**31), 2.0**31 - 1)
    # Half a revolution up and down are the same angle; int32 holds only the latter.
    upper = torch.where(upper >= 2.0**31, upper - 2.0**32, upper)
    return torch.stack((upper, lower), dim=-2).to(torch.int64).to(torch.int32).to(inv_freq.device)


def as_fixed_point(inv_freq: torch.Tensor) -> torch.Tensor:
    """:func:`to_fixed_point` of floating frequencies; what it made is returned as it is."""
    return inv_freq if inv_freq.dtype == torch.int32 else to_fixed_point(inv_freq)


def difference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The frequencies ``new - old``, exactly; both as :func:`to_fixed_point` made them, of one shape."""
    upper, lower = (new.to(torch.int64) - old.to(torch.int64)).unbind(-2)
    # Modulo 2^64, as int64 wraps; then the halves anew, the lower one signed.
    value = upper * 2**32 + lower
    lower = ((value + 2**31) & 0xFFFFFFFF) - 2**31
    return torch.stack(((value - lower) >> 32, lower), dim=-2).to(torch.int32)


def angles(inv_freq_q64: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Angles in 2^-32 revolutions, as the kernels compute them.

    Args:
        inv_freq_q64: ``[2, R/2]`` int32 from :func:`to_fixed_point`, or ``[axes, 2, R/2]``.
        positions: integers of any shape, each within int32; with axes, the first of its shape.

    Returns:
        ``[*positions.shape, R/2]`` int64 within ``[-2^31, 2^31)``; of the axes, the sum.
    """
    if inv_freq_q64.ndim == 2:
        inv_freq_q64, positions = inv_freq_q64[None], positions[None]
    high, low = inv_freq_q64.to(torch.int64).unbind(1)
    angle = torch.zeros((), dtype=torch.int64, device=positions.device)
    for axis, position in enumerate(positions.to(torch.int64)[..., None]):
        # Both factors are within 32 bits, so no product leaves 64; >> is a floor.
        angle = angle + position * high[axis] + ((position * low[axis]) >> 32)
        angle &= 0xFFFFFFFF
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
    radians = to_float64(angles(inv_freq_q64, positions)) * (math.pi / 2**31)
    cos, sin = ((x * scaling).to(dtype).to(positions.device) for x in (radians.cos(), radians.sin()))
    return cos, sin


def mrope_frequencies(
    inv_freq: torch.Tensor, mrope_section: Sequence[int], *, interleaved: bool = False
) -> torch.Tensor:
    """Frequencies for positions that have several axes (M-RoPE, Wang et al. 2024: time, height and width).

    Each pair turns by the position on one axis: it has its frequency there, and 0 on the others.

    Args:
        inv_freq: ``[R/2]`` floating, radians a token.
        mrope_section: how many pairs belong to each axis.
        interleaved: the axes take turns, as long as each has pairs left (Qwen3-VL), and what remains is the first's;
            instead of one after the other (Qwen2-VL).

    Returns:
        ``[axes, R/2]`` in the dtype of ``inv_freq``, for :func:`rope_dist.ops.rotary_at` with ``position_ids``
        ``[axes, B, S]``.

    Raises:
        ValueError: sections that are not positive or do not sum up to ``R/2``.
    """
    sections = [int(n) for n in mrope_section]
    if inv_freq.ndim != 1 or min(sections, default=0) < 1 or sum(sections) != inv_freq.shape[0]:
        raise ValueError(
            f"mrope_section must be positive and sum up to the pairs of inv_freq [R/2], got {sections} for "
            f"{list(inv_freq.shape)}"
        )
    pair = torch.arange(inv_freq.shape[0], device=inv_freq.device)
    axes = torch.arange(len(sections), device=inv_freq.device)
    if interleaved:
        ends = torch.tensor(sections, device=inv_freq.device) * len(sections)
        axis = pair % len(sections)
        axis = torch.where(pair < ends[axis], axis, 0)
    else:
        axis = torch.repeat_interleave(axes, torch.tensor(sections, device=inv_freq.device))
    return torch.where(axis == axes[:, None], inv_freq, 0)
