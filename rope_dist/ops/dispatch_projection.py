"""How a projection with rotation is carried out: fused, or by cuBLAS with a rotary pass after it."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from . import dispatch, reference, tuning


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
        with dispatch.without_autocast(x):
            return reference.qkv_rotary(x, *weights, *angles)
    if path == "auto":
        path = choose(x, *weights, *angles)
    run = separate if path == "separate" else fused
    return run(x, *weights, *angles, path)


PATHS = ("auto", "separate", "pointers", "descriptors", "decode")


def choose(
    x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, cos, sin, words, positions, scaling, interleaved
) -> str:
    """The path for these tensors: fixed by the environment, the only one, or the fastest (``tuning.py``)."""
    rotary_dim = 2 * (words if cos is None else cos).shape[-1]
    weights = [w for w in (w_q, w_k, w_v) if w is not None]
    fixed = tuning.fixed()
    if fixed is not None:
        if fixed not in PATHS[1:]:
            raise ValueError(f"ROPE_DIST_PATH={fixed!r} is no path; there are {', '.join(PATHS[1:])}")
        possible = candidates(x, w_q, w_k, w_v, head_dim, rotary_dim)
        return fixed if fixed in possible else "separate"
    if torch.are_deterministic_algorithms_enabled():
        # A measured choice may differ between processes, and with it the rounding.
        return "separate"
    form = (cos is not None, any(b is not None for b in (b_q, b_k, b_v)), interleaved)
    # Everything that the answer depends on: looked up before it is worked out, for a call that decodes one
    # token should not spend its time here.
    call = (
        x.device,
        x.dtype,
        head_dim,
        rotary_dim,
        form,
        *((y.shape, y.stride(), y.data_ptr() % 16) for y in (x, *weights)),
    )
    if call in _CHOSEN:
        return _CHOSEN[call]
    possible = candidates(x, w_q, w_k, w_v, head_dim, rotary_dim)
    if len(possible) == 1 or not x.is_cuda:
        # Without a GPU nothing is timed: the interpreter runs the kernel that is the most special.
        return possible[-1]
    from . import triton_projection

    aligned = triton_projection.fits_descriptors(x.reshape(-1, x.shape[-1]), *weights)
    names = ("table", "bias", "interleaved", "unaligned")
    problem = tuning.Problem(
        device=torch.cuda.get_device_name(x.device),
        dtype=str(x.dtype).removeprefix("torch."),
        rows=tuning.rows_class(x.shape[0] * x.shape[1]),
        depth=x.shape[2],
        widths=tuple(w.shape[0] for w in weights),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        form="+".join(name for name, used in zip(names, (*form, not aligned), strict=True) if used),
    )
    arguments = (x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, cos, sin, words, positions, scaling, interleaved)
    ways = {
        path: functools.partial(separate if path == "separate" else fused, *arguments, path)
        for path in possible
    }
    with torch.cuda.device(x.device):
        path = tuning.choose(problem, ways)
    if tuning.choices().get(problem) == path:
        if len(_CHOSEN) >= 4096:
            _CHOSEN.clear()
        _CHOSEN[call] = path
    return path


_CHOSEN: dict[tuple, str] = {}


def candidates(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int,
) -> list[str]:
    """The paths that can serve these tensors, the one that is taken unmeasured last."""
    from . import triton_decode, triton_projection

    matrices = [x.reshape(-1, x.shape[-1]), *(w for w in (w_q, w_k, w_v) if w is not None)]
    if x.dtype not in (torch.float16, torch.bfloat16) or any(
        y.numel() == 0 or y.stride(1) != 1 for y in matrices
    ):
        return ["separate"]
    paths = ["separate"]
    if triton_projection.fits(head_dim, rotary_dim):
        paths.append("pointers")
        arch = triton_projection.architecture(x.device)
        if triton_projection.has_descriptors(arch, head_dim) and triton_projection.fits_descriptors(
            *matrices
        ):
            paths.append("descriptors")
    if matrices[0].shape[0] <= triton_decode.MAX_TOKENS:
        paths.append("decode")
    return paths


def project(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim) -> list[torch.Tensor]:
    """The library's matrix products, ``[B, S, heads, head_dim]`` for each weight that there is."""
    with dispatch.without_autocast(x):
        return [
            functional.linear(x, w, b).unflatten(-1, (w.shape[0] // head_dim, head_dim))
            for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))
            if w is not None
        ]


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
    q, k, *v = project(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
    dispatch.rotate_(q, k, cos, sin, words, positions, scaling=scaling, interleaved=interleaved)
    return q, k, v[0] if v else x.new_empty(0)


def fused(x, w_q, w_k, w_v, b_q, b_k, b_v, head_dim, cos, sin, words, positions, scaling, interleaved, path):
    """One launch of ``triton_projection`` or ``triton_decode``."""
    from . import triton_decode, triton_projection

    batch, length, depth = x.shape
    weights, biases = _operands(w_q, w_k, w_v, b_q, b_k, b_v)
    angles = _flat_angles(x, cos, sin, words, positions)
    outputs = tuple(x.new_empty(batch * length, w.shape[0] // head_dim, head_dim) for w in weights)
    options = {**angles, "scaling": scaling, "interleaved": interleaved}
    rows = x.reshape(-1, depth)
    if path == "decode":
        v = outputs[2] if w_v is not None else None
        triton_decode.launch(rows, weights, biases, outputs[0], outputs[1], v, **options)
    else:
        flat = tuple(y.flatten(1) for y in outputs)
        options["descriptors"] = path == "descriptors"
        triton_projection.launch(rows, weights, biases, flat, head_dim=head_dim, **options)
    shaped = [y.unflatten(0, (batch, length)) for y in outputs]
    return shaped[0], shaped[1], shaped[2] if w_v is not None else x.new_empty(0)


def _operands(w_q, w_k, w_v, b_q, b_k, b_v) -> tuple[tuple, tuple | None]:
    """Weights that are there, and a bias for each if there is one for any."""
    pairs = [(w, b) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)) if w is not None]
    biases = None
    if any(b is not None for _, b in pairs):
        biases = tuple(b if b is not None else w.new_zeros(w.shape[0]) for w, b in pairs)
    return tuple(w for w, _ in pairs), biases


def _flat_angles(x, cos, sin, words, positions) -> dict[str, torch.Tensor | None]:
    """Tables or positions with one row a token, as the tokens lie; tables aligned as descriptors want them."""
    batch, length = x.shape[:2]
    if words is None:
        # Small beside q and k, and a view where each batch has its own.
        cos, sin = (
            t.float().expand(batch, -1, -1).reshape(batch * length, -1).contiguous() for t in (cos, sin)
        )
        cos, sin = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (cos, sin))
        return {"cos": cos, "sin": sin}
    if positions is None:
        positions = torch.arange(length, device=x.device)
    return {"words": words, "positions": positions.reshape(-1).contiguous()}


