"""Registration of norm + rotary with ``torch.library``: schema, shapes, gradients. As ``library.py`` for the rotation.

The norm keeps for its gradient the heads that it was given, which their projection keeps for nothing, and one
reciprocal norm a head.
"""

from __future__ import annotations

import torch

from . import dispatch, launch_cache, library, reference_norm, validation
from .arguments import Angles, Norms, is_joint, present, schema
from .launch_cache import transformed
from .reference import add_bias, compute_dtype

_NORMS, _ANGLES = schema(Norms), schema(Angles)
_BIASES = "Tensor? q_bias=None, Tensor? k_bias=None"
_LAST = len(Norms._fields)
Pair = tuple[torch.Tensor, torch.Tensor | None]


def _split(flat: tuple) -> tuple[Norms, Angles]:
    """The norms and the angles of the flat arguments of an operator. Defaults may be left out."""
    angles = Angles(*flat[_LAST:])
    if angles.deinterleave:
        raise ValueError("deinterleave goes with ops.rotary and ops.rotary_at, not with a norm")
    return Norms(*flat[:_LAST]), angles


def _empty(q: torch.Tensor, k: torch.Tensor | None) -> torch.Tensor | None:
    """What an operator returns in the place of keys that are not there: a tensor, as its schema has it."""
    return q.new_empty(0) if k is None else k


def _impl(q, k, q_bias=None, k_bias=None, *flat) -> tuple[torch.Tensor, ...]:
    norms, angles = _split(flat)
    q_out, k_out, rstds = dispatch.norm_rotate_saving(q, k, norms, angles, q_bias, k_bias)
    return q_out, present(_empty(q, k_out)), rstds[0], present(_empty(rstds[0], rstds[1]))


def _in_place_impl(q, k, q_bias=None, k_bias=None, *flat) -> None:
    norms, angles = _split(flat)
    dispatch.norm_rotate(q, k, norms, angles, q_bias, k_bias, inplace=True)


def _backward_impl(grad_q, grad_k, q, k, q_rstd, k_rstd, q_bias=None, k_bias=None, *flat):
    norms, angles = _split(flat)
    gradients = dispatch.norm_rotate_backward(
        (grad_q, grad_k), (q, k), (q_rstd, k_rstd), norms, angles, q_bias, k_bias
    )
    return tuple(gradient if gradient is not None else q.new_empty(0) for gradient in gradients)


library.define(
    f"norm_rotate(Tensor q, Tensor? k, {_BIASES}, {_NORMS}, {_ANGLES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _impl,
)
library.define(
    f"norm_rotate_(Tensor(a!) q, Tensor(b!)? k, {_BIASES}, {_NORMS}, {_ANGLES}) -> ()", _in_place_impl
)
library.define(
    "norm_rotate_backward(Tensor grad_q, Tensor? grad_k, Tensor q, Tensor? k, Tensor q_rstd, Tensor? k_rstd, "
    f"{_BIASES}, {_NORMS}, {_ANGLES}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
)


@torch.library.register_fake("rope_dist::norm_rotate", lib=library.LIBRARY)
def _fake(q, k, q_bias=None, k_bias=None, *flat):
    norms, _ = _split(flat)
    rstds = [
        x.new_empty((*x.shape[:2], 1 if is_joint(weight, x) else x.shape[2]), dtype=compute_dtype(x))
        if x is not None
        else q.new_empty(0, dtype=compute_dtype(q))
        for x, weight in zip((q, k), norms.weights(), strict=True)
    ]
    return q.new_empty(q.shape), q.new_empty(k.shape if k is not None else 0), *rstds


@torch.library.register_fake("rope_dist::norm_rotate_", lib=library.LIBRARY)
def _in_place_fake(q, k, *rest) -> None:
    return None


@torch.library.register_fake("rope_dist::norm_rotate_backward", lib=library.LIBRARY)
def _backward_fake(grad_q, grad_k, q, k, q_rstd, k_rstd, q_bias=None, k_bias=None, *flat):
    norms, _ = _split(flat)
    like = (q, k, norms.q_weight, norms.k_weight if k is not None else None)
    return tuple(x.new_empty(x.shape) if x is not None else q.new_empty(0) for x in like)


def _setup(ctx, inputs, output) -> None:
    q, k, q_bias, k_bias, *flat = inputs
    norms, angles = _split(tuple(flat))
    q_rstd, k_rstd = output[2:]
    ctx.norms, ctx.numbers = norms[2:], angles[len(angles.tensors()) :]
    ctx.save_for_backward(
        q, k, q_bias, k_bias, q_rstd, k_rstd if k is not None else None, *norms.weights(), *angles.tensors()
    )
    ctx.mark_non_differentiable(q_rstd, k_rstd)


