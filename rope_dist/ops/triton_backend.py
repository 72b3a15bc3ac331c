"""The Triton kernels as a backend. Triton itself is imported with the first call that it serves."""

from __future__ import annotations

import importlib.util
import sys

import torch

from .arguments import Angles, Projections, present
from .backend import Backend, Launch, packed_heads

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton is no dependency of a CPU-only installation. ``sys.modules`` may hold None for a forbidden import.
INSTALLED = sys.modules.get("triton", "") is not None and importlib.util.find_spec("triton") is not None


class Triton(Backend):
    """Rotates on GPUs, alone or in the epilogue of the projection."""

    name = "triton"
    projects = True

    def supports(self, x: torch.Tensor, requested: bool = False) -> str | None:
        if x.dtype not in DTYPES:
            return f"it has no kernel for {x.dtype}"
        if requested:
            return None
        if not x.is_cuda:
            return f"its kernels are for GPUs, not for {x.device.type}"
        return None if INSTALLED else "Triton is not installed"

    def rotate(self, q, k, q_out, k_out, angles, q_bias=None, k_bias=None) -> Launch | None:
        from . import triton_rotary

        return triton_rotary.launch(q, k, q_out, k_out, angles, q_bias, k_bias)

    def pack_gradients(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, angles: Angles
    ) -> torch.Tensor:
        from . import triton_rotary

        packed, parts = packed_heads(q, k, v)
        v_out = parts[2] if v is not None else None
        triton_rotary.launch(q, k, parts[0], parts[1], angles, v=v, v_out=v_out)
        return packed

    def paths(self, x: torch.Tensor, projections: Projections, num_pairs: int) -> list[str]:
        from . import triton_decode, triton_projection

        weights, head_dim = projections.weights(), projections.head_dim
        if x.dtype not in (torch.float16, torch.bfloat16):
            return []
        if x.numel() == 0 or x.stride(-1) != 1 or any(w.numel() == 0 or w.stride(1) != 1 for w in weights):
            return []
        found, x = [], _side_by_side(x)
        if triton_projection.fits(head_dim, 2 * num_pairs):
            found.append("triton")
            arch = triton_projection.architecture(x.device)
            if triton_projection.has_tma(arch, head_dim) and triton_projection.fits_tma(x, weights):
                found.append("triton_tma")
        if x.shape[0] * x.shape[1] <= triton_decode.MAX_TOKENS:
            found.append("decode")
        return found

    def project(
        self, path: str, x: torch.Tensor, projections: Projections, angles: Angles
    ) -> tuple[list[torch.Tensor], Launch | None]:
        from . import triton_decode, triton_projection

        rows, ready = _side_by_side(x), _ready(x, angles, path)
        outputs = empty_heads(x, projections)
        if path == "decode":
            again = triton_decode.launch(rows, projections, ready, outputs)
        else:
            again = triton_projection.launch(rows, projections, ready, outputs, tma=path == "triton_tma")
        return outputs, again if rows is x and ready is angles else None

    def decode(
        self,
        x: torch.Tensor,
        projections: Projections,
        angles: Angles,
        caches: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, Launch | None] | None:
        if "decode" not in self.paths(x, projections, angles.num_pairs) or any(
            c.stride(2) != 1 for c in caches
        ):
            return None
        from . import triton_decode

        rows, ready = _side_by_side(x), _ready(x, angles, "decode")
        q = empty_heads(x, projections)[0]
        slots_ready = slots.contiguous()
        again = triton_decode.launch(rows, projections, ready, [q, *caches], slots_ready)
        return q, again if rows is x and ready is angles and slots_ready is slots else None

    def write_cache(self, q, k, v, q_out, cache, norms, angles) -> Launch | None:
        from . import triton_cache

        if not triton_cache.serves(k, norms):
            return super().write_cache(q, k, v, q_out, cache, norms, angles)
        return triton_cache.launch(q, k, v, q_out, cache, norms, angles)


def empty_heads(x: torch.Tensor, projections: Projections) -> list[torch.Tensor]:
    """What projections of ``x`` are written to: ``[B, S, heads, head_dim]`` for each weight that is there."""
    head_dim = projections.head_dim
    return [x.new_empty(*x.shape[:2], w.shape[0] // head_dim, head_dim) for w in projections.weights()]


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, S, K]`` with all its tokens equally far apart."""
    batch, length = x.shape[:2]
    return x if batch == 1 or length == 1 or x.stride(0) == length * x.stride(1) else x.contiguous()


def _rows_of_16_bytes(table: torch.Tensor) -> bool:
    return table.stride(2) == 1 and table.stride(1) % 4 == 0 and table.data_ptr() % 16 == 0


def _ready(x: torch.Tensor, angles: Angles, path: str) -> Angles:
    """``angles`` with float32 tables (rows equally far apart) or contiguous positions, of one row or one a batch."""
    from . import triton_projection

    batch, length = x.shape[:2]
    if angles.cos is None or angles.sin is None:
        positions = angles.positions
        if positions is None:
            positions = torch.arange(length, device=x.device)[None]
        inv_freq_q64 = present(angles.inv_freq_q64)
        ready = angles._replace(positions=positions.contiguous(), inv_freq_q64=inv_freq_q64.contiguous())
    else:
        tables = [_side_by_side(t.float()) for t in (angles.cos, angles.sin)]
        # A descriptor reads the rows of a tile at once: a tile must not run past the end of shared tables.
        if path == "triton_tma" and tables[0].shape[0] < batch and length % triton_projection.TMA_ROWS:
            tables = [t.expand(batch, -1, -1).contiguous() for t in tables]
        # Rows may lie apart: an enabled model hands the first half of wider tables.
        if not all(_rows_of_16_bytes(t) and t.stride() == tables[0].stride() for t in tables):
            tables = [t.clone(memory_format=torch.contiguous_format) for t in tables]
        ready = angles._replace(cos=tables[0], sin=tables[1])
    return angles if all(a is b for a, b in zip(ready.tensors(), angles.tensors(), strict=True)) else ready
