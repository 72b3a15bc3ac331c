"""Registration of the operators with ``torch.library``: schema, shapes, gradients.

The operators of ``torch.ops.rope_dist`` are what models call, so that ``torch.compile(fullgraph=True)``
sees opaque nodes. Which backend serves a call is decided in ``dispatch.py``.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from . import dispatch, validation

# Library.define/impl rather than torch.library.custom_op: a quarter of the call overhead, which
# counts in decoding, where one call rotates a single token.
LIBRARY = torch.library.Library("rope_dist", "DEF")
LIBRARY.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False, bool inverse=False) "
    "-> (Tensor, Tensor)"
)
LIBRARY.impl("rotary", dispatch.rotary, "CompositeExplicitAutograd")

_ANGLES = (
    "Tensor? cos=None, Tensor? sin=None, Tensor? words=None, Tensor? positions=None, Tensor? cu_seqlens=None, "
    "Tensor? offsets=None, int offset=0, float scaling=1.0, bool interleaved=False, bool inverse=False"
)
_BIASES = "Tensor? q_bias=None, Tensor? k_bias=None"
LIBRARY.define(f"rotate(Tensor q, Tensor? k, {_ANGLES}, {_BIASES}) -> (Tensor, Tensor)")
LIBRARY.impl("rotate", dispatch.rotate, "CompositeExplicitAutograd")
LIBRARY.define(f"rotate_(Tensor(a!) q, Tensor(b!)? k, {_ANGLES}, {_BIASES}) -> ()")
LIBRARY.impl("rotate_", dispatch.rotate_, "CompositeExplicitAutograd")


@torch.library.register_fake("rope_dist::rotary", lib=LIBRARY)
def _rotary_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("rope_dist::rotate", lib=LIBRARY)
def _rotate_fake(q: torch.Tensor, k: torch.Tensor | None, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape if k is not None else 0)


@torch.library.register_fake("rope_dist::rotate_", lib=LIBRARY)
def _rotate_in_place_fake(q: torch.Tensor, k: torch.Tensor | None, *rest) -> None:
    return None


# The rotation is orthogonal up to the attention scaling that sits in the tables, so its gradient is the
# inverse rotation by the same angles: nothing of q and k has to be kept.


@torch.compiler.assume_constant_result  # its guards are on both
def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work.

    Registered gradients know neither; :class:`Rotate` does.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _rotary_setup(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor):
    cos, sin = ctx.saved_tensors
    if transformed():
        rest = (cos, sin, *[None] * 4, 0, 1.0, ctx.interleaved, not ctx.inverse, None, None)
        grad_q, grad_k = _rotate(grad_q, grad_k, *rest)
    else:
        grad_q, grad_k = torch.ops.rope_dist.rotary(
            grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.inverse
        )
    return grad_q, grad_k, None, None, None, None


torch.library.register_autograd(
    "rope_dist::rotary", _rotary_backward, setup_context=_rotary_setup, lib=LIBRARY
)


def _save_angles(ctx, rest: tuple) -> None:
    """Keep what the gradient needs of the arguments after ``k``: the angles, and which biases there are."""
    ctx.save_for_backward(*rest[:6])
    ctx.offset, ctx.scaling, ctx.interleaved, ctx.inverse, *biases = rest[6:]
    ctx.biased = [bias is not None for bias in biases]


def _gradients(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None) -> tuple:
    """Gradients of every argument of ``rotate``; a bias is added to each token, so it gets the sum over them."""
    angles = (*ctx.saved_tensors, ctx.offset, ctx.scaling, ctx.interleaved, not ctx.inverse)
    grad_q, grad_k = _rotate(grad_q, grad_k, *angles, None, None)
    of_biases = [
        grad.sum((0, 1)).flatten() if biased else None
        for grad, biased in zip((grad_q, grad_k), ctx.biased, strict=True)
    ]
    return grad_q, grad_k, *[None] * 10, *of_biases


def _rotate_setup(ctx, inputs, output) -> None:
    _, k, *rest = inputs
    ctx.has_k = k is not None
    _save_angles(ctx, tuple(rest))


def _rotate_backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None = None) -> tuple:
    return _gradients(ctx, grad_q, grad_k if ctx.has_k else None)


torch.library.register_autograd(
    "rope_dist::rotate", _rotate_backward, setup_context=_rotate_setup, lib=LIBRARY
)


class Rotate(torch.autograd.Function):
    """``rotate`` for the transforms of ``torch.func`` and forward mode; without keys it returns one tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor | None, *rest):
        q, out = torch.ops.rope_dist.rotate(q, k, *rest)
        return (q, out) if k is not None else q

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _rotate_setup(ctx, inputs, output)
        ctx.save_for_forward(*inputs[2:8])  # what the gradient keeps: under vmap both must be the same

    backward = staticmethod(_rotate_backward)

    @staticmethod
    def jvp(ctx, q: torch.Tensor, k: torch.Tensor | None, *rest):
        """The rotation is linear in the heads and the biases: tangents are rotated as they are."""
        angles = (*ctx.saved_tensors, ctx.offset, ctx.scaling, ctx.interleaved, ctx.inverse)
        q, k = _rotate(q, k, *angles, *rest[10:])
        return (q, k) if k is not None else q


