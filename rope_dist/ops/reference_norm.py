"""The definition of RMS norm and rotation in one, in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch

from .arguments import Angles, Norms, is_joint, present
from .reference import add_bias, compute_dtype, rotate, token_tables

Heads = tuple[torch.Tensor, torch.Tensor | None]


def reciprocal_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` of ``x`` ``[B, S, H, D]``: ``[B, S, H, 1]``, or ``[B, S, 1, 1]`` of all heads."""
    axes = (2, 3) if is_joint(weight, x) else (3,)
    return (x.square().mean(axes, keepdim=True) + eps).rsqrt()


def scale(x: torch.Tensor, weight: torch.Tensor | None, offset: float) -> torch.Tensor:
    """``x`` ``[B, S, H, D]`` times the weight plus the offset."""
    if weight is None:
        return x
    weight = weight.to(x.dtype) + offset if offset else weight.to(x.dtype)
    return x * (weight.unflatten(0, x.shape[2:]) if is_joint(weight, x) else weight)


def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    """RMS norm of ``x`` ``[B, S, H, D]``, in its own dtype."""
    return scale(x * reciprocal_norm(x, weight, eps), weight, offset)


def norm_rotate_tokens(
    q: torch.Tensor,
    k: torch.Tensor | None,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """Normalise and rotate ``q`` ``[B, S, Hq, D]`` and ``k`` ``[B, S, Hk, D]`` (or None).

    16-bit inputs are computed in float32 and rounded once.

    Args:
        q_bias, k_bias: ``[heads * D]``, added first.

    Returns:
        New contiguous queries and keys, and the reciprocal norms ``[B, S, heads or 1]`` of both, in the type that the
        norm was computed in; None for ``k`` None.
    """
    rotation = _Rotation(angles, q)

    def one(x, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
        wide = add_bias(x, bias) if bias is not None else x.to(compute_dtype(x))
        if norms.norm_after:
            wide = rotation(wide)
        rstd = reciprocal_norm(wide, weight, norms.eps)
        wide = scale(wide * rstd, weight, norms.weight_offset)
        if not norms.norm_after:
            wide = rotation(wide)
        return wide.to(x.dtype).contiguous(), rstd[..., 0]

    q_out, q_rstd = one(q, norms.q_weight, q_bias)
    if k is None:
        return q_out, None, q_rstd, None
    k_out, k_rstd = one(k, norms.k_weight, k_bias)
    return q_out, k_out, q_rstd, k_rstd


def norm_rotate_backward(
    grads: Heads,
    heads: Heads,
    rstds: Heads,
    norms: Norms,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``heads`` (queries and keys before the norm) and of the norms' weights.

    Args:
        grads: of what :func:`norm_rotate_tokens` returned, ``[B, S, heads, D]`` each.
        rstds: the reciprocal norms that it returned.
    """
    back = _Rotation(angles.conjugated(), heads[0])
    forth = _Rotation(angles, heads[0])

    def one(grad, x, rstd, weight, bias) -> tuple[torch.Tensor, torch.Tensor | None]:
        compute = compute_dtype(x)
        wide = add_bias(x, bias) if bias is not None else x.to(compute)
        grad, rstd = grad.to(compute), rstd[..., None].to(compute)
        normed = (forth(wide) if norms.norm_after else wide) * rstd
        if not norms.norm_after:
            grad = back(grad)
        of_weight = None
        if weight is not None:
            products = (grad * normed).sum((0, 1))
            of_weight = (products.flatten() if is_joint(weight, x) else products.sum(0)).to(weight.dtype)
        grad = scale(grad, weight, norms.weight_offset)
        axes = (2, 3) if is_joint(weight, x) else (3,)
        grad = rstd * (grad - normed * (grad * normed).mean(axes, keepdim=True))
        if norms.norm_after:
            grad = back(grad)
        return grad.to(x.dtype).contiguous(), of_weight

    (q, k), (q_rstd, k_rstd) = heads, rstds
    q_grad, q_weight = one(grads[0], q, q_rstd, norms.q_weight, q_bias)
    if k is None:
        return q_grad, None, q_weight, None
    k_grad, k_weight = one(present(grads[1]), k, k_rstd, norms.k_weight, k_bias)
    return q_grad, k_grad, q_weight, k_weight


class _Rotation:
    """The rotation of the tokens of a call, for heads in the type that is computed in."""

    def __init__(self, angles: Angles, q: torch.Tensor) -> None:
        self.cos, self.sin, self.known = token_tables(angles, q)
        self.order = {"interleaved": angles.interleaved, "conjugate": angles.conjugate}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = rotate(x, self.cos, self.sin, **self.order)
        return out if self.known is None else torch.where(self.known[:, :, None, None], out, x)
