"""The rotation of queries and keys with the write of keys and values to their caches: :func:`rotary_write_cache`."""

from __future__ import annotations

import math

import torch

from . import launch_cache, library_cache, reference_cache, validation
from .arguments import Angles, KeyValueCache, Norms, present
from .fixed_point import as_fixed_point

KV_LAYOUTS = ("NHD", "HND")


def rotary_write_cache(  # noqa: PLR0913  (public)
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    *,
    block_table: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    inv_freq: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    norm_after: bool = False,
    inplace: bool = False,
) -> torch.Tensor | None:
    """Rotate queries and keys, and write the keys and the values to their caches, for inference: no gradient.

    One launch for any number of tokens. A token is rotated by its position: ``position_ids``, or else its index in its
    sequence plus ``cache_seqlens``. It is written to its slot, or to its place in its sequence by ``block_table``: its
    index plus ``cache_seqlens`` or, without these, its position.

    Args:
        q: ``[B, S, Hq, D]`` or packed ``[T, Hq, D]``, floating, any strides; None: keys and values only.
        k, v: ``[B, S, Hk, D]`` or ``[T, Hk, D]`` in the dtype of ``q``; the values may have a head size of their own.
        k_cache, v_cache: ``[entries, Hk, D]``, or paged ``[blocks, block_size, Hk, D]`` (``kv_layout`` "HND":
            ``[blocks, Hk, block_size, D]``), any strides, changed in place. In the dtype of ``k``, or float8_e4m3fn,
            which stores ``x / scale``, rounded once from float32 and at most 448 in magnitude.
        slots: ``[T]`` (``[B, S]``, ``[B * S]``) int32 or int64, the entry of each token, counted through the blocks
            (vLLM's slot_mapping); a token with a negative one is rotated and not written. Entries must differ.
        block_table: instead of ``slots``, ``[sequences, most blocks]`` int32 or int64: the blocks of each sequence.
        cache_seqlens: ``[sequences]`` int32 or int64, entries that each sequence has already.
        cu_seqlens: ``[sequences + 1]`` int32 or int64, not decreasing: bounds of packed sequences (else each row of the
            batch is one). Tokens outside them are not written and, without ``position_ids``, not rotated.
        kv_layout: ``"NHD"`` or ``"HND"``, of paged caches.
        k_scale, v_scale: of float8 caches, and only of these: a positive number, or floating ``[1]`` or ``[Hk]``.
        inv_freq: ``[R/2]`` floating radians a token, or ``[axes, R/2]`` of :func:`rope_dist.ops.mrope_frequencies`; or
            what :func:`rope_dist.ops.to_fixed_point` made of them.
        position_ids: ``[B, S]`` or ``[1, S]`` (packed: ``[T]``) int32 or int64; of several axes one of each before.
        cos, sin: instead of ``inv_freq``, tables ``[B or 1, rows, R/2]`` or ``[rows, R/2]``: the row of a token is its
            position, and a token whose position is not in them is not rotated.
        attention_scaling: factor on the rotated dimensions, with ``inv_freq``; tables carry it in them.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        q_weight, k_weight: of RMS norms before the rotation, as in :func:`rope_dist.ops.norm_rotary`. Without any, and
            without ``eps``, nothing is normalised; with one of the three, queries and keys both.
        eps: added to the mean of the squares; None: 1e-6 where there is a norm.
        weight_offset, norm_after: as in :func:`rope_dist.ops.norm_rotary`.
        inplace: change ``q`` and return it.

    Returns:
        The queries, shaped and typed as ``q``; None for None.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, tensors that share memory with what is
            written, a transform of ``torch.func``; entries or blocks that do not exist (looked at on CPU tensors only:
            a GPU does not write such tokens).
    """
    if launch_cache.transformed():
        raise ValueError("rotary_write_cache is for inference: torch.func and forward mode go with rotary_at")
    inv_freq_q64 = as_fixed_point(inv_freq) if inv_freq is not None else None
    packed = k.ndim == 3
    if packed:
        k, v = k[None], v[None] if v.ndim == 3 else v
        q = q[None] if q is not None and q.ndim == 3 else q
        if (
            position_ids is not None
            and position_ids.ndim == (2 if inv_freq_q64 is None else inv_freq_q64.ndim) - 1
        ):
            position_ids = position_ids.unsqueeze(-2)
    if cos is not None and sin is not None and cos.ndim == sin.ndim == 2:
        cos, sin = cos[None], sin[None]
    angles = Angles(
        cos, sin, inv_freq_q64, position_ids, cu_seqlens, cache_seqlens,
        scaling=float(attention_scaling), interleaved=interleaved,
    )  # fmt: skip
    k_tensor, k_number = _scale(k_scale)
    v_tensor, v_number = _scale(v_scale)
    cache = KeyValueCache(
        k_cache, v_cache, slots if slots is None or slots.ndim == 1 else slots.flatten(), block_table,
        k_tensor, v_tensor, k_number, v_number, kv_layout == "HND",
    )  # fmt: skip
    norms = None
    if not (q_weight is k_weight is eps is None):
        norms = Norms(
            q_weight, k_weight, 1e-6 if eps is None else float(eps), float(weight_offset), norm_after
        )
    elif weight_offset != 0.0 or norm_after:
        raise ValueError(
            "weight_offset and norm_after are of a norm: give weights, or eps for a norm without any"
        )
    without_scale = (k_scale is None, v_scale is None)
    options = (
        inplace,
        packed,
        kv_layout,
        without_scale,
        norms and norms[2:],
        *launch_cache.metadata(inv_freq),
    )
    with torch.no_grad():
        tensors = (q, k, v, *cache[:6], q_weight, k_weight)
        launch, key = launch_cache.find("rotary_write_cache", tensors, angles, *options)
        if launch is None:
            _check_heads(q, k, v, packed)
            _check_angles(k, angles, inv_freq, packed)
            _check_cache(k, v, cache, kv_layout)
            _check_scales(k, cache, without_scale)
            _check_slots(k, cache, angles)
            if norms is not None:
                _check_norms(q, k, norms)
        _check_values(cache, angles, *k.shape[:2])
        heads = {"q": q, "k": k, "v": v}
        written = {"k_cache": k_cache, "v_cache": v_cache, **({"q": heads.pop("q")} if inplace else {})}
        validation.apart(written, heads)
        if launch is not None:
            out = launch(q, k, v, cache, norms, angles)
        else:
            out = library_cache.write_cache(q, k, v, cache, norms, angles, inplace=inplace, key=key)
    return out[0] if packed and out is not None else out


