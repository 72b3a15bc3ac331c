"""The Triton kernels as a backend. Triton itself is imported with the first call that it serves."""

from __future__ import annotations

import importlib.util
import sys

import torch

from . import configurations
from .arguments import Angles, Norms, Projections, present
from .backend import Backend, Launch, packed_heads
from .configurations import Configuration
from .window_angles import WindowAngles

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton is no dependency of a CPU-only installation. ``sys.modules`` may hold None for a forbidden import.
INSTALLED = sys.modules.get("triton", "") is not None and importlib.util.find_spec("triton") is not None


class Triton(Backend):
    """Rotates on GPUs, alone or in the epilogue of the projection."""

    name = "triton"
    projects = True
    decodes_windows = True

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

    def norm_rotate(
        self, q, k, q_out, k_out, norms, angles, q_bias=None, k_bias=None, rstds=None
    ) -> Launch | None:
        if q.shape[3] % 2:  # the kernel takes dimensions in pairs
            return super().norm_rotate(q, k, q_out, k_out, norms, angles, q_bias, k_bias, rstds)
        from . import triton_norm_rotary

        return triton_norm_rotary.launch(q, k, q_out, k_out, norms, angles, q_bias, k_bias, rstds)

    def norm_rotate_backward(self, grads, heads, rstds, norms, angles, q_bias=None, k_bias=None):
        if heads[0].shape[3] % 2:
            return super().norm_rotate_backward(grads, heads, rstds, norms, angles, q_bias, k_bias)
        from . import triton_norm_backward

        return triton_norm_backward.launch(grads, heads, rstds, norms, angles, q_bias, k_bias)

    def pack_gradients(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, angles: Angles
    ) -> torch.Tensor:
        from . import triton_rotary

        packed, parts = packed_heads(q, k, v)
        v_out = parts[2] if v is not None else None
        triton_rotary.launch(q, k, parts[0], parts[1], angles, v=v, v_out=v_out)
        return packed

    def paths(
        self, x: torch.Tensor, projections: Projections, num_pairs: int, norms: Norms | None = None
    ) -> list[str]:
        from . import triton_decode, triton_projection

        weights, head_dim = projections.weights(), projections.head_dim
        if x.dtype not in (torch.float16, torch.bfloat16):
            return []
        if x.numel() == 0 or x.stride(-1) != 1 or any(w.numel() == 0 or w.stride(1) != 1 for w in weights):
            return []
        found, x = [], _side_by_side(x)
        if norms is not None and not triton_projection.fits_norms(norms, head_dim):
            return []
        if triton_projection.fits(head_dim, 2 * num_pairs):
            found.append("triton")
            arch = triton_projection.architecture(x.device)
            if triton_projection.has_tma(arch, head_dim) and triton_projection.fits_tma(x, weights):
                found.append("triton_tma")
        # Its programs have parts of heads, a norm needs whole ones.
        if norms is None and x.shape[0] * x.shape[1] <= triton_decode.MAX_TOKENS:
            found.append("decode")
        return found

    def configurations(
        self,
        path: str,
        x: torch.Tensor,
        projections: Projections,
        norms: Norms | None = None,
        *,
        every: bool = False,
    ) -> list[str]:
        return [found.name for found in _configurations(path, x, projections, norms, every)]

    def project(
        self,
        path: str,
        x: torch.Tensor,
        projections: Projections,
        angles: Angles,
        norms: Norms | None = None,
    ) -> tuple[list[torch.Tensor], Launch | None]:
        from . import triton_decode, triton_projection

        path, configuration = _configuration(path, x, projections, norms)
        tma = path == "triton_tma"
        rows, ready = _side_by_side(x), _ready(x, angles, configuration.rows if tma else 1)
        outputs = empty_heads(x, projections)
        if path == "decode":
            again = triton_decode.launch(rows, projections, ready, outputs, configuration=configuration)
        else:
            again = triton_projection.launch(
                rows, projections, ready, outputs, norms, tma=tma, configuration=configuration
            )
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

        rows, ready = _side_by_side(x), _ready(x, angles)
        q = empty_heads(x, projections)[0]
        slots_ready = slots.contiguous()
        _, configuration = _configuration("decode", x, projections)
        again = triton_decode.launch(
            rows, projections, ready, [q, *caches], slots_ready, configuration=configuration
        )
        return q, again if rows is x and ready is angles and slots_ready is slots else None

    def write_cache(self, q, k, v, q_out, cache, norms, angles) -> Launch | None:
        from . import triton_cache

        if not triton_cache.serves(k, norms):
            return super().write_cache(q, k, v, q_out, cache, norms, angles)
        return triton_cache.launch(q, k, v, q_out, cache, norms, angles)

    def window_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: WindowAngles,
        seen: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        from . import triton_window

        angles = angles._replace(
            positions=_whole_rows(angles.positions),
            key_positions=_whole_rows(angles.key_positions),
            inv_freq=angles.inv_freq.contiguous(),
            change_q64=angles.change_q64.contiguous(),
        )
        rows = None if seen is None else _whole_rows(seen[:, 0].view(torch.uint8))
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        triton_window.run(q, k, v, out, rows, angles, scale)
        return out.transpose(1, 2)


