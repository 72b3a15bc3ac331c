"""Cases of the static gate: the rotary kernel."""

from __future__ import annotations

import torch

from rope_dist.ops import triton_rotary
from rope_dist.ops.arguments import Angles

from .static_case import BF16, Case, angles, meta


def _rotary(
    q_heads, k_heads, head_dim, *, rotary_dim=None, table=False, bias=False, inplace=True, dtype=BF16, **order
):
    def call(arch: str) -> None:
        q, k = (meta(1, 8192, heads, head_dim, dtype=dtype) for heads in (q_heads, k_heads))
        out = (q, k) if inplace else (torch.empty_like(q), torch.empty_like(k))
        turn = angles(8192, rotary_dim or head_dim, table, **order)
        biases = (meta(q_heads * head_dim), meta(k_heads * head_dim)) if bias else ()
        triton_rotary.launch(q, k, *out, turn, *biases)

    return call


def _packed(arch: str) -> None:
    """As flash-attention calls it: one packed tensor, a table, bounds and offsets."""
    x, table = meta(1, 8192, 32, 128), meta(1, 8192, 64, dtype=torch.float32)
    bounds, offsets = meta(9, dtype=torch.int32), meta(8, dtype=torch.int32)
    turn = Angles(table, table, cu_seqlens=bounds, seqlen_offsets=offsets)
    triton_rotary.launch(x, None, x, None, turn)


def _pack_gradients(arch: str) -> None:
    """The backward pass: rotated back and joined with the gradient of the values."""
    q, k, v = (meta(1, 8192, heads, 128) for heads in (32, 8, 8))
    packed = [part.unflatten(-1, (-1, 128)) for part in meta(1, 8192, 48 * 128).split([4096, 1024, 1024], -1)]
    turn = angles(8192, 128, False, conjugate=True)
    triton_rotary.launch(q, k, packed[0], packed[1], turn, v=v, v_out=packed[2])


NVIDIA = ("sm_80", "sm_90", "sm_100")
# Heads are read and written 16 bytes at a time; what else is loaded is one position and the frequencies.
WIDE = {"registers": 64, "stack": 0, "shared": 0, "narrow stores": 0, "narrow loads": 2, "convert_layout": 0}
# Interleaved pairs in and halves out, or the other way: a thread keeps its elements. The conversions that are left are
# between two names of one layout, and no instruction.
MLA = {"deinterleave": True, "inplace": False}
REORDERED = {**WIDE, "convert_layout": 4, "shuffles": 0}

CASES = (
    Case("rotary 32+32 in place", _rotary(32, 32, 128), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 in place", _rotary(32, 8, 128), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 table", _rotary(32, 8, 128, table=True), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 bias", _rotary(32, 8, 128, bias=True), NVIDIA, WIDE, {"wide stores": 4}),
    Case("rotary 32+8 new", _rotary(32, 8, 128, inplace=False), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary 32+1", _rotary(32, 1, 128), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary 9+3 head 64", _rotary(9, 3, 64), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 80", _rotary(32, 32, 80), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 96", _rotary(32, 32, 96), ("sm_90",), WIDE, {"wide stores": 4}),
    Case("rotary head 256", _rotary(16, 8, 256), ("sm_90",), WIDE, {"wide stores": 4}),
    Case(
        "rotary partial new",
        _rotary(32, 32, 80, rotary_dim=32, inplace=False),
        ("sm_90",),
        WIDE,
        {"wide stores": 6},
    ),
    # One position an axis.
    Case(
        "rotary M-RoPE", _rotary(32, 8, 128, axes=3), NVIDIA, {**WIDE, "narrow loads": 4}, {"wide stores": 4}
    ),
    Case("rotary interleaved", _rotary(32, 8, 128, interleaved=True), ("sm_90",), WIDE, {"wide stores": 2}),
    Case("rotary deinterleave", _rotary(128, 1, 64, **MLA), NVIDIA, REORDERED, {"wide stores": 4}),
    Case(
        "rotary deinterleave table",
        _rotary(16, 16, 64, table=True, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave bias",
        _rotary(64, 1, 64, bias=True, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave float32",
        _rotary(16, 16, 64, dtype=torch.float32, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 4},
    ),
    Case(
        "rotary deinterleave partial",
        _rotary(32, 32, 80, rotary_dim=32, **MLA),
        ("sm_90",),
        REORDERED,
        {"wide stores": 6},
    ),
    Case(
        "rotary deinterleave gradient",
        _rotary(128, 1, 64, conjugate=True, **MLA),
        NVIDIA,
        REORDERED,
        {"wide stores": 4},
    ),
    # A wave has 64 threads, each with half of that: neighbours exchange through shared memory.
    Case("rotary deinterleave", _rotary(128, 1, 64, **MLA), ("gfx942",), {"stack": 0, "shared": 4096}),
    # The bounds are looked through by all threads together: a few bytes to add up what each found.
    Case(
        "rotary packed", _packed, ("sm_90",), {**WIDE, "shared": 128, "narrow loads": 8}, {"wide stores": 4}
    ),
    Case("rotary gradients", _pack_gradients, ("sm_90",), WIDE, {"wide stores": 5}),
    Case("rotary 32+8 in place", _rotary(32, 8, 128), ("gfx942",), {"stack": 0, "shared": 0}),
)
