"""What rotates: the Triton kernel on GPUs, PyTorch elsewhere. In the place of rope_dist's choice among more."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable

import torch

Launch = Callable[..., None]
"""Rotates again, for tensors of the same metadata as those it was made for."""

VARIABLE = "ROPE_DIST_ROTARY_BACKEND"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INSTALLED = sys.modules.get("triton", "") is not None and importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def requested() -> str:
    """``triton`` (on CPU tensors in Triton's interpreter), ``reference``, or ``auto``."""
    return os.environ.get(VARIABLE) or "auto"


def is_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernel rotates heads of the dtype and device of ``x``."""
    return _is_triton(x.dtype, x.device.type, requested())


@functools.cache
def _is_triton(dtype: torch.dtype, device: str, name: str) -> bool:
    if name not in ("auto", "triton", "reference"):
        raise ValueError(f"{VARIABLE} must be auto, triton or reference, got {name!r}")
    if dtype not in DTYPES or name == "reference":
        return False
    # "cuda" is AMD's too.
    return name == "triton" or (device == "cuda" and INSTALLED)
