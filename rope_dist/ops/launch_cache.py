"""Launches that were made before: a call like an earlier one skips its checks, its choices and Triton's.

What a call needs besides its pointers follows from the shapes, strides, dtypes, device and alignment of its tensors and
from its options. The first call with a key of these is checked, finds its backend and compiles; what remains to be
done then is kept under the key. A Triton launch costs 71 to 122 us of host time without, 9 us with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from .arguments import Angles
from .backend import requested

Key = tuple[Any, ...]

_LAUNCHES: dict[Key, Callable[..., Any]] = {}
MOST = 4096
"""Keys: a server sees one for each length of a prompt. Then all are forgotten."""


def find(
    operation: str, tensors: Iterable[torch.Tensor | None], angles: Angles, *options: Any
) -> tuple[Callable[..., Any] | None, Key | None]:
    """The launch of an earlier call like this one, and the key of such calls.

    Args:
        operation: who calls: what it checked holds for its own calls only.
        tensors, angles: what the launch reads.
        options: what else the launch depends on.

    Returns:
        None for the launch: there was no such call. None for the key: the call has to go through its
        ``torch.library`` operator, because something differentiates, traces, transforms, profiles or intercepts it.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return None, None
    # Not the offset, which is handed on at each call: it grows with every token that is decoded.
    key: list[Any] = [operation, requested(), *angles[7:], *options]
    grad = torch.is_grad_enabled()
    for x in (*tensors, *angles[:6]):
        if x is None:
            key.append(None)
        elif type(x) not in _PLAIN or (grad and x.requires_grad) or x.is_neg():
            return None, None
        else:
            key += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)
    found = tuple(key)
    return _LAUNCHES.get(found), found


_PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose memory is what it seems to be."""


def metadata(x: torch.Tensor | None) -> tuple[Any, ...]:
    """What was checked of an argument that is not itself handed on."""
    return () if x is None else (x.shape, x.dtype, x.device, x.requires_grad)


def get(key: Key) -> Callable[..., Any] | None:
    """The launch that :func:`put` was given with a key that its caller made."""
    return _LAUNCHES.get(key)


def put(key: Key | None, launch: Callable[..., Any] | None) -> None:
    """Keep ``launch``, which must hold no tensor, for calls with ``key``; nothing is kept for None."""
    if key is not None and launch is not None:
        if len(_LAUNCHES) >= MOST:
            _LAUNCHES.clear()
        _LAUNCHES[key] = launch


def clear() -> None:
    """Forget every launch."""
    _LAUNCHES.clear()


@torch.compiler.assume_constant_result  # its guards are on both
def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
