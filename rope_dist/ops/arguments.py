"""Arguments that travel together: angles of a rotation, norms before it, weights of a projection, caches.

They are named tuples whose fields, in order, are the arguments of the ``torch.library`` operators: ``*angles`` is
what an operator takes, ``Angles(*rest)`` what its implementation makes of it, and torch.compile traces them.
"""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch


def present(x: torch.Tensor | None) -> torch.Tensor:
    """``x``, which the caller knows to be there."""
    assert x is not None
    return x


class Angles(NamedTuple):
    """The angle of every token and pair, by a table or by frequencies and positions.

    Attributes:
        cos, sin: tables ``[B or 1, rows, R/2]``, floating; a token's row is its position, and a token whose position
            is not in the table is not rotated.
        inv_freq_q64: instead, ``[2, R/2]`` int32 from :func:`rope_dist.ops.to_fixed_point`; or ``[axes, 2, R/2]``,
            whose angles are summed.
        positions: ``[B or 1, S]`` int32 or int64, values within int32, or ``[axes, B or 1, S]`` with frequencies of as
            many axes. None: a token's index in its sequence, plus ``offset`` and the sequence's entry in
            ``seqlen_offsets``.
        cu_seqlens: ``[sequences + 1]`` integers, not decreasing: bounds of packed sequences in the one row of the
            batch; a token outside them is not rotated.
        seqlen_offsets: ``[sequences]`` integers (``[B]`` without ``cu_seqlens``).
        offset: added to every index.
        scaling: factor on cos and sin made from ``inv_freq_q64`` (YaRN's attention factor); a table has it in it.
        interleaved: pairs are dimensions ``(2i, 2i + 1)`` (GPT-J) instead of ``(i, i + R/2)`` (Hugging Face).
        deinterleave: pairs are read interleaved and written as halves (multi-head latent attention), whatever
            ``interleaved`` is. What is not rotated keeps its place.
        conjugate: rotate by the negative angles, which is the gradient of the rotation: with ``deinterleave`` it
            reads halves and writes interleaved pairs.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    inv_freq_q64: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    seqlen_offsets: torch.Tensor | None = None
    offset: int = 0
    scaling: float = 1.0
    interleaved: bool = False
    deinterleave: bool = False
    conjugate: bool = False

    @property
    def num_pairs(self) -> int:
        """``R/2``, the rotated pairs of a head."""
        return present(self.inv_freq_q64 if self.cos is None else self.cos).shape[-1]

    @property
    def axes(self) -> int:
        """Axes of the positions: 1, or as many as the frequencies have."""
        words = self.inv_freq_q64
        return words.shape[0] if words is not None and words.ndim == 3 else 1

    @property
    def interleaved_in(self) -> bool:
        """Whether the pairs that are read are interleaved."""
        return not self.conjugate if self.deinterleave else self.interleaved

    @property
    def interleaved_out(self) -> bool:
        """Whether the pairs that are written are interleaved."""
        return self.conjugate if self.deinterleave else self.interleaved

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields that hold tensors, which come first."""
        return self[:6]

    def conjugated(self) -> Angles:
        """The negative angles."""
        return self._replace(conjugate=not self.conjugate)


class Norms(NamedTuple):
    """The RMS norms of queries and keys (Zhang and Sennrich 2019).

    ``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``.

    Attributes:
        q_weight, k_weight: ``[D]``, then each head is normalised by itself; or ``[heads * D]``, all heads of a token
            together. Floating, of any dtype. None: each head, without a weight.
        eps: added to the mean of the squares.
        weight_offset: added to the weights: 1 for Gemma's.
        norm_after: the norm follows the rotation (Hunyuan) instead of preceding it.
    """

    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 1e-6
    weight_offset: float = 0.0
    norm_after: bool = False

    def weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of queries and of keys."""
        return self[:2]


def is_joint(weight: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether all heads of ``x`` ``[B, S, H, D]`` are normalised together."""
    return weight is not None and weight.shape[0] != x.shape[3]


class Projections(NamedTuple):
    """Weights ``[heads * head_dim, K]`` of queries, keys and, unless left out, values, as ``nn.Linear`` has them."""

    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor | None
    b_q: torch.Tensor | None
    b_k: torch.Tensor | None
    b_v: torch.Tensor | None
    head_dim: int

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Each weight that is there with its bias."""
        both = zip(self[:3], self[3:6], strict=True)
        return [(weight, bias) for weight, bias in both if weight is not None]

    def weights(self) -> list[torch.Tensor]:
        """The weights that are there."""
        return [weight for weight in self[:3] if weight is not None]

    def biases(self) -> list[torch.Tensor] | None:
        """A contiguous bias for each weight that is there, zeros where there is none; None where no weight has one."""
        if self.b_q is self.b_k is self.b_v is None:
            return None
        pairs = self.pairs()
        return [b.contiguous() if b is not None else w.new_zeros(w.shape[0]) for w, b in pairs]


class KeyValueCache(NamedTuple):
    """Caches of keys and values, and the entry of every token that is written to them.

    Attributes:
        k_cache, v_cache: ``[entries, Hk, D]``, or paged ``[blocks, block_size, Hk, D]`` (``heads_first``: ``[blocks,
            Hk, block_size, D]``), any strides; in the dtype of the keys, or float8_e4m3fn.
        slots: ``[B * S]`` int32 or int64, entries, counted through all blocks; a negative one is not written.
        block_table: instead, ``[sequences, most blocks]`` int32 or int64, the block of every ``block_size`` places of
            a sequence. The places follow from :class:`Angles`: ``seqlen_offsets`` is how many there are already.
        k_scale, v_scale: for float8, ``[1]`` or ``[Hk]`` floating: what is stored is divided by it.
        k_scale_value, v_scale_value: the same as a number, where there is no tensor.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    k_scale_value: float = 1.0
    v_scale_value: float = 1.0
    heads_first: bool = False

    @property
    def block_size(self) -> int:
        """Entries a block; those of a flat cache are blocks of one."""
        return 1 if self.k_cache.ndim == 3 else self.k_cache.shape[2 if self.heads_first else 1]

    @property
    def entries(self) -> int:
        """Tokens that the caches have room for."""
        return self.k_cache.shape[0] * self.block_size

    @property
    def is_fp8(self) -> bool:
        """Whether what is stored is divided by a scale and rounded to 8 bits."""
        return self.k_cache.dtype == torch.float8_e4m3fn

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[blocks, block_size, Hk, D]`` of both caches."""

        def view(cache: torch.Tensor) -> torch.Tensor:
            if cache.ndim == 3:
                return cache.unsqueeze(1)
            return cache.transpose(1, 2) if self.heads_first else cache

        return view(self.k_cache), view(self.v_cache)


def schema(group: type[NamedTuple]) -> str:
    """The fields of ``group`` in the syntax of ``torch.library`` schemas."""
    names = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool"}
    fields = []
    for name, kind in get_type_hints(group).items():
        default = f"={group._field_defaults[name]}" if name in group._field_defaults else ""
        fields.append(f"{names[kind]} {name}{default}")
    return ", ".join(fields)
