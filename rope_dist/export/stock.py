"""The rotary embedding that the installed transformers computes from a config: its own class, without weights."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..layer_types import rope_parameters, unextendable
from ..model_config import load_config, pretrained_rope
from ..stock_rotary import model_class, rotary_class, without_remarks
from .engines import EngineConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def read_config(source: str | os.PathLike[str]) -> PretrainedConfig:
    """:func:`rope_dist.planning.load_config`, without transformers' warning about keys for other engines."""
    with without_remarks():
        return load_config(source)


@dataclass(frozen=True)
class StockModel:
    """A config's language model as transformers builds it, on the meta device: no memory for weights.

    Attributes:
        config: of the whole model; its language model is what is examined.
    """

    config: PretrainedConfig

    @property
    def text(self) -> PretrainedConfig:
        """The language model's config: the only one, or the part of a composite one."""
        text = self.config.get_text_config(decoder=True)
        if not hasattr(text, "model_type"):
            raise ValueError(f"the config of the language model of {self.config.model_type} is {text!r:.80}")
        return text

    @property
    def part(self) -> str | None:
        """The entry of a composite config that is the language model's; None where the config is not composite.

        Raises:
            ValueError: it is composite, and the language model is none of its parts.
        """
        config, text = self.config, self.text
        if text is config:
            return None
        name = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
        if name is None:
            raise ValueError(
                f"the language model of {config.model_type} is not one of its parts: export it alone"
            )
        return name

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The rotary parameters that a plan extends; ``ValueError`` if there are none."""
        reason = unextendable(self.text)
        if reason is not None:
            raise ValueError(reason)
        return rope_parameters(self.text)

    @property
    def layer_typed(self) -> bool:
        """Whether types of layers have rotary parameters of their own."""
        return self.parameters is not self.text.rope_parameters

    @cached_property
    def model(self) -> nn.Module | None:
        """The model on the meta device; None where transformers has no model of this config.

        Raises:
            ValueError: transformers cannot build it.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

        from ..hf.constructing import left_alone

        # Some language models have no class of their own: the whole model is built.
        for config in (self.text, self.config):
            for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
                if type(config) not in mapping:
                    continue
                try:
                    with torch.device("meta"), without_remarks(), left_alone():
                        return model_class(mapping[type(config)])(copy.deepcopy(config))
                except Exception as error:
                    if config is not self.text:
                        return None  # Its other parts may need packages that are not installed.
                    raise ValueError(f"transformers cannot build it: {_message(error)}") from None
        return None

    @cached_property
    def rotary(self) -> nn.Module | None:
        """The rotary embedding of the model's own class, computed on the CPU; None where none is found.

        Raises:
            ValueError: transformers cannot build it.
        """
        _ = self.model  # transformers has to build it
        cls = rotary_class(self.text)
        if cls is None:
            return None
        try:
            with torch.device("cpu"):
                return cls(copy.deepcopy(self.text))
        except Exception as error:
            raise ValueError(f"transformers cannot build its rotary embedding: {_message(error)}") from None

    def engine_config(self, tokens: int | None = None) -> EngineConfig:
        """Frequencies, scaling of cos and sin, and length.

        Args:
            tokens: of the text. None: for a text of any length.

        Raises:
            ValueError: the frequencies change with the length, or transformers fails on the config.
        """
        length = self.text.max_position_embeddings
        rotary = self.rotary
        if rotary is None:
            rope, _ = pretrained_rope(self.text)
            if self.parameters.get("short_factor") != self.parameters.get("long_factor"):
                raise ValueError("the frequencies change with the length")
            return EngineConfig(rope.inv_freq, rope.attention_scaling, length)
        if tokens is not None:
            return EngineConfig(*self._tables(rotary, tokens - 1), length)
        long, scaling = self._tables(rotary, length - 1)
        short, _ = self._tables(rotary, 1)
        if not torch.equal(long, short):
            raise ValueError("the frequencies change with the length")
        return EngineConfig(long, scaling, length)

    def scalars(self) -> dict[str, float]:
        """Numbers that the modules derived from the config, by name, e.g. the scaling of the softmax."""
        if self.model is None:
            return {}
        return {
            f"{name}.{key}": value
            for name, module in self.model.named_modules()
            if not type(module).__name__.endswith("RotaryEmbedding")
            for key, value in vars(module).items()
            if isinstance(value, float)
        }

    @property
    def interleaved(self) -> bool:
        """Whether neighbouring dimensions are a pair, not dimension ``i`` and ``i + R/2``."""
        if self.model is None:
            return False
        rotate_half = getattr(sys.modules[type(self.model).__module__], "rotate_half", None)
        return rotate_half is not None and rotate_half(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0]

    @property
    def multimodal_positions(self) -> bool:
        """Whether a token has positions in time, height and width (Qwen2-VL), each rotating some of the pairs."""
        return "mrope_section" in self.parameters or (self.rotary is not None and _axes(self.rotary) > 1)

    def _tables(self, rotary: nn.Module, position: int) -> tuple[torch.Tensor, float]:
        """``inv_freq`` after a forward pass over a text that ends at ``position``, and the factor of cos and sin."""
        prefix, options = "", {}
        for layer_type, parameters in self.text.rope_parameters.items():
            if parameters is self.parameters:
                prefix, options = f"{layer_type}_", {"layer_type": layer_type}
        positions = torch.tensor([[0, position]])
        axes = _axes(rotary, **options)
        if axes > 1:
            positions = positions.expand(axes, 1, 2)
        try:
            with torch.no_grad():
                tables = rotary(torch.zeros(1), positions, **options)
        except KeyError as error:
            raise ValueError(f"transformers fails in the forward pass: no {error.args[0]!r}") from None
        except Exception as error:
            raise ValueError(f"transformers fails in the forward pass: {_message(error)}") from None
        scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
        if isinstance(tables, tuple):
            at_zero = tables[0].double().flatten()[0].item()  # cos(0) times the scaling
            if not math.isclose(at_zero, scaling, rel_tol=1e-6):
                scaling = at_zero
        return getattr(rotary, f"{prefix}inv_freq").clone(), scaling