def decode_cached(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    b_q: torch.Tensor | None,
    b_k: torch.Tensor | None,
    b_v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> torch.Tensor:
    """:func:`qkv_rotary` whose keys and values go to entries ``slots`` of caches ``[entries, Hk, D]``.

    Returns:
        The queries ``[B, S, Hq, D]``.
    """
    from_kernel = dispatch.backend_for(x) == "triton" and (
        candidates(x, w_q, w_k, w_v, k_cache.shape[2], 2 * (cos if words is None else words).shape[-1])[-1]
        == "decode"
    )
    head_dim = k_cache.shape[2]
    if not from_kernel or k_cache.stride(2) != 1 or v_cache.stride(2) != 1:
        weights = (w_q, w_k, w_v, b_q, b_k, b_v, head_dim)
        q, k, v = qkv_rotary(x, *weights, cos, sin, words, positions, scaling, interleaved)
        reference.write_cache(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots)
        return q
    from . import triton_decode

    weights, biases = _operands(w_q, w_k, w_v, b_q, b_k, b_v)
    q = x.new_empty(x.shape[0] * x.shape[1], w_q.shape[0] // head_dim, head_dim)
    triton_decode.launch(
        x.reshape(-1, x.shape[-1]), weights, biases, q, k_cache, v_cache, slots=slots, scaling=scaling,
        interleaved=interleaved, **_flat_angles(x, cos, sin, words, positions),
    )  # fmt: skip
    return q.unflatten(0, x.shape[:2])


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
        with dispatch.without_autocast(q):
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
