"""Norms and rotation of queries and keys in one call, where the norms are nothing but their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from .applying import can_rotate, kept_pairs, rotate
from .forms import Form
from .norm_calls import HEADS, PROJECTION

if TYPE_CHECKING:
    from .enabled import EnabledAttention


ROUNDED = "tables='model' rotates what the modules return, rounded as it is"


def normalise_and_rotate(  # noqa: PLR0913
    form: Form,
    stock: Callable[..., Any],
    unsqueeze_dim: int,
    attention: EnabledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    normalised: bool = True,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys normalised and rotated, or rotated and normalised.

    By :func:`rope_dist.ops.norm_rotary` where both norms are RMS norms that are nothing but their weight; else the
    modules are called with what stock calls them with, and :func:`rope_dist.ops.rotary` rotates.

    Args:
        form, stock: the function that the model applies to rotate, which computes what the kernels do not take.
        unsqueeze_dim: axis of the heads in ``q`` and ``k``.
        cos, sin: tables as ``form`` has them.
        normalised: the model has these norms.
        inplace: ``q`` and ``k`` may be changed.
    """
    if not normalised:
        return rotate(form, stock, q, k, cos, sin, unsqueeze_dim, inplace=inplace)
    norms, found = attention.norms, norm_arguments(attention, q)
    if isinstance(found, str) or not can_rotate(q, k, cos, unsqueeze_dim):
        # New tensors from here on: a hook may have seen those that a norm returned.
        if not norms.after:
            q, k = _called(attention, q, k, unsqueeze_dim)
        q, k = rotate(form, stock, q, k, cos, sin, unsqueeze_dim)
        return _called(attention, q, k, unsqueeze_dim) if norms.after else (q, k)
    q_weight, k_weight, eps, offset = found
    cos, sin = kept_pairs(form.tables, cos, sin)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = ops.norm_rotary(
        q, k, q_weight, k_weight, cos, -sin if form.negative else sin, eps=eps, weight_offset=offset,
        norm_after=norms.after, interleaved=form.layout == "interleaved", inplace=inplace,
    )  # fmt: skip
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def _called(
    attention: EnabledAttention, q: torch.Tensor, k: torch.Tensor, unsqueeze_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the modules return, called with the shape that stock gives them."""
    norms = attention.norms
    turned = norms.shape != PROJECTION and (norms.shape == HEADS) != (unsqueeze_dim == 2)
    out = []
    for name, x in ((norms.q, q), (norms.k, k)):
        module = getattr(attention, name)
        if norms.shape == PROJECTION:
            out.append(module(x.flatten(2)).view(x.shape))
        else:
            out.append(module(x.transpose(1, 2)).transpose(1, 2) if turned else module(x))
    return out[0], out[1]


def norm_arguments(
    attention: EnabledAttention, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, float, float] | str:
    """Weights, eps and offset of the norms of queries and keys, for :func:`rope_dist.ops.norm_rotary` of ``x``; or why
    the modules have to be called.

    Only dtype and device of ``x`` matter.
    """
    if ops.backend_for(x) == "reference":
        return "no kernels for this device: the modules are faster"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "every module has hooks"
    if attention._rope_dist_rounded and x.dtype in (torch.float16, torch.bfloat16):
        return ROUNDED
    norms = attention.norms
    q = _arguments(attention, norms.q, norms.shape == PROJECTION, x)
    if isinstance(q, str):
        return q
    k = _arguments(attention, norms.k, norms.shape == PROJECTION, x)
    if isinstance(k, str):
        return k
    if q[1:] != k[1:]:
        return "the norms of queries and keys have another eps or form"
    return q[0], *k


def why_called(attention: EnabledAttention, x: torch.Tensor) -> str:
    """As :func:`norm_arguments`, with the name of the module; empty where none has to be called."""
    norms = attention.norms
    for name in (norms.q, norms.k):
        found = _arguments(attention, name, norms.shape == PROJECTION, x)
        if isinstance(found, str):
            return f"{name}: {found}"
    found = norm_arguments(attention, x)
    return found if isinstance(found, str) else ""


_MISSING = object()


def _arguments(
    attention: EnabledAttention, name: str, joint: bool, x: torch.Tensor
) -> tuple[torch.Tensor | None, float, float] | str:
    # The texts are constants, so that torch.compile can trace the choice.
    module = attention._modules.get(name)
    known = attention.norm_forms.get(type(module))
    if known is None:
        return "not a norm of a known form (an adapter, or replaced)"
    form, forward = known
    if "forward" in module.__dict__ or type(module).forward is not forward:
        return "its forward has been replaced"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks"
    eps = getattr(module, form.eps)
    if type(eps) is not float:
        return "its eps is not a number"  # torch.nn.RMSNorm chooses one
    if form.autocast and torch.is_autocast_enabled(x.device.type):
        return "autocast chooses its dtype"
    weight = None
    if form.weight and not (form.scaled and not getattr(module, form.scaled)):
        weight = module._parameters.get(form.weight, _MISSING)
    if weight is None:
        return "all heads together, without a weight" if joint else (None, eps, form.offset)
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return "its weight is not a plain tensor (sharded)"
    if form.promotes and weight.dtype != x.dtype:
        return "its weight has another dtype, which the result would have"
    if weight.device != x.device and not weight.is_meta:
        return "its weight is on another device"
    return weight, eps, form.offset
