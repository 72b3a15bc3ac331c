"""What a key/value cache remembers under a dynamic plan: by which stage its keys are rotated, and their positions."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import Cache

from ..dynamic import DynamicPlan
from ..planning import RopePlan

_RECORD = "_rope_dist_record"
_PIECES = 256
"""Pieces of positions that are kept apart; then they become one."""


class CacheRecord:
    """The stage and the positions of the keys in one cache; it is copied and pickled with the cache.

    Attributes:
        plan: whose stages are meant.
        stage: by which all keys are rotated; None while they are being corrected.
        length: tokens of which the positions are known.
        announced: tokens of a call that :func:`rope_dist.prepare_cache` has made the cache ready for and that has not
            been seen to run, as a compiled one never is.
    """

    def __init__(self, plan: RopePlan | DynamicPlan) -> None:
        self.plan = plan
        self.stage: int | None = 0
        self.length = 0
        self.announced = 0
        self.rotations: Any = None
        self._pieces: list[torch.Tensor] = []

    def write(self, start: int, positions: torch.Tensor) -> None:
        """Positions ``[..., B or 1, S]`` of the tokens from ``start`` on; what was known of later ones is dropped."""
        if start != self.length:
            self.crop(start)
        # The caller may count on in the tensor itself.
        self._pieces.append(positions.detach().clone())
        self.length = start + positions.shape[-1]
        if len(self._pieces) > _PIECES:
            self._pieces = [_joined(self._pieces)]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        if length < self.length:
            known = self.positions(0, length)
            self._pieces, self.length = ([known] if length else []), length
            self.rotations = None

    def positions(self, start: int, end: int) -> torch.Tensor:
        """``[..., B or 1, end - start]`` int64."""
        if len(self._pieces) > 1:
            self._pieces = [_joined(self._pieces)]
        if not self._pieces:
            return torch.empty(1, 0, dtype=torch.int64)
        return self._pieces[0][..., start:end]

    def rows(self, choose: Any) -> None:
        """Give the positions other rows: ``choose`` takes and returns a tensor with the rows first."""
        known = self.positions(0, self.length)
        if self.length and known.shape[-2] > 1:
            self._pieces = [choose(known.transpose(0, -2)).transpose(0, -2)]
            self.rotations = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRecord:
        copied = CacheRecord(self.plan)
        copied.stage, copied.length, copied.announced = self.stage, self.length, self.announced
        copied._pieces = list(self._pieces)  # never changed in place
        return copied


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    rows = max(piece.shape[-2] for piece in pieces)
    return torch.cat([piece.expand(*piece.shape[:-2], rows, -1) for piece in pieces], dim=-1)


class RecordedCache:
    """Mixin of a stock cache: what changes its rows or its length changes the record too."""

    stock: type[Cache]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        record_of(self).rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        record_of(self).rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        record_of(self).rows(lambda x: x[indices.to(x.device)])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        record, left = record_of(self), _tokens_on_cpu(self)
        if left is None:  # no static cache takes anything but the number of tokens to be removed, below 0
            left = record.length + next(iter((*args, *kwargs.values())))
        record.crop(max(left, 0))
        record.announced = 0

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        setattr(self, _RECORD, CacheRecord(record_of(self).plan))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class itself was made in this process; another makes its own from the stock class.
        _, _, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return (_blank, (self.stock,), *rest)


def _blank(stock: type[Cache]) -> Cache:
    cls = _recorded_class(stock)
    return cls.__new__(cls)


@functools.cache
def _recorded_class(stock: type[Cache]) -> type[Cache]:
    body = {"__doc__": stock.__doc__, "__module__": __name__, "stock": stock}
    return type(stock.__name__, (RecordedCache, stock), body)


def record_of(cache: Any) -> CacheRecord | None:
    """The record of a cache, or None."""
    return cache.__dict__.get(_RECORD)


def attach(cache: Cache, record: CacheRecord) -> None:
    """Give a cache its record."""
    setattr(cache, _RECORD, record)
    if not isinstance(cache, RecordedCache):
        cache.__class__ = _recorded_class(type(cache))


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, whose pages hold the keys of several texts."""
    # By its name: importing its module takes a second.
    return type(cache).__name__ == "PagedAttentionCache"


def recorded(cache: Cache, plan: RopePlan | DynamicPlan) -> CacheRecord:
    """The record of a cache under ``plan``; a new one where it has none, or is empty.

    Keys that another model has put there count as the trained model's, at the positions that follow, with a warning.

    Raises:
        ValueError: the cache belongs to another plan, or is longer than the trained model reads and nobody knows how
            its keys were rotated.
        TypeError: not a cache of transformers.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"the plan needs a transformers.Cache, got {type(cache).__name__}, whose keys cannot be corrected"
        )
    record, there = record_of(cache), _tokens_on_cpu(cache)
    if there is None:
        there = int(cache.get_seq_length()) if record is None else record.length
    if there == 0:
        attach(cache, CacheRecord(plan))
        return record_of(cache)
    new = record is None
    if new:
        record = CacheRecord(plan)
    elif record.plan is not plan and record.plan != plan:
        raise ValueError(f"the cache was filled under another plan: {record.plan!r}, the model has {plan!r}")
    if record.stage is None:
        raise ValueError("the correction of this cache was interrupted: its keys cannot be used")
    record.plan = plan
    if there > record.length:
        _count_on(record, there)
    if new:
        attach(cache, record)
    return record


def _count_on(record: CacheRecord, there: int) -> None:
    """Give tokens of another model the positions that follow those known; ``ValueError`` past the trained length."""
    known, most = record.length, record.plan.original_length
    if there > most or record.stage:
        raise ValueError(
            f"the cache has {there} tokens, of which {there - known} were read by another model or plan, and the "
            f"trained model reads {most}: how their keys are rotated is not known"
        )
    warnings.warn(
        f"{there - known} of the {there} tokens in the cache were not read under this plan: they count as the trained "
        "model's, at the positions that follow",
        stacklevel=4,
    )
    last = record.positions(known - 1, known) if known else torch.tensor([[-1]])
    record.write(known, last + torch.arange(1, there - known + 1, device=last.device))


def cached_tokens(cache: Cache, record: CacheRecord, new: int = 0) -> int:
    """Tokens in a cache before a call with ``new`` ones, without waiting for a device that a static cache counts on."""
    there = _tokens_on_cpu(cache)
    if there is not None:
        return there
    return record.length - (record.announced if record.announced == new else 0)


def _tokens_on_cpu(cache: Cache) -> int | None:
    """Tokens in a cache; None where only a device knows."""
    there = cache.get_seq_length()
    if isinstance(there, torch.Tensor) and there.device.type != "cpu":
        return None
    return int(there)
