"""Attention by two rotations from what returns a log-sum-exp elsewhere: flash-attention and flex_attention."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .windowed_attention import merge


@functools.cache
def _flash() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    function: Callable[..., Any] = torch.compile(flex_attention)
    return function


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def has_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether flash-attention takes them. Its gradient is not used: that of a log-sum-exp is not returned.

    It has one dtype of 16 bits, one head_dim of keys and values, a multiple of 8 up to 256, and GPUs from Ampere on.
    """
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and _is_ampere(q.device)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and _flash() is not None
    )


def flash_windowed(
    q: torch.Tensor,
    k: torch.Tensor,
    far_q: torch.Tensor,
    far_k: torch.Tensor,
    v: torch.Tensor,
    window: int,
    scale: float,
    function: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """:func:`rope_dist.ops.windowed_attention` of contiguous positions by ``flash_attn_func``, without a gradient.

    The near part is its window. The far part of the query at position ``i`` are the keys up to ``i - window``: causal
    attention of the queries from ``window`` on over the keys without the last ``window``.

    Args:
        q, far_q: ``[B, H, S, D]``, the last of the tokens.
        k, far_k, v: ``[B, Hkv, T, D]``.
        window: at least 1.
        function: with the interface of ``flash_attn.flash_attn_func``; by default that.

    Raises:
        ValueError: no function is given, and flash-attention is not installed.
    """
    if (function := function or _flash()) is None:
        raise ValueError("flash_windowed needs flash-attention, which is not installed")
    queries, keys = q.shape[2], k.shape[2]
    near = _called(function, q, k, v, scale, window_size=(window - 1, 0))
    far_keys = keys - window
    first = max(0, queries - far_keys)  # query of the first key beyond its window
    if far_keys <= 0:
        return near[0]
    far = _called(function, far_q[:, :, first:], far_k[:, :, :far_keys], v[:, :, :far_keys], scale)
    out = near[0]
    both, _ = merge([(near[0][:, :, first:], near[1][..., first:]), far], like=out[:, :, first:])
    return torch.cat((out[:, :, :first], both), dim=2)


def _called(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, _ = function(q, k, v, softmax_scale=scale, causal=True, return_attn_probs=True, **options)
    return out.transpose(1, 2), lse


def flex_windowed(  # noqa: PLR0913
    q: torch.Tensor,
    k: torch.Tensor,
    far_q: torch.Tensor,
    far_k: torch.Tensor,
    v: torch.Tensor,
    *,
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    window: int,
    mask_mod: Callable[..., torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """:func:`rope_dist.ops.windowed_attention` by ``flex_attention``, differentiable as that is.

    Args:
        positions, key_positions: ``[B or 1, S]``, ``[B or 1, T]``.
        mask_mod: of a ``BlockMask``: which keys each query sees.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    positions = positions.to(q.device).expand(batch, -1).contiguous()
    key_positions = key_positions.to(q.device).expand(batch, -1).contiguous()

    def near(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return mask_mod(b, h, i, j) & (positions[b, i] - key_positions[b, j] < window)

    def far(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return mask_mod(b, h, i, j) & (positions[b, i] - key_positions[b, j] >= window)

    function, parts = _flex(q.device.type != "cpu"), []
    for seen, one_q, one_k in ((near, q, k), (far, far_q, far_k)):
        mask = create_block_mask(seen, batch, None, queries, keys, device=q.device)
        out, aux = function(
            one_q,
            one_k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        parts.append((out, aux.lse))
    out, _ = merge(parts, like=torch.zeros_like(parts[0][0]))
    return out
