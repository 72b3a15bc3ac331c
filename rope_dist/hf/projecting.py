"""Projections, norms and rotation of an enabled attention in one call, where modules are nothing but their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from .applying import kept_pairs, rotate
from .forms import Form
from .fusing import PROJECTIONS, Fused
from .normalising import ROUNDED, norm_arguments, normalise_and_rotate

if TYPE_CHECKING:
    from .enabled import EnabledAttention


def one_call(fusion: Fused, form: Form, stock: Callable[..., Any]) -> functools.partial[Any]:
    """What a rewritten method calls.

    Args:
        form, stock: the function that the model applies to rotate.
    """
    if fusion.norms is None:
        return functools.partial(project_and_rotate, form, stock, fusion.transposed)
    if fusion.projects:
        return functools.partial(project_normalise_and_rotate, form, stock, fusion.transposed)
    return functools.partial(normalise_and_rotate, form, stock, 1 if fusion.transposed else 2)


def project_and_rotate(
    form: Form,
    stock: Callable[..., Any],
    transposed: bool,
    attention: nn.Module,
    x: torch.Tensor,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries and keys, and values, of ``x`` ``[B, S, hidden]``.

    By :func:`rope_dist.ops.qkv_rotary`, together with the projections, where the kernels run and each projection is
    nothing but its matrix; else by :func:`rope_dist.ops.rotary` after the modules.

    Args:
        form, stock: the function that the model applies, which computes what the kernels do not take.
        transposed: return ``[B, H, S, D]`` instead of ``[B, S, H, D]``.
        cos, sin: tables as ``form`` has them.
    """
    if why_not_fused(attention, x) is None and not cos.requires_grad:
        weights, biases = _weights(attention)
        cos, sin = kept_pairs(form.tables, cos, sin)
        q, k, v = ops.qkv_rotary(
            x, *weights, *biases, head_dim=head_dim, cos=cos, sin=-sin if form.negative else sin,
            interleaved=form.layout == "interleaved",
        )  # fmt: skip
    else:
        q, k, v = (_heads(projection(x), head_dim) for projection in projections(attention))
        q, k = rotate(form, stock, q, k, cos, sin, 2, inplace=_can_rotate_inplace(attention, q, k))
    return (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)) if transposed else (q, k, v)


def project_normalise_and_rotate(
    form: Form,
    stock: Callable[..., Any],
    transposed: bool,
    attention: EnabledAttention,
    x: torch.Tensor,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    normalised: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`project_and_rotate`, with norms of queries and keys: by :func:`rope_dist.ops.qkv_norm_rotary` where the
    kernels run and all five modules are nothing but their weights, else :func:`normalise_and_rotate` after the modules.

    Args:
        normalised: the model has them.
    """
    if not normalised:
        return project_and_rotate(form, stock, transposed, attention, x, head_dim, cos, sin)
    fused = not attention.norms.joint and why_not_fused(attention, x) is None and not cos.requires_grad
    norms = norm_arguments(attention, x) if fused else ""
    if isinstance(norms, str):
        q, k, v = (_heads(projection(x), head_dim) for projection in projections(attention))
        inplace = _can_rotate_inplace(attention, q, k)
        q, k = normalise_and_rotate(form, stock, 2, attention, q, k, cos, sin, inplace=inplace)
    else:
        weights, biases = _weights(attention)
        q_norm, k_norm, eps, offset = norms
        cos, sin = kept_pairs(form.tables, cos, sin)
        q, k, v = ops.qkv_norm_rotary(
            x, *weights, q_norm, k_norm, *biases, head_dim=head_dim, cos=cos, sin=-sin if form.negative else sin,
            eps=eps, weight_offset=offset, norm_after=attention.norms.after,
            interleaved=form.layout == "interleaved",
        )  # fmt: skip
    return (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)) if transposed else (q, k, v)


def projections(attention: nn.Module) -> list[nn.Module]:
    """Of queries, keys and values."""
    modules = attention._modules
    return [modules[name] for name in PROJECTIONS]


def _weights(attention: nn.Module) -> tuple[list[Any], list[Any]]:
    """Weights and biases of the three projections."""
    # Parameters in their dictionaries: by attribute each takes nn.Module longer than a tensor's view.
    parameters = [projection._parameters for projection in projections(attention)]
    return [p["weight"] for p in parameters], [p["bias"] for p in parameters]


def _heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    batch, length, width = x.shape
    return x.view(batch, length, width // head_dim, head_dim)


def _can_rotate_inplace(attention: nn.Module, q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether ``q`` and ``k`` are new tensors that no hook or gradient has seen.

    New tensors cost a CPU the operating system's zeroed pages, several times what the rotation takes.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if nn.modules.module._global_forward_hooks:
        return False
    q_proj, k_proj, _ = projections(attention)
    return (
        type(q_proj) is type(k_proj) is nn.Linear
        and type(q) is type(k) is torch.Tensor
        and not (q_proj._forward_hooks or k_proj._forward_hooks)
        and "forward" not in q_proj.__dict__
        and "forward" not in k_proj.__dict__
    )


def why_not_fused(attention: nn.Module, x: torch.Tensor) -> str | None:
    """Why projection and rotation of ``x`` are not one launch, or None where they are.

    Only dtype and device of ``x`` matter. Adapters, quantisation, sharding and hooks all change what calling a
    projection does; each shows as another type, a replaced forward, a hook or another dtype, and then the
    modules are called.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "only float16 and bfloat16 are projected by the kernels"
    if attention._rope_dist_rounded:
        return ROUNDED
    if ops.backend_for(x) != "triton":
        return "no Triton kernels for this device"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtype of the projections"
    for projection in projections(attention):
        reason = why_not_its_weight(projection, x)
        if reason is not None:
            return reason
    return None


_MISSING = object()


def why_not_its_weight(projection: nn.Module, x: torch.Tensor) -> str | None:
    """Why a projection of ``x`` has to be called instead of computed from its weight, or None."""
    # The texts are constants, so that torch.compile can trace the choice.
    if type(projection) is not nn.Linear:
        return "not a plain nn.Linear (an adapter or quantised)"
    if "forward" in projection.__dict__:
        return "its forward has been replaced (offloading or sharding)"
    if (
        projection._forward_hooks
        or projection._forward_pre_hooks
        or projection._backward_hooks
        or projection._backward_pre_hooks
    ):
        return "it has hooks"
    for t in (projection._parameters.get("weight", _MISSING), projection._parameters.get("bias", _MISSING)):
        if t is not None:
            if type(t) not in (nn.Parameter, torch.Tensor):
                return "its weight is not a plain tensor (quantised or sharded)"
            if t.dtype != x.dtype:
                return "its weight has another dtype"
            # A weight without storage is asked about, not run (rope-dist info MODEL).
            if t.device != x.device and not t.is_meta:
                return "its weight is on another device"
    return None
