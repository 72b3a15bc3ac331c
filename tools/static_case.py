"""What the static gate checks: a kernel in one use, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rope_dist.ops.arguments import Angles

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A kernel in one use, the architectures it is for, and its limits.

    Attributes:
        least, most: limits on a number of :func:`numbers`, by its name.
    """

    name: str
    call: Callable[[str], Any]
    targets: tuple[str, ...]
    most: dict[str, int] = field(default_factory=dict)
    least: dict[str, int] = field(default_factory=dict)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor of ``shape`` without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def angles(tokens: int, rotary_dim: int, table: bool, axes: int = 0, **options: Any) -> Angles:
    """Angles of ``tokens`` of one sequence; ``axes`` of M-RoPE's positions."""
    num_pairs = rotary_dim // 2
    if table:
        cos, sin = (meta(1, tokens, num_pairs, dtype=torch.float32) for _ in range(2))
        return Angles(cos, sin, **options)
    first = (axes,) if axes else ()
    inv_freq_q64 = meta(*first, 2, num_pairs, dtype=torch.int32)
    positions = meta(*first, 1, tokens, dtype=torch.int64)
    return Angles(inv_freq_q64=inv_freq_q64, positions=positions, **options)
