"""Longer contexts for LLaMA-like models by rescaled rotary embeddings (RoPE), and fused RoPE kernels.

>>> import rope_dist
>>> plan = rope_dist.plan("llama2-7b", target_length=16384)
>>> rope_dist.enable(model, plan=plan)  # doctest: +SKIP

Everything here is defined elsewhere and imported on first use, so that planning does not wait for transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .dynamic import DynamicPlan, dynamic_plan
    from .hf import disable, enable, expect_length, prepare_cache, report, supported
    from .ops import qkv_rotary, rotary
    from .planning import RopePlan, plan

_HOME = {
    "DynamicPlan": "dynamic",
    "RopePlan": "planning",
    "dynamic_plan": "dynamic",
    "plan": "planning",
    "qkv_rotary": "ops",
    "rotary": "ops",
    "disable": "hf",
    "enable": "hf",
    "expect_length": "hf",
    "prepare_cache": "hf",
    "report": "hf",
    "supported": "hf",
}

__all__ = [
    "DynamicPlan",
    "RopePlan",
    "__version__",
    "disable",
    "dynamic_plan",
    "enable",
    "expect_length",
    "plan",
    "prepare_cache",
    "qkv_rotary",
    "report",
    "rotary",
    "supported",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] != "ops":
        from .optional import require_hf

        require_hf(f"rope_dist.{name}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
