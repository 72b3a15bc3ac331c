"""A Triton driver that compiles for a GPU that is not there and launches nothing.

With it Triton's own specialisation, compiler cache and launch code run on CPU tensors, so that the host's share of a
kernel launch is measured (``benchmarks.host_time``) and counted (tests) without a GPU. What is left out is the C
launcher itself and the encoding of tensor maps; results are whatever the new tensors held.
"""

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from rope_dist import ops


class _Launcher:
    """In the place of the compiled launcher: counts the launches of this process that were left out."""

    launches = 0

    def __init__(self, *arguments: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        _Launcher.launches += 1


H100 = SimpleNamespace(
    # Module, function, registers, spills and threads of a binary that is not loaded.
    load_binary=lambda *arguments: (object(), object(), 64, 0, 1024),
    unload_module=lambda module: None,
    get_device_properties=lambda device: {
        "max_shared_mem": 232_448,
        "multiprocessor_count": 132,
        "warpSize": 32,
    },
)


@contextlib.contextmanager
def host_only() -> Iterator[type[_Launcher]]:
    """Within it rope_dist's Triton kernels take CPU tensors, compile for sm_90 and are not launched.

    Raises:
        RuntimeError: Triton's interpreter is on (``TRITON_INTERPRET``), which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: its interpreter would run instead of the compiler")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active
    hopper = SimpleNamespace(
        launcher_cls=_Launcher,
        utils=H100,
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    driver.set_active(hopper)
    try:
        with ops.use_backend("triton"):
            yield _Launcher
    finally:
        driver.set_active(before)
