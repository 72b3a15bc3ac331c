"""Which keys each block of queries sees within a window and beyond it, and by which mask.

Made once for a call of a model, and shared by all its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 256
"""Queries at a time: long enough for fast matrix products, short enough for little waste at the edges of the window."""


@dataclass(frozen=True)
class Piece:
    """Keys ``start <= j < end`` that a block of queries sees by one rotation.

    Attributes:
        far: the rotation is that beyond the window.
        masked: not every query of the block sees all of them.
    """

    far: bool
    start: int
    end: int
    masked: bool


class WindowBlocks:
    """The near and far keys of every block of queries, by distance ``position - key_position``.

    Distances below ``window`` are near, all others far. What a query sees is decided by ``mask``, or without one by
    the order of the tokens: the queries are the last of the keys, and each sees itself and those before it.

    Attributes:
        contiguous: neighbouring keys are neighbours in position, and there is no mask: a distance is one in tokens.
        blocks: first and last + 1 query of each block, and its pieces.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        key_positions: torch.Tensor,
        window: int,
        mask: torch.Tensor | None = None,
        block: int = BLOCK,
    ) -> None:
        """Sort the keys.

        Args:
            positions: of the queries, ``[B or 1, S]`` whole numbers.
            key_positions: ``[B or 1, T]``, ``T >= S``.
            window: in tokens, at least 0 (all distances are far then).
            mask: ``[B or 1, 1, S, T]``; bool, True where a query sees a key, or to be added to the logits, 0 there.

        Raises:
            ValueError: shapes that do not fit, or a mask that is more than a choice of keys.
        """
        self.window, self.size = window, block
        self.queries, self.keys = positions.shape[-1], key_positions.shape[-1]
        self.offset = self.keys - self.queries
        if self.offset < 0:
            raise ValueError(f"there are {self.queries} queries and only {self.keys} keys")
        self.mask = None if mask is None else visible_keys(mask, self.queries, self.keys)
        self.positions, self.key_positions = positions, key_positions
        on_cpu = positions.cpu(), key_positions.cpu()
        self.contiguous = self.mask is None and _contiguous(*on_cpu)
        self.blocks = list(self._blocks(*on_cpu))
        self._masks: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def _blocks(
        self, positions: torch.Tensor, key_positions: torch.Tensor
    ) -> Iterator[tuple[int, int, list[Piece]]]:
        # Of all rows of the batch together: a key that is near in one row and far in another is masked.
        first, last = key_positions.amin(0), key_positions.amax(0)
        order = torch.arange(self.keys, device="cpu")
        for start in range(0, self.queries, self.size):
            end = min(start + self.size, self.queries)
            block = positions[:, start:end]
            some_near = block.min() - last < self.window
            some_far = block.max() - first >= self.window
            if self.mask is None:
                seen, all_see = order < end + self.offset, order <= start + self.offset
            else:
                rows = self.mask[:, 0, start:end]
                seen, all_see = rows.any(1).any(0).cpu(), rows.all(1).all(0).cpu()
            whole = all_see & ~(some_near & some_far)
            pieces = [
                Piece(far, k0, k1, masked)
                for far, some in ((True, some_far), (False, some_near))
                for k0, k1, masked in _runs(some & seen, whole)
            ]
            yield start, end, pieces

    def bias(
        self, start: int, end: int, piece: Piece, groups: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What to add to the logits of a masked piece, and the queries that see none of its keys.

        Args:
            start, end: of the block of queries.
            groups: queries that share a key, which follow one another.

        Returns:
            ``[B or 1, 1, groups * (end - start), keys]`` float32 of 0 and minus infinity, and
            ``[B or 1, 1, groups * (end - start)]`` bool.
        """
        key = (piece.far, piece.start - start, piece.end - start, end - start, groups, device)
        if key in self._masks:
            return self._masks[key]
        keys = slice(piece.start, piece.end)
        distance = self.positions[:, start:end, None] - self.key_positions[:, None, keys]
        seen = distance >= self.window if piece.far else distance < self.window
        if self.mask is None:
            query = torch.arange(start, end, device=seen.device)[:, None] + self.offset
            seen = seen & (query >= torch.arange(piece.start, piece.end, device=seen.device))
        else:
            seen = seen & self.mask[:, 0, start:end, keys]
        seen = seen[:, None].expand(-1, groups, -1, -1).flatten(1, 2)[:, None].to(device)
        bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))
        made = bias, ~seen.any(-1)
        if self.contiguous:  # one for all blocks
            self._masks[key] = made
        return made


def visible_keys(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor | None:
    """A mask ``[B or 1, 1, S, T or more]`` as bool ``[B or 1, 1, S, T]``; None where it is the order of the tokens.

    Raises:
        ValueError: another shape, or a mask that is more than a choice of keys.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != queries or mask.shape[3] < keys:
        raise ValueError(
            f"the mask must be [B, 1, {queries}, {keys}], the same for all heads, got {list(mask.shape)}"
        )
    mask = mask[..., :keys]
    seen = mask
    if mask.dtype != torch.bool:
        seen = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask.masked_fill(~seen, 0.0) != 0).any()):
            raise ValueError("the mask adds a bias to the logits: which distances it is for is not known")
    causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril_(keys - queries)
    return None if bool((seen == causal).all()) else seen


def _contiguous(positions: torch.Tensor, key_positions: torch.Tensor) -> bool:
    queries = positions.shape[-1]
    steps = key_positions.diff(dim=-1) == 1
    return bool(steps.all()) and bool((key_positions[:, -queries:] == positions).all())


def _runs(needed: torch.Tensor, whole: torch.Tensor) -> Iterator[tuple[int, int, bool]]:
    """Runs of neighbouring keys that are needed, those that need no mask apart: start, end, masked."""
    kind = needed.to(torch.int8) * (1 + (~whole).to(torch.int8))
    values, counts = torch.unique_consecutive(kind, return_counts=True)
    start = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value:
            yield start, start + count, value == 2
        start += count
