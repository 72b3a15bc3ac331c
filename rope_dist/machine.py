"""The machine: its description, which every figure needs, the memory that is free and the size of its cache."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def describe() -> dict[str, str]:
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


def load() -> float | None:
    """Processes that wanted to run in the last minute, or None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_bfloat16_products() -> bool:
    """Whether PyTorch multiplies matrices in bfloat16 by instructions of this processor.

    Without them (AVX2 alone) a product takes many times as long as in float32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def last_level_cache_bytes(device: torch.device | str) -> int:
    """Bytes of the last level of cache; 64 MiB where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or 64 << 20
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = file.read_text().strip().rstrip("K")
        sizes += [int(number) << 10] if number.isdigit() else []
    return max(sizes, default=64 << 20)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be allocated on a device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in reserve is free for it too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = []
    try:
        lines = _MEMINFO.read_text().splitlines()
        known += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            # Page cache counts as used there but is given up on demand.
            statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            used = int((_CGROUP / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            known.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(known, default=None)
