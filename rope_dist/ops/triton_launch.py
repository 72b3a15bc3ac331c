"""Launching Triton kernels: on the device of their tensors, and a second time without Triton's own preparations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import CompiledKernel


@functools.cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` and the like; without a GPU what the interpreter is to follow, ``"sm_90"``."""
    if device.type != "cuda":
        return "sm_90"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current: Triton launches on the current one."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(
    kernel: Any,
    programs: int | Callable[..., int],
    device: torch.device,
    pack: Callable[..., tuple[Any, ...]],
    tensors: tuple[Any, ...],
    options: dict[str, Any],
) -> Callable[..., None] | None:
    """Launch ``kernel``.

    Args:
        kernel: a function under ``triton.jit``.
        programs: the grid, of one axis; or ``programs(*tensors)`` gives it.
        pack: ``pack(*tensors)`` gives the arguments that are no constants of the compilation, in the kernel's order.
        options: its constants by name, and how it is compiled.

    Returns:
        What launches it again for other ``tensors``, whose arguments differ in addresses only; None where kernels
        are interpreted.
    """
    arguments = pack(*tensors)
    grid = programs(*tensors) if callable(programs) else programs
    with on_device(device):
        compiled = kernel[(grid,)](*arguments, **options)
    if not isinstance(compiled, CompiledKernel):
        return None
    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
    run = compiled[(grid, 1, 1)]

    def again(*tensors: Any) -> None:
        start = compiled[(programs(*tensors), 1, 1)] if callable(programs) else run
        with on_device(device):
            start(*pack(*tensors), *constants)

    return again


def common_vector(*tensors: torch.Tensor | None) -> int:
    """The largest of 8, 4, 2 and 1 elements that divides the strides of all ``[B, S, heads, D]``, but the last axis's.

    An axis of one element is never stepped over; its stride must not cost the alignment of the others.
    """
    strides = [
        stride if size > 1 else 0
        for x in tensors
        if x is not None
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    return next(n for n in (8, 4, 2, 1) if all(stride % n == 0 for stride in strides))


def head_strides(x: torch.Tensor | None, vec: int) -> tuple[int, int, int, int]:
    """Strides of ``[B, S, heads, D]`` in units of ``vec`` elements, but for the last axis's.

    A stride that is not a multiple of 16 loses Triton's hint and with it the wide accesses. Divided here and multiplied
    by ``vec`` in the kernel, the compiler sees the divisor again.
    """
    if x is None:
        return 0, 0, 0, 0
    batch, seq, head = (s // vec if n > 1 else 0 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    return batch, seq, head, x.stride(3)


def row_strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Strides of the batch and row axes, the batch's 0 where one entry serves every batch."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1)


def position_strides(positions: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of the batches, the tokens and the axes of positions ``[B or 1, S]`` or ``[axes, B or 1, S]``."""
    if positions is None or positions.ndim == 2:
        return *row_strides(positions), 0
    return *row_strides(positions[0]), positions.stride(0)