def empty_heads(x: torch.Tensor, projections: Projections) -> list[torch.Tensor]:
    """What projections of ``x`` are written to: ``[B, S, heads, head_dim]`` for each weight that is there."""
    head_dim = projections.head_dim
    return [x.new_empty(*x.shape[:2], w.shape[0] // head_dim, head_dim) for w in projections.weights()]


def _configurations(
    path: str, x: torch.Tensor, projections: Projections, norms: Norms | None = None, every: bool = False
) -> list[Configuration]:
    """Those of ``path`` worth measuring for ``x``, the one that is taken unmeasured first; or all that there are."""
    from . import triton_projection

    arch, head_dim, norm = triton_projection.architecture(x.device), projections.head_dim, norms is not None
    if every:
        return configurations.every(path, arch, head_dim, norm)
    heads = sum(weight.shape[0] for weight in projections.weights()) // head_dim
    return configurations.candidates(
        path, arch, head_dim, x.shape[0] * x.shape[1], norm,
        multiprocessors=triton_projection.programs(x.device), heads=heads,
    )  # fmt: skip


def _configuration(
    path: str, x: torch.Tensor, projections: Projections, norms: Norms | None = None
) -> tuple[str, Configuration]:
    """``path`` without and with its configuration: the one that it names, else the one that is taken unmeasured."""
    path, _, name = path.partition(":")
    if not name:
        return path, _configurations(path, x, projections, norms)[0]
    every = _configurations(path, x, projections, norms, every=True)
    return path, next(configuration for configuration in every if configuration.name == name)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, S, K]`` with all its tokens equally far apart."""
    batch, length = x.shape[:2]
    return x if batch == 1 or length == 1 or x.stride(0) == length * x.stride(1) else x.contiguous()


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` whose last axis is contiguous; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_of_16_bytes(table: torch.Tensor) -> bool:
    return table.stride(2) == 1 and table.stride(1) % 4 == 0 and table.data_ptr() % 16 == 0


def _ready(x: torch.Tensor, angles: Angles, tile_rows: int = 1) -> Angles:
    """``angles`` with float32 tables (rows equally far apart) or contiguous positions, of one row or one a batch.

    Args:
        tile_rows: tokens whose rows of the tables are read at once, whatever sequences they are of.
    """
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
        if tables[0].shape[0] < batch and length % tile_rows:
            tables = [t.expand(batch, -1, -1).contiguous() for t in tables]
        # Rows may lie apart: an enabled model hands the first half of wider tables.
        if not all(_rows_of_16_bytes(t) and t.stride() == tables[0].stride() for t in tables):
            tables = [t.clone(memory_format=torch.contiguous_format) for t in tables]
        ready = angles._replace(cos=tables[0], sin=tables[1])
    return angles if all(a is b for a, b in zip(ready.tensors(), angles.tensors(), strict=True)) else ready
