"""The definition of the key/value cache write, in plain PyTorch: where a token goes, and what is stored of it.

Nothing here waits for a device.
"""

from __future__ import annotations

import torch

from . import reference
from .arguments import Angles, KeyValueCache, present

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""


def write(k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache, angles: Angles) -> None:
    """Write ``k`` and ``v`` ``[B, S, Hk, D]``, rotated already, to the entries of their tokens."""
    if k.shape[0] * k.shape[1] == 0 or cache.entries == 0:
        return
    slots = token_slots(cache, angles, k.shape[0], k.shape[1])
    scales = (cache.k_scale, cache.k_scale_value), (cache.v_scale, cache.v_scale_value)
    for new, blocks, scale in zip((k, v), cache.blocks(), scales, strict=True):
        new = new.flatten(0, 1)
        if cache.is_fp8:
            # As bytes: not every device indexes float8.
            new, blocks = to_fp8(new, *scale).view(torch.uint8), blocks.view(torch.uint8)
        (write_entries if new.device.type == "cpu" else write_all)(new, blocks, slots)


def to_fp8(x: torch.Tensor, scale: torch.Tensor | None, value: float = 1.0) -> torch.Tensor:
    """``x`` ``[T, H, D]`` divided by its scale (of all, or ``[H]``) in float8_e4m3fn; what is too large is 448."""
    x = x.to(reference.compute_dtype(x))
    x = x / (scale.to(x.dtype).view(-1, 1) if scale is not None else value)
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def token_slots(cache: KeyValueCache, angles: Angles, batch: int, length: int) -> torch.Tensor:
    """Entry of every token, ``[B * S]`` int64; -1 for a token that is not written."""
    if cache.slots is not None:
        slots = cache.slots.to(torch.int64)
        return torch.where(slots < cache.entries, slots, -1).clamp_min(-1)
    table, block_size = present(cache.block_table), cache.block_size
    sequence, place = token_places(angles, batch, length, table.device)
    column = place.div(block_size, rounding_mode="floor")
    known = (place >= 0) & (column < table.shape[1])
    if table.numel() == 0:
        return place.new_full((batch * length,), -1)
    block = table[sequence, column.clamp(0, table.shape[1] - 1)].to(torch.int64)
    known &= (block >= 0) & (block < cache.entries // block_size)
    return torch.where(known, block * block_size + place % block_size, -1).flatten()


def token_places(
    angles: Angles, batch: int, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence and place in it of every token, ``[B, S]`` int64; the place is negative for one that has none.

    Places follow the entries that the cache has of a sequence, and positions where nobody says how many it has.
    """
    index = reference.token_positions(angles._replace(positions=None), batch, length, device)
    if angles.cu_seqlens is not None:
        token = torch.arange(length, device=device)[None]
        sequence = torch.searchsorted(angles.cu_seqlens[:-1].to(torch.int64), token, right=True) - 1
    else:
        sequence = torch.arange(batch, device=device)[:, None].expand(batch, length)
    place = index
    if angles.positions is not None and angles.seqlen_offsets is None:
        place = torch.where(index == reference.NOWHERE, index, angles.positions.to(torch.int64))
    return sequence.clamp_min(0), place.expand(batch, length)


def write_entries(new: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
    """Write ``new`` ``[T, H, D]`` to ``blocks`` ``[blocks, block_size, H, D]`` at the ``slots`` ``[T]`` from 0 on."""
    written = slots >= 0
    if not written.all():
        new, slots = new[written], slots[written]
    _put(new, blocks, slots)


def write_all(new: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
    """:func:`write_entries` for a device: the size of a mask would have to be waited for.

    A token that is not written repeats what another one writes or, where none is, what is there.
    """
    written = slots >= 0
    first = written.to(torch.int8).argmax()
    token = torch.where(written, torch.arange(len(slots), device=slots.device), first)
    slots = slots[token].clamp_min(0)
    old = blocks[slots // blocks.shape[1], slots % blocks.shape[1]]
    _put(torch.where(written.any(), new[token], old), blocks, slots)


def _put(new: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
    blocks[slots // blocks.shape[1], slots % blocks.shape[1]] = new
