"""Registration of the key/value cache write with ``torch.library``, as ``library.py`` has it of the other operators.

No gradients: the caches are changed, and what is kept of a token serves generation.
"""

from __future__ import annotations

import torch

from . import dispatch_cache, launch_cache
from .arguments import Angles, KeyValueCache, Norms, schema
from .library import LIBRARY, define

_CACHES = "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache"
_PLACES = schema(KeyValueCache).split(", ", 2)[2]
_REST = f"{_CACHES}, {_PLACES}, bool has_norm=False, {schema(Norms)}, {schema(Angles)}"


def _split(flat: tuple) -> tuple[KeyValueCache, Norms | None, Angles]:
    """The groups of the flat arguments of an operator. Defaults may be left out."""
    first = len(KeyValueCache._fields)
    last = first + 1 + len(Norms._fields)
    cache, has_norm, norms = (
        KeyValueCache(*flat[:first]),
        flat[first : first + 1],
        Norms(*flat[first + 1 : last]),
    )
    angles = Angles(*flat[last:])
    if angles.deinterleave or angles.conjugate:
        raise ValueError("deinterleave and conjugate go with the rotation alone")
    return cache, norms if has_norm == (True,) else None, angles


def _impl(q, k, v, *flat) -> torch.Tensor:
    q_out = dispatch_cache.write_cache(q, k, v, *_split(flat))
    return q_out if q_out is not None else k.new_empty(0)


def _in_place_impl(q, k, v, *flat) -> None:
    dispatch_cache.write_cache(q, k, v, *_split(flat), inplace=True)


define(f"rotary_write_cache(Tensor? q, {_REST}) -> Tensor", _impl)
define(f"rotary_write_cache_(Tensor(c!) q, {_REST}) -> ()", _in_place_impl)


@torch.library.register_fake("rope_dist::rotary_write_cache", lib=LIBRARY)
def _fake(q: torch.Tensor | None, k: torch.Tensor, *rest) -> torch.Tensor:
    return q.new_empty(q.shape) if q is not None else k.new_empty(0)


@torch.library.register_fake("rope_dist::rotary_write_cache_", lib=LIBRARY)
def _in_place_fake(q: torch.Tensor, *rest) -> None:
    return None


def write_cache(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KeyValueCache,
    norms: Norms | None,
    angles: Angles,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> torch.Tensor | None:
    """Normalise, rotate and write for checked arguments; ``key`` as in :func:`library.rotate`."""
    if key is not None:
        return dispatch_cache.write_cache(q, k, v, cache, norms, angles, inplace=inplace, key=key)
    flat = (*cache, norms is not None, *(norms or Norms()), *angles)
    if q is None or not inplace:
        out = torch.ops.rope_dist.rotary_write_cache(q, k, v, *flat)
        return out if q is not None else None
    torch.ops.rope_dist.rotary_write_cache_(q, k, v, *flat)
    return q
