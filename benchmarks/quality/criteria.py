"""Criteria that were tried on the way to ``auto``, beside the paper's: what they choose is read in ``tuning.py``.

The paper (Wu et al., EMNLP 2024) compares, pair by pair, the distribution of the angles of all positions. Two
objections to that are made exact here: attention sees distances and not positions, and a token has the angles of all
pairs at once.
"""

import math

import torch

# A cell of few positions is empty by chance: what each cell's count starts at, in positions.
SMOOTHING = 0.01


def by_distance(
    inv_freq: torch.Tensor, length: int, target_length: int, *, intervals: int = 360, threshold: float = 5e-4
) -> list[float]:
    """Eq. 9 on the angles of distances: of ``n`` tokens ``n - d`` pairs are ``d`` apart.

    ``inv_freq`` ``[pairs]`` in radians a token; ``threshold``: nats that a pair has to gain to be interpolated.
    Returns 1 or ``s = target_length / length`` for each pair.
    """
    s = target_length / length
    before = _distances(inv_freq, length, intervals)
    kept, interpolated = (
        _divergence(before, _distances(inv_freq / factor, target_length, intervals)) for factor in (1, s)
    )
    return torch.where(kept > interpolated + threshold, s, 1.0).tolist()


def of_neighbours(
    inv_freq: torch.Tensor, length: int, target_length: int, *, cells: int = 24, steps: int = 4
) -> list[float]:
    """The factors whose joint distribution of neighbouring pairs is least disturbed, over all chains of factors.

    The angles of pairs ``i`` and ``i + 1`` at a position are a point of a torus of ``cells x cells``. The sum of the
    disturbances of all neighbours is minimised exactly, along the chain of pairs. Factors to choose from are
    ``s ** (k / steps)``, k from 0 to ``steps``; returns one for each pair.
    """
    s = target_length / length
    factors = [s ** (k / steps) for k in range(steps + 1)]
    before = _cells(inv_freq, length, cells)
    after = [_cells(inv_freq / factor, target_length, cells) for factor in factors]
    best, choices = torch.zeros(len(factors), dtype=torch.float64), []
    for i in range(len(inv_freq) - 1):
        seen = _joint(before[i], before[i + 1], cells)
        cost = torch.stack(
            [torch.stack([_divergence(seen, _joint(a[i], b[i + 1], cells)) for b in after]) for a in after]
        )
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    chosen = [int(best.argmin())]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return [factors[k] for k in reversed(chosen)]


def _cells(inv_freq: torch.Tensor, length: int, cells: int) -> torch.Tensor:
    """``[pairs, length]``: in which part of the circle each position is."""
    revolutions = inv_freq.double()[:, None] * torch.arange(length, dtype=torch.float64) / (2 * math.pi)
    return (revolutions.remainder(1) * cells).floor().clamp(max=cells - 1).long()


def _distances(inv_freq: torch.Tensor, length: int, intervals: int) -> torch.Tensor:
    """``[pairs, intervals]``: how many pairs of positions have a distance whose angle is there, over ``length``."""
    weights = (length - torch.arange(length, dtype=torch.float64)) / length
    where = _cells(inv_freq, length, intervals)
    counts = torch.zeros(len(inv_freq), intervals, dtype=torch.float64)
    return counts.scatter_add_(1, where, weights.expand(where.shape))


def _joint(a: torch.Tensor, b: torch.Tensor, cells: int) -> torch.Tensor:
    """``[cells * cells]``: positions in each cell of the torus."""
    return torch.bincount(a * cells + b, minlength=cells * cells).double()


def _divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before || after) in nats of counts ``[..., cells]``."""
    p, q = ((x + SMOOTHING) / (x + SMOOTHING).sum(-1, keepdim=True) for x in (before, after))
    return (p * (p / q).log()).sum(-1)