def _scale(scale: torch.Tensor | float | None) -> tuple[torch.Tensor | None, float]:
    """A scale as a tensor, or else as a number."""
    if isinstance(scale, torch.Tensor):
        return scale, 1.0
    return None, 1.0 if scale is None else float(scale)


def _check_heads(q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    """``q``, ``k`` and ``v`` are heads of the same tokens, of one dtype and device."""
    axes = "[T, heads, D]" if packed else "[B, S, heads, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.ndim != 4 or x.shape[:2] != k.shape[:2]:
            raise ValueError(f"{name} must be {axes} of the tokens of k {list(k.shape)}, got {list(x.shape)}")
        if x.dtype != k.dtype or x.device != k.device or not x.dtype.is_floating_point:
            raise ValueError(
                f"q, k and v must have one floating dtype and one device, got {x.dtype} on {x.device} for {name} and "
                f"{k.dtype} on {k.device} for k"
            )
    if q is not None and q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head size, got {q.shape[3]} and {k.shape[3]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have one number of heads, got {k.shape[2]} and {v.shape[2]}")


def _check_angles(k: torch.Tensor, angles: Angles, inv_freq: torch.Tensor | None, packed: bool) -> None:
    """Frequencies or tables, positions, bounds and offsets fit ``k`` ``[B, S, heads, D]``."""
    batch, length = k.shape[:2]
    if (inv_freq is None) == (angles.cos is None) or (angles.cos is None) != (angles.sin is None):
        raise ValueError("give inv_freq, or cos and sin")
    several = angles.inv_freq_q64 is not None and angles.inv_freq_q64.ndim == 3
    if inv_freq is not None:
        validation.frequencies(inv_freq, k.shape[3], k.device)
        if several and angles.positions is None:
            raise ValueError(
                f"frequencies of {angles.axes} axes need position_ids [{angles.axes}, B or 1, S]"
            )
    else:
        if angles.scaling != 1.0:
            raise ValueError("attention_scaling goes with inv_freq; tables carry it in them")
        by_index = all(x is None for x in (angles.positions, angles.cu_seqlens, angles.seqlen_offsets))
        validation.tables(k, present(angles.cos), present(angles.sin), rows=length if by_index else None)
    if angles.positions is not None:
        validation.positions(angles.positions, batch, length, k.device, angles.axes if several else None)
    if angles.cu_seqlens is not None:
        if not packed:
            raise ValueError(f"cu_seqlens needs packed k [T, heads, D], got {list(k.shape)}")
        validation.bounds(angles.cu_seqlens, length, k.device)
    if angles.seqlen_offsets is not None:
        if angles.seqlen_offsets.shape != (_sequences(angles, batch),):
            raise ValueError(
                f"cache_seqlens must be [{_sequences(angles, batch)}], got {list(angles.seqlen_offsets.shape)}"
            )
        validation.integers(angles.seqlen_offsets, "cache_seqlens", k.device)


def _sequences(angles: Angles, batch: int) -> int:
    return batch if angles.cu_seqlens is None else angles.cu_seqlens.shape[0] - 1


def _check_cache(k: torch.Tensor, v: torch.Tensor, cache: KeyValueCache, kv_layout: str) -> None:
    """The caches have room for heads of ``k`` and of ``v``."""
    if kv_layout not in KV_LAYOUTS:
        raise ValueError(f"kv_layout must be 'NHD' or 'HND', got {kv_layout!r}")
    k_cache, v_cache = cache.k_cache, cache.v_cache
    flat = k_cache.ndim == 3
    if flat and kv_layout != "NHD":
        raise ValueError("kv_layout 'HND' goes with paged caches [blocks, heads, block_size, D]")
    axes = "[entries, {0}, {1}]" if flat else "[blocks, block_size, {0}, {1}]"
    axes = "[blocks, {0}, block_size, {1}]" if cache.heads_first else axes
    for name, given, x in (("k", k_cache, k), ("v", v_cache, v)):
        heads_axis = 1 if flat or cache.heads_first else 2
        if (
            given.ndim not in (3, 4)
            or given.ndim != k_cache.ndim
            or (given.shape[heads_axis], given.shape[-1]) != tuple(x.shape[2:])
        ):
            raise ValueError(
                f"{name}_cache must be {axes.format(*x.shape[2:])} for {name} {list(x.shape)}, got {list(given.shape)}"
            )
        if given.device != x.device or given.dtype not in (x.dtype, torch.float8_e4m3fn):
            raise ValueError(
                f"{name}_cache must be {x.dtype} or torch.float8_e4m3fn on {x.device}, got {given.dtype} on "
                f"{given.device}"
            )
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise ValueError(
            f"k_cache and v_cache must have room for the same tokens, got {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"k_cache and v_cache must have one dtype, got {k_cache.dtype} and {v_cache.dtype}")


def _check_scales(k: torch.Tensor, cache: KeyValueCache, left_out: tuple[bool, bool]) -> None:
    """Float8 caches, and no others, have a scale each."""
    heads = k.shape[2]
    for name, scale, none in zip(
        ("k_scale", "v_scale"), (cache.k_scale, cache.v_scale), left_out, strict=True
    ):
        if none and cache.is_fp8:
            raise ValueError(f"float8 caches need {name}: a number, or a tensor [1] or [{heads}]")
        if not none and not cache.is_fp8:
            raise ValueError(f"{name} is for float8 caches, got caches in {cache.k_cache.dtype}")
        if scale is None:
            continue
        fits = scale.shape in ((), (1,), (heads,)) and scale.dtype.is_floating_point
        if not fits or scale.device != k.device:
            raise ValueError(
                f"{name} must be a number, or floating [1] or [{heads}] on {k.device}, got {list(scale.shape)} "
                f"{scale.dtype} on {scale.device}"
            )


def _check_slots(k: torch.Tensor, cache: KeyValueCache, angles: Angles) -> None:
    """Slots or a table of blocks say where each token goes, and nothing says it twice."""
    slots, table, (batch, length) = cache.slots, cache.block_table, k.shape[:2]
    if (slots is None) == (table is None):
        raise ValueError("give slots or block_table, got " + ("neither" if slots is None else "both"))
    if slots is not None:
        if slots.shape != (batch * length,):
            raise ValueError(f"slots must be [{batch * length}], got {list(slots.shape)}")
        validation.integers(slots, "slots", k.device)
        if angles.positions is not None and not (angles.cu_seqlens is angles.seqlen_offsets is None):
            raise ValueError(
                "with slots and position_ids there is nothing left that cache_seqlens and cu_seqlens would say"
            )
        return
    assert table is not None
    if angles.positions is not None and angles.positions.ndim == 3 and angles.seqlen_offsets is None:
        raise ValueError(
            "positions of several axes say no place in a sequence: give block_table cache_seqlens too"
        )
    if cache.k_cache.ndim == 3:
        raise ValueError(
            f"block_table needs paged caches [blocks, block_size, heads, D], got {list(cache.k_cache.shape)}"
        )
    sequences = _sequences(angles, batch)
    if table.ndim != 2 or table.shape[0] != sequences:
        raise ValueError(f"block_table must be [{sequences}, most blocks], got {list(table.shape)}")
    validation.integers(table, "block_table", k.device)


def _check_norms(q: torch.Tensor | None, k: torch.Tensor, norms: Norms) -> None:
    if q is None and norms.q_weight is not None:
        raise ValueError("q_weight without q")
    validation.norms(k if q is None else q, k, norms)


def _check_values(cache: KeyValueCache, angles: Angles, batch: int, length: int) -> None:
    """What is not in the metadata of tensors: numbers, and values that can be read without waiting."""
    for name, value in (("k_scale", cache.k_scale_value), ("v_scale", cache.v_scale_value)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")
    validation.values(angles.positions, "position_ids")
    validation.values(angles.seqlen_offsets, "cache_seqlens")
    validation.bound_values(angles.cu_seqlens, length)
    if cache.slots is not None:
        validation.slot_values(cache.slots, cache.entries)
        return
    table = present(cache.block_table)
    if not validation.readable(table.device):
        return
    sequence, place = reference_cache.token_places(angles, batch, length, table.device)
    sequence, place = sequence.expand_as(place)[place >= 0], place[place >= 0]
    if place.numel() == 0:
        return
    column, room = place // cache.block_size, table.shape[1] * cache.block_size
    if int(place.max()) >= room:
        raise ValueError(f"place {int(place.max())} of a sequence is past the {room} that block_table has")
    low, high = (int(x) for x in table[sequence, column].aminmax())
    if low < 0 or high >= cache.k_cache.shape[0]:
        raise ValueError(
            f"block_table must hold blocks of the {cache.k_cache.shape[0]} there are, got {low} to {high}"
        )
