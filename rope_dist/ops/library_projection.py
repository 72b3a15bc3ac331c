"""Registration of the fused projection: schema, shapes, gradients."""

from __future__ import annotations

import torch

from . import dispatch, dispatch_projection
from .library import LIBRARY

_ANGLES = (
    "Tensor? cos=None, Tensor? sin=None, Tensor? words=None, Tensor? positions=None, float scaling=1.0, "
    "bool interleaved=False"
)
LIBRARY.define(
    "qkv_rotary(Tensor x, Tensor w_q, Tensor w_k, Tensor? w_v, Tensor? b_q, Tensor? b_k, Tensor? b_v, "
    f"int head_dim, {_ANGLES}, str path='auto') -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("qkv_rotary", dispatch_projection.qkv_rotary, "CompositeExplicitAutograd")
LIBRARY.define(f"pack_inverse(Tensor q, Tensor k, Tensor? v, {_ANGLES}) -> Tensor")
LIBRARY.impl("pack_inverse", dispatch_projection.pack_inverse, "CompositeExplicitAutograd")
LIBRARY.define(
    "decode_cached(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, Tensor? b_q, Tensor? b_k, Tensor? b_v, "
    f"Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, {_ANGLES}) -> Tensor"
)
LIBRARY.impl("decode_cached", dispatch_projection.decode_cached, "CompositeExplicitAutograd")


@torch.library.register_fake("rope_dist::decode_cached", lib=LIBRARY)
def _decode_fake(x, w_q, w_k, w_v, b_q, b_k, b_v, k_cache, *angles):
    return x.new_empty(*x.shape[:2], w_q.shape[0] // k_cache.shape[2], k_cache.shape[2])


@torch.library.register_fake("rope_dist::qkv_rotary", lib=LIBRARY)
def _qkv_fake(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, *angles):
    def heads(weight: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:2], weight.shape[0] // head_dim, head_dim)

    return heads(w_q), heads(w_k), heads(w_v) if w_v is not None else x.new_empty(0)


@torch.library.register_fake("rope_dist::pack_inverse", lib=LIBRARY)
def _pack_fake(q, k, v, *angles):
    heads = sum(x.shape[2] for x in (q, k, v) if x is not None)
    return q.new_empty(*q.shape[:2], heads * q.shape[3])


def _qkv_setup(ctx, inputs, output) -> None:
    (
        x,
        w_q,
        w_k,
        w_v,
        b_q,
        b_k,
        b_v,
        ctx.head_dim,
        cos,
        sin,
        words,
        positions,
        ctx.scaling,
        ctx.interleaved,
        _,
    ) = inputs
    ctx.has_bias = [b is not None for b in (b_q, b_k, b_v)]
    # What the caller holds anyway: no output and nothing as large as one.
    ctx.save_for_backward(x, w_q, w_k, w_v, cos, sin, words, positions)


def _qkv_backward(ctx, grad_q, grad_k, grad_v):
    x, w_q, w_k, w_v, *angles = ctx.saved_tensors
    weights = [w for w in (w_q, w_k, w_v) if w is not None]
    widths = [w.shape[0] for w in weights]
    packed = torch.ops.rope_dist.pack_inverse(
        grad_q, grad_k, grad_v if w_v is not None else None, *angles, ctx.scaling, ctx.interleaved
    )
    grad_x, grad_w, grad_b = None, [None] * 3, [None] * 3
    rows = packed.flatten(0, 1)
    with dispatch.without_autocast(x):
        if ctx.needs_input_grad[0]:
            # One product, rounded once; the joined weights live only as long as it takes.
            grad_x = packed @ torch.cat(weights)
        if any(ctx.needs_input_grad[1:4]):
            joined = (rows.t() @ x.flatten(0, 1)).split(widths)
            grad_w = [
                joined[i] if i < len(joined) and ctx.needs_input_grad[1 + i] else None for i in range(3)
            ]
        if any(ctx.needs_input_grad[4:7]):
            joined = rows.sum(0).split(widths)
            grad_b = [
                joined[i] if i < len(joined) and ctx.needs_input_grad[4 + i] else None for i in range(3)
            ]
    return grad_x, *grad_w, *grad_b, *[None] * 8


torch.library.register_autograd("rope_dist::qkv_rotary", _qkv_backward, setup_context=_qkv_setup, lib=LIBRARY)


def _pack_setup(ctx, inputs, output) -> None:
    q, k, v, *angles, ctx.scaling, ctx.interleaved = inputs
    ctx.shapes = [x.shape[2:] for x in (q, k, v) if x is not None]
    ctx.save_for_backward(*angles)


def _pack_backward(ctx, grad):
    parts = grad.split([heads * dim for heads, dim in ctx.shapes], dim=-1)
    q, k, *v = (part.unflatten(-1, shape) for part, shape in zip(parts, ctx.shapes, strict=True))
    cos, sin, words, positions = ctx.saved_tensors
    q, k = torch.ops.rope_dist.rotate(
        q, k, cos, sin, words, positions, scaling=ctx.scaling, interleaved=ctx.interleaved
    )
    return q, k, v[0] if v else None, *[None] * 6


torch.library.register_autograd(
    "rope_dist::pack_inverse", _pack_backward, setup_context=_pack_setup, lib=LIBRARY
)
