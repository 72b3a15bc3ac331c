"""This package's rotation with the signatures of transformers' functions: :func:`replacement`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from .forms import Form, Unsupported

Function = Callable[..., Any]


def replacement(form: Form, stock: Function) -> Function:
    """A function that is called as ``stock`` is and rotates as it does, by this package's kernels.

    Tables may be float32 whatever the tensors are; what comes back has the dtype of the tensors. What the kernels do
    not take (queries and keys of different lengths, tables that are trained) is left to ``stock``.

    Raises:
        Unsupported: ``stock`` has other parameters than those known.
    """
    parameters = inspect.signature(stock).parameters
    names = tuple(parameters)
    if names not in _SIGNATURES:
        where = f"{stock.__name__} of {stock.__module__}"
        raise Unsupported(f"{where} has parameters that are not known: {', '.join(names)}")
    return _SIGNATURES[names](form, stock)


def _two(form: Form, stock: Function) -> Function:
    # Qwen4 leaves the keys out, and then gets the queries alone.
    alone = inspect.signature(stock).parameters["k"].default is None

    def stock_of_two(q, k, cos, sin, unsqueeze_dim):
        rotated = stock(q, k, cos, sin, unsqueeze_dim)
        return (rotated, None) if alone and k is None else rotated

    def apply_rotary_pos_emb(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
        rotated = rotate(form, stock_of_two, q, k, cos, sin, unsqueeze_dim)
        return rotated[0] if alone and k is None else rotated

    return apply_rotary_pos_emb


def _two_and_positions(form: Form, stock: Function) -> Function:
    # Of transformers before 5.17, where nothing reads position_ids any more.
    def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return rotate(form, stock, q, k, cos, sin, unsqueeze_dim)

    return apply_rotary_pos_emb


def _one(form: Form, stock: Function) -> Function:
    def stock_of_two(q, k, cos, sin, unsqueeze_dim):
        return stock(q, cos, sin, unsqueeze_dim), None

    def apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=1):
        return rotate(form, stock_of_two, x, None, cos, sin, unsqueeze_dim)[0]

    return apply_rotary_pos_emb


def _complex(form: Form, stock: Function) -> Function:
    def apply_rotary_emb(xq, xk, freqs_cis):
        def stock_of_two(q, k, cos, sin, unsqueeze_dim):
            return stock(q, k, freqs_cis)  # complex numbers of 16 bits there are none

        return rotate(form, stock_of_two, xq, xk, *_parts(freqs_cis), form.heads_axis)

    return apply_rotary_emb


def _sections(form: Form, stock: Function) -> Function:
    # Of transformers before 5.17: tables [3, B, S, R] of three position axes, of which each rotates a section.
    once = dataclasses.replace(form, tables="once")

    def apply_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
        def stock_of_sections(q, k, *tables, unsqueeze_dim):
            return stock(q, k, cos.to(q.dtype), sin.to(q.dtype), mrope_section, unsqueeze_dim)

        tables = sections_of(cos, mrope_section), sections_of(sin, mrope_section)
        return rotate(once, stock_of_sections, q, k, *tables, unsqueeze_dim)

    return apply_multimodal_rotary_pos_emb


_SIGNATURES: dict[tuple[str, ...], Callable[[Form, Function], Function]] = {
    ("q", "k", "cos", "sin", "unsqueeze_dim"): _two,
    ("q", "k", "cos", "sin", "position_ids", "unsqueeze_dim"): _two_and_positions,
    ("x", "cos", "sin", "unsqueeze_dim"): _one,
    ("xq", "xk", "freqs_cis"): _complex,
    ("q", "k", "cos", "sin", "mrope_section", "unsqueeze_dim"): _sections,
}


def sections_of(table: torch.Tensor, sections: list[int]) -> torch.Tensor:
    """Each value once, ``[B, S, R/2]``, of a table ``[3, B, S, R]`` of three position axes with a section each."""
    parts = table[..., : sum(sections)].split(sections, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def pairs_of(tables: str, table: torch.Tensor) -> torch.Tensor:
    """Each value once, ``[B or 1, S, R/2]``, of a real table that holds it ``"twice"``, in ``"pairs"`` or once."""
    if tables == "twice":
        return table.narrow(-1, 0, table.shape[-1] // 2)
    return table[..., ::2] if tables == "pairs" else table


_KEPT = "_rope_dist_pairs"


def keep_pairs(tables: str, made: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """Give stock's tables, as an attribute, what the kernels read of them: made once a forward pass, not in each layer.

    A copy of a table (on another device, say) has no such attribute, and each layer takes it apart again.
    """
    if tables == "complex":
        setattr(made, _KEPT, (made.real.contiguous(), made.imag.contiguous()))
    elif tables != "once":
        for table in made:
            setattr(table, _KEPT, pairs_of(tables, table).contiguous())


def kept_pairs(tables: str, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[B or 1, S, R/2]`` of stock's real tables."""
    if not torch.compiler.is_compiling():
        kept_cos, kept_sin = getattr(cos, _KEPT, None), getattr(sin, _KEPT, None)
        if kept_cos is not None and kept_sin is not None:
            return kept_cos, kept_sin
    return pairs_of(tables, cos), pairs_of(tables, sin)


