"""The rotation of queries and keys that are there: :func:`rotary` by tables, :func:`rotary_at` by positions.

:func:`rerotate_` corrects keys that were rotated by other frequencies.
"""

from __future__ import annotations

import torch

from . import fixed_point, launch_cache, library, validation
from .arguments import Angles
from .fixed_point import as_fixed_point


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    deinterleave: bool = False,
    inplace: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate queries and keys by the angles of their positions (Su et al. 2021, eq. 34).

    Args:
        q: ``[B, S, Hq, D]`` queries, floating, any strides (a transposed ``[B, Hq, S, D]`` is as good).
        k: ``[B, S, Hk, D]`` keys, same dtype and device; None rotates ``q`` alone.
        cos, sin: ``[B, S, R/2]``, ``[1, S, R/2]`` or ``[S, R/2]``, floating (float32 where ``q`` is 16-bit),
            ``R <= D`` rotated dimensions; see :func:`cos_sin`.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of Hugging Face's ``(i, i + R/2)``.
        deinterleave: pairs are ``(2i, 2i + 1)`` of ``q`` and ``k`` and ``(i, i + R/2)`` of what is returned, as
            multi-head latent attention has them (DeepSeek's ``rope_interleave``). Not in place.
        inplace: change ``q`` and ``k`` and return them.
        q_bias, k_bias: ``[Hq * D]`` and ``[Hk * D]`` in the dtype of ``q``, added first, 16-bit sums without
            rounding between: the end of a projection whose product was made without its bias.

    Returns:
        New tensors, contiguous, shaped and typed as ``q`` and ``k`` (None for None). Differentiable in ``q``,
        ``k`` and the biases, backward and forward, and under ``torch.func``.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, tables that need a gradient (they
            are constants); in place, tensors that are expanded or share memory, and, where a gradient is
            wanted, leaves and views that autograd cannot write to (of ``unbind``, ``split``, ``chunk``);
            ``inplace`` and ``deinterleave`` together.
    """
    angles = Angles(cos, sin, interleaved=interleaved, deinterleave=deinterleave)
    launch, key = launch_cache.find("rotary", (q, k, q_bias, k_bias), angles, inplace)
    if launch is not None:
        return launch(q, k, angles, q_bias, k_bias)
    validation.heads(q, k)
    cos, sin = validation.tables(q, cos, sin, rows=q.shape[1])
    validation.biases(q, k, q_bias, k_bias)
    angles = angles._replace(cos=cos, sin=sin)
    return library.rotate(q, k, angles, q_bias, k_bias, inplace=inplace, key=key)


def rotary_at(  # noqa: PLR0913  (public)
    q: torch.Tensor,
    k: torch.Tensor | None,
    inv_freq: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seqlen_offsets: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    deinterleave: bool = False,
    inplace: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`rotary` without tables: angles from frequencies and positions, right at any length.

    Angles are computed in fixed point (see ``fixed_point.py``), to 2e-7 of the exact product of the float32
    frequency and the position; a float32 product is off by 3e-2 at position one million.

    Args:
        q, k: ``[B, S, heads, D]``, any strides, or packed ``[T, heads, D]``; ``k`` None rotates ``q`` alone.
        inv_freq: ``[R/2]`` floating radians a token, or ``[axes, R/2]`` of :func:`rope_dist.ops.mrope_frequencies`; or
            what :func:`rope_dist.ops.to_fixed_point` made of them, which saves its few small launches a call.
        position_ids: ``[B, S]`` or ``[1, S]`` (packed: ``[T]``) int32 or int64, values within int32; of several axes
            ``[axes, B or 1, S]`` (packed: ``[axes, T]``), whose angles are summed.
            None: tokens count from 0, in each sequence of ``cu_seqlens`` if given.
        cu_seqlens: ``[sequences + 1]`` int32 or int64, bounds of packed sequences, not decreasing; only without
            ``position_ids``. Tokens before the first bound and from the last on are in no sequence and are
            not rotated.
        seqlen_offsets: ``[sequences]`` (``[B]`` without ``cu_seqlens``) int32 or int64: the position of the first token
            of each sequence, what its key/value cache holds already; only without ``position_ids``.
        attention_scaling: factor on the rotated dimensions (YaRN's temperature).
        interleaved, deinterleave, inplace, q_bias, k_bias: as in :func:`rotary`.

    Returns:
        As :func:`rotary`.

    Raises:
        ValueError: as :func:`rotary`; positions outside int32 and bounds that decrease or are outside the tokens
            (looked at on CPU tensors only: elsewhere it would wait for the device).
    """
    inv_freq_q64 = as_fixed_point(inv_freq)
    q, k, position_ids, packed = one_batch(q, k, position_ids, inv_freq_q64)
    angles = Angles(
        inv_freq_q64=inv_freq_q64, positions=position_ids, cu_seqlens=cu_seqlens,
        seqlen_offsets=seqlen_offsets, scaling=float(attention_scaling),
        interleaved=interleaved, deinterleave=deinterleave,
    )  # fmt: skip
    options = (inplace, packed, *launch_cache.metadata(inv_freq))
    launch, key = launch_cache.find("rotary_at", (q, k, q_bias, k_bias), angles, *options)
    if launch is not None:
        validation.angle_values(angles, q.shape[1])
        out = launch(q, k, angles, q_bias, k_bias)
    else:
        validation.heads(q, k)
        validation.angles_at(q, inv_freq, angles, packed)
        validation.biases(q, k, q_bias, k_bias)
        out = library.rotate(q, k, angles, q_bias, k_bias, inplace=inplace, key=key)
    return without_batch(out) if packed else out


def rerotate_(
    k: torch.Tensor,
    inv_freq: torch.Tensor,
    new_inv_freq: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seqlen_offsets: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """Correct the keys of a cache in place: rotated by ``inv_freq``, they become what ``new_inv_freq`` would have made.

    A key at position ``p`` is rotated by ``p * (new_inv_freq - inv_freq)``: the difference is taken in fixed point, so
    that the angle is as right as that of a first rotation. A 16-bit cache is rounded once more each time.

    Args:
        k: ``[B, S, Hk, D]``, any strides (of a Hugging Face cache ``keys.transpose(1, 2)``), or packed ``[T, Hk, D]``.
        inv_freq, new_inv_freq: of one shape and dtype; see :func:`rotary_at`.
        position_ids, cu_seqlens, seqlen_offsets: positions of the keys, as in :func:`rotary_at`.
        attention_scaling: the new factor on the rotated dimensions divided by the old one.
        interleaved: as the keys were rotated.

    Returns:
        ``k``.

    Raises:
        ValueError: as :func:`rotary_at` in place, and frequencies that differ in shape or dtype.
    """
    if inv_freq.shape != new_inv_freq.shape or inv_freq.dtype != new_inv_freq.dtype:
        raise ValueError(
            f"inv_freq and new_inv_freq must have one shape and dtype, got {list(inv_freq.shape)} {inv_freq.dtype} and "
            f"{list(new_inv_freq.shape)} {new_inv_freq.dtype}"
        )
    turn = fixed_point.difference(as_fixed_point(new_inv_freq), as_fixed_point(inv_freq))
    rotary_at(
        k, None, turn, position_ids, cu_seqlens=cu_seqlens, seqlen_offsets=seqlen_offsets,
        attention_scaling=attention_scaling, interleaved=interleaved, inplace=True,
    )  # fmt: skip
    return k


def one_batch(
    q: torch.Tensor, k: torch.Tensor | None, position_ids: torch.Tensor | None, inv_freq_q64: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool]:
    """Packed ``[T, heads, D]`` and positions ``[T]`` or ``[axes, T]`` as of one batch, and whether they were packed."""
    packed = q.ndim == 3 and (k is None or k.ndim == 3)
    if packed:
        q, k = q[None], k[None] if k is not None else None
        if position_ids is not None and position_ids.ndim == inv_freq_q64.ndim - 1:
            position_ids = position_ids.unsqueeze(-2)
    return q, k, position_ids, packed


def without_batch(
    heads: tuple[torch.Tensor, torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The only batch of both."""
    q, k = heads
    return q[0], k[0] if k is not None else None
