"""Registration of the operators with ``torch.library``: schema, shapes, gradients.

The operators of ``torch.ops.rope_dist`` are what is called where something looks on:
``torch.compile(fullgraph=True)`` sees opaque nodes, autograd finds gradients. Eager calls that nothing observes go
straight to ``dispatch.py``, which chooses the backend of both; ``launch_cache.find`` tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import autotune, dispatch, dispatch_projection, launch_cache, validation
from .arguments import Angles, Projections, present, schema
from .backend import without_autocast
from .launch_cache import transformed

# Library.define/impl rather than torch.library.custom_op: a quarter of the call overhead.
LIBRARY = torch.library.Library("rope_dist", "DEF")
_ANGLES, _PROJECTIONS = schema(Angles), schema(Projections)
_ROTATE = f"Tensor? q_bias=None, Tensor? k_bias=None, {_ANGLES}"
_NO_ANGLES = (None,) * len(Angles._fields)


def define(signature: str, implementation) -> None:
    LIBRARY.define(signature)
    LIBRARY.impl(signature.partition("(")[0], implementation, "CompositeExplicitAutograd")


# --- rotation ------------------------------------------------------------------------------------


def _rotate_impl(q, k, q_bias=None, k_bias=None, *flat) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = _run("operator", q, k, Angles(*flat), q_bias, k_bias)
    return q_out, k_out if k_out is not None else q.new_empty(0)


def _rotate_in_place_impl(q, k, q_bias=None, k_bias=None, *flat) -> None:
    angles = Angles(*flat)
    validation.same_order(angles)
    _run("operator in place", q, k, angles, q_bias, k_bias)


def _run(operation: str, q, k, angles: Angles, q_bias, k_bias) -> tuple[torch.Tensor, torch.Tensor | None]:
    launch, key = launch_cache.find(operation, (q, k, q_bias, k_bias), angles)
    if launch is not None:
        return launch(q, k, angles, q_bias, k_bias)
    inplace = operation == "operator in place"
    return dispatch.rotate(q, k, angles, q_bias, k_bias, inplace=inplace, key=key)


define(f"rotate(Tensor q, Tensor? k, {_ROTATE}) -> (Tensor, Tensor)", _rotate_impl)
define(f"rotate_(Tensor(a!) q, Tensor(b!)? k, {_ROTATE}) -> ()", _rotate_in_place_impl)


@torch.library.register_fake("rope_dist::rotate", lib=LIBRARY)
def _rotate_fake(q: torch.Tensor, k: torch.Tensor | None, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(k.shape if k is not None else 0)


@torch.library.register_fake("rope_dist::rotate_", lib=LIBRARY)
def _rotate_in_place_fake(q: torch.Tensor, k: torch.Tensor | None, *rest) -> None:
    return None


# The rotation is orthogonal up to the attention scaling that sits in the tables, so its gradient is the
# conjugate rotation by the same angles: nothing of q and k has to be kept.


def _save(ctx, angles: Angles, biases: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
    ctx.save_for_backward(*angles.tensors())
    ctx.numbers = angles[len(angles.tensors()) :]
    ctx.biased = [bias is not None for bias in biases]


def _saved_angles(ctx) -> Angles:
    return Angles(*ctx.saved_tensors, *ctx.numbers)


def _gradients(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None) -> tuple:
    """Gradients of q, k and the biases; a bias is added to each token, so it gets the sum over them."""
    grads = _rotate(grad_q, grad_k, _saved_angles(ctx).conjugated())
    of_biases = [
        present(grad).sum((0, 1)).flatten() if biased else None
        for grad, biased in zip(grads, ctx.biased, strict=True)
    ]
    return *grads, *of_biases


def _rotate_setup(ctx, inputs, output) -> None:
    _, k, q_bias, k_bias, *flat = inputs
    ctx.has_k = k is not None
    _save(ctx, Angles(*flat), (q_bias, k_bias))


def _rotate_backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor | None = None) -> tuple:
    return *_gradients(ctx, grad_q, grad_k if ctx.has_k else None), *_NO_ANGLES


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
        ctx.save_for_forward(
            *Angles(*inputs[4:]).tensors()
        )  # as for backward: under vmap both must be the same

    backward = staticmethod(_rotate_backward)

    @staticmethod
    def jvp(ctx, q: torch.Tensor, k: torch.Tensor | None, q_bias, k_bias, *rest):
        """The rotation is linear in the heads and the biases: tangents are rotated as they are."""
        q, k = _rotate(q, k, _saved_angles(ctx), q_bias, k_bias)
        return (q, k) if k is not None else q


def _rotate(
    q: torch.Tensor, k: torch.Tensor | None, angles: Angles, q_bias=None, k_bias=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator, differentiable in every way that is asked for now."""
    if transformed():
        return _rotate_transformed(q, k, q_bias, k_bias, *angles)
    q, out = torch.ops.rope_dist.rotate(q, k, q_bias, k_bias, *angles)
    return q, out if k is not None else None


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
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, *flat):
        _save(ctx, Angles(*flat), (bias, None))
        ctx.mark_dirty(x)
        torch.ops.rope_dist.rotate_(x, None, bias, None, *flat)
        return x

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad, _, of_bias, _ = _gradients(ctx, grad, None)
        return grad, of_bias, *_NO_ANGLES


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    angles: Angles,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    key: launch_cache.Key | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate for checked arguments (see ``reference.rotate_tokens``), in place or not.

    Args:
        key: of ``launch_cache.find``, which had no launch; None: the call goes through the operator.

    Raises:
        ValueError: ``inplace`` and tensors that cannot be changed in place (:func:`validation.writable`), or
            ``deinterleave``.
    """
    if inplace:
        validation.same_order(angles)
        validation.writable(q, k)
    if key is not None:
        return dispatch.rotate(q, k, angles, q_bias, k_bias, inplace=inplace, key=key)
    if not inplace:
        return _rotate(q, k, angles, q_bias, k_bias)
    gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, q_bias, k_bias)
    )
    if not gradient and not transformed():
        torch.ops.rope_dist.rotate_(q, k, q_bias, k_bias, *angles)
        return q, k
    if torch.compiler.is_compiling() or transformed():
        # They follow a copy into a view, and the compiler leaves it out.
        q_out, k_out = _rotate(q, k, angles, q_bias, k_bias)
        return q.copy_(q_out), k.copy_(present(k_out)) if k is not None else None
    for x, bias, name in ((q, q_bias, "q"), (k, k_bias, "k")):
        if x is not None and (x.requires_grad or (bias is not None and bias.requires_grad)):
            validation.changeable(x, name)
    k_changed = RotateInPlace.apply(k, k_bias, *angles) if k is not None else None
    return RotateInPlace.apply(q, q_bias, *angles), k_changed


# --- projection and rotation ---------------------------------------------------------------------


def _split(flat: tuple) -> tuple[Projections, Angles, tuple]:
    """``flat`` arguments of an operator as the groups that they begin with, and the rest. Defaults may be left out."""
    first, last = len(Projections._fields), len(Projections._fields) + len(Angles._fields)
    projections, angles = Projections(*flat[:first]), Angles(*flat[first:last])
    if angles.deinterleave:
        raise ValueError(
            "deinterleave is for heads that are there: project, then ops.rotary or ops.rotary_at"
        )
    return projections, angles, flat[last:]


def _qkv_impl(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    projections, angles, rest = _split(flat)
    path = rest[0] if rest else "auto"
    options = (projections.head_dim, path, autotune.fixed(), torch.are_deterministic_algorithms_enabled())
    launch, key = launch_cache.find("operator", (x, *projections[:6]), angles, *options)
    if launch is not None:
        q, k, v = launch(x, projections, angles)
    else:
        q, k, v = dispatch_projection.qkv_rotary(x, projections, angles, path, key)
    return q, k, v if v is not None else x.new_empty(0)


def _decode_impl(x: torch.Tensor, k_cache, v_cache, slots, *flat) -> torch.Tensor:
    projections, angles, _ = _split(flat)
    return dispatch_projection.decode_cached(x, projections, angles, (k_cache, v_cache), slots)


def _pack_impl(q, k, v, *flat) -> torch.Tensor:
    return dispatch_projection.pack_gradients(q, k, v, Angles(*flat))


define(
    f"qkv_rotary(Tensor x, {_PROJECTIONS}, {_ANGLES}, str path='auto') -> (Tensor, Tensor, Tensor)", _qkv_impl
)
define(
    "decode_cached(Tensor x, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    f"{_PROJECTIONS}, {_ANGLES}) -> Tensor",
    _decode_impl,
)
define(f"pack_gradients(Tensor q, Tensor k, Tensor? v, {_ANGLES}) -> Tensor", _pack_impl)


@torch.library.register_fake("rope_dist::qkv_rotary", lib=LIBRARY)
def _qkv_fake(x, *flat):
    projections, _, _ = _split(flat)
    heads = [
        x.new_empty(*x.shape[:2], w.shape[0] // projections.head_dim, projections.head_dim)
        if w is not None
        else x.new_empty(0)
        for w in projections[:3]
    ]
    return tuple(heads)


@torch.library.register_fake("rope_dist::decode_cached", lib=LIBRARY)
def _decode_fake(x, k_cache, v_cache, slots, w_q, *rest):
    return x.new_empty(*x.shape[:2], w_q.shape[0] // k_cache.shape[2], k_cache.shape[2])


@torch.library.register_fake("rope_dist::pack_gradients", lib=LIBRARY)
def _pack_fake(q, k, v, *flat):
    heads = sum(x.shape[2] for x in (q, k, v) if x is not None)
    return q.new_empty(*q.shape[:2], heads * q.shape[3])


def _qkv_setup(ctx, inputs, output) -> None:
    x, *flat = inputs
    projections, angles, _ = _split(tuple(flat))
    ctx.numbers = angles[len(angles.tensors()) :]
    # What the caller holds anyway: no output and nothing as large as one.
    ctx.save_for_backward(*angles.tensors(), x, *projections[:3])


def _qkv_backward(ctx, grad_q, grad_k, grad_v):
    *tensors, x, w_q, w_k, w_v = ctx.saved_tensors
    weights = [w for w in (w_q, w_k, w_v) if w is not None]
    angles = Angles(*tensors, *ctx.numbers).conjugated()
    packed = torch.ops.rope_dist.pack_gradients(grad_q, grad_k, grad_v if w_v is not None else None, *angles)
    gradients = projection_gradients(packed, x, weights, ctx.needs_input_grad)
    return *gradients, None, *_NO_ANGLES, None


def projection_gradients(
    packed: torch.Tensor, x: torch.Tensor, weights: list[torch.Tensor], wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """Gradients of ``x``, the three weights and the three biases; None for those that are not wanted or not there.

    Args:
        packed: gradients of the products ``[B, S, N]``, side by side.
        wanted: of each of the seven.
    """
    rows, widths = packed.flatten(0, 1), [w.shape[0] for w in weights]

    def parts(joined: torch.Tensor, first: int) -> list[torch.Tensor | None]:
        """``joined`` gradients of all weights or biases, split to those that are wanted."""
        split = [*joined.split(widths), None][:3]
        return [grad if wanted[first + i] else None for i, grad in enumerate(split)]

    grad_x: torch.Tensor | None = None
    grad_w: list[torch.Tensor | None] = [None] * 3
    grad_b: list[torch.Tensor | None] = [None] * 3
    with without_autocast(x):
        if wanted[0]:
            # One product, rounded once; the joined weights live only as long as it takes.
            grad_x = packed @ torch.cat(weights)
        if any(wanted[1:4]):
            grad_w = parts(rows.t() @ x.flatten(0, 1), 1)
        if any(wanted[4:7]):
            grad_b = parts(rows.sum(0), 4)
    return [grad_x, *grad_w, *grad_b]


torch.library.register_autograd("rope_dist::qkv_rotary", _qkv_backward, setup_context=_qkv_setup, lib=LIBRARY)


def _pack_setup(ctx, inputs, output) -> None:
    q, k, v, *flat = inputs
    angles = Angles(*flat)
    ctx.shapes = [x.shape[2:] for x in (q, k, v) if x is not None]
    ctx.numbers = angles[len(angles.tensors()) :]
    ctx.save_for_backward(*angles.tensors())


def _pack_backward(ctx, grad):
    parts = grad.split([heads * dim for heads, dim in ctx.shapes], dim=-1)
    q, k, *v = (part.unflatten(-1, shape) for part, shape in zip(parts, ctx.shapes, strict=True))
    q, k = torch.ops.rope_dist.rotate(q, k, None, None, *_saved_angles(ctx).conjugated())
    return q, k, v[0] if v else None, *_NO_ANGLES


torch.library.register_autograd(
    "rope_dist::pack_gradients", _pack_backward, setup_context=_pack_setup, lib=LIBRARY
)


def qkv_rotary(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    path: str = "auto",
    key: launch_cache.Key | None = None,
) -> dispatch_projection.Heads:
    """Project and rotate for checked arguments; ``key`` as in :func:`rotate`."""
    if key is not None:
        with torch.no_grad():
            return dispatch_projection.qkv_rotary(x, projections, angles, path, key)
    if transformed():
        heads = dispatch_projection.project(x, projections)
        q, k = _rotate(heads[0], heads[1], angles)
        return q, present(k), heads[2] if len(heads) == 3 else None
    q, k, v = torch.ops.rope_dist.qkv_rotary(x, *projections, *angles, path)
    return q, k, v if projections.w_v is not None else None
