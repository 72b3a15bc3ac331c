"""Registration of the operators with ``torch.library``: schema, shapes, gradients, backends.

``torch.ops.rope_dist.rotary`` is what models call, so that ``torch.compile(fullgraph=True)`` sees
one opaque node. A faster backend registers itself for a dispatch key ("CUDA", "CPU") and takes
precedence over the reference, which serves every device.
"""

from __future__ import annotations

import torch

from . import reference

# Library.define/impl rather than torch.library.custom_op: a quarter of the call overhead, which
# counts in decoding, where one call rotates a single token.
LIBRARY = torch.library.Library("rope_dist", "DEF")
LIBRARY.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False, bool inverse=False) "
    "-> (Tensor, Tensor)"
)
LIBRARY.impl("rotary", reference.rotary, "CompositeExplicitAutograd")


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


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad_q: torch.Tensor, grad_k: torch.Tensor):
    # The rotation is orthogonal up to the attention scaling that sits in the tables, so its gradient
    # is the inverse rotation by the same tables: nothing of q and k has to be kept.
    cos, sin = ctx.saved_tensors
    grad_q, grad_k = torch.ops.rope_dist.rotary(grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.inverse)
    return grad_q, grad_k, None, None, None, None


torch.library.register_autograd("rope_dist::rotary", _backward, setup_context=_setup_context, lib=LIBRARY)
