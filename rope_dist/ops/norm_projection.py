"""The projection of queries, keys and values with RMS norm and rotation: :func:`qkv_norm_rotary`."""

from __future__ import annotations

import torch

from . import launch_cache, library_norm_projection, projection, validation
from .arguments import Angles, Norms, Projections
from .fixed_point import as_fixed_point


def qkv_norm_rotary(  # noqa: PLR0913  (public)
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    *,
    head_dim: int,
    inv_freq: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_after: bool = False,
    interleaved: bool = False,
    path: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Project, normalise queries and keys and rotate them, in one launch where that is possible.

    :func:`rope_dist.ops.qkv_rotary` with the norms of :func:`rope_dist.ops.norm_rotary` between the products and the
    rotation. The norm is made of the float32 sums, and the result is rounded once (where the projection is left to
    cuBLAS, twice). One launch takes norms of each head by itself, with weights of one dtype for queries and keys or
    with none, and head sizes 16 to 256 that are powers of two; anything else is products and one pass.

    Args:
        x: ``[B, S, K]``, or packed ``[T, K]``, floating.
        w_q, w_k, w_v, b_q, b_k, b_v, head_dim: as in :func:`rope_dist.ops.qkv_rotary`.
        q_norm_weight, k_norm_weight: ``[head_dim]`` normalises each head by itself (Qwen3, Gemma 3),
            ``[heads * head_dim]`` all heads of a token together (OLMo 2 and 3); floating, of any dtype. None: each head
            by itself, without a weight.
        inv_freq, position_ids, cos, sin, attention_scaling, interleaved: as in :func:`rope_dist.ops.qkv_rotary`.
        eps, weight_offset, norm_after: as in :func:`rope_dist.ops.norm_rotary`.
        path: as in :func:`rope_dist.ops.qkv_rotary`; ``"decode"`` has no norm.

    Returns:
        ``q``, ``k``, ``v``: ``[B, S, heads, head_dim]`` (packed: ``[T, heads, head_dim]``), contiguous; ``v`` None
        without ``w_v``. In the dtype of ``x``. Differentiable in ``x``, weights, biases and the norms' weights: where a
        gradient is wanted it is products and one pass, whatever the path, which keep queries and keys.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, neither or both of frequencies and
            tables, or a path that cannot serve these tensors.
    """
    inv_freq_q64 = as_fixed_point(inv_freq) if inv_freq is not None else None
    x, position_ids, packed = projection.one_batch(x, position_ids, inv_freq_q64)
    projections = Projections(w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
    norms = Norms(q_norm_weight, k_norm_weight, float(eps), float(weight_offset), norm_after)
    angles = Angles(
        cos, sin, inv_freq_q64, position_ids, scaling=float(attention_scaling), interleaved=interleaved,
    )  # fmt: skip
    options = library_norm_projection.options(projections, norms, path) + launch_cache.metadata(inv_freq)
    tensors = (x, *projections[:6], *norms.weights())
    launch, key = launch_cache.find("qkv_norm_rotary", tensors, angles, *options)
    if launch is not None:
        validation.values(position_ids, "position_ids")
        q, k, v = launch(x, projections, angles, norms)
    else:
        angles = projection.checked(x, projections, angles, inv_freq, path, norms)
        q, k, v = library_norm_projection.qkv_norm_rotary(x, projections, norms, angles, path, key)
    return (q[0], k[0], v[0] if v is not None else None) if packed else (q, k, v)
