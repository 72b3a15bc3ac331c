"""The angles of attention by two rotations, of keys that are rotated by the trained frequencies."""

from __future__ import annotations

from typing import NamedTuple

import torch


class WindowAngles(NamedTuple):
    """What rotates queries and keys on to their angles beyond a window.

    Both arrive rotated by float32 products ``position * inv_freq``. At position ``p`` a key is rotated on by
    ``m(p) * change`` and a query by ``(m(p) - m(window)) * change``, with ``m(p) = p``, or with a group size ``G``
    ``m(p) = p // G - p``; and both by what the product lacks of the exact angle.

    Attributes:
        positions: of the queries, ``[B or 1, S]`` int32 or int64, at least 0.
        key_positions: ``[B or 1, T]``.
        inv_freq: ``[R/2]`` float32, the trained frequencies.
        change_q64: ``[2, R/2]`` int32 from :func:`rope_dist.ops.to_fixed_point`: the frequencies beyond the window
            less the trained ones; with a group size, the trained ones.
        window: distances below it are near.
        group: of positions that are divided by it and rounded down; 0: they are not.
        first: of the rotated dimensions, which are the first or the last of a head.
        interleaved: pairs are neighbouring dimensions instead of ``(i, i + R/2)``.
        near_scaling, far_scaling: factors on the rotated dimensions of the queries.
    """

    positions: torch.Tensor
    key_positions: torch.Tensor
    inv_freq: torch.Tensor
    change_q64: torch.Tensor
    window: int
    group: int = 0
    first: int = 0
    interleaved: bool = False
    near_scaling: float = 1.0
    far_scaling: float = 1.0
