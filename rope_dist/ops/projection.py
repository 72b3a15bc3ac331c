"""The projection of queries, keys and values with the rotation: :func:`qkv_rotary`, :func:`decode_rotary`."""

from __future__ import annotations

import torch

from . import autotune, dispatch, dispatch_projection, launch_cache, library, validation
from .arguments import Angles, Norms, Projections, present
from .fixed_point import as_fixed_point


def qkv_rotary(  # noqa: PLR0913  (public)
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None = None,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    *,
    head_dim: int,
    inv_freq: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    path: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Project to queries, keys and values and rotate the first two, in one launch where that is possible.

    The weights are taken as three ``nn.Linear`` hold them: nothing is concatenated, copied or permuted.
    16-bit products are accumulated, biased and rotated in float32 and rounded once (where the projection is
    left to cuBLAS, twice: after it and after the rotation).

    Args:
        x: ``[B, S, K]``, or packed ``[T, K]``, floating.
        w_q, w_k, w_v: ``[heads * head_dim, K]`` in the dtype of ``x``; ``w_v`` None leaves the values out.
        b_q, b_k, b_v: ``[heads * head_dim]`` or None.
        head_dim: even.
        inv_freq: ``[R/2]`` floating radians a token, or ``[axes, R/2]`` of :func:`rope_dist.ops.mrope_frequencies`; or
            what :func:`rope_dist.ops.to_fixed_point` made of either.
        position_ids: ``[B, S]`` or ``[1, S]`` (packed: ``[T]``) int32 or int64, of several axes ``[axes, B or 1, S]``
            (packed: ``[axes, T]``); None counts from 0.
        cos, sin: instead of both, tables ``[B, S, R/2]``, ``[1, S, R/2]`` or ``[S, R/2]``.
        attention_scaling: factor on the rotated dimensions, with ``inv_freq``; tables carry it in them.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        path: ``"auto"``, or ``"separate"`` (matrix products, then a rotary pass), ``"triton"``,
            ``"triton_tma"`` (the fused kernels) or ``"decode"`` (at most 16 tokens). A kernel's configuration may be
            named, as ``rope-dist info`` prints it: ``"triton_tma:128x256x64/4"``.

    Returns:
        ``q``, ``k``, ``v``: ``[B, S, heads, head_dim]`` (packed: ``[T, heads, head_dim]``), contiguous; ``v``
        None without ``w_v``. In the dtype of ``x``, under autocast too. Differentiable in ``x``, weights and
        biases; the backward pass keeps ``x``, the weights and the positions, no output. Under ``torch.func`` and
        forward-mode differentiation the products are PyTorch's, whatever the path.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, neither or both of frequencies and
            tables, or a path that cannot serve these tensors.
    """
    inv_freq_q64 = as_fixed_point(inv_freq) if inv_freq is not None else None
    x, position_ids, packed = one_batch(x, position_ids, inv_freq_q64)
    projections = Projections(w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
    angles = Angles(
        cos, sin, inv_freq_q64, position_ids, scaling=float(attention_scaling), interleaved=interleaved
    )
    options = (head_dim, path, autotune.fixed(), torch.are_deterministic_algorithms_enabled())
    options += launch_cache.metadata(inv_freq)
    launch, key = launch_cache.find("qkv_rotary", (x, *projections[:6]), angles, *options)
    if launch is not None:
        validation.values(position_ids, "position_ids")
        out = launch(x, projections, angles)
    else:
        angles = checked(x, projections, angles, inv_freq, path)
        out = library.qkv_rotary(x, projections, angles, path, key)
    q, k, v = out
    return (q[0], k[0], v[0] if v is not None else None) if packed else out


def projection_paths(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None = None,
    *,
    head_dim: int,
    rotary_dim: int,
) -> list[str]:
    """The paths of :func:`qkv_rotary` that can serve these tensors, for any angles of ``rotary_dim`` dimensions."""
    projections = Projections(w_q, w_k, w_v, None, None, None, head_dim)
    return dispatch_projection.candidates(dispatch.projecting(x), x, projections, rotary_dim // 2)


def one_batch(
    x: torch.Tensor, position_ids: torch.Tensor | None, inv_freq_q64: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Packed ``[T, K]`` and positions ``[T]`` or ``[axes, T]`` as of one batch, and whether they were packed."""
    packed = x.ndim == 2
    if packed:
        x = x[None]
        axes = inv_freq_q64 is not None and inv_freq_q64.ndim == 3
        if position_ids is not None and position_ids.ndim == (2 if axes else 1):
            position_ids = position_ids.unsqueeze(-2)
    return x, position_ids, packed


def checked(
    x: torch.Tensor,
    projections: Projections,
    angles: Angles,
    inv_freq: torch.Tensor | None,
    path: str,
    norms: Norms | None = None,
) -> Angles:
    """``angles`` with tables of three axes; ``ValueError`` where arguments do not belong together."""
    _check_projections(x, projections)
    head_dim, (batch, length) = projections.head_dim, x.shape[:2]
    if (inv_freq is None) == (angles.cos is None) or (angles.cos is None) != (angles.sin is None):
        raise ValueError("give inv_freq, or cos and sin")
    if inv_freq is not None:
        validation.angles_at(x.new_empty(batch, length, 0, head_dim), inv_freq, angles, packed=False)
    else:
        if angles.positions is not None or angles.scaling != 1.0:
            raise ValueError("position_ids and attention_scaling go with inv_freq; tables carry both in them")
        heads = x.new_empty(batch, length, 0, head_dim)
        cos, sin = validation.tables(heads, present(angles.cos), present(angles.sin), rows=length)
        angles = angles._replace(cos=cos, sin=sin)
    if norms is not None:
        q, k = (
            x.new_empty(0, 0, w.shape[0] // head_dim, head_dim) for w in (projections.w_q, projections.w_k)
        )
        validation.norms(q, k, norms, ("q_norm_weight", "k_norm_weight"))
    _check_path(x, projections, angles.num_pairs, path, norms)
    return angles


def _check_path(
    x: torch.Tensor, projections: Projections, num_pairs: int, path: str, norms: Norms | None = None
) -> None:
    """``ValueError`` where ``path`` is none or cannot serve these tensors."""
    name, _, configuration = path.partition(":")
    if name not in dispatch_projection.PATHS:
        raise ValueError(f"no such path {path!r}; there are {', '.join(dispatch_projection.PATHS)}")
    if path in ("auto", "separate"):
        return
    backend = dispatch.projecting(x)
    if dispatch_projection.serves(backend, path, x, projections, num_pairs, norms):
        return
    possible = dispatch_projection.candidates(backend, x, projections, num_pairs, norms)
    if configuration and name in possible:
        possible = dispatch_projection.configured(backend, [name], x, projections, norms, every=True)
    raise ValueError(f"path {path!r} cannot serve these tensors; {', '.join(possible)} can")


def decode_rotary(  # noqa: PLR0913  (public)
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    *,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    inv_freq: torch.Tensor,
    position_ids: torch.Tensor,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """:func:`qkv_rotary` that writes keys and values into their caches, for inference: no gradient.

    One launch for up to 16 float16 or bfloat16 tokens; more, or other types, take more launches.

    Args:
        x: ``[B, S, K]`` or ``[T, K]``.
        k_cache, v_cache: ``[entries, Hk, head_dim]`` in the dtype of ``x``, any strides, changed in place.
        slots: ``[B * S]`` int32 or int64, the entry of each token; a negative one is not written. Entries
            must exist and differ: on a GPU they are not looked at.
        others: as in :func:`qkv_rotary`.

    Returns:
        The queries ``[B, S, Hq, head_dim]`` (packed: ``[T, Hq, head_dim]``).

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, caches that share memory, slots past the
            cache (looked at on CPU tensors only), or a transform of ``torch.func``.
    """
    if launch_cache.transformed():
        raise ValueError("decode_rotary is for inference: torch.func and forward mode go with qkv_rotary")
    if k_cache.ndim != 3 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"caches must be [entries, heads, head_dim] of one shape, got {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    inv_freq_q64 = as_fixed_point(inv_freq)
    x, at, packed = one_batch(x, position_ids, inv_freq_q64)
    projections = Projections(w_q, w_k, w_v, b_q, b_k, b_v, k_cache.shape[-1])
    angles = Angles(
        inv_freq_q64=inv_freq_q64, positions=at, scaling=float(attention_scaling),
        interleaved=interleaved,
    )  # fmt: skip
    caches = (k_cache, v_cache)
    with torch.no_grad():
        tensors = (x, *projections[:6], *caches, slots)
        launch, key = launch_cache.find("decode_rotary", tensors, angles, *launch_cache.metadata(inv_freq))
        if launch is None:
            _check_caches(x, projections, caches, slots)
            heads = x.new_empty(*x.shape[:2], 0, projections.head_dim)
            validation.angles_at(heads, inv_freq, angles, packed=False)
        validation.values(position_ids, "position_ids")
        validation.apart({"k_cache": k_cache, "v_cache": v_cache}, {"x": x})
        validation.slot_values(slots, k_cache.shape[0])
        if launch is not None:
            q = launch(x, projections, angles, caches, slots)
        elif key is not None:
            q = dispatch_projection.decode_cached(x, projections, angles, caches, slots, key)
        else:
            q = torch.ops.rope_dist.decode_cached(x, *caches, slots, *projections, *angles)
    return q[0] if packed else q


def _check_caches(
    x: torch.Tensor,
    projections: Projections,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
) -> None:
    k_cache, v_cache = caches
    w_v = present(projections.w_v)
    _check_projections(x, projections)
    head_dim = projections.head_dim
    for cache, weight, name in ((k_cache, projections.w_k, "k"), (v_cache, w_v, "v")):
        if cache.shape[1] * head_dim != weight.shape[0]:
            raise ValueError(
                f"{name}_cache has {cache.shape[1]} heads, w_{name} {weight.shape[0] // head_dim}"
            )
        if cache.dtype != x.dtype or cache.device != x.device:
            raise ValueError(
                f"{name}_cache must be {x.dtype} on {x.device}, got {cache.dtype} on {cache.device}"
            )
    tokens = x.shape[0] * x.shape[1]
    if slots.shape != (tokens,):
        raise ValueError(f"slots must be [{tokens}], got {list(slots.shape)}")
    validation.integers(slots, "slots", x.device)


def _check_projections(x: torch.Tensor, projections: Projections) -> None:
    head_dim = projections.head_dim
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be [B, S, K] or [T, K] floating, got {list(x.shape)} {x.dtype}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    for name, weight, bias in zip("qkv", projections[:3], projections[3:6], strict=True):
        if weight is None:
            if bias is not None:
                raise ValueError(f"b_{name} without w_{name}")
            continue
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] % head_dim:
            raise ValueError(
                f"w_{name} must be [heads * {head_dim}, {x.shape[-1]}], got {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"b_{name} must be {list(weight.shape[:1])}, got {list(bias.shape)}")
        for tensor, which in ((weight, f"w_{name}"), (bias, f"b_{name}")):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
                raise ValueError(
                    f"{which} must be {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}"
                )
