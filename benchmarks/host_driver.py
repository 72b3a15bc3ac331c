"""A Triton driver that compiles for a GPU that is not there and launches nothing.

With it Triton's own specialisation, compiler cache and launch code run on CPU tensors, so that the host's share of a
kernel launch is measured (``benchmarks.host_time``) and counted (tests) without a GPU. What is left out is the C
launcher itself and the encoding of tensor maps; results are whatever the new tensors held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from rope_dist import ops


class _Launcher:
    launches = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        _Launcher.launches += 1


class _Utils:
    """H100: what the compiler asks of the device, and a binary that is not loaded."""

    def load_binary(self, *arguments: Any) -> tuple[object, object, int, int, int]:
        return object(), object(), 64, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class HostDriver:
    """What ``triton.runtime.driver`` wants, for compute capability 9.0."""

    launcher_cls = _Launcher
    utils = _Utils()

    @property
    def launches(self) -> int:
        """Launches of this process that were left out."""
        return _Launcher.launches

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def host_only() -> Iterator[HostDriver]:
    """Within it rope_dist's Triton kernels take CPU tensors, compile for sm_90 and are not launched.

    Raises:
        RuntimeError: Triton's interpreter is on (``TRITON_INTERPRET``), which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: its interpreter would run instead of the compiler")
    from triton.runtime import driver

    before = driver._active
    driver.set_active(HostDriver())
    try:
        with ops.use_backend("triton"):
            yield driver.active
    finally:
        driver.set_active(before)