def _parts(freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a complex table."""
    kept = None if torch.compiler.is_compiling() else getattr(freqs_cis, _KEPT, None)
    return kept or (freqs_cis.real, freqs_cis.imag)


def rotate(
    form: Form,
    stock: Function,
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries and keys rotated in ``form``; by ``stock`` what the kernels do not take.

    Args:
        q, k: ``[B, H, S, D]`` with ``unsqueeze_dim`` 1, ``[B, S, H, D]`` with 2; ``k`` may be None.
        cos, sin: real tables as ``form`` has them, floating.
        inplace: ``q`` and ``k`` may be changed.
    """
    if not can_rotate(q, k, cos, unsqueeze_dim):
        return stock(q, k, cos.to(q.dtype), sin.to(q.dtype), unsqueeze_dim=unsqueeze_dim)
    cos, sin = kept_pairs(form.tables, cos, sin)
    if form.negative:
        sin = -sin
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2) if k is not None else None
    if form.last:
        q, k = _last(form, q, k, cos, sin)
    else:
        q, k = _first(form, q, k, cos, sin, inplace)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2) if k is not None else None
    return q, k


def can_rotate(q: torch.Tensor, k: torch.Tensor | None, table: torch.Tensor, unsqueeze_dim: int) -> bool:
    if q.ndim != 4 or table.ndim != 3 or unsqueeze_dim not in (1, 2) or table.requires_grad:
        return False
    batch, tokens = q.shape[0], q.shape[3 - unsqueeze_dim]
    if table.shape[1] != tokens or (table.shape[0] != 1 and table.shape[0] != batch):
        return False
    if k is None:
        return True
    return k.ndim == 4 and k.dtype == q.dtype and k.shape[0] == batch and k.shape[3 - unsqueeze_dim] == tokens


def _first(form: Form, q, k, cos, sin, inplace=False):
    """The first R dimensions of each head."""
    if form.layout == "interleaved-to-half":
        return ops.rotary(q, k, cos, sin, deinterleave=True)
    return ops.rotary(q, k, cos, sin, interleaved=form.layout == "interleaved", inplace=inplace)


def _last(form: Form, q, k, cos, sin):
    """The last R dimensions of each head."""
    rotary_dim = 2 * cos.shape[-1]

    def split(x):
        return x.split([x.shape[-1] - rotary_dim, rotary_dim], dim=-1) if x is not None else (None, None)

    (q_kept, q), (k_kept, k) = split(q), split(k)
    q, k = _first(form, q, k, cos, sin)
    return torch.cat((q_kept, q), dim=-1), torch.cat((k_kept, k), dim=-1) if k is not None else None
