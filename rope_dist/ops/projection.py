"""The checked public face of the fused projection."""

from __future__ import annotations

import torch

from . import (
    dispatch_projection,
    library,
    library_projection,  # noqa: F401  (registers the operators)
    validation,
)
from .angles import turns


def qkv_rotary(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None = None,
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
    interleaved: bool = False,
    path: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Project to queries, keys and values and rotate the first two, in one launch where that is possible.

    The weights are taken as three ``nn.Linear`` hold them: nothing is concatenated, copied or permuted.
    16-bit products are accumulated, biased and rotated in float32 and rounded once (where the projection is
    left to cuBLAS, twice: after it and after the rotation).

    Args:
        x: ``[B, S, K]``, or packed ``[T, K]``, floating.
        w_q, w_k, w_v: ``[heads * head_dim, K]`` in the dtype of ``x``; ``w_v`` None leaves the values out.
        b_q, b_k, b_v: ``[heads * head_dim]`` or None.
        head_dim: even.
        inv_freq: ``[R/2]`` floating radians a token, or what :func:`rope_dist.ops.turns` made of them.
        position_ids: ``[B, S]`` or ``[1, S]`` (packed: ``[T]``) int32 or int64; None counts from 0.
        cos, sin: instead of both, tables ``[B, S, R/2]``, ``[1, S, R/2]`` or ``[S, R/2]``.
        attention_scaling: factor on the rotated dimensions, with ``inv_freq``; tables carry it in them.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        path: ``"auto"``, or ``"separate"`` (matrix products, then a rotary pass), ``"pointers"``,
            ``"descriptors"`` (the fused kernels) or ``"decode"`` (at most 16 tokens).

    Returns:
        ``q``, ``k``, ``v``: ``[B, S, heads, head_dim]`` (packed: ``[T, heads, head_dim]``), contiguous; ``v``
        None without ``w_v``. In the dtype of ``x``, under autocast too. Differentiable in ``x``, weights and
        biases; the backward pass keeps ``x``, the weights and the positions, no output. Under ``torch.func`` and
        forward-mode differentiation the products are PyTorch's, whatever the path.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, neither or both of frequencies and
            tables, or a path that cannot serve these tensors.
    """
    packed = x.ndim == 2
    if packed:
        x = x[None]
        position_ids = (
            position_ids[None] if position_ids is not None and position_ids.ndim == 1 else position_ids
        )
    _weights(x, head_dim, (("q", w_q, b_q), ("k", w_k, b_k), ("v", w_v, b_v)))
    batch, length = x.shape[:2]
    words = None
    if (inv_freq is None) == (cos is None) or (cos is None) != (sin is None):
        raise ValueError("give inv_freq, or cos and sin")
    if inv_freq is not None:
        validation.frequencies(inv_freq, head_dim, x.device)
        if position_ids is not None:
            validation.positions(position_ids, batch, length, x.device)
        words = inv_freq if inv_freq.dtype == torch.int32 else turns(inv_freq)
    else:
        if position_ids is not None or attention_scaling != 1.0:
            raise ValueError("position_ids and attention_scaling go with inv_freq; tables carry both in them")
        cos, sin = validation.tables(x.new_empty(batch, length, 0, head_dim), cos, sin, rows=length)
    if path not in dispatch_projection.PATHS:
        raise ValueError(f"no such path {path!r}; there are {', '.join(dispatch_projection.PATHS)}")
    if path not in ("auto", "separate"):
        half = (cos if words is None else words).shape[-1]
        possible = dispatch_projection.candidates(x, w_q, w_k, w_v, head_dim, 2 * half)
        if path not in possible:
            raise ValueError(f"path {path!r} cannot serve these tensors; {', '.join(possible)} can")
    if library.transformed():
        q, k, *v = dispatch_projection.project(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
        q, k = library.rotate(
            q, k, cos=cos, sin=sin, words=words, positions=position_ids, scaling=float(attention_scaling),
            interleaved=interleaved,
        )  # fmt: skip
        v = v[0] if v else None
    else:
        q, k, v = torch.ops.rope_dist.qkv_rotary(
            x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, cos, sin, words, position_ids, float(attention_scaling),
            interleaved, path,
        )  # fmt: skip
    out = (q, k, v) if w_v is not None else (q, k, None)
    return tuple(y[0] if packed and y is not None else y for y in out)


def decode_rotary(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    *,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    inv_freq: torch.Tensor,
    position_ids: torch.Tensor,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """:func:`qkv_rotary` that writes keys and values into their caches, for inference: no gradient.

    One launch for up to 16 float16 or bfloat16 tokens; more, or other types, take more launches.

    Args:
        x: ``[B, S, K]`` or ``[T, K]``.
        k_cache, v_cache: ``[entries, Hk, head_dim]`` in the dtype of ``x``, any strides, changed in place.
        slots: ``[B * S]`` int32 or int64, the entry of each token; a negative one is not written. Entries
            must exist and differ: on a GPU they are not looked at.
        Others as in :func:`qkv_rotary`.

    Returns:
        The queries ``[B, S, Hq, head_dim]`` (packed: ``[T, Hq, head_dim]``).

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, caches that share memory, slots past the
            cache (looked at on CPU tensors only), or a transform of ``torch.func``.
    """
    if library.transformed():
        raise ValueError("decode_rotary is for inference: torch.func and forward mode go with qkv_rotary")
    packed = x.ndim == 2
    if packed:
        x = x[None]
        position_ids = position_ids[None] if position_ids.ndim == 1 else position_ids
    if k_cache.ndim != 3 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"caches must be [entries, heads, head_dim] of one shape, got {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    head_dim = k_cache.shape[2]
    _weights(x, head_dim, (("q", w_q, b_q), ("k", w_k, b_k), ("v", w_v, b_v)))
    for cache, weight, name in ((k_cache, w_k, "k"), (v_cache, w_v, "v")):
        if cache.shape[1] * head_dim != weight.shape[0]:
            raise ValueError(
                f"{name}_cache has {cache.shape[1]} heads, w_{name} {weight.shape[0] // head_dim}"
            )
        if cache.dtype != x.dtype or cache.device != x.device:
            raise ValueError(
                f"{name}_cache must be {x.dtype} on {x.device}, got {cache.dtype} on {cache.device}"
            )
    validation.writable(k_cache, v_cache, names=("k_cache", "v_cache"))
    tokens = x.shape[0] * x.shape[1]
    if slots.shape != (tokens,):
        raise ValueError(f"slots must be [{tokens}], got {list(slots.shape)}")
    validation.integers(slots, "slots", x.device)
    if slots.device.type == "cpu" and tokens and not torch.compiler.is_compiling():
        last = int(slots.max())
        if last >= k_cache.shape[0]:
            raise ValueError(f"slot {last} is past the cache's {k_cache.shape[0]} entries")
    validation.frequencies(inv_freq, head_dim, x.device)
    validation.positions(position_ids, x.shape[0], x.shape[1], x.device)
    words = inv_freq if inv_freq.dtype == torch.int32 else turns(inv_freq)
    with torch.no_grad():
        q = torch.ops.rope_dist.decode_cached(
            x, w_q, w_k, w_v, b_q, b_k, b_v, k_cache, v_cache, slots, None, None, words, position_ids,
            float(attention_scaling), interleaved,
        )  # fmt: skip
    return q[0] if packed else q


def _weights(x: torch.Tensor, head_dim: int, projections: tuple) -> None:
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be [B, S, K] or [T, K] floating, got {list(x.shape)} {x.dtype}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    for name, weight, bias in projections:
        if weight is None:
            if bias is not None:
                raise ValueError(f"b_{name} without w_{name}")
            continue
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] % head_dim:
            raise ValueError(
                f"w_{name} must be [heads * {head_dim}, {x.shape[-1]}], got {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"b_{name} must be {list(weight.shape[:1])}, got {list(bias.shape)}")
        for tensor, which in ((weight, f"w_{name}"), (bias, f"b_{name}")):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
                raise ValueError(
                    f"{which} must be {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}"
                )
