"""The model families that can be enabled: an allow-list, one entry a family.

Nothing of a family is imported before one of its modules is met. Its enabled classes are then made by joining
the stock class with a mixin of ``modules.py``; they are found by name in this module, which is what pickling asks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model_config import REFUSED
from .modules import (
    LayerTypedRotaryTables,
    NormalizedHeads,
    NormalizedProjections,
    RotaryTables,
    RotatedAttention,
)


def _own_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


def _config_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _window_and_softcap(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window, "softcap": attention.attn_logit_softcapping}


__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "enabled_class",
    "is_rotary_embedding",
    "is_stock",
    "known_stock",
]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the prefix of its classes in transformers.
        module: its folder in ``transformers.models``.
        attention: what its attention computes before the attention function.
        rotary_embedding: what makes its tables.
        options: what its attention hands to the attention function beside mask, dropout and scaling.
    """

    name: str
    module: str
    attention: type[RotatedAttention] = RotatedAttention
    rotary_embedding: type[RotaryTables] = RotaryTables
    options: Callable[[Any], dict[str, Any]] | None = None

    @property
    def file(self) -> str:
        """The module that defines the stock classes."""
        return f"transformers.models.{self.module}.modeling_{self.module}"


FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", options=_config_window),
    Family("Mixtral", "mixtral", options=_config_window),
    Family("Ministral", "ministral", options=_own_window),
    Family("Granite", "granite"),
    Family("Qwen2", "qwen2", options=_own_window),
    Family("SeedOss", "seed_oss"),
    Family("Arcee", "arcee"),
    Family("Gemma", "gemma"),
    Family("Gemma2", "gemma2", options=_window_and_softcap),
    Family("SmolLM3", "smollm3", options=_own_window),
    Family("Qwen3", "qwen3", NormalizedHeads, options=_own_window),
    Family("Qwen3Moe", "qwen3_moe", NormalizedHeads, options=_own_window),
    Family("Olmo2", "olmo2", NormalizedProjections),
    Family("Olmo3", "olmo3", NormalizedProjections, LayerTypedRotaryTables, options=_own_window),
    Family("Gemma3", "gemma3", NormalizedHeads, LayerTypedRotaryTables, options=_own_window),
)

_STOCK: dict[tuple[str, str], tuple[Family, str]] = {
    (family.file, f"{family.name}{kind}"): (family, kind)
    for family in FAMILIES
    for kind in ("Attention", "RotaryEmbedding")
}


def known_stock(cls: type) -> tuple[str, str] | None:
    """Key of the stock class of the allow-list that ``cls`` is or is made from, or None."""
    return next((key for base in cls.__mro__ if (key := (base.__module__, base.__name__)) in _STOCK), None)


def is_stock(cls: type) -> bool:
    """Whether ``cls`` itself, not something made from it, is on the allow-list."""
    return (cls.__module__, cls.__name__) in _STOCK


def is_rotary_embedding(cls: type) -> bool:
    """Whether ``cls`` is, or is made from, a rotary embedding of the allow-list."""
    key = known_stock(cls)
    return key is not None and _STOCK[key][1] == "RotaryEmbedding"


@functools.cache
def enabled_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The enabled class of a stock class of the allow-list; it names the class it replaces as ``stock``."""
    family, kind = _STOCK[stock.__module__, stock.__name__]
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"``{stock.__name__}`` that runs this package's rotary embedding.",
        "stock": stock,
    }
    mixin = family.rotary_embedding
    if kind == "Attention":
        mixin = family.attention
        if family.options is not None:
            body["attention_options"] = family.options
    return type(f"Enabled{stock.__name__}", (mixin, stock), body)


def __getattr__(name: str) -> type[nn.Module]:
    # Unpickling looks an enabled class up here, perhaps before any was made.
    for (file, stock), _ in _STOCK.items():
        if name == f"Enabled{stock}":
            return enabled_class(getattr(importlib.import_module(file), stock))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
