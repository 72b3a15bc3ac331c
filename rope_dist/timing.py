"""Side-by-side wall-clock timing, and the description of the machine that every figure needs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch


def time_interleaved(
    providers: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Wall seconds of each provider, run in turn and back (A B B A ...) so that drift hits all alike.

    Args:
        providers: what to time, by name.
        repeats: timed calls of each.
        warmup: calls of each before, not timed.
        device: where they work; a GPU is waited for before and after each call.

    Returns:
        ``repeats`` times for each name, in seconds; quote the :func:`statistics.median`.
    """
    device = torch.device(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warmup):
        for call in providers.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    order = list(providers)
    for _ in range(repeats):
        for name in order:
            wait()
            start = time.perf_counter()
            providers[name]()
            wait()
            times[name].append(time.perf_counter() - start)
        order.reverse()
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each provider's times."""
    return {name: median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """Processor, threads and versions, for the head of a table or a result file."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "transformers", "triton")},
    }


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
