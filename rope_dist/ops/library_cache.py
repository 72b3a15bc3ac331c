"""Registration of the key/value cache write with ``torch.library``, as ``library.py`` has it of the other operators.

No gradients: the caches are changed, and what is kept of a token serves generation.
"""

from __future__ import annotations

import torch

from . import dispatch, launch_cache, validation
from .arguments import Angles, KeyValueCache, schema
from .library import LIBRARY

_HEADS = "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache"
_CACHE = schema(KeyValueCache).split(", ", 2)[2]
_REST = f"{_HEADS}, {_CACHE}, {schema(Angles)}"


def _split(flat: tuple) -> tuple[KeyValueCache, Angles]:
    first = len(KeyValueCache._fields)
    angles = Angles(*flat[first:])
    validation.same_order(angles)
    return KeyValueCache(*flat[:first]), angles


def _write_impl(q, k, v, *flat) -> torch.Tensor:
    q_out = dispatch.write_cache(q, k, v, *_split(flat))
    return q_out if q_out is not None else k.new_empty(0)


def _write_in_place_impl(q, k, v, *flat) -> None:
    dispatch.write_cache(q, k, v, *_split(flat), inplace=True)


LIBRARY.define(f"rotary_write_cache(Tensor? q, {_REST}) -> Tensor")
LIBRARY.impl("rotary_write_cache", _write_impl, "CompositeExplicitAutograd")
LIBRARY.define(f"rotary_write_cache_(Tensor(c!) q, {_REST}) -> ()")
LIBRARY.impl("rotary_write_cache_", _write_in_place_impl, "CompositeExplicitAutograd")


@torch.library.register_fake("rope_dist::rotary_write_cache", lib=LIBRARY)
def _write_fake(q: torch.Tensor | None, k: torch.Tensor, *rest) -> torch.Tensor:
    return q.new_empty(q.shape) if q is not None else k.new_empty(0)


@torch.library.register_fake("rope_dist::rotary_write_cache_", lib=LIBRARY)
def _write_in_place_fake(q: torch.Tensor, *rest) -> None:
    return None


def write_cache(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KeyValueCache,
    angles: Angles,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> torch.Tensor | None:
    """Rotate and write for checked arguments; ``key`` as in :func:`library.rotate`."""
    if key is not None:
        return dispatch.write_cache(q, k, v, cache, angles, inplace=inplace, key=key)
    if q is None or not inplace:
        out = torch.ops.rope_dist.rotary_write_cache(q, k, v, *cache, *angles)
        return out if q is not None else None
    torch.ops.rope_dist.rotary_write_cache_(q, k, v, *cache, *angles)
    return q
