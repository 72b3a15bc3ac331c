"""The functions of vLLM and FlashInfer over these operators: change one import.

By a table of cos and sin: :func:`rotary_embedding` (vLLM) and :func:`apply_rope_with_cos_sin_cache` (FlashInfer,
SGLang). By a base, without a table: :func:`apply_rope` and :func:`apply_rope_pos_ids` (FlashInfer).
"""

from __future__ import annotations

import torch

from . import launch_cache, library, validation
from .arguments import Angles, present
from .fixed_point import to_fixed_point

# --- by a table ----------------------------------------------------------------------------------


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """As ``vllm._custom_ops.rotary_embedding``: rotate ``query`` and ``key`` in place.

    Args:
        positions: ``[T]`` or ``[B, S]`` int32 or int64, rows of the table. On a GPU, where looking at them would
            wait, a token whose position is not a row is not rotated.
        query: ``[*positions.shape, Hq * head_size]`` or ``[*positions.shape, Hq, head_size]``, any strides.
        key: the same with its own heads; None rotates ``query`` alone.
        head_size: D.
        cos_sin_cache: ``[max_position, R]`` floating: R/2 cosines, then R/2 sines; best in float32, since each
            rounding of a table is an error of the angle.
        is_neox: pairs are ``(i, i + R/2)``; False: ``(2i, 2i + 1)``.
        rope_dim_offset: first rotated dimension of a head.
        inverse: rotate by the negative angles.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; positions that are no row of the table
            (looked at on CPU tensors only); tensors that are expanded or share memory; where a gradient is wanted,
            leaves and views that autograd cannot write to.
    """
    angles = _by_cache(positions, cos_sin_cache, is_neox, inverse)
    q, k = _heads(positions, query, key, head_size)
    if rope_dim_offset < 0 or rope_dim_offset + 2 * angles.num_pairs > head_size:
        raise ValueError(
            f"rope_dim_offset {rope_dim_offset} and the {2 * angles.num_pairs} dimensions of cos_sin_cache must be "
            f"within the {head_size} of a head"
        )
    if rope_dim_offset:
        q, k = q[..., rope_dim_offset:], k[..., rope_dim_offset:] if k is not None else None
    _rotate("rotary_embedding", q, k, angles, inplace=True)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``flashinfer.apply_rope_with_cos_sin_cache``: new tensors.

    Args:
        positions, query, key, head_size, cos_sin_cache, is_neox: as in :func:`rotary_embedding`.

    Returns:
        Contiguous tensors, shaped and typed as ``query`` and ``key`` (None for None). Differentiable in both.

    Raises:
        ValueError: as :func:`rotary_embedding`; nothing is refused for how it lies in memory.
    """
    angles = _by_cache(positions, cos_sin_cache, is_neox)
    q, k = _heads(positions, query, key, head_size)
    q, k = _rotate("apply_rope_with_cos_sin_cache", q, k, angles, inplace=False)
    return q.view(query.shape), k.view(key.shape) if k is not None and key is not None else None


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """As ``flashinfer.apply_rope_with_cos_sin_cache_inplace``: :func:`rotary_embedding` of whole heads.

    Args:
        positions, query, key, head_size, cos_sin_cache, is_neox: as in :func:`rotary_embedding`.

    Raises:
        ValueError: as :func:`rotary_embedding`.
    """
    rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


def _by_cache(
    positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool, inverse: bool = False
) -> Angles:
    if cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] < 2 or cos_sin_cache.shape[1] % 2:
        raise ValueError(
            f"cos_sin_cache must be [max_position, R] with R even and above 0, got {list(cos_sin_cache.shape)}"
        )
    if positions.ndim not in (1, 2):
        raise ValueError(f"positions must be [tokens] or [B, S], got {list(positions.shape)}")
    cos, sin = cos_sin_cache[None].chunk(2, dim=-1)
    return Angles(
        cos,
        sin,
        positions=positions if positions.ndim == 2 else positions[None],
        interleaved=not is_neox,
        conjugate=inverse,
    )


def _heads(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None, head_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views ``[B, S, heads, D]`` of both."""

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        shape, axes = x.shape, positions.ndim
        fits = shape[:axes] == positions.shape and head_size > 0
        if fits and x.ndim == axes + 1 and shape[-1] % head_size == 0:
            x = x.unflatten(-1, (shape[-1] // head_size, head_size))
        elif not (fits and x.ndim == axes + 2 and shape[-1] == head_size):
            tokens = ", ".join(str(n) for n in positions.shape)
            raise ValueError(
                f"{name} must be [{tokens}, heads * {head_size}] or [{tokens}, heads, {head_size}] for positions "
                f"{list(positions.shape)}, got {list(shape)}"
            )
        return x if axes == 2 else x[None]

    return heads(query, "query"), heads(key, "key") if key is not None else None


# --- by a base -----------------------------------------------------------------------------------


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``flashinfer.apply_rope``: packed sequences, each from a position of its own.

    Angles are computed in fixed point from float32 frequencies, to 2e-7 at any position (see
    :func:`rope_dist.ops.rotary_at`, which takes frequencies and positions of any kind).

    Args:
        q: ``[T, Hq, D]``, any strides.
        k: ``[T, Hk, D]``; None rotates ``q`` alone.
        indptr: ``[sequences + 1]`` int32 or int64, bounds of the sequences, not decreasing. A token outside of them
            is not rotated.
        offsets: ``[sequences]`` int32 or int64, position of the first token of each sequence.
        rotary_dim: R, even, the first dimensions of a head; None: all.
        interleave: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        rope_scale: factor by which all positions are divided (position interpolation).
        rope_theta: base: frequencies are ``rope_theta ** (-2i / R) / rope_scale``.

    Returns:
        New tensors, contiguous, shaped and typed as ``q`` and ``k`` (None for None). Differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; bounds that decrease or are outside the
            tokens and offsets outside int32 (looked at on CPU tensors only).
    """
    angles = _by_base(q, k, rotary_dim, interleave, rope_scale, rope_theta)
    return _ragged("apply_rope", q, k, angles._replace(cu_seqlens=indptr, seqlen_offsets=offsets), False)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor | None,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """As ``flashinfer.apply_rope_inplace``: :func:`apply_rope` that changes ``q`` and ``k``.

    Raises:
        ValueError: as :func:`apply_rope`; tensors that are expanded or share memory; where a gradient is wanted,
            leaves and views that autograd cannot write to.
    """
    angles = _by_base(q, k, rotary_dim, interleave, rope_scale, rope_theta)
    _ragged("apply_rope", q, k, angles._replace(cu_seqlens=indptr, seqlen_offsets=offsets), True)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor | None,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``flashinfer.apply_rope_pos_ids``: a position for each token.

    Args:
        pos_ids: ``[T]`` int32 or int64, values within int32.
        q, k, rotary_dim, interleave, rope_scale, rope_theta: as in :func:`apply_rope`.

    Returns:
        As :func:`apply_rope`.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; positions outside int32 (looked at on CPU
            tensors only).
    """
    angles = _by_base(q, k, rotary_dim, interleave, rope_scale, rope_theta)
    return _ragged("apply_rope_pos_ids", q, k, _at(angles, q, pos_ids), False)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor | None,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """As ``flashinfer.apply_rope_pos_ids_inplace``: :func:`apply_rope_pos_ids` that changes ``q`` and ``k``.

    Raises:
        ValueError: as :func:`apply_rope_pos_ids`; tensors as in :func:`apply_rope_inplace`.
    """
    angles = _by_base(q, k, rotary_dim, interleave, rope_scale, rope_theta)
    _ragged("apply_rope_pos_ids", q, k, _at(angles, q, pos_ids), True)


def _by_base(
    q: torch.Tensor,
    k: torch.Tensor | None,
    rotary_dim: int | None,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
) -> Angles:
    if q.ndim != 3 or (k is not None and k.ndim != 3):
        shapes = " and ".join(str(None if x is None else list(x.shape)) for x in (q, k))
        raise ValueError(f"q and k must be [tokens, heads, D], got {shapes}")
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > q.shape[-1]:
        raise ValueError(f"rotary_dim must be even and at most {q.shape[-1]}, got {rotary_dim}")
    if not (rope_scale > 0 and rope_theta > 0):
        raise ValueError(f"rope_scale and rope_theta must be above 0, got {rope_scale} and {rope_theta}")
    frequencies = _frequencies(rotary_dim, rope_scale, rope_theta, q.device)
    return Angles(inv_freq_q64=frequencies, interleaved=interleave)


def _at(angles: Angles, q: torch.Tensor, pos_ids: torch.Tensor) -> Angles:
    if pos_ids.shape != q.shape[:1]:
        raise ValueError(f"pos_ids must be [{q.shape[0]}], got {list(pos_ids.shape)}")
    return angles._replace(positions=pos_ids[None])


def _ragged(
    operation: str, q: torch.Tensor, k: torch.Tensor | None, angles: Angles, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k = _rotate(operation, q[None], k[None] if k is not None else None, angles, inplace)
    return q[0], k[0] if k is not None else None


_FREQUENCIES: dict[tuple[int, float, float, torch.device], torch.Tensor] = {}
"""What :func:`_frequencies` made: it takes a dozen small launches."""
MOST_FREQUENCIES = 256


def _frequencies(rotary_dim: int, rope_scale: float, rope_theta: float, device: torch.device) -> torch.Tensor:
    """Frequencies in fixed point, of float32 ones as a model's buffer has them."""

    def make() -> torch.Tensor:
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        return to_fixed_point(1.0 / rope_theta**exponents / rope_scale)

    if torch.compiler.is_compiling() or launch_cache.transformed() or torch._C._len_torch_dispatch_stack():
        return make()  # perhaps no tensor with values
    key = (rotary_dim, float(rope_scale), float(rope_theta), device)
    found = _FREQUENCIES.get(key)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return found  # in the memory of the graph, without values until it runs
        if len(_FREQUENCIES) >= MOST_FREQUENCIES:
            _FREQUENCIES.clear()
        _FREQUENCIES[key] = found
    return found


# --- both ----------------------------------------------------------------------------------------


def _rotate(
    operation: str, q: torch.Tensor, k: torch.Tensor | None, angles: Angles, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate ``q`` and ``k`` ``[B, S, heads, D]`` by angles whose tensors are not checked yet."""
    by_table = angles.cos is not None
    name = "positions" if by_table else "pos_ids"
    launch, key = launch_cache.find(operation, (q, k), angles, inplace)
    if launch is None:
        validation.heads(q, k)
        if by_table:
            validation.tables(q, present(angles.cos), present(angles.sin), rows=None)
        if angles.positions is not None:
            validation.integers(angles.positions, name, q.device)
        if angles.cu_seqlens is not None:
            validation.bounds(angles.cu_seqlens, q.shape[1], q.device, "indptr")
            sequences, offsets = angles.cu_seqlens.shape[0] - 1, present(angles.seqlen_offsets)
            if offsets.shape != (sequences,):
                raise ValueError(f"offsets must be [{sequences}], got {list(offsets.shape)}")
            validation.integers(offsets, "offsets", q.device)
    # Values are looked at in each call, on a CPU only.
    if by_table:
        validation.rows(present(angles.positions), present(angles.cos).shape[1], name)
    else:
        validation.values(angles.positions, name)
    validation.values(angles.seqlen_offsets, "offsets")
    validation.bound_values(angles.cu_seqlens, q.shape[1], "indptr")
    if launch is not None:
        return launch(q, k, angles)
    return library.rotate(q, k, angles, inplace=inplace, key=key)