def _backward(ctx, grad_q, grad_k, *_of_rstds):
    q, k, q_bias, k_bias, q_rstd, k_rstd, *rest = ctx.saved_tensors
    norms, angles = Norms(*rest[:2], *ctx.norms), Angles(*rest[2:], *ctx.numbers)
    if k is None:
        grad_k = None
    if torch.is_grad_enabled():
        # Gradients that are to be differentiated again: by what they are made of.
        gradients = _twice(grad_q, grad_k, q, k, q_bias, k_bias, norms, angles)
    else:
        gradients = list(
            torch.ops.rope_dist.norm_rotate_backward(
                grad_q, grad_k, q, k, q_rstd, k_rstd, q_bias, k_bias, *norms, *angles
            )
        )
    of_q, of_k, of_q_weight, of_k_weight = gradients
    of_biases = [
        gradient.sum((0, 1)).flatten() if bias is not None else None
        for gradient, bias in ((of_q, q_bias), (of_k, k_bias))
    ]
    return (
        of_q,
        of_k if k is not None else None,
        *of_biases,
        of_q_weight if norms.q_weight is not None else None,
        of_k_weight if norms.k_weight is not None and k is not None else None,
        *(None,) * (_LAST - 2 + len(Angles._fields)),
    )


def _twice(grad_q, grad_k, q, k, q_bias, k_bias, norms: Norms, angles: Angles) -> list[torch.Tensor]:
    """The gradients of :func:`_backward`, differentiable."""
    with torch.enable_grad():
        out = _composed(q, k, norms, angles, q_bias, k_bias)
        pairs = [(y, grad) for y, grad in zip(out, (grad_q, grad_k), strict=True) if y is not None]
        wanted = [q, k, *norms.weights()]
        inputs = [x for x in wanted if x is not None and x.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], inputs, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    gradients = iter(found)
    return [
        q.new_zeros(0) if x is None
        else next(gradients) if x.requires_grad
        else torch.zeros_like(x)
        for x in wanted
    ]  # fmt: skip


torch.library.register_autograd(
    "rope_dist::norm_rotate", _backward, setup_context=_setup, lib=library.LIBRARY
)


def _composed(
    q: torch.Tensor, k: torch.Tensor | None, norms: Norms, angles: Angles, q_bias=None, k_bias=None
) -> Pair:
    """Norm and rotation as operators of their own, which every transform and order of differentiation knows."""

    def widened(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return add_bias(x, bias) if bias is not None else x.to(compute_dtype(x))

    def normed(q: torch.Tensor, k: torch.Tensor | None) -> Pair:
        pairs = zip((q, k), norms.weights(), strict=True)
        out = [
            reference_norm.norm(x, w, norms.eps, norms.weight_offset) if x is not None else None
            for x, w in pairs
        ]
        return present(out[0]), out[1]

    wide: Pair = widened(q, q_bias), widened(k, k_bias) if k is not None else None
    if not norms.norm_after:
        wide = normed(*wide)
    q_out, k_out = library.rotate(*wide, angles)
    if norms.norm_after:
        q_out, k_out = normed(q_out, k_out)
    return q_out.to(q.dtype), k_out.to(q.dtype) if k_out is not None else None


def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> Pair:
    """Normalise and rotate for checked arguments (see ``reference_norm.norm_rotate_tokens``), in place or not.

    Args:
        key: of ``launch_cache.find``, which had no launch; None: the call goes through the operator.

    Raises:
        ValueError: ``inplace`` and tensors that cannot be changed in place, or that need a gradient: it is made of what
            they were.
    """
    if inplace:
        validation.writable(q, k)
    if key is not None:
        return dispatch.norm_rotate(q, k, norms, angles, q_bias, k_bias, inplace=inplace, key=key)
    if not inplace:
        if transformed():
            return _composed(q, k, norms, angles, q_bias, k_bias)
        q_out, k_out, _, _ = torch.ops.rope_dist.norm_rotate(q, k, q_bias, k_bias, *norms, *angles)
        return q_out, k_out if k is not None else None
    tensors = (q, k, q_bias, k_bias, *norms.weights())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "the gradient of a norm needs what it was given, which is gone when it is changed in place: give "
            "inplace=False, or call under torch.no_grad()"
        )
    if transformed():
        q_out, k_out = _composed(q, k, norms, angles, q_bias, k_bias)
        return q.copy_(q_out), k.copy_(present(k_out)) if k is not None else None
    torch.ops.rope_dist.norm_rotate_(q, k, q_bias, k_bias, *norms, *angles)
    return q, k
