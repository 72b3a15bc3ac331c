"""Cached keys become what another stage of a dynamic plan would have made of them.

They are multiplied, as complex numbers, by the tables of the new stage divided by those of the old one at their own
positions, in place and in one launch a layer. Tables are stock's, whose angles are rounded to float32: a corrected key
equals the one that the new stage would have cached up to one rounding, attention scaling included.
(:func:`rope_dist.ops.rerotate_` does the same from frequencies, by exact angles, for caches of other engines.)

Each correction rounds once. A rotation does not lengthen the errors of earlier ones, so after n corrections a cached
pair is off by at most (n + 1) u of its length, where u is 2^-8 in bfloat16, 2^-11 in float16 and 2^-24 in float32, and
the one is the rounding of every cached key. Errors are independent: they grow as sqrt(n + 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from .. import ops
from ..ops.fixed_point import to_float64
from .applying import pairs_of, sections_of
from .cache_record import CacheRecord
from .cached_keys import CachedKeys
from .stages import Growth


def change_stage(decoder: nn.Module, cache: Cache, record: CacheRecord, past: int, stage: int) -> None:
    """Correct the keys of the first ``past`` tokens of a cache in place.

    Raises:
        ValueError: positions of tokens are not known, or a kind of cache whose keys cannot be corrected. The cache is
            as it was.
    """
    before = record.stage
    if stage == before:
        return
    if past:
        if record.length < past:
            raise ValueError(
                f"the cache has {past} tokens, of which {past - record.length} were not read under the dynamic plan: "
                "their positions are not known"
            )
        growth: Growth = decoder._rope_dist_growth
        layers = [(how, *_keys(cache, index, past, how.tensor)) for index, how in growth.layers.items()]
        found = [(how, holder, keys) for how, holder, keys in layers if keys is not None]
        dtype = found[0][2].dtype if found else torch.float32
        turn = _difference(decoder, growth, record, past, (before, stage), dtype)
        tables = {keys.device: tuple(table.to(keys.device) for table in turn) for _, _, keys in found}
        _wait(cache)
        record.stage = None
        for how, holder, keys in found:
            _correct(how, holder, keys, *tables[keys.device])
        _wait(cache)
    record.stage = stage


def _keys(cache: Cache, index: int, past: int, tensor: str) -> tuple[Any, torch.Tensor | None]:
    """A layer of a cache and its rotated tensor ``[B, H, n, D]`` of the last ``n`` tokens; None where it has none."""
    if index >= len(cache.layers):
        return None, None
    holder = cache.layers[index]
    if hasattr(holder, "_quantized_keys") or "Quantized" in type(holder).__name__:
        raise ValueError(
            f"the text grows past a stage of the dynamic plan, and the keys of a {type(holder).__name__} cannot be "
            "corrected: give a cache that is not quantised, or a static plan"
        )
    if not getattr(holder, "is_initialized", False):
        return None, None
    keys = getattr(holder, tensor)
    if hasattr(holder, "max_cache_len"):
        keys = keys.narrow(-2, 0, min(past, keys.shape[-2]))
    tokens = keys.shape[-2]
    if tokens > past or (tokens < past and not getattr(holder, "is_sliding", False)):
        raise ValueError(
            f"layer {index} of the cache, a {type(holder).__name__}, has keys of {tokens} tokens where {past} were "
            "read: it is not known of which"
        )
    return holder, keys


def _wait(cache: Cache) -> None:
    """Until copies of an offloaded cache are finished."""
    if getattr(cache, "offloading", False) and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _difference(
    decoder: nn.Module,
    growth: Growth,
    record: CacheRecord,
    past: int,
    stages: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[B or 1, past, R/2]`` float32: the tables of the new stage divided by those of the old.

    From the tables themselves, so that a corrected key equals the one that the new stage would have made up to one
    rounding, although stock rounds its angles, and ``tables="model"`` cos and sin.

    Args:
        stages: the old one and the new one.
        dtype: of the keys.
    """
    rotary = decoder.get_submodule(growth.rotary)
    positions, device = record.positions(0, past), rotary.stage_inv_freq.device
    numbers = []
    for number in stages:
        tables = rotary.tables_at(number, positions.to(device), dtype, growth.layer_type)
        if growth.tables == "complex":
            numbers.append(torch.complex(to_float64(tables.real), to_float64(tables.imag)))
        else:
            if tables[0].ndim == 4:  # of three position axes, before transformers 5.17
                sections = rotary.config.rope_parameters["mrope_section"]
                cos, sin = (sections_of(table, sections) for table in tables)
            else:
                cos, sin = (pairs_of(growth.tables, table) for table in tables)
            numbers.append(torch.complex(to_float64(cos), to_float64(sin)))
    turn = numbers[1] / numbers[0]
    if growth.negative:
        turn = turn.conj()
    return turn.real.float().contiguous().to(device), turn.imag.float().contiguous().to(device)


def _correct(how: CachedKeys, holder: Any, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    tokens, rotary_dim = keys.shape[-2], 2 * cos.shape[-1]
    cos, sin = cos[:, -tokens:], sin[:, -tokens:]
    heads = keys.transpose(1, 2)
    start = 0 if how.first else heads.shape[-1] - rotary_dim
    part = heads.narrow(-1, start, rotary_dim)
    if keys.requires_grad:  # a backward pass needs them as they are
        turned, _ = ops.rotary(part, None, cos, sin, interleaved=how.interleaved)
        new = torch.cat((heads[..., :start], turned, heads[..., start + rotary_dim :]), dim=-1)
        room = getattr(holder, how.tensor)[..., tokens:, :]
        setattr(holder, how.tensor, torch.cat((new.transpose(1, 2), room), dim=-2))
        return
    # Tensors made in inference mode may be changed in it only.
    with torch.inference_mode() if keys.is_inference() else torch.no_grad():
        ops.rotary(part, None, cos, sin, interleaved=how.interleaved, inplace=True)
