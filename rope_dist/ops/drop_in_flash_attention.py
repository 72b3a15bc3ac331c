"""The functions and the module of ``flash_attn.layers.rotary`` over these operators: change one import."""

from __future__ import annotations

import torch

from . import launch_cache, library, validation
from .arguments import Angles
from .fixed_point import to_fixed_point


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """As ``flash_attn.layers.rotary.apply_rotary_emb`` (``apply_rotary_emb_func`` is the same).

    Args:
        x: ``[B, S, H, D]``, or packed ``[T, H, D]`` with ``cu_seqlens``.
        cos, sin: ``[rows, R/2]`` floating; a token's row is its place in its sequence plus the offset, and
            a token past the last row is not rotated.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        inplace: change ``x`` and return it.
        seqlen_offsets: added to the positions; one integer, or ``[sequences]`` integers on the device.
        cu_seqlens: ``[sequences + 1]`` int32 or int64, not decreasing; tokens outside the bounds are not rotated.
        max_seqlen: longest sequence in ``cu_seqlens``; only checked against the table.

    Returns:
        Shaped and typed as ``x``. Differentiable in ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, a negative integer offset, or a table with
            fewer rows than an integer offset and the length need; in place, as :func:`rope_dist.ops.rotary`.
    """
    packed = cu_seqlens is not None
    if x.ndim != (3 if packed else 4):
        raise ValueError(
            f"x must be {'[T, H, D] with cu_seqlens' if packed else '[B, S, H, D]'}, got {list(x.shape)}"
        )
    x = x[None] if packed else x
    angles = _by_table(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens, max_seqlen)
    x, _ = _rotate("apply_rotary_emb", x, None, angles, inplace)
    return x[0] if packed else x


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """As ``flash_attn.layers.rotary.apply_rotary_emb_qkv_``: queries and keys where they are, values untouched.

    Args:
        qkv: ``[B, S, 3, H, D]``, or ``[B, S, Hq + 2 * Hk, D]`` with ``num_heads_q``; any strides.
        cos, sin: ``[rows, R/2]`` floating, as in :func:`apply_rotary_emb`.
        cos_k, sin_k: tables for the keys, where they are others (one launch more).
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        seqlen_offsets: added to the positions; one integer, or ``[B]`` integers on the device.
        num_heads_q: Hq.

    Returns:
        ``qkv``, changed. Differentiable in ``qkv``.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, a table with fewer rows than an integer
            offset and the length need; where a gradient is wanted, a leaf and views that autograd cannot write to.
    """
    if (cos_k is None) != (sin_k is None):
        raise ValueError("give cos_k and sin_k, or neither")
    q, k = _queries_and_keys(qkv, num_heads_q)
    angles = _by_table(q, cos, sin, interleaved, seqlen_offsets)
    if cos_k is None or sin_k is None:
        _rotate("apply_rotary_emb_qkv_", *_joined(qkv, q, k), angles, inplace=True)
        return qkv
    angles_k = _by_table(k, cos_k, sin_k, interleaved, seqlen_offsets)
    _rotate("apply_rotary_emb_qkv_", q, None, angles, inplace=True)
    _rotate("apply_rotary_emb_qkv_", k, None, angles_k, inplace=True)
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
) -> torch.Tensor:
    """As ``flash_attn.layers.rotary.apply_rotary_emb_kv_``: keys where they are, values untouched.

    Args:
        kv: ``[B, S, 2, H, D]``, any strides.
        cos, sin, interleaved, seqlen_offsets: as in :func:`apply_rotary_emb_qkv_`.

    Returns:
        ``kv``, changed. Differentiable in ``kv``.

    Raises:
        ValueError: as :func:`apply_rotary_emb_qkv_`.
    """
    k = _keys(kv)
    _rotate(
        "apply_rotary_emb_kv_", k, None, _by_table(k, cos, sin, interleaved, seqlen_offsets), inplace=True
    )
    return kv


