"""The stage of a dynamic plan by which a call reads, and the call that runs in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..dynamic import DynamicPlan
from .cache_record import CacheRecord
from .cached_keys import CachedKeys

BACK = 1 / 16
"""A cache that was cropped goes back to an earlier stage once it is shorter than that stage by this share.

Assisted generation crops every few tokens: a cache near the end of a stage would be corrected to and fro.
"""


@dataclass
class Growth:
    """What a decoder with a dynamic plan keeps: plain values, so that it copies and pickles.

    Attributes:
        plan: its plan.
        rotary: name of the rotary embedding among the decoder's modules.
        layer_type: of the layers that the plan is for, or None.
        layers: index in the cache of each layer whose keys are corrected, and what they have of the rotation.
        tables: how stock's tables hold their values (:class:`rope_dist.hf.forms.Form`).
        negative: stock rotates by the angles' negatives.
        others: names of those of the other layers, where each has its own.
        by_hand: calls of compiled graphs are prepared by :func:`rope_dist.prepare_cache`.
    """

    plan: DynamicPlan
    rotary: str
    layer_type: str | None
    layers: dict[int, CachedKeys]
    tables: str
    negative: bool
    others: tuple[str, ...] = ()
    by_hand: bool = False

    def stage(self, tokens: int, before: int = 0) -> int:
        """The stage for ``tokens`` in all, of a text that was read by the stage ``before``."""
        plan = self.plan
        stage = plan.stage(max(tokens, expected_length(), 1))
        while stage < before and tokens > plan.lengths[stage] * (1 - BACK):
            stage += 1
        return stage

    def use(self, decoder: nn.Module, stage: int) -> None:
        """Put the frequencies of a stage in force, for what runs outside of a call: graphs, and checkpoints again."""
        for name in (self.rotary, *self.others):
            decoder.get_submodule(name).use_stage(stage)


@dataclass
class Call:
    """A forward pass that is running in this thread.

    Attributes:
        decoder: which module runs.
        stage: by which it rotates.
        record: of its cache; None where it has none yet.
        past: tokens in the cache.
        positions: of its tokens, once the rotary embedding has seen them.
    """

    decoder: nn.Module
    stage: int
    record: CacheRecord | None
    past: int
    positions: torch.Tensor | None = None


_LOCAL = threading.local()


def begin_call(call: Call) -> None:
    """A forward pass starts in this thread."""
    _LOCAL.call = call


def end_call(decoder: nn.Module) -> Call | None:
    """The forward pass of ``decoder`` that ends in this thread, or None."""
    call = getattr(_LOCAL, "call", None)
    if call is None or call.decoder is not decoder:
        return None
    _LOCAL.call = None
    return call


def current_call(plan: DynamicPlan) -> Call | None:
    """The forward pass in this thread that reads by ``plan``."""
    call = getattr(_LOCAL, "call", None)
    return call if call is not None and call.decoder._rope_dist_growth.plan is plan else None


def note_positions(call: Call, positions: torch.Tensor) -> None:
    """Keep the positions ``[..., B or 1, S]`` of the tokens of a call; of several rotary embeddings, the first's."""
    if call.positions is None:
        call.positions = positions
        if call.record is not None:
            call.record.write(call.past, positions)


def expected_length() -> int:
    """Tokens of :func:`expect_length` in this thread, else 0."""
    return getattr(_LOCAL, "at_least", 0)


@contextlib.contextmanager
def expect_length(length: int) -> Iterator[None]:
    """Context manager that chooses the stage of dynamic plans for texts that will become ``length`` tokens long.

    Around ``generate`` with the length of the prompt and ``max_new_tokens`` together, it avoids a change of stage
    while new tokens are written. It is meant for this thread.

    Raises:
        ValueError: ``length`` is not a positive whole number.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"the length must be a positive whole number of tokens, got {length!r}")
    before = expected_length()
    _LOCAL.at_least = max(before, length)
    try:
        yield
    finally:
        _LOCAL.at_least = before
