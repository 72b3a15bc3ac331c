"""Memory of an evaluation: estimate it before the run, and explain an out-of-memory error during it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..machine import free_bytes
from .models import attention_shape


def kv_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the key/value cache of one sequence of ``tokens``."""
    _, heads, head_dim = attention_shape(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return 2 * layers * heads * head_dim * tokens * model.dtype.itemsize


def check_memory(model: PreTrainedModel, tokens: int, chunk: int) -> None:
    """Check that the key/value cache and the logits of one sequence fit into the free memory.

    On a CPU the system kills a process that runs out of memory, without a message.

    Args:
        model: a causal language model.
        tokens: length of the sequence.
        chunk: tokens a forward pass.

    Raises:
        ValueError: they do not fit; the message gives both sizes and the settings to lower.
    """
    logits = min(chunk, tokens) * model.config.get_text_config().vocab_size * 4
    needed, free = kv_cache_bytes(model, tokens) + logits, free_bytes(model.device)
    if free is not None and needed > free:
        raise ValueError(
            f"{tokens} tokens need at least {needed / 2**30:.1f} GiB of memory on {model.device}, "
            f"{free / 2**30:.1f} GiB are free: {_ADVICE}"
        )


_ADVICE = "lower the length or --chunk, or choose another --device; what is finished is kept"


@contextmanager
def explain_out_of_memory(what: str, advice: str = _ADVICE) -> Iterator[None]:
    """Turn torch's allocation errors into a one-line ``ValueError``.

    Args:
        what: what needed the memory, e.g. ``"evaluating 16384 tokens"``.
        advice: what to change.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(f"out of memory while {what}: {advice}") from error
    except RuntimeError as error:
        # The CPU allocator raises a plain RuntimeError.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise ValueError(f"out of memory while {what}: {advice}") from error
