"""Frequencies, attention scaling and length that each engine computes from a Hugging Face ``config.json``.

Every function follows the engine's own code, read in the version that its docstring names. A test runs vLLM's and
SGLang's classes themselves against the plan; MLX and TensorRT-LLM are from their source code only.

Engines that choose between short and long factors take ``tokens``: of the text, or of the context that they are started
with. Without it the two must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..defaults import STRATEGY_SETTINGS
from ..dynamic import DynamicPlan
from ..planning import RopePlan
from ..strategies import default_inv_freq
from ..trained_length import LENGTH_KEYS


@dataclass(frozen=True)
class EngineConfig:
    """The rotary embedding that an engine computes from an artefact.

    Attributes:
        inv_freq: ``[rotary_dim / 2]`` float32, radians per token.
        attention_scaling: factor of cos and sin.
        length: tokens of context that the engine allows by default.
    """

    inv_freq: torch.Tensor
    attention_scaling: float
    length: int


def transformers_4(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """transformers 4.57: ``rope_theta`` and ``rope_scaling`` only; it ignores ``rope_parameters``.

    A text takes the long factors from one token past the original length of the top level on.
    """
    rope = dict(config.get("rope_scaling") or {})
    theta, length = config.get("rope_theta", 10000.0), config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings")
    long = None if tokens is None else tokens > (original or length)
    inv_freq = _inv_freq(rope, theta, _rotary_dim(config, config.get("partial_rotary_factor")), long)
    scaling = 1.0
    if _kind(rope) == "longrope":
        factor = length / original if original else rope.get("factor") or 1.0
        given = rope.get("attention_factor")
        scaling = _derived_scaling(factor, original or length) if given is None else given
    return EngineConfig(inv_freq, float(scaling), length)


def vllm(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """vLLM 0.33: ``attention_factor`` of longrope is not read, ``long_mscale`` is.

    It takes the long factors for every text if started with ``--max-model-len`` (``tokens``) past the original length.
    """
    rope = _current_rope(config)
    length = min(
        config[key] for key in ("max_position_embeddings", *LENGTH_KEYS) if isinstance(config.get(key), int)
    )
    if _kind(rope) == "longrope" and tokens is None:
        # Without --max-model-len it stops at a top-level original length.
        length = config.get("original_max_position_embeddings", length)
    return _served(config, rope, length, tokens)


def sglang(config: Mapping[str, Any]) -> EngineConfig:
    """SGLang 0.5.23: like vLLM, but it looks for the length under other keys first."""
    rope = _current_rope(config)
    keys = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
    length = next(config[key] for key in keys if config.get(key) is not None)
    return _served(config, rope, length)


def mlx(config: Mapping[str, Any]) -> EngineConfig:
    """mlx-lm 0.32: ``rope_theta`` and ``rope_scaling`` only; the attention scaling is always derived."""
    rope = dict(config.get("rope_scaling") or {})
    length = config["max_position_embeddings"]
    inv_freq = _inv_freq(rope, config.get("rope_theta", 10000.0), _rotary_dim(config, None))
    scaling = 1.0
    if _kind(rope) == "longrope":
        original = rope["original_max_position_embeddings"]
        scaling = _derived_scaling(length / original, original)
    return EngineConfig(inv_freq, scaling, length)


def tensorrt_llm(config: Mapping[str, Any]) -> EngineConfig:
    """TensorRT-LLM (``RopeParams.from_config``): a missing original length is 1024, the scaling is derived."""
    rope = _current_rope(config)
    length = config["max_position_embeddings"]
    inv_freq = _inv_freq(rope, rope["rope_theta"], _rotary_dim(config, rope.get("partial_rotary_factor")))
    scaling = 1.0
    if _kind(rope) == "longrope":
        original = config.get("original_max_position_embeddings") or rope.get(
            "original_max_position_embeddings", 1024
        )
        scaling = _derived_scaling(length / original, original)
    return EngineConfig(inv_freq, scaling, length)


ENGINES: dict[str, Callable[..., EngineConfig]] = {
    "transformers-4": transformers_4,
    "vllm": vllm,
    "sglang": sglang,
    "mlx": mlx,
    "tensorrt-llm": tensorrt_llm,
}
"""Engine -> its interpretation of a config. The installed transformers 5 is run itself (``stock.py``)."""


ONE_SET = {
    "sglang": "sglang chooses the factors of a whole batch by its longest text, whatever cached keys were made with",
    "mlx": "mlx reads every text by long_factor",
    "tensorrt-llm": "tensorrt-llm derives a scaling of cos and sin from the original and the extended length",
}
"""Engine -> why a config with short and long factors that differ is not exact in it up to the trained length."""


def unable(engine: str, plan: RopePlan | DynamicPlan, form: str = "longrope") -> str | None:
    """Why ``engine`` cannot represent ``plan`` in a LLaMA's config of that form, or None if it can.

    Other models are in ``architectures.py``.
    """
    if isinstance(plan, DynamicPlan):
        return f"{ONE_SET[engine]}: export a static plan for it" if engine in ONE_SET else None
    if form == "longrope" and engine in ("mlx", "tensorrt-llm") and plan.attention_scaling != 1:
        return (
            f"{engine} does not scale cos and sin of a longrope, and the plan scales them by "
            f"{plan.attention_scaling:.6g}: take a strategy that does not, e.g. dprope"
        )
    if engine == "mlx" and plan.rotary_dim != plan.head_dim:
        return f"mlx rotates whole heads, and the plan {plan.rotary_dim} of {plan.head_dim} dimensions"
    return None


def check_engines(
    plan: RopePlan | DynamicPlan, engines: Iterable[str] = (), form: str = "longrope"
) -> None:
    """``ValueError`` for an unknown engine, or one that cannot represent the plan, or if none can."""
    if isinstance(plan, DynamicPlan):
        _check_one_scaling(plan)
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
        reason = unable(engine, plan, form)
        if reason is not None:
            raise ValueError(reason)


def _check_one_scaling(plan: DynamicPlan) -> None:
    """``ValueError`` unless the trained model and the last stage scale cos and sin alike: a config has one scaling."""
    trained, last = plan.stages[0].attention_scaling, plan.stages[-1].attention_scaling
    if trained == last:
        return
    hint = "take a strategy that does not, e.g. dprope"
    if "attention_factor" in STRATEGY_SETTINGS[plan.strategy]:
        hint = "make the plan with attention_factor=1 (--set attention_factor=1 on the command line)"
    raise ValueError(
        f"{plan.strategy} scales cos and sin by {last:.6g} and the trained model by {trained:.6g}, and stock engines "
        f"have one scaling for texts of any length: {hint}"
    )


def _served(
    config: Mapping[str, Any], rope: dict[str, Any], length: int, tokens: int | None = None
) -> EngineConfig:
    long = None if tokens is None else tokens > rope.get("original_max_position_embeddings", length)
    rotary_dim = _rotary_dim(config, rope.get("partial_rotary_factor"))
    inv_freq = _inv_freq(rope, rope["rope_theta"], rotary_dim, long)
    scaling = 1.0
    if _kind(rope) == "longrope":
        original, longest = rope["original_max_position_embeddings"], config["max_position_embeddings"]
        long = length > original if long is None else long
        given = rope.get("long_mscale" if long else "short_mscale")
        scaling = _derived_scaling(longest / original, original) if given is None else given
    return EngineConfig(inv_freq, float(scaling), length)


def _current_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The two schemas merged as in transformers 5: ``rope_scaling`` wins."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return rope


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rotary_dim(config: Mapping[str, Any], share: float | None) -> int:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head_dim * (1.0 if share is None else share))


def _inv_freq(
    rope: Mapping[str, Any], theta: float, rotary_dim: int, long: bool | None = None
) -> torch.Tensor:
    """``[rotary_dim / 2]``; ``long`` chooses between factors for short and long texts, None: they must be equal."""
    kind = _kind(rope)
    if kind == "default":
        return default_inv_freq(theta, rotary_dim)
    if kind == "linear":
        return default_inv_freq(theta, rotary_dim) / rope["factor"]
    if kind != "longrope":
        raise ValueError(
            f"its rope_type is {kind!r}, which engines read differently: longrope is exact in all"
        )
    if long is None and rope["short_factor"] != rope["long_factor"]:
        raise ValueError("short_factor and long_factor differ: the frequencies change with the length")
    factors = torch.tensor(rope["short_factor" if long is False else "long_factor"], dtype=torch.float32)
    if factors.shape != (rotary_dim // 2,):
        raise ValueError(f"there are {factors.numel()} factors for {rotary_dim // 2} rotary pairs")
    return default_inv_freq(theta, rotary_dim, factors)


def _derived_scaling(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
