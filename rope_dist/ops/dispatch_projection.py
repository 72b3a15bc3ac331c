"""How a projection with rotation is carried out: fused, or by cuBLAS with a rotary pass after it."""

from __future__ import annotations

import torch
from torch.nn import functional

from . import dispatch, reference


def qkv_rotary(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    b_q: torch.Tensor | None,
    b_k: torch.Tensor | None,
    b_v: torch.Tensor | None,
    head_dim: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
    path: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`rope_dist.ops.reference.qkv_rotary`; ``path`` is one of :data:`PATHS`."""
    weights = (w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
    angles = (cos, sin, words, positions, scaling, interleaved)
    if dispatch.backend_for(x) == "reference":
        return reference.qkv_rotary(x, *weights, *angles)
    if path == "auto":
        path = choose(x, w_q, w_k, w_v, head_dim, words if cos is None else cos)
    run = {"separate": separate, "descriptors": fused, "pointers": fused}[path]
    return run(x, *weights, *angles, path)


PATHS = ("auto", "separate", "descriptors", "pointers")


def choose(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    head_dim: int,
    angles: torch.Tensor,
) -> str:
    """The path for these tensors.

    Args:
        angles: words or table, whose last axis is R/2.
    """
    possible = candidates(x, w_q, w_k, w_v, head_dim, 2 * angles.shape[-1])
    return possible[-1]


def candidates(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int,
) -> list[str]:
    """The paths that can serve these tensors, the one that is taken unmeasured last."""
    from . import triton_projection

    weights = [w for w in (w_q, w_k, w_v) if w is not None]
    matrices = [x.reshape(-1, x.shape[-1]), *weights]
    if (
        x.dtype not in (torch.float16, torch.bfloat16)
        or not triton_projection.fits(head_dim, rotary_dim)
        or any(y.numel() == 0 or y.stride(1) != 1 for y in matrices)
    ):
        return ["separate"]
    paths = ["separate", "pointers"]
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda and not torch.version.hip else 0
    if (major >= 9 or not x.is_cuda) and triton_projection.fits_descriptors(*matrices):
        paths.append("descriptors")
    return paths


def separate(
    x,
    w_q,
    w_k,
    w_v,
    b_q,
    b_k,
    b_v,
    head_dim,
    cos,
    sin,
    words,
    positions,
    scaling,
    interleaved,
    path="separate",
):
    """The library's matrix products, then one rotary pass in place."""
    heads = [
        functional.linear(x, w, b).unflatten(-1, (w.shape[0] // head_dim, head_dim))
        for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))
        if w is not None
    ]
    q, k = heads[:2]
    dispatch.rotate_(q, k, cos, sin, words, positions, scaling=scaling, interleaved=interleaved)
    return q, k, heads[2] if w_v is not None else x.new_empty(0)


def fused(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, cos, sin, words, positions, scaling, interleaved, path):
    """One launch of ``triton_projection``."""
    from . import triton_projection

    batch, length, depth = x.shape
    pairs = [(w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)) if w is not None]
    weights = tuple(w for w, _ in pairs)
    biases = None
    if any(b is not None for _, b in pairs):
        biases = tuple(b if b is not None else w.new_zeros(w.shape[0]) for w, b in pairs)
    outputs = tuple(x.new_empty(batch * length, w.shape[0]) for w in weights)
    if words is None:
        # Rows of the table as the tokens lie: small beside q and k, and a view where the batch has its own.
        cos, sin = (
            t.float().expand(batch, -1, -1).reshape(batch * length, -1).contiguous() for t in (cos, sin)
        )
    else:
        positions = torch.arange(length, device=x.device)[None] if positions is None else positions
        positions = positions.reshape(-1).contiguous()
    triton_projection.launch(
        x.reshape(-1, depth), weights, biases, outputs, head_dim=head_dim, cos=cos, sin=sin, words=words,
        positions=positions, scaling=scaling, interleaved=interleaved, descriptors=path == "descriptors",
    )  # fmt: skip
    shaped = [y.view(batch, length, -1, head_dim) for y in outputs]
    return shaped[0], shaped[1], shaped[2] if w_v is not None else x.new_empty(0)


def pack_inverse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """As :func:`rope_dist.ops.reference.pack_inverse`, in one pass."""
    if dispatch.backend_for(q) == "reference":
        return reference.pack_inverse(q, k, v, cos, sin, words, positions, scaling, interleaved)
    from . import triton_rotary

    present = [x for x in (q, k, v) if x is not None]
    widths = [x.shape[2] * x.shape[3] for x in present]
    packed = q.new_empty(*q.shape[:2], sum(widths))
    out = [
        part.unflatten(-1, x.shape[2:]) for part, x in zip(packed.split(widths, dim=-1), present, strict=True)
    ]
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    triton_rotary.launch(
        q, k, out[0], out[1], cos=cos, sin=sin, words=words, positions=positions, scaling=scaling,
        interleaved=interleaved, inverse=True, v=v, v_out=out[2] if v is not None else None,
    )  # fmt: skip
    return packed
