"""Registration of the operators with ``torch.library``: schema, shapes, gradients.

The operators of ``torch.ops.rope_dist`` are what models call, so that ``torch.compile(fullgraph=True)``
sees opaque nodes. Which backend serves a call is decided in ``dispatch.py``.
"""

from __future__ import annotations

import torch

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


def _rotary_setup(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor):
    cos, sin = ctx.saved_tensors
    grad_q, grad_k = torch.ops.rope_dist.rotary(grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.inverse)
    return grad_q, grad_k, None, None, None, None


torch.library.register_autograd(
    "rope_dist::rotary", _rotary_backward, setup_context=_rotary_setup, lib=LIBRARY
)


def _save_angles(ctx, k: torch.Tensor | None, rest: tuple) -> None:
    """Keep what the gradient needs of the arguments after ``k``: the angles, and which biases there are."""
    ctx.save_for_backward(*rest[:6])
    ctx.offset, ctx.scaling, ctx.interleaved, ctx.inverse, *biases = rest[6:]
    ctx.has_k, ctx.biased = k is not None, [bias is not None for bias in biases]


def _gradients(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None) -> tuple:
    """Gradients of every argument of ``rotate``; a bias is added to each token, so it gets the sum over them."""
    angles = (*ctx.saved_tensors, ctx.offset, ctx.scaling, ctx.interleaved, not ctx.inverse)
    grad_q, grad_k = torch.ops.rope_dist.rotate(grad_q, grad_k if ctx.has_k else None, *angles)
    of_biases = [
        grad.sum((0, 1)).flatten() if biased else None
        for grad, biased in zip((grad_q, grad_k), ctx.biased, strict=True)
    ]
    return grad_q, grad_k if ctx.has_k else None, *[None] * 10, *of_biases


def _rotate_setup(ctx, inputs, output) -> None:
    _, k, *rest = inputs
    _save_angles(ctx, k, tuple(rest))


torch.library.register_autograd("rope_dist::rotate", _gradients, setup_context=_rotate_setup, lib=LIBRARY)


class RotateInPlace(torch.autograd.Function):
    """``rotate_`` with a gradient: an operator that changes its arguments can have none registered."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor | None, *rest):
        _save_angles(ctx, k, rest)
        ctx.mark_dirty(*(x for x in (q, k) if x is not None))
        torch.ops.rope_dist.rotate_(q, k, *rest)
        return (q, k) if k is not None else q

    @staticmethod
    def backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None = None):
        return _gradients(ctx, grad_q, grad_k)


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
        ValueError: ``inplace`` and an expanded tensor.
    """
    rest = (cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, False)
    rest += (q_bias, k_bias)
    if not inplace:
        q, out = torch.ops.rope_dist.rotate(q, k, *rest)
        return q, out if k is not None else None
    for x, name in ((q, "q"), (k, "k")):
        if x is not None:
            validation.writable(x, name)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, q_bias, k_bias)):
        rotated = RotateInPlace.apply(q, k, *rest)
        return rotated if k is not None else (rotated, None)
    torch.ops.rope_dist.rotate_(q, k, *rest)
    return q, k
