"""What a backend is, and the one that is always there. ``dispatch.BACKENDS`` lists them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from . import reference, reference_cache, reference_norm
from .arguments import Angles, KeyValueCache, Norms, Projections
from .window_angles import WindowAngles

Launch = Callable[..., None]
"""Called as :meth:`Backend.rotate`, for tensors of the same metadata as those it was made for."""


override: str | None = None
"""The name of a backend that :func:`dispatch.use` chose for now."""


@torch.compiler.assume_constant_result
def requested() -> str:
    """Name of the backend that the user chose, or ``"auto"``; torch.compile takes it as it is when it traces."""
    return override or environment("ROPE_DIST_BACKEND") or "auto"


_ENVIRONMENT: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_KEYS = {name: os.environ.encodekey(name) for name in ("ROPE_DIST_BACKEND", "ROPE_DIST_PATH")}


def environment(name: str) -> str | None:
    """``os.environ.get(name)`` of one of :data:`_KEYS`.

    Read in each layer of a model: the mapping's own way, four calls and an exception, takes longer than a launch.
    """
    if _ENVIRONMENT is not None and _KEYS[name] not in _ENVIRONMENT:
        return None
    return os.environ.get(name)


class NotBuilt(str):
    """A reason why a backend does not serve a tensor that building or installing its library would remove."""


class Backend:
    """Rotates queries and keys, and projects them first where it has a fused kernel for that.

    A backend implements :meth:`supports` and :meth:`rotate`; the other methods have defaults made of these.

    Attributes:
        name: for ``ROPE_DIST_BACKEND`` and :func:`rope_dist.ops.use_backend`.
        projects: whether it has kernels that project and rotate; else :func:`reference.qkv_rotary` does.
        decodes_windows: whether it has :meth:`window_decode`.
    """

    name: str
    projects = False
    decodes_windows = False

    def supports(self, x: torch.Tensor, requested: bool = False) -> str | None:
        """Why heads of the dtype and device of ``x`` are not rotated here; None: they are.

        Args:
            requested: the user named this backend.
        """
        raise NotImplementedError

    def rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        q_out: torch.Tensor,
        k_out: torch.Tensor | None,
        angles: Angles,
        q_bias: torch.Tensor | None = None,
        k_bias: torch.Tensor | None = None,
    ) -> Launch | None:
        """Rotate ``q`` into ``q_out`` and ``k`` into ``k_out`` (or None both). Checks nothing.

        Args:
            q, k: ``[B, S, heads, D]`` of one dtype, any strides; ``q_out`` may be ``q`` itself, ``k_out`` ``k``.
            angles: see :class:`Angles`; the last axis of tables is contiguous.
            q_bias, k_bias: ``[heads * D]`` in the dtype of ``q``, added before the rotation without rounding between.

        Returns:
            What does the same again, at less cost, for tensors that share shapes, strides, dtypes, device and
            alignment to 16 bytes with these; None where there is no such thing.
        """
        raise NotImplementedError

    def norm_rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        q_out: torch.Tensor,
        k_out: torch.Tensor | None,
        norms: Norms,
        angles: Angles,
        q_bias: torch.Tensor | None = None,
        k_bias: torch.Tensor | None = None,
        rstds: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> Launch | None:
        """:meth:`rotate` with RMS norms; see :class:`Norms`.

        Args:
            rstds: where the reciprocal norms ``[B, S, heads or 1]`` are written; None: nowhere.

        Returns:
            As :meth:`rotate`, called as ``launch(q, k, q_out, k_out, norms, angles, q_bias, k_bias)``.
        """
        *found, q_rstd, k_rstd = reference_norm.norm_rotate_tokens(q, k, norms, angles, q_bias, k_bias)
        targets = (q_out, k_out, *(rstds or ()))
        for out, new in zip(targets, (*found, q_rstd, k_rstd), strict=False):
            if out is not None and new is not None:
                out.copy_(new)
        return None

    def norm_rotate_backward(
        self,
        grads: tuple[torch.Tensor, torch.Tensor | None],
        heads: tuple[torch.Tensor, torch.Tensor | None],
        rstds: tuple[torch.Tensor, torch.Tensor | None],
        norms: Norms,
        angles: Angles,
        q_bias: torch.Tensor | None = None,
        k_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients of queries, keys and the norms' weights; see :func:`reference_norm.norm_rotate_backward`."""
        return reference_norm.norm_rotate_backward(grads, heads, rstds, norms, angles, q_bias, k_bias)

    def pack_gradients(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, angles: Angles
    ) -> torch.Tensor:
        """``q`` and ``k`` ``[B, S, heads, D]`` rotated, and ``v`` as it is, side by side ``[B, S, all heads * D]``."""
        packed, parts = packed_heads(q, k, v)
        self.rotate(q, k, parts[0], parts[1], angles)
        if v is not None:
            parts[2].copy_(v)
        return packed

    def paths(
        self, x: torch.Tensor, projections: Projections, num_pairs: int, norms: Norms | None = None
    ) -> list[str]:
        """Names of the fused projections that can serve these tensors, the most specialised last."""
        return []

    def configurations(
        self,
        path: str,
        x: torch.Tensor,
        projections: Projections,
        norms: Norms | None = None,
        *,
        every: bool = False,
    ) -> list[str]:
        """Names of the configurations of one of :meth:`paths` that are worth measuring for these tensors.

        The first is taken where ``path`` stands alone; ``path:name`` names another.

        Args:
            every: all that can serve them instead.
        """
        return [""]

    def project(
        self,
        path: str,
        x: torch.Tensor,
        projections: Projections,
        angles: Angles,
        norms: Norms | None = None,
    ) -> tuple[list[torch.Tensor], Launch | None]:
        """Project ``x`` ``[B, S, K]``, normalise and rotate by one of :meth:`paths`, or ``path:configuration``.

        Returns:
            Queries, keys and, where they have a weight, values ``[B, S, heads, head_dim]``; and what does the
            same again, as :meth:`rotate` returns it, called as
            ``launch(x, projections, angles, outputs, norms)``.
        """
        raise NotImplementedError

    def decode(
        self,
        x: torch.Tensor,
        projections: Projections,
        angles: Angles,
        caches: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, Launch | None] | None:
        """Project and rotate, writing keys and values to entries ``slots`` of ``caches``, in one launch.

        Returns:
            The queries ``[B, S, heads, head_dim]``, and what does the same again, called as
            ``launch(x, projections, angles, [q, *caches], slots)``; None, with nothing written, where no kernel serves.
        """
        return None

    def write_cache(
        self,
        q: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
        q_out: torch.Tensor | None,
        cache: KeyValueCache,
        norms: Norms | None,
        angles: Angles,
    ) -> Launch | None:
        """Rotate ``q`` into ``q_out`` (or None both), and ``k`` into its cache; write ``v`` as it is. Checks nothing.

        Args:
            q, k, v: ``[B, S, heads, D]`` of one dtype, any strides; ``q_out`` may be ``q`` itself.
            norms: of ``q`` and ``k``, or None.
            angles: as for :meth:`rotate`; with ``positions``, the bounds and offsets of sequences tell their places in
                the cache only.

        Returns:
            What does the same again, as :meth:`rotate` returns it, called as ``launch(q, k, v, q_out, cache, norms,
            angles)``.
        """
        at = angles if angles.positions is None else angles._replace(cu_seqlens=None, seqlen_offsets=None)

        def run(q, k, q_out, k_out, norms: Norms | None) -> None:
            if norms is None:
                self.rotate(q, k, q_out, k_out, at)
            else:
                self.norm_rotate(q, k, q_out, k_out, norms, at)

        # Keys that are stored in 8 bits are not rounded to 16 before.
        wide = k.to(reference.compute_dtype(k)) if cache.is_fp8 else k
        rotated = torch.empty(k.shape, dtype=wide.dtype, device=k.device)
        if q is not None and q.dtype == wide.dtype:
            run(q, wide, q_out, rotated, norms)
        else:
            run(wide, None, rotated, None, norms and norms._replace(q_weight=norms.k_weight, k_weight=None))
            if q is not None:
                run(q, None, q_out, None, norms and norms._replace(k_weight=None))
        reference_cache.write(rotated, v, cache, angles)
        return None

    def window_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: WindowAngles,
        seen: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """:func:`rope_dist.ops.window_decode.window_decode`. Checks nothing."""
        raise NotImplementedError


class Reference(Backend):
    """Plain PyTorch: every dtype and device."""

    name = "reference"

    def supports(self, x: torch.Tensor, requested: bool = False) -> str | None:
        return None

    def rotate(self, q, k, q_out, k_out, angles, q_bias=None, k_bias=None) -> None:
        rotated = reference.rotate_tokens(q, k, angles, q_bias, k_bias)
        for out, new in zip((q_out, k_out), rotated, strict=True):
            if out is not None:
                out.copy_(new)


def packed_heads(*heads: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An empty ``[B, S, all heads * D]``, and its part for each of ``heads`` ``[B, S, heads, D]`` that is there."""
    present = [x for x in heads if x is not None]
    widths = [x.shape[2] * x.shape[3] for x in present]
    packed = present[0].new_empty(*present[0].shape[:2], sum(widths))
    parts = zip(packed.split(widths, dim=-1), present, strict=True)
    return packed, [part.unflatten(-1, x.shape[2:]) for part, x in parts]


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtypes of their operands: what an operator returns must not depend on autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