class RotaryEmbedding(torch.nn.Module):
    """As ``flash_attn.layers.rotary.RotaryEmbedding``, without tables: angles are computed in the kernel.

    They are right to 2e-7 at any length, where flash-attention's tables have the dtype of ``qkv`` and end at the
    longest sequence so far. Frequencies are kept in fixed point, which ``module.half()`` does not touch. Those of an
    extended context replace them::

        rotary.inv_freq_q64 = rope_dist.ops.to_fixed_point(inv_freq)  # [dim / 2], radians a token

    Args:
        dim: R, rotated dimensions of a head, even.
        base: frequencies are ``1 / base ** (2i / dim)``, in float32 as models have them.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        scale_base: must be None; xPos is not supported.
        device: of the frequencies.

    Raises:
        ValueError: ``dim`` or ``base`` out of range, or ``scale_base``.
    """

    inv_freq_q64: torch.Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if scale_base is not None:
            raise ValueError(
                "scale_base (xPos) is not supported: leave it out, or use flash-attention's module"
            )
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        if not base > 0:
            raise ValueError(f"base must be above 0, got {base}")
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        empty = torch.empty(2, dim // 2, dtype=torch.int32, device=device)
        self.register_buffer("inv_freq_q64", empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the frequencies, as after ``to_empty`` of a module that was made on the meta device."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=self.inv_freq_q64.device)
        self.inv_freq_q64.copy_(to_fixed_point(1.0 / self.base ** (exponents / self.dim)))

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys in place.

        Args:
            qkv: ``[B, S, 3, H, D]``, or ``[B, S, Hq + 2 * Hk, D]`` with ``num_heads_q``; with ``kv`` the queries
                ``[B, S, Hq, D]``.
            kv: ``[B, Sk, 2, Hk, D]``.
            seqlen_offset: position of the first token; one integer, or ``[B]`` integers on the device.
            max_seqlen: not needed: there is no table.
            num_heads_q: Hq.

        Returns:
            ``qkv``, or ``(qkv, kv)``, changed. Differentiable in both.

        Raises:
            ValueError: as :func:`apply_rotary_emb_qkv_`.
        """
        if kv is None:
            q, k = _joined(qkv, *_queries_and_keys(qkv, num_heads_q))
            self._rotate(q, k, seqlen_offset)
            return qkv
        k = _keys(kv)
        if qkv.ndim != 4:
            raise ValueError(f"with kv, qkv must be the queries [B, S, H, D], got {list(qkv.shape)}")
        if qkv.shape[1] == k.shape[1]:
            self._rotate(qkv, k, seqlen_offset)
        else:
            self._rotate(qkv, None, seqlen_offset)
            self._rotate(k, None, seqlen_offset)
        return qkv, kv

    def _rotate(self, q: torch.Tensor, k: torch.Tensor | None, seqlen_offset: int | torch.Tensor) -> None:
        validation.heads(q, k)
        validation.frequencies(self.inv_freq_q64, q.shape[3], q.device)
        offset, offsets = _offsets(seqlen_offset, q.shape[0], q.device)
        if offset + q.shape[1] > 2**31:
            raise ValueError(f"positions must be within int32, got {q.shape[1]} tokens from {offset}")
        angles = Angles(
            inv_freq_q64=self.inv_freq_q64,
            seqlen_offsets=offsets,
            offset=offset,
            interleaved=self.interleaved,
        )
        _rotate("RotaryEmbedding", q, k, angles, inplace=True)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}"


def _rotate(
    operation: str, q: torch.Tensor, k: torch.Tensor | None, angles: Angles, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate for checked arguments."""
    launch, key = launch_cache.find(operation, (q, k), angles, inplace)
    if launch is not None:
        return launch(q, k, angles)
    return library.rotate(q, k, angles, inplace=inplace, key=key)


def _by_table(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Angles:
    """The angles of ``x`` ``[B, S, H, D]`` by tables ``[rows, R/2]``, checked."""
    if cos.ndim != 2:
        raise ValueError(f"cos and sin must be [rows, R/2], got {list(cos.shape)} and {list(sin.shape)}")
    validation.heads(x, None)
    validation.tables(x, cos[None], sin[None], rows=None)
    sequences, length = x.shape[:2]
    if cu_seqlens is not None:
        validation.bounds(cu_seqlens, x.shape[1], x.device)
        sequences, length = cu_seqlens.shape[0] - 1, max_seqlen or 0
    offset, offsets = _offsets(seqlen_offsets, sequences, x.device)
    if offsets is None and offset + length > cos.shape[0]:
        raise ValueError(
            f"a length of {length} from {offset} needs {length + offset} rows of cos, got {cos.shape[0]}"
        )
    return Angles(
        cos[None],
        sin[None],
        cu_seqlens=cu_seqlens,
        seqlen_offsets=offsets,
        offset=offset,
        interleaved=interleaved,
    )


def _offsets(
    seqlen_offsets: int | torch.Tensor, sequences: int, device: torch.device
) -> tuple[int, torch.Tensor | None]:
    """One offset for all sequences, and that of each, checked."""
    if isinstance(seqlen_offsets, torch.Tensor):
        if seqlen_offsets.shape != (sequences,):
            raise ValueError(f"seqlen_offsets must be [{sequences}], got {list(seqlen_offsets.shape)}")
        validation.integers(seqlen_offsets, "seqlen_offsets", device)
        return 0, seqlen_offsets
    offset = int(seqlen_offsets)
    if offset < 0:
        raise ValueError(f"seqlen_offsets must not be negative, got {offset}")
    return offset, None


def _queries_and_keys(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``[B, S, heads, D]`` of packed queries, keys and values."""
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        if num_heads_q is not None and num_heads_q != qkv.shape[3]:
            raise ValueError(f"qkv {list(qkv.shape)} has {qkv.shape[3]} heads, got num_heads_q={num_heads_q}")
        return qkv[:, :, 0], qkv[:, :, 1]
    if qkv.ndim != 4:
        raise ValueError(f"qkv must be [B, S, 3, H, D] or [B, S, Hq + 2 * Hk, D], got {list(qkv.shape)}")
    if num_heads_q is None:
        raise ValueError(f"qkv [B, S, Hq + 2 * Hk, D] needs num_heads_q, got {list(qkv.shape)} without it")
    num_heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
    if num_heads_q < 1 or num_heads_k < 1 or odd:
        raise ValueError(
            f"qkv must be [B, S, Hq + 2 * Hk, D], got {list(qkv.shape)} with num_heads_q={num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_k]


def _joined(qkv: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``q`` and ``k``, parts of ``qkv``, as one view where there is one: autograd then writes back one gradient."""
    if qkv.ndim == 4:
        return qkv[:, :, : q.shape[2] + k.shape[2]], None
    if qkv.stride(2) == qkv.shape[3] * qkv.stride(3):
        return qkv[:, :, :2].flatten(2, 3), None
    return q, k


def _keys(kv: torch.Tensor) -> torch.Tensor:
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv must be [B, S, 2, H, D], got {list(kv.shape)}")
    return kv[:, :, 0]
