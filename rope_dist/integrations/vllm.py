"""vLLM's plugin: a longrope with one set of factors runs the engine's fused rotary kernel.

vLLM computes a longrope by a class of its own, in many small kernels: what an exported plan is, whose short and long
factors are equal. ``get_rope`` looks that class up in the globals of its package, where :func:`register` puts
:func:`longrope`. ``ROPE_DIST_VLLM=0`` turns it off.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from typing import Any

import torch

ROTARY = "vllm.model_executor.layers.rotary_embedding"
NAME = "Phi3LongRoPEScaledRotaryEmbedding"

ORIGINAL = (
    *("head_size", "rotary_dim", "max_position_embeddings", "original_max_position_embeddings", "base"),
    *("is_neox_style", "dtype", "short_factor", "long_factor", "short_mscale", "long_mscale"),
)
FUSED = (
    *("head_size", "rotary_dim", "max_position_embeddings", "base", "is_neox_style", "dtype", "init_cache"),
)
"""Parameters of the two classes that are known."""

logger = logging.getLogger("vllm.plugins.rope_dist")  # vLLM shows what is below its own logger


def register() -> None:
    """The entry point in ``vllm.general_plugins``. vLLM may call it several times in a process."""
    if os.environ.get("ROPE_DIST_VLLM", "1") == "0":
        return
    rotary = importlib.import_module(ROTARY)
    original, fused = getattr(rotary, NAME, None), getattr(rotary, "RotaryEmbedding", None)
    if getattr(original, "rope_dist", False):
        return
    if _parameters(original) != ORIGINAL or _parameters(fused) != FUSED:
        logger.warning("rope_dist: this vLLM's %s is not the one known; it is left as it is", NAME)
        return
    setattr(rotary, NAME, replacement(original, fused))
    logger.info(
        "rope_dist: longrope with equal factors runs vLLM's fused rotary kernel (off: ROPE_DIST_VLLM=0)"
    )


def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.__init__).parameters)[1:] if inspect.isclass(cls) else ()


def replacement(original: Any, fused: Any) -> Any:
    """What is called in place of the class ``original``; ``fused`` is vLLM's plain rotary embedding."""

    @functools.wraps(original, updated=())
    def longrope(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        try:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            one_set = list(given["short_factor"]) == list(given["long_factor"])
            return _fused(made, given, fused) if one_set and made.short_mscale == made.long_mscale else made
        except Exception:
            logger.warning("rope_dist: vLLM's own longrope runs", exc_info=True)
            return made

    longrope.rope_dist = True  # type: ignore[attr-defined]
    return longrope


def _fused(made: Any, given: dict[str, Any], fused: Any) -> Any:
    """A ``fused`` with the table of ``made`` for the lengths that vLLM serves; ``made`` itself where it is another."""
    first, rows = 0, given["original_max_position_embeddings"]
    if made.use_long_rope:
        first, rows = rows, given["max_position_embeddings"]
    sizes = (
        given["head_size"],
        given["rotary_dim"],
        rows,
        given["base"],
        given["is_neox_style"],
        given["dtype"],
    )
    module = fused(*sizes)
    # Not by a formula of ours: theirs is the table, bit for bit, with its attention scaling and dtype.
    table = made.long_short_cos_sin_cache[first : first + rows].clone()
    own = module.cos_sin_cache
    if type(module) is not fused or (own.shape, own.dtype, own.device) != (
        table.shape,
        table.dtype,
        table.device,
    ):
        return made  # another platform's class
    module.cos_sin_cache = table
    if getattr(module, "cos_sin_cache_bf16", None) is not None:
        module.cos_sin_cache_bf16 = table.to(torch.bfloat16)
    return module
