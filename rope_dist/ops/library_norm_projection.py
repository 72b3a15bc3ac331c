"""Registration of projection + norm + rotary with ``torch.library``: schema, shapes, gradients.

The gradient of a norm needs its input, which the fused kernel does not keep. Where a gradient is wanted the products
and the norm with the rotation are therefore operators of their own, and keep it. The backward pass of the operator
here, for who calls it directly, makes the products again.
"""

from __future__ import annotations

import torch

from . import autotune, dispatch_projection, launch_cache, library, library_norm
from .arguments import Angles, Norms, Projections, schema

_FIRST, _SECOND = len(Projections._fields), len(Projections._fields) + len(Norms._fields)
_LAST = _SECOND + len(Angles._fields)


def _split(flat: tuple) -> tuple[Projections, Norms, Angles, str]:
    """The groups and the path that the flat arguments of the operator are. Defaults may be left out."""
    angles = Angles(*flat[_SECOND:_LAST])
    if angles.deinterleave:
        raise ValueError("deinterleave goes with ops.rotary and ops.rotary_at, not with a norm")
    path = flat[_LAST] if len(flat) > _LAST else "auto"
    return Projections(*flat[:_FIRST]), Norms(*flat[_FIRST:_SECOND]), angles, path


def options(projections: Projections, norms: Norms, path: str) -> tuple:
    """What a launch depends on besides tensors and angles."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return projections.head_dim, *norms[2:], path, autotune.fixed(), deterministic


def _impl(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    projections, norms, angles, path = _split(flat)
    tensors = (x, *projections[:6], *norms.weights())
    launch, key = launch_cache.find("operator norm", tensors, angles, *options(projections, norms, path))
    if launch is not None:
        q, k, v = launch(x, projections, angles, norms)
    else:
        q, k, v = dispatch_projection.qkv_rotary(x, projections, angles, path, key, norms)
    return q, k, v if v is not None else x.new_empty(0)


library.define(
    f"qkv_norm_rotary(Tensor x, {schema(Projections)}, {schema(Norms)}, {schema(Angles)}, str path='auto') "
    "-> (Tensor, Tensor, Tensor)",
    _impl,
)


@torch.library.register_fake("rope_dist::qkv_norm_rotary", lib=library.LIBRARY)
def _fake(x, *flat):
    projections, _, _, _ = _split(flat)
    return tuple(
        x.new_empty(*x.shape[:2], w.shape[0] // projections.head_dim, projections.head_dim)
        if w is not None
        else x.new_empty(0)
        for w in projections[:3]
    )


def _setup(ctx, inputs, output) -> None:
    x, *flat = inputs
    projections, norms, angles, _ = _split(tuple(flat))
    tensors = angles.tensors()
    ctx.numbers = projections.head_dim, norms[2:], angles[len(tensors) :]
    ctx.save_for_backward(x, *projections[:6], *norms.weights(), *tensors)


def _backward(ctx, grad_q, grad_k, grad_v):
    x, *tensors = ctx.saved_tensors
    head_dim, norm_numbers, angle_numbers = ctx.numbers
    projections = Projections(*tensors[:6], head_dim)
    norms, angles = Norms(*tensors[6:8], *norm_numbers), Angles(*tensors[8:], *angle_numbers)
    q, k, *_ = dispatch_projection.project(x, projections)
    *_, q_rstd, k_rstd = torch.ops.rope_dist.norm_rotate(q, k, None, None, *norms, *angles)
    of_q, of_k, of_q_weight, of_k_weight = torch.ops.rope_dist.norm_rotate_backward(
        grad_q, grad_k, q, k, q_rstd, k_rstd, None, None, *norms, *angles
    )
    parts = [of_q, of_k, *([grad_v] if projections.w_v is not None else [])]
    packed = torch.cat([part.flatten(2) for part in parts], -1)
    gradients = library.projection_gradients(packed, x, projections.weights(), ctx.needs_input_grad)
    of_weights = [
        gradient if weight is not None else None
        for gradient, weight in zip((of_q_weight, of_k_weight), norms.weights(), strict=True)
    ]
    return *gradients, None, *of_weights, *(None,) * (len(norm_numbers) + len(Angles._fields) + 1)


torch.library.register_autograd(
    "rope_dist::qkv_norm_rotary", _backward, setup_context=_setup, lib=library.LIBRARY
)


def qkv_norm_rotary(
    x: torch.Tensor,
    projections: Projections,
    norms: Norms,
    angles: Angles,
    path: str = "auto",
    key: launch_cache.Key | None = None,
) -> dispatch_projection.Heads:
    """Project, normalise and rotate for checked arguments; ``key`` as in ``library.rotate``."""
    if key is not None:
        with torch.no_grad():
            return dispatch_projection.qkv_rotary(x, projections, angles, path, key, norms)
    tensors = (x, *projections[:6], *norms.weights())
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if gradient or launch_cache.transformed():
        heads = dispatch_projection.project(x, projections)
        q, k = library_norm.norm_rotate(heads[0], heads[1], norms, angles)
        assert k is not None
        return q, k, heads[2] if len(heads) == 3 else None
    q, k, v = torch.ops.rope_dist.qkv_norm_rotary(x, *projections, *norms, *angles, path)
    return q, k, v if projections.w_v is not None else None
