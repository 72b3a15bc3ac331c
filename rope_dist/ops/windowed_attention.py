"""Attention by two rotations of the same queries and keys: one within a window of distances, one beyond it.

Both parts share the values. Each part gives its output and the logarithm of the sum of its exponentials, by which the
two are merged exactly: ``out = sum_i exp(lse_i - lse) out_i`` with ``lse = log sum_i exp(lse_i)``. Memory is linear in
the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .window_blocks import WindowBlocks


def windowed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    far_q: torch.Tensor,
    far_k: torch.Tensor,
    v: torch.Tensor,
    blocks: WindowBlocks,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention whose logits are ``q @ k`` within the window and ``far_q @ far_k`` beyond it.

    On a CPU each piece is PyTorch's fused attention, elsewhere two matrix products in float32. The gradient computes
    the probabilities of each piece again.

    Args:
        q, far_q: ``[B, H, S, D]``.
        k, far_k: ``[B, Hkv, T, D]``, ``Hkv`` divides ``H``.
        v: ``[B, Hkv, T, Dv]``.
        blocks: of ``S`` queries and ``T`` keys.
        scale: of the logits, by default ``D ** -0.5``.

    Returns:
        ``[B, H, S, Dv]`` in the dtype of ``v``; zeros for queries that see no key.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k, far_q, far_k, v, blocks)
    return _Windowed.apply(q, k, far_q, far_k, v, blocks, q.shape[-1] ** -0.5 if scale is None else scale)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    far_q: torch.Tensor,
    far_k: torch.Tensor,
    v: torch.Tensor,
    blocks: WindowBlocks,
) -> None:
    if far_q.shape != q.shape or far_k.shape != k.shape:
        raise ValueError(
            "far_q and far_k must have the shapes of q and k, got "
            f"{[list(x.shape) for x in (q, far_q, k, far_k)]}"
        )
    if q.ndim != 4 or k.ndim != 4 or v.shape[:3] != k.shape[:3] or k.shape[0] != q.shape[0]:
        raise ValueError(
            "q must be [B, H, S, D], k [B, Hkv, T, D] and v [B, Hkv, T, Dv], got "
            f"{[list(x.shape) for x in (q, k, v)]}"
        )
    if q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q has {q.shape[1]} heads of {q.shape[3]}, which {k.shape[1]} of {k.shape[3]} do not serve"
        )
    if (q.shape[2], k.shape[2]) != (blocks.queries, blocks.keys):
        raise ValueError(
            f"the blocks are of {blocks.queries} queries and {blocks.keys} keys, got {q.shape[2]} and {k.shape[2]}"
        )
    if len({x.dtype for x in (q, k, far_q, far_k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype, got {[x.dtype for x in (q, k, far_q, far_k, v)]}")


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        far_q: torch.Tensor,
        far_k: torch.Tensor,
        v: torch.Tensor,
        blocks: WindowBlocks,
        scale: float,
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=_exact(q.dtype), device=q.device)
        for start, end, pieces in blocks.blocks:
            parts = []
            queries = [_fold(x, start, end, groups) for x in (q, far_q)]
            for piece in pieces:
                keys = slice(piece.start, piece.end)
                bias, blind = None, None
                if piece.masked:
                    bias, blind = blocks.bias(start, end, piece, groups, q.device)
                one, own = _part(
                    queries[piece.far], (far_k if piece.far else k)[:, :, keys], v[:, :, keys], bias, scale
                )
                parts.append((one, own if blind is None else own.masked_fill(blind, float("-inf"))))
            made, total = merge(parts, like=queries[0].new_zeros(*queries[0].shape[:3], v.shape[-1]))
            _unfold(out, start, end, groups).copy_(made.unflatten(2, (groups, -1)))
            _unfold(lse, start, end, groups).copy_(total.unflatten(2, (groups, -1)))
        ctx.save_for_backward(q, k, far_q, far_k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With the output and the log-sum-exp of all pieces together, the gradient of attention is a sum over pieces.
        q, k, far_q, far_k, v, out, lse = ctx.saved_tensors
        blocks, groups = ctx.blocks, q.shape[1] // k.shape[1]
        of_q, of_far_q, of_k, of_far_k, of_v = (
            torch.zeros(x.shape, dtype=_exact(x.dtype), device=x.device) for x in (q, far_q, k, far_k, v)
        )
        # A query that sees nothing has a log-sum-exp of minus infinity; by infinity its probabilities are 0.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        for start, end, pieces in blocks.blocks:
            queries = [_fold(x, start, end, groups) for x in (q, far_q)]
            of_out, made, total = (_fold(x, start, end, groups) for x in (grad, out, lse))
            for piece in pieces:
                keys = slice(piece.start, piece.end)
                bias = blocks.bias(start, end, piece, groups, q.device)[0] if piece.masked else None
                one_q, one_k, one_v = _part_backward(
                    of_out,
                    queries[piece.far],
                    (far_k if piece.far else k)[:, :, keys],
                    v[:, :, keys],
                    made,
                    total,
                    bias,
                    ctx.scale,
                )
                target = _unfold(of_far_q if piece.far else of_q, start, end, groups)
                target += one_q.unflatten(2, (groups, -1))
                (of_far_k if piece.far else of_k)[:, :, keys] += one_k
                of_v[:, :, keys] += one_v
        dtypes = (q, k, far_q, far_k, v)
        grads = (of_q, of_k, of_far_q, of_far_k, of_v)
        return (*(g.to(x.dtype) for g, x in zip(grads, dtypes, strict=True)), None, None)


def merge(
    parts: list[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over all keys from outputs ``[..., S, Dv]`` and log-sum-exps ``[..., S]`` over disjoint ones.

    Args:
        like: zeros ``[..., S, Dv]``, what queries without keys get.

    Returns:
        Output and log-sum-exp; the latter is minus infinity for a query that sees no key.
    """
    if not parts:
        return like, torch.full(like.shape[:-1], float("-inf"), dtype=_exact(like.dtype), device=like.device)
    if len(parts) == 1:
        out, lse = parts[0]
        return out.masked_fill((lse == float("-inf"))[..., None], 0.0), lse
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total.masked_fill(total == float("-inf"), 0.0))
    out = sum(one * weight[..., None] for (one, _), weight in zip(parts, weights, strict=True))
    return out.to(like.dtype), total


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fold(x: torch.Tensor, start: int, end: int, groups: int) -> torch.Tensor:
    """``[B, H, S, ...]`` to ``[B, Hkv, groups * (end - start), ...]``: the queries of one key head in a row."""
    return x[:, :, start:end].unflatten(1, (-1, groups)).flatten(2, 3)


def _unfold(x: torch.Tensor, start: int, end: int, groups: int) -> torch.Tensor:
    """A view ``[B, Hkv, groups, end - start, ...]``."""
    return x.unflatten(1, (-1, groups))[:, :, :, start:end]


def _is_fused(q: torch.Tensor, v: torch.Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_fused(q, v):
        bias = None if bias is None else bias.to(_exact(q.dtype))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
    logits = _logits(q, k, bias, scale)
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return (p.to(v.dtype) @ v), lse


def _part_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _is_fused(q, v):
        bias = None if bias is None else bias.to(_exact(q.dtype))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    p = torch.exp(_logits(q, k, bias, scale) - lse[..., None])
    exact = p.dtype
    grad, v, out, q, k = (x.to(exact) for x in (grad, v, out, q, k))
    of_logits = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return of_logits @ k, of_logits.mT @ q, p.mT @ grad


def _logits(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    exact = _exact(q.dtype)
    logits = q.to(exact) @ k.to(exact).mT * scale
    return logits if bias is None else logits + bias
