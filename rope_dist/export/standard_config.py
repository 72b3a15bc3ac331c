"""What engines make of a config before they compute frequencies: transformers 5's standard form, and shared parts.

vLLM, SGLang and TensorRT-LLM build on transformers 5, so that they read a config after its standardization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..layer_types import rope_parameters, unextendable
from ..strategies import default_inv_freq
from . import rope_types

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""``rope_type`` -> keys without which transformers 5 refuses a config."""


HAVE_ORIGINAL_LENGTH = ("phi3", "phi4_multimodal", "phimoe")
"""``model_type`` whose config class has a top-level ``original_max_position_embeddings``."""

SHAPE = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings")
READ_THE_FILE = ("mlx", "exllamav3")
"""Engines without transformers, which see no rotary defaults of its config classes."""


def completed(engine: str, file: Mapping[str, Any], text: PretrainedConfig) -> dict[str, Any]:
    """A language model's entries of a file, with defaults of its config class that the file may leave out.

    Args:
        engine: that reads them. Empty: without rotary defaults.
        file: the entries.
        text: the config that transformers reads from them.
    """
    config = dict(file)
    defaults: dict[str, Any] = {key: getattr(text, key, None) for key in SHAPE}
    if engine and engine not in READ_THE_FILE:
        defaults["original_max_position_embeddings"] = getattr(text, "original_max_position_embeddings", None)
        given = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        own = {} if unextendable(text) else rope_parameters(text)
        for key in ("rope_theta", "partial_rotary_factor"):
            if all(rope.get(key) is None for rope in given):
                defaults[key] = own.get(key)
    for key, value in defaults.items():
        if value is not None and config.get(key) is None:
            config[key] = value
    return config


def standard_rope(config: Mapping[str, Any], *, vllm: bool = False, top_level: bool = True) -> dict[str, Any]:
    """Rotary parameters as transformers 5 standardizes them; ``KeyError`` for a missing one.

    Args:
        config: of the language model, its parameters for one layer type only.
        vllm: with the old names that vLLM replaces.
        top_level: whether a top-level original length is preferred in every model, as where the config is standardized
            again when frequencies are computed; else only in those whose config class has it.
    """
    rope = current_rope(config)
    kind = rope.get("rope_type")
    if vllm:
        both = "type" in rope and "rope_type" in rope and rope["type"] != kind
        if both and (rope["type"], kind) not in (("su", "longrope"), ("mrope", "default")):
            raise ValueError(f"its rope_type is {kind!r} and its type {rope['type']!r}")
    kind = rope.get("type", "default") if kind is None else kind
    if vllm and kind == "mrope" and "mrope_section" not in rope:
        raise KeyError("mrope_section")
    if vllm:
        kind = "longrope" if kind == "su" else kind
        if kind == "telechat3-yarn":
            kind = "yarn"
            rope["attention_factor"] = 0.07 * math.log(rope["factor"]) + 1.0
    if kind == "mrope" and "mrope_section" in rope:
        kind = "default"  # So do the config classes that have it.
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    rope["rope_type"] = kind
    if kind in ("llama3", "yarn", "longrope"):
        own = config.get("original_max_position_embeddings")
        if own is not None and (top_level or config.get("model_type") in HAVE_ORIGINAL_LENGTH):
            rope["original_max_position_embeddings"] = own
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    for key in REQUIRED.get(kind, ()):
        if key not in rope:
            raise KeyError(key)
    return rope


def current_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The two schemas merged as in transformers 5: ``rope_scaling`` wins."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return rope


def head_dim_of(config: Mapping[str, Any]) -> int:
    if config.get("kv_lora_rank") is not None and config.get("qk_rope_head_dim"):
        return config["qk_rope_head_dim"]
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotary_dim_of(config: Mapping[str, Any], shared: Mapping[str, Any]) -> int:
    share = shared.get("partial_rotary_factor")
    if config.get("kv_lora_rank") is not None and config.get("qk_rope_head_dim"):
        share = None
    return int(head_dim_of(config) * (1.0 if share is None else share))


def chosen(rope: Mapping[str, Any], long: bool | None, otherwise: bool) -> bool:
    """Whether a longrope's long factors are taken; where that is open, its two sets must be equal."""
    if long is None and rope["short_factor"] != rope["long_factor"]:
        raise ValueError("short_factor and long_factor differ: the frequencies change with the length")
    return otherwise if long is None else long


def chosen_factors(rope: Mapping[str, Any], long: bool | None) -> Any:
    return rope["long_factor" if chosen(rope, long, True) else "short_factor"]


def served_longrope(
    rope: Mapping[str, Any], theta: float, rotary_dim: int, positions: int, long: bool
) -> tuple[torch.Tensor, float]:
    original = rope["original_max_position_embeddings"]
    inv_freq = rope_types.longrope(theta, rotary_dim, chosen_factors(rope, long))
    given = rope.get("long_mscale" if long else "short_mscale")
    return inv_freq, rope_types.longrope_scaling(positions / original, original) if given is None else given


def read_llama3(rope: Mapping[str, Any], theta: float, rotary_dim: int) -> torch.Tensor:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return rope_types.llama3(default_inv_freq(theta, rotary_dim), *(rope[key] for key in keys))


def read_yarn(
    rope: Mapping[str, Any], theta: float, rotary_dim: int, factor: float, original: int
) -> torch.Tensor:
    betas = {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    truncate = rope.get("truncate", True)
    return rope_types.yarn(theta, rotary_dim, factor, original, truncate=truncate, **betas)


def yarn_scaling(rope: Mapping[str, Any], factor: float) -> float:
    """Of transformers and vLLM."""
    given, over, under = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    if over and under:
        return rope_types.yarn_mscale(factor, over) / rope_types.yarn_mscale(factor, under)
    return rope_types.yarn_mscale(factor)


def deepseek_yarn(
    rope: Mapping[str, Any], theta: float, rotary_dim: int, positions: int
) -> tuple[torch.Tensor, float, int]:
    """Of models with multi-head latent attention: frequencies, scaling and length of the table."""
    factor, original = rope["factor"], rope.get("original_max_position_embeddings", positions)
    settings = {k: rope[k] for k in ("beta_fast", "beta_slow", "extrapolation_factor") if k in rope}
    inv_freq = rope_types.yarn(theta, rotary_dim, factor, original, **settings)
    mscales = float(rope.get("mscale", 1)), float(rope.get("mscale_all_dim", 0))
    scaling = rope_types.yarn_mscale(factor, mscales[0]) / rope_types.yarn_mscale(factor, mscales[1])
    return inv_freq, scaling, int(original * factor)


def growing(theta: float, rotary_dim: int, factor: float, trained: int, tokens: int | None) -> torch.Tensor:
    """Dynamic NTK by the text, which starts past the trained length."""
    if tokens is None:
        raise ValueError("dynamic: the frequencies change with the length")
    return rope_types.dynamic(theta, rotary_dim, factor, max(tokens, trained), trained)


def plain_or_proportional(
    kind: str, theta: float, rotary_dim: int, config: Mapping[str, Any]
) -> torch.Tensor:
    """Of vLLM and SGLang, which read no factor of ``proportional``."""
    if kind == "proportional":
        return rope_types.proportional(theta, head_dim_of(config), rotary_dim)
    if kind != "default":
        raise ValueError(f"it knows no rope_type {kind!r}")
    return default_inv_freq(theta, rotary_dim)