def _axes(rotary: nn.Module, **options: str) -> int:
    """The number of positions that a token has to this rotary embedding."""
    if hasattr(rotary, "mrope_section"):
        return 3
    for axes in (1, 3, 4):
        positions = torch.zeros(1, 2, dtype=torch.long)
        with contextlib.suppress(Exception), torch.no_grad():
            rotary(torch.zeros(1), positions.expand(axes, 1, 2) if axes > 1 else positions, **options)
            return axes
    return 1


SUPERSEDED = frozenset((
    "rope_type", "type", "factor", "attention_factor", "original_max_position_embeddings", "short_factor",
    "long_factor", "short_mscale", "long_mscale", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "truncate", "mscale", "attn_factor", "extrapolation_factor", "finetuned", "alpha",
    "partial_rotary_factor", "rope_theta",
))  # fmt: skip
"""Rotary parameters whose effect a plan's frequencies and scaling include: an extension may drop them."""


def changed(before: StockModel, after: StockModel) -> str | None:
    """A lost parameter or another attention scaling that the extension caused beside its frequencies, or None."""
    kept = after.parameters
    lost = [
        key
        for key, value in before.parameters.items()
        if key not in SUPERSEDED and value not in (None, 0) and kept.get(key) != value
    ]
    if lost:
        return f"it loses the model's rotary parameter{'s' * (len(lost) > 1)} {', '.join(lost)}"
    scalars = after.scalars()
    for name, value in before.scalars().items():
        found = scalars.get(name, math.nan)
        if not math.isclose(found, value, rel_tol=1e-6):
            return f"{name} is {found:.6g}, {value:.6g} in the model"
    return None


def _message(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
