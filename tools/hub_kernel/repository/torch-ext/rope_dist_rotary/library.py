"""The operator, registered with ``torch.library`` in a namespace of this build: schema, shapes, gradient."""

from __future__ import annotations

import torch

from . import backend, launch_cache, reference
from ._ops import add_op_namespace_prefix, ops
from .arguments import Angles, present
from .launch_cache import transformed

NAME = add_op_namespace_prefix("rotate")
LIBRARY = torch.library.Library(NAME.partition("::")[0], "FRAGMENT")


def _rotate_impl(q, k, cos, sin, interleaved=False, conjugate=False) -> tuple[torch.Tensor, torch.Tensor]:
    angles = Angles(cos, sin, interleaved=interleaved, conjugate=conjugate)
    launch, key = launch_cache.find("operator", (q, k), angles)
    q_out, k_out = launch(q, k, angles) if launch is not None else _run(q, k, angles, key)
    return q_out, k_out if k_out is not None else q.new_empty(0)


LIBRARY.define(
    "rotate(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved=False, bool conjugate=False)"
    " -> (Tensor, Tensor)"
)
LIBRARY.impl("rotate", _rotate_impl, "CompositeExplicitAutograd")


@torch.library.register_fake(NAME, lib=LIBRARY)
def _rotate_fake(q, k, cos, sin, interleaved=False, conjugate=False) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape if k is not None else 0)


# The rotation is orthogonal up to the attention scaling that is in the tables: its gradient is the rotation by the
# negative angles, and nothing of q and k has to be kept.


def _setup(ctx, inputs, output) -> None:
    _, k, cos, sin, *ctx.flags = (*inputs, *(False, False)[len(inputs) - 4 :])
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None) -> tuple:
    cos, sin = ctx.saved_tensors
    interleaved, conjugate = ctx.flags
    angles = Angles(cos, sin, interleaved=interleaved, conjugate=not conjugate)
    return *rotate(grad_q, grad_k if ctx.has_k else None, angles), None, None, None, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup, lib=LIBRARY)


def rotate(
    q: torch.Tensor, k: torch.Tensor | None, angles: Angles, *, key: launch_cache.Key | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate checked ``[B, S, heads, D]`` by tables.

    Args:
        key: of ``launch_cache.find``, which had no launch; None: the call goes through the operator.
    """
    if key is not None:
        return _run(q, k, angles, key)
    if transformed():
        return _rotate_plain(q, angles), _rotate_plain(k, angles) if k is not None else None
    q_out, k_out = ops.rotate(q, k, angles.cos, angles.sin, angles.interleaved, angles.conjugate)
    return q_out, k_out if k is not None else None


def _run(
    q: torch.Tensor, k: torch.Tensor | None, angles: Angles, key: launch_cache.Key | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not backend.is_triton(q):
        return reference.rotate_tokens(q, k, angles)
    from . import triton_rotary

    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else None
    # The kernel reads whole rows, which may lie apart.
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in map(present, angles[:2]))
    again = triton_rotary.launch(q, k, q_out, k_out, angles._replace(cos=cos, sin=sin))
    if again is not None and cos is angles.cos and sin is angles.sin:

        def launch(q, k, angles):
            q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape) if k is not None else None
            again(q, k, q_out, k_out, angles)
            return q_out, k_out

        launch_cache.put(key, launch)
    return q_out, k_out


def _rotate_plain(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Of operations that the transforms of ``torch.func`` know."""
    compute = reference.compute_dtype(x)
    cos, sin = (t[:, :, None].to(compute) for t in map(present, angles[:2]))
    sin = -sin if angles.conjugate else sin
    turned, rest = x.split([2 * angles.num_pairs, x.shape[-1] - 2 * angles.num_pairs], dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if angles.interleaved else turned.chunk(2, dim=-1)
    both = (
        first.to(compute) * cos - second.to(compute) * sin,
        second.to(compute) * cos + first.to(compute) * sin,
    )
    turned = torch.stack(both, dim=-1).flatten(-2) if angles.interleaved else torch.cat(both, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
