"""Time of an evaluation: an estimate before it starts and a progress bar during it."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from .models import attention_shape, cache_option

LINE_SECONDS = 30
"""Seconds between two lines of progress where stderr is no terminal."""

_PROBE_TOKENS = 256
_PROBE_CONTEXT = 4096


class Progress(tqdm):
    """A progress bar with the remaining time on a terminal, a line every half minute elsewhere.

    Args:
        description: label; None shows nothing.
        total: total of what :meth:`update` adds, in any unit. :func:`work`, which grows with the position, gives a
            better estimate of the remaining time than tokens do.
    """

    def __init__(self, description: str | None, total: float) -> None:
        self._lines = not sys.stderr.isatty()
        options: dict[str, Any] = {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"}
        if self._lines:
            options = {
                "bar_format": "{desc}: {percentage:.0f} %, {elapsed} elapsed, about {remaining} left",
                "mininterval": LINE_SECONDS,
                "delay": LINE_SECONDS,
                "miniters": 1,
                "file": io.StringIO(),  # for tqdm's control characters; display() prints the lines
            }
        super().__init__(desc=description, total=total, disable=description is None, leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self._lines:
            return super().display(msg, pos)
        if msg is None:  # tqdm clears a bar with an empty message
            print(str(self), file=sys.stderr, flush=True)
        return True


def work(model: PreTrainedModel, start: int, end: int) -> float:
    """Relative number of operations of a forward pass over tokens ``start <= i < end`` with a key/value cache.

    Linear layers cost the same for every token; attention grows with its position.
    """
    heads, _, head_dim = attention_shape(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    parameters = sum(p.numel() for p in model.parameters())
    attention = 2.0 * layers * heads * head_dim  # per token of context: scores and their weighted sum
    return (end - start) * (parameters + attention * (start + end) / 2)


@dataclass(frozen=True)
class Pace:
    """Measured prefill speed of a model.

    Attributes:
        token: seconds a token without context.
        context: additional seconds a token of context.
    """

    token: float
    context: float

    def seconds(self, end: int, start: int = 0) -> float:
        """Estimated seconds of a forward pass over tokens ``start <= i < end``, the earlier ones in the cache."""
        return (end - start) * (self.token + self.context * (start + end) / 2)


@torch.inference_mode()
def measure_pace(model: PreTrainedModel) -> Pace:
    """Time a forward pass over 256 tokens without context and after 4096 tokens; 5 to 10 seconds on two CPU cores.

    The minimum of two times each: other processes can only add time.
    """
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size

    def cache(context: int) -> DynamicCache:
        made = DynamicCache(config=model.config)
        layers: Sequence[Any] = first.layers if context else ()
        for index, layer in enumerate(layers):
            copies = (1, 1, context // _PROBE_TOKENS, 1)
            made.update(layer.keys.repeat(copies), layer.values.repeat(copies), index)
        return made

    def seconds(cache: DynamicCache) -> float:
        began = time.perf_counter()
        logits = model(ids, **cache_option(model, cache), use_cache=True).logits
        logits[0, -1, 0].item()  # waits for a GPU
        return time.perf_counter() - began

    first = DynamicCache(config=model.config)
    seconds(first)  # warm-up
    short, long = (min(seconds(cache(context)) for _ in range(2)) for context in (0, _PROBE_CONTEXT))
    context = max(long - short, 0.0) / (_PROBE_TOKENS * _PROBE_CONTEXT)
    token = max(short / _PROBE_TOKENS - context * _PROBE_TOKENS / 2, 0.0)
    return Pace(token, context)


def announce(seconds: float) -> None:
    """Print the estimated time to stderr."""
    print(f"evaluation takes about {duration(seconds)} on this machine", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``50 s``, ``4 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
