"""Cases of the static gate: RMS norm and rotary, forward and backward."""

from __future__ import annotations

import torch

from rope_dist.ops import triton_norm_backward, triton_norm_rotary
from rope_dist.ops.arguments import Norms

from .static_case import BF16, Case, angles, meta
from .static_rotary import WIDE


def _norm(  # noqa: PLR0913
    q_heads, k_heads, head_dim, *, joint=False, weight_dtype=BF16, rotary_dim=None, table=False, bias=False,
    inplace=True, saving=False, backward=False, dtype=BF16, after=False, **order,
):  # fmt: skip
    """Norm + rotary, or its gradient. ``joint``: the norm is of all heads together."""

    def call(arch: str) -> None:
        counts = (q_heads, k_heads)
        heads = tuple(meta(1, 8192, n, head_dim, dtype=dtype) for n in counts)
        weights = [meta(n * head_dim if joint else head_dim, dtype=weight_dtype) for n in counts]
        rstds = tuple(meta(1, 8192, 1 if joint else n, dtype=torch.float32) for n in counts)
        biases = [meta(n * head_dim, dtype=dtype) if bias else None for n in counts]
        norms = Norms(*weights, norm_after=after)
        turn = angles(8192, rotary_dim or head_dim, table, **order)
        other = heads if inplace and not backward else tuple(torch.empty_like(x) for x in heads)
        if backward:
            triton_norm_backward.launch(other, heads, rstds, norms, turn, *biases, num_programs=528)
        else:
            triton_norm_rotary.launch(*heads, *other, norms, turn, *biases, rstds if saving else None)

    return call


EVERY = ("sm_80", "sm_89", "sm_90", "sm_100")
STORES = {"wide stores": 4}
# Every warp adds its sum of squares to those of the others: four bytes a warp and norm.
JOINT = {**WIDE, "shared": 64}
# The reciprocal norms, for the gradient: one number a head, gathered from the threads that share it.
SAVING = {**WIDE, "shared": 64, "narrow stores": 2, "convert_layout": 2}
# 128 registers leave room for 16 warps on a multiprocessor, whose loads in flight are what reading at full speed
# needs. The weights' sums are exchanged between warps once a program, and stored as float32. What else is loaded
# is a position and a reciprocal norm, each for queries and for keys.
NORM_GRADIENT = {"registers": 128, "stack": 0, "narrow stores": 2, "narrow loads": 4, "convert_layout": 4}
F32 = torch.float32

CASES = (
    Case("norm + rotary 32+8", _norm(32, 8, 128), EVERY, WIDE, STORES),
    Case("norm + rotary 32+8", _norm(32, 8, 128), ("gfx942",), {"stack": 0, "shared": 0}),
    Case("norm + rotary float32 weight", _norm(32, 8, 128, weight_dtype=F32), ("sm_90",), WIDE, STORES),
    Case("norm + rotary new", _norm(32, 8, 128, inplace=False), ("sm_90",), WIDE, STORES),
    Case("norm + rotary table", _norm(32, 8, 128, table=True), EVERY, WIDE, STORES),
    Case("norm + rotary bias", _norm(32, 8, 128, bias=True), ("sm_90",), WIDE, STORES),
    Case("norm + rotary head 64", _norm(9, 3, 64), ("sm_90",), WIDE, STORES),
    Case("norm + rotary head 80", _norm(32, 32, 80), ("sm_90",), WIDE, STORES),
    Case("norm + rotary head 96", _norm(32, 8, 96), ("sm_90",), WIDE, STORES),
    Case("norm + rotary head 256", _norm(16, 8, 256), EVERY, WIDE, STORES),
    Case("norm + rotary partial", _norm(96, 8, 128, rotary_dim=64), ("sm_90",), WIDE, STORES),
    Case(
        "norm + rotary interleaved", _norm(32, 8, 128, interleaved=True), ("sm_90",), WIDE, {"wide stores": 2}
    ),
    Case("norm + rotary float32", _norm(32, 8, 128, dtype=F32, weight_dtype=F32), ("sm_90",), WIDE, STORES),
    Case("rotary + norm 32+8", _norm(32, 8, 128, after=True), ("sm_90",), WIDE, STORES),
    Case("norm + rotary saving", _norm(32, 8, 128, inplace=False, saving=True), ("sm_90",), SAVING, STORES),
    Case("norm of all heads + rotary 32+32", _norm(32, 32, 128, joint=True), EVERY, JOINT, STORES),
    Case("norm of all heads + rotary 40+8", _norm(40, 8, 128, joint=True), EVERY, JOINT, STORES),
    Case(
        "norm of all heads + rotary 40+8",
        _norm(40, 8, 128, joint=True),
        ("gfx942",),
        {"stack": 0, "shared": 64},
    ),
    Case(
        "norm of all heads + rotary bias table",
        _norm(32, 32, 128, joint=True, bias=True, table=True),
        ("sm_90",),
        JOINT,
        STORES,
    ),
    Case("norm + rotary gradient", _norm(32, 8, 128, backward=True), EVERY, NORM_GRADIENT, STORES),
    Case("norm + rotary gradient", _norm(32, 8, 128, backward=True), ("gfx942",), {"stack": 0}),
    Case(
        "norm + rotary gradient bias table",
        _norm(32, 8, 128, backward=True, bias=True, table=True),
        ("sm_90",),
        NORM_GRADIENT,
        STORES,
    ),
    Case(
        "norm + rotary gradient head 80", _norm(32, 32, 80, backward=True), ("sm_90",), NORM_GRADIENT, STORES
    ),
    Case(
        "norm + rotary gradient head 256", _norm(16, 8, 256, backward=True), ("sm_90",), NORM_GRADIENT, STORES
    ),
    Case(
        "rotary + norm gradient",
        _norm(32, 8, 128, backward=True, after=True),
        ("sm_90",),
        NORM_GRADIENT,
        STORES,
    ),
    Case(
        "norm of all heads + rotary gradient 32+32",
        _norm(32, 32, 128, joint=True, backward=True),
        EVERY,
        NORM_GRADIENT,
        STORES,
    ),
    Case(
        "norm of all heads + rotary gradient 40+8",
        _norm(40, 8, 128, joint=True, backward=True),
        ("sm_90",),
        NORM_GRADIENT,
        STORES,
    ),
    Case(
        "norm of all heads + rotary gradient 40+8",
        _norm(40, 8, 128, joint=True, backward=True),
        ("gfx942",),
        {"stack": 0, "shared": 64},
    ),
)
