"""Memory: refused in words before a long reading where it can be foreseen, and after it where not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..machine import free_bytes


def kv_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the key/value cache of one sequence of ``tokens``."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * tokens * model.dtype.itemsize


def check_memory(model: PreTrainedModel, tokens: int, chunk: int) -> None:
    """Refuse a reading whose cache and logits alone are more than what is free.

    A system that runs out of memory ends the process without a word, so this is asked before.

    Raises:
        ValueError: says how much is needed and free, and what to lower.
    """
    logits = min(chunk, tokens) * model.config.get_text_config().vocab_size * 4
    needed, free = kv_cache_bytes(model, tokens) + logits, free_bytes(model.device)
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
