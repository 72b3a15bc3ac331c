"""The model families that can be enabled: an allow-list, one entry a family.

An enabled class must be importable by name (pickling stores names), so each is written out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from .modules import RotaryTables, RotatedAttention


class EnabledLlamaAttention(RotatedAttention, LlamaAttention):
    """LLaMA attention with :func:`rope_dist.ops.rotary`."""

    stock = LlamaAttention


class EnabledLlamaRotaryEmbedding(RotaryTables, LlamaRotaryEmbedding):
    """LLaMA's rotary embedding with float32 tables."""

    stock = LlamaRotaryEmbedding


@dataclass(frozen=True)
class Family:
    """A family's name and its enabled classes (each names the stock class that it replaces)."""

    name: str
    attention: type[nn.Module]
    rotary_embedding: type[nn.Module]


FAMILIES: tuple[Family, ...] = (Family("Llama", EnabledLlamaAttention, EnabledLlamaRotaryEmbedding),)

ENABLED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    enabled.stock: enabled for family in FAMILIES for enabled in (family.attention, family.rotary_embedding)
}
"""Stock class -> enabled class."""
