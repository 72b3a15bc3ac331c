"""Memory: refused in words before a long reading where it can be foreseen, and after it where not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the key/value cache of one sequence of ``tokens``."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * tokens * model.dtype.itemsize


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


def check_memory(model: PreTrainedModel, tokens: int, chunk: int) -> None:
    """Refuse a reading whose cache and logits alone are more than what is free.

    A system that runs out of memory ends the process without a word, so this is asked before.

    Raises:
        ValueError: says how much is needed and free, and what to lower.
    """
    logits = min(chunk, tokens) * model.config.get_text_config().vocab_size * 4
    needed, free = cache_bytes(model, tokens) + logits, free_bytes(model.device)
    if free is not None and needed > free:
        raise ValueError(
            f"reading {tokens} tokens needs at least {needed / 2**30:.1f} GiB of memory on {model.device}, "
            f"{free / 2**30:.1f} GiB are free: {_ADVICE}"
        )


_ADVICE = "lower the length or --chunk, or choose another --device; what is finished is kept"


@contextmanager
def memory_errors_in_words(what: str, advice: str = _ADVICE) -> Iterator[None]:
    """Turn an allocation failure of torch into a ``ValueError`` of one line that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(f"out of memory while {what}: {advice}") from error
    except RuntimeError as error:
        # The allocator of the CPU has no class of its own.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise ValueError(f"out of memory while {what}: {advice}") from error