def _rotate(q: torch.Tensor, k: torch.Tensor | None, *rest) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator, differentiable in every way that is asked for now."""
    if not transformed():
        q, out = torch.ops.rope_dist.rotate(q, k, *rest)
        return q, out if k is not None else None
    return _rotate_transformed(q, k, *rest)


@torch.compiler.disable(
    reason="a transform of torch.func within torch.compile: compile what it is applied to"
)
def _rotate_transformed(q, k, *rest) -> tuple[torch.Tensor, torch.Tensor | None]:
    return Rotate.apply(q, k, *rest) if k is not None else (Rotate.apply(q, k, *rest), None)


class RotateInPlace(torch.autograd.Function):
    """``rotate_`` with a gradient: an operator that changes its arguments can have none registered.

    Of one tensor: autograd lets a function change a view only if that is all it returns, and what a projection
    made is always one.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, *angles):
        _save_angles(ctx, (*angles, bias, None))
        ctx.mark_dirty(x)
        torch.ops.rope_dist.rotate_(x, None, *angles, bias)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad, *_, of_bias, _ = _gradients(ctx, grad, None)
        return grad, of_bias, *[None] * 10


def rotary(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the operator for checked arguments and tables with a row a token (see ``reference.rotary``)."""
    if k is None or transformed():
        return rotate(q, k, cos=cos, sin=sin, interleaved=interleaved)
    return torch.ops.rope_dist.rotary(q, k, cos, sin, interleaved)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    offset: int = 0,
    scaling: float = 1.0,
    interleaved: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the operator for checked arguments (see ``reference.rotate_tokens``), in place or not.

    Raises:
        ValueError: ``inplace`` and tensors that cannot be changed in place (:func:`validation.writable`).
    """
    angles = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, False)
    if not inplace:
        return _rotate(q, k, *angles, q_bias, k_bias)
    validation.writable(q, k)
    gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, q_bias, k_bias)
    )
    if not gradient and not transformed():
        torch.ops.rope_dist.rotate_(q, k, *angles, q_bias, k_bias)
        return q, k
    if torch.compiler.is_compiling() or transformed():
        # They follow a copy into a view, and the compiler leaves it out.
        out = _rotate(q, k, *angles, q_bias, k_bias)
        return tuple(x.copy_(y) if x is not None else None for x, y in zip((q, k), out, strict=True))
    for x, bias, name in ((q, q_bias, "q"), (k, k_bias, "k")):
        if x is not None and (x.requires_grad or (bias is not None and bias.requires_grad)):
            validation.changeable(x, name)
    pairs = ((q, q_bias), (k, k_bias))
    return tuple(RotateInPlace.apply(x, bias, *angles) if x is not None else None for x, bias in pairs)
