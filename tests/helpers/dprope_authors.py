"""The procedure of Wu et al. (EMNLP 2024), position by position: the reference for the vectorised count.

Written anew from its description (their published code counts float32 angles into intervals, starts
every count at the smallest normal float16 and takes torch's kl_div with P pre-trained, Q extended).
"""

import math

import torch
import torch.nn.functional as F


def angle_counts(inv_freq: torch.Tensor, length: int, intervals: int) -> torch.Tensor:
    counts = torch.full((inv_freq.numel(), intervals), torch.finfo(torch.float16).tiny)
    for pair, frequency in enumerate(inv_freq):
        for position in range(length):
            angle = (frequency * position) % (2 * math.pi)
            counts[pair, int(torch.floor(intervals / (2 * math.pi) * angle))] += 1
    return counts / length


def factors(theta: float, length: int, head_dim: int, scale: int, intervals: int) -> torch.Tensor:
    """Eq. 9 at t = 0, ``[head_dim / 2]``; IndexError where an angle rounds up to a whole turn."""
    inv_freq = 1 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    before = angle_counts(inv_freq, length, intervals)
    similarity = []
    for frequencies in (inv_freq, inv_freq / scale):
        after = angle_counts(frequencies, length * scale, intervals)
        # Means over the intervals of one pair at a time, as theirs: the last bit decides near ties.
        rows = zip(before, after, strict=True)
        similarity.append(torch.stack([F.kl_div(q.log(), p, reduction="sum") / intervals for p, q in rows]))
    interpolated = torch.stack(similarity).argmin(0) == 1
    return torch.where(interpolated, float(scale), 1.0)
