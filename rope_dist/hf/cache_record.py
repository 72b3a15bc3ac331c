"""What a key/value cache remembers under a dynamic plan: by which stage its keys are rotated, and their positions."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import Cache

from ..dynamic import DynamicPlan

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

    def __init__(self, plan: DynamicPlan) -> None:
        self.plan = plan
        self.stage: int | None = 0
        self.length = 0
        self.announced = 0
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
        tokens = next(iter((*args, *kwargs.values())))
        record = record_of(self)
        had = record.length
        # Below 0: to be removed; above, in older versions: to be kept.
        record.crop(max(had + tokens, 0) if tokens <= 0 else min(had, tokens))
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
    cache.__class__ = _recorded_class(type(cache))


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, whose pages hold the keys of several texts."""
    # By its name: importing its module takes a second.
    return type(cache).__name__ == "PagedAttentionCache"


def recorded(cache: Cache, plan: DynamicPlan) -> CacheRecord:
    """The record of a cache under ``plan``; a new one where it has none.

    Keys that are there already count as the trained model's, from position 0 on, with a warning.

    Raises:
        ValueError: the cache belongs to another plan, or is longer than the trained model reads and nobody knows how
            its keys were rotated.
        TypeError: not a cache of transformers.
    """
    record = record_of(cache) if isinstance(cache, Cache) else None
    if record is None:
        if not isinstance(cache, Cache):
            raise TypeError(f"a dynamic plan needs a cache of transformers, got {type(cache).__name__}")
        record, there = CacheRecord(plan), int(cache.get_seq_length())
        if there > plan.original_length:
            raise ValueError(
                f"the cache has {there} tokens, more than the {plan.original_length} of the trained model, and was "
                "filled by another model or plan: how its keys are rotated is not known"
            )
        if there:
            warnings.warn(
                f"the {there} tokens in the cache were not read under this plan: they count as positions 0 to "
                f"{there - 1} of the trained model",
                stacklevel=2,
            )
            record.write(0, torch.arange(there)[None])
        attach(cache, record)
    if record.plan is not plan:
        if record.plan != plan:
            raise ValueError(
                f"the cache was filled under another plan: {record.plan!r}, the model has {plan!r}"
            )
        record.plan = plan
    if record.stage is None:
        raise ValueError("the correction of this cache was interrupted: its keys cannot be used")
    return record


def cached_tokens(cache: Cache, record: CacheRecord, new: int = 0) -> int:
    """Tokens in a cache before a call with ``new`` ones, without waiting for a device that a static cache counts on."""
    there = cache.get_seq_length()
    if not isinstance(there, torch.Tensor):
        return there
    if there.device.type == "cpu":
        return int(there)
    return record.length - (record.announced if record.announced == new else 0)
