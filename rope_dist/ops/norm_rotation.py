"""RMS norm and rotation of queries and keys in one pass: :func:`norm_rotary`, :func:`norm_rotary_at`."""

from __future__ import annotations

import torch

from . import launch_cache, library_norm, validation
from .arguments import Angles, Norms
from .fixed_point import as_fixed_point
from .rotation import one_batch, without_batch


def norm_rotary(  # noqa: PLR0913  (public)
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_after: bool = False,
    interleaved: bool = False,
    inplace: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise queries and keys by their root mean square (Zhang and Sennrich 2019) and rotate them.

    ``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``, then :func:`rope_dist.ops.rotary`. 16-bit heads are
    computed in float32 and rounded once.

    Args:
        q: ``[B, S, Hq, D]`` queries, floating, any strides.
        k: ``[B, S, Hk, D]`` keys, same dtype and device; None takes ``q`` alone.
        q_weight, k_weight: ``[D]`` normalises each head by itself (Qwen3, Gemma 3), ``[heads * D]`` all heads of a
            token together (OLMo 2 and 3); floating, of any dtype. None: each head by itself, without a weight.
        cos, sin: ``[B, S, R/2]``, ``[1, S, R/2]`` or ``[S, R/2]``; the norm is of all ``D`` dimensions where ``R < D``.
        eps: added to the mean of the squares.
        weight_offset: added to the weights; 1 for Gemma's.
        norm_after: the norm follows the rotation, as Hunyuan has it.
        interleaved, inplace: as in :func:`rope_dist.ops.rotary`.
        q_bias, k_bias: ``[Hq * D]`` and ``[Hk * D]`` in the dtype of ``q``, added first.

    Returns:
        New tensors, contiguous, shaped and typed as ``q`` and ``k`` (None for None). Differentiable in ``q``, ``k``,
        the weights and the biases, also twice and under ``torch.func``; the backward pass keeps ``q`` and ``k`` and one
        number a head.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, tables that need a gradient; in place,
            tensors that are expanded or share memory, and any that need a gradient: it is made of what they were.
    """
    norms = Norms(q_weight, k_weight, float(eps), float(weight_offset), norm_after)
    angles = Angles(cos, sin, interleaved=interleaved)
    launch, key = _find("norm_rotary", q, k, norms, angles, q_bias, k_bias, inplace)
    if launch is not None:
        return launch(q, k, norms, angles, q_bias, k_bias)
    validation.heads(q, k)
    cos, sin = validation.tables(q, cos, sin, rows=q.shape[1])
    validation.biases(q, k, q_bias, k_bias)
    validation.norms(q, k, norms)
    angles = angles._replace(cos=cos, sin=sin)
    return library_norm.norm_rotate(q, k, norms, angles, q_bias, k_bias, inplace=inplace, key=key)


def norm_rotary_at(  # noqa: PLR0913  (public)
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    inv_freq: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seqlen_offsets: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_after: bool = False,
    interleaved: bool = False,
    inplace: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`norm_rotary` without tables: angles from frequencies and positions, right at any length.

    Args:
        q, k: ``[B, S, heads, D]``, any strides, or packed ``[T, heads, D]``; ``k`` None takes ``q`` alone.
        inv_freq, position_ids, cu_seqlens, seqlen_offsets, attention_scaling: as in :func:`rope_dist.ops.rotary_at`. A
            token in no sequence is normalised and not rotated.
        others: as in :func:`norm_rotary`.

    Returns:
        As :func:`norm_rotary`.

    Raises:
        ValueError: as :func:`norm_rotary` and :func:`rope_dist.ops.rotary_at`.
    """
    inv_freq_q64 = as_fixed_point(inv_freq)
    q, k, position_ids, packed = one_batch(q, k, position_ids, inv_freq_q64)
    norms = Norms(q_weight, k_weight, float(eps), float(weight_offset), norm_after)
    angles = Angles(
        inv_freq_q64=inv_freq_q64, positions=position_ids, cu_seqlens=cu_seqlens,
        seqlen_offsets=seqlen_offsets, scaling=float(attention_scaling), interleaved=interleaved,
    )  # fmt: skip
    options = (inplace, packed, *launch_cache.metadata(inv_freq))
    launch, key = _find("norm_rotary_at", q, k, norms, angles, q_bias, k_bias, *options)
    if launch is not None:
        validation.angle_values(angles, q.shape[1])
        out = launch(q, k, norms, angles, q_bias, k_bias)
    else:
        validation.heads(q, k)
        validation.angles_at(q, inv_freq, angles, packed)
        validation.biases(q, k, q_bias, k_bias)
        validation.norms(q, k, norms)
        out = library_norm.norm_rotate(q, k, norms, angles, q_bias, k_bias, inplace=inplace, key=key)
    return without_batch(out) if packed else out


def _find(operation: str, q, k, norms: Norms, angles: Angles, q_bias, k_bias, *options):
    tensors = (q, k, q_bias, k_bias, *norms.weights())
    return launch_cache.find(operation, tensors, angles, *norms[2:], *options)
