"""Frequencies, attention scaling and length that each engine computes from a Hugging Face ``config.json``.

Every function follows the engine's own code, read in the version that its docstring names (the one of
``architectures.VERSIONS``); tests run those of vLLM,
SGLang, mlx-lm and ExLlamaV3 from their wheels, TensorRT-LLM's is from its source code only. What a model's own file in
an engine does with the result (nothing, in some) is in ``architectures.py``.

A config is that of a language model alone, with one set of rotary parameters. Engines whose frequencies depend on the
length take ``tokens``: of the text, or of the context that they are started with. Without it they must be the same for
every length, else ``ValueError``. ``KeyError`` names a key that is not there, and every other error is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..defaults import STRATEGY_SETTINGS
from ..dynamic import DynamicPlan
from ..planning import RopePlan
from ..strategies import default_inv_freq
from ..trained_length import LENGTH_KEYS
from . import rope_types
from .mlx_models import MLX_READS_RECENT, MLX_THETA
from .standard_config import (
    chosen,
    chosen_factors,
    deepseek_yarn,
    growing,
    head_dim_of,
    plain_or_proportional,
    read_llama3,
    read_yarn,
    rotary_dim_of,
    served_longrope,
    standard_rope,
    yarn_scaling,
)


@dataclass(frozen=True)
class EngineConfig:
    """The rotary embedding that an engine computes from an artefact.

    Attributes:
        inv_freq: ``[rotary_dim / 2]`` float32, radians per token.
        attention_scaling: factor of cos and sin.
        length: tokens of context that the engine allows by default.
        rope_type: as the engine understands it.
        table_length: tokens for which it has cos and sin, where that is fixed; else None.
    """

    inv_freq: torch.Tensor
    attention_scaling: float
    length: int
    rope_type: str = "default"
    table_length: int | None = None


def transformers_4(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """transformers 4.57: ``rope_theta`` and ``rope_scaling`` only; it ignores ``rope_parameters``.

    A text takes the long factors from one token past the original length of the top level on.
    """
    rope = dict(config.get("rope_scaling") or {})
    length = config["max_position_embeddings"]
    if rope and config.get("model_type") in TRANSFORMERS_4_KEYS:
        keys = TRANSFORMERS_4_KEYS[config["model_type"]]
        if set(rope) != keys:
            raise ValueError(f"its config accepts a rope_scaling of {', '.join(sorted(keys))} only")
    # Classes copy `type` to `rope_type`.
    kind = rope.get("type", rope.get("rope_type")) if rope else "default"
    if kind == "mrope" and "mrope_section" in rope:
        kind = "default"
    if kind == "su" and config.get("model_type") == "phi3":
        kind = "longrope"
    theta, rotary_dim = config.get("rope_theta", 10000.0), rotary_dim_of(config, config)
    scaling = 1.0
    if kind == "default":
        inv_freq = default_inv_freq(theta, rotary_dim)
    elif kind == "linear":
        inv_freq = rope_types.linear(theta, rotary_dim, rope["factor"])
    elif kind == "dynamic":
        inv_freq = growing(theta, rotary_dim, rope["factor"], length, tokens)
    elif kind == "llama3":
        inv_freq = read_llama3(rope, theta, rotary_dim)
    elif kind == "yarn":
        original = rope.get("original_max_position_embeddings") or length
        inv_freq = read_yarn(rope, theta, rotary_dim, rope["factor"], original)
        scaling = yarn_scaling(rope, rope["factor"])
    elif kind == "longrope":
        original = config.get("original_max_position_embeddings")
        factors = chosen_factors(rope, None if tokens is None else tokens > (original or length))
        inv_freq = rope_types.longrope(theta, rotary_dim, factors)
        ratio: Any = length / original if original else rope.get("factor")
        given = rope.get("attention_factor")
        scaling = rope_types.longrope_scaling(ratio, original or length) if given is None else given
    else:
        raise ValueError(f"it knows no rope_type {kind!r}")
    return EngineConfig(inv_freq, float(scaling), length, kind)


TRANSFORMERS_4_KEYS = {
    "phi3": {"type", "short_factor", "long_factor"},
    **{model: {"type", "factor"} for model in ("chameleon", "olmo", "olmo2", "open-llama")},
}
"""``model_type`` -> the only keys that transformers 4 accepts in its ``rope_scaling``."""


def transformers_5(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """transformers 5.6 to 5.24: the schemas merged, ``rope_scaling`` first. The installed one is run itself.

    A text takes the long factors from one token past the original length on.
    """
    rope = standard_rope(config)
    kind, theta, length = rope["rope_type"], rope["rope_theta"], config["max_position_embeddings"]
    rotary_dim, scaling = rotary_dim_of(config, rope), 1.0
    original = rope.get("original_max_position_embeddings", length)
    if kind == "default" or (kind == "mrope" and "mrope_section" in rope):
        inv_freq = default_inv_freq(theta, rotary_dim)
    elif kind == "linear":
        inv_freq = rope_types.linear(theta, rotary_dim, rope["factor"])
    elif kind == "dynamic":
        if rope.get("alpha"):
            inv_freq = rope_types.dynamic_alpha(theta, rotary_dim, rope["alpha"])
        else:
            inv_freq = growing(theta, rotary_dim, rope["factor"], length, tokens)
    elif kind == "llama3":
        inv_freq = read_llama3(rope, theta, rotary_dim)
    elif kind == "yarn":
        factor = length / original if rope["factor"] is None else rope["factor"]
        inv_freq = read_yarn(rope, theta, rotary_dim, factor, original)
        scaling = yarn_scaling(rope, factor)
    elif kind == "longrope":
        factors = chosen_factors(rope, None if tokens is None else tokens > original)
        inv_freq = rope_types.longrope(theta, rotary_dim, factors)
        given = rope.get("attention_factor")
        scaling = (
            rope_types.longrope_scaling(rope.get("factor") or length / original, original)
            if given is None
            else given
        )
    elif kind == "proportional":
        inv_freq = rope_types.proportional(theta, head_dim_of(config), rotary_dim, rope.get("factor", 1.0))
    else:
        raise ValueError(f"it knows no rope_type {kind!r}")
    return EngineConfig(inv_freq, float(scaling), length, kind)


def vllm(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """vLLM 0.33: transformers 5's config; ``attention_factor`` is read of YaRN, not of longrope (``long_mscale`` is).

    It takes one set of frequencies for every text, of longrope the long one if started with ``--max-model-len``
    (``tokens``) past the original length. ``dynamic`` without ``max_trained_positions`` is the plain embedding.
    """
    rope = standard_rope(config, vllm=True)
    kind, theta, positions = rope["rope_type"], rope["rope_theta"], config["max_position_embeddings"]
    rotary_dim, length = rotary_dim_of(config, rope), _vllm_length(config, rope)
    if kind != "default" and _is_deepseek(config):
        kind = "deepseek_yarn"
    scaling, rows = 1.0, positions
    if kind == "linear":
        inv_freq = rope_types.linear(theta, rotary_dim, rope["factor"])
        rows = int(positions * rope["factor"])
    elif kind == "dynamic":
        if "alpha" in rope:
            inv_freq = rope_types.dynamic_alpha(theta, rotary_dim, rope["alpha"])
        else:
            trained = rope.get("max_trained_positions", positions)
            inv_freq = rope_types.dynamic(theta, rotary_dim, rope["factor"], positions, trained)
    elif kind == "ntk":
        inv_freq = rope_types.ntk(theta, rotary_dim, rope["factor"], rope.get("mixed_b"))
    elif kind == "llama3":
        inv_freq = read_llama3(rope, theta, rotary_dim)
    elif kind == "yarn":
        factor, original = rope["factor"], rope["original_max_position_embeddings"]
        betas = {k: rope[k] for k in ("beta_fast", "beta_slow", "truncate") if k in rope}
        inv_freq = rope_types.yarn(theta, rotary_dim, factor, original, **betas)
        scaling, rows = yarn_scaling(rope, factor), int(original * factor)
    elif kind == "deepseek_yarn":
        inv_freq, scaling, rows = deepseek_yarn(rope, theta, rotary_dim, positions)
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        if tokens is None:
            # Without --max-model-len it stops at a top-level original length.
            length = config.get("original_max_position_embeddings") or length
        long = (tokens or length) > original
        inv_freq, scaling = served_longrope(rope, theta, rotary_dim, positions, long)
    else:
        inv_freq = plain_or_proportional(kind, theta, rotary_dim, config)
    return EngineConfig(inv_freq, float(scaling), length, kind, rows)


def _is_deepseek(config: Mapping[str, Any]) -> bool:
    """Whether vLLM and SGLang take every scaling for DeepSeek's YaRN: of all models with latent attention but one."""
    return config.get("kv_lora_rank") is not None and config.get("model_type") != "minicpm3"


def _vllm_length(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    keys = ("max_position_embeddings", "max_target_positions", *LENGTH_KEYS)
    length = min(config[key] for key in keys if config.get(key) is not None)
    length = config.get("model_max_length") or length
    unscaled = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
    if rope["rope_type"] not in unscaled and "gemma3" not in str(config.get("model_type")):
        length *= rope.get("factor") or 1.0
    return int(length)


def sglang(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """SGLang 0.5.23: as vLLM, but for YaRN's ``attention_factor`` (not read; ``attn_factor`` multiplies), ``dynamic``
    (always that of the largest length) and longrope, where the longest text of a batch chooses (``tokens``)."""
    rope = standard_rope(config, top_level=False)
    kind, theta, positions = rope["rope_type"], rope["rope_theta"], config["max_position_embeddings"]
    rotary_dim = rotary_dim_of(config, rope)
    keys = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
    length = next(config[key] for key in keys if config.get(key) is not None)
    if "original_max_position_embeddings" not in rope and kind != "llama3":
        length = int(rope.get("factor", 1) * length)
    if kind != "default" and _is_deepseek(config):
        kind = "deepseek_yarn"
    factor, scaling = rope.get("factor", 1.0), 1.0
    original = rope.get("original_max_position_embeddings", positions)
    if kind == "linear":
        inv_freq = rope_types.linear(theta, rotary_dim, factor)
    elif kind == "dynamic":
        if "alpha" in rope:
            inv_freq = rope_types.dynamic_alpha(theta, rotary_dim, rope["alpha"])
        else:
            inv_freq = rope_types.dynamic(theta, rotary_dim, factor, positions * factor, positions)
    elif kind == "llama3":
        inv_freq = read_llama3(rope, theta, rotary_dim)
    elif kind == "yarn":
        settings = ("beta_fast", "beta_slow", "truncate", "extrapolation_factor")
        given = {k: rope[k] for k in settings if k in rope}
        inv_freq = rope_types.yarn(theta, rotary_dim, factor, original, **given)
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale is not None and mscale_all_dim is not None:
            scaling = rope_types.yarn_mscale(factor, mscale) / rope_types.yarn_mscale(factor, mscale_all_dim)
        else:
            scaling = rope_types.yarn_mscale(factor)
        scaling *= rope.get("attn_factor", 1)
    elif kind == "deepseek_yarn":
        inv_freq, scaling, _ = deepseek_yarn({**rope, "factor": factor}, theta, rotary_dim, positions)
        scaling *= rope.get("attn_factor", 1)
    elif kind == "longrope":
        long = chosen(rope, None if tokens is None else tokens > original, length > original)
        inv_freq, scaling = served_longrope(rope, theta, rotary_dim, positions, long)
    else:
        inv_freq = plain_or_proportional(kind, theta, rotary_dim, config)
    return EngineConfig(inv_freq, float(scaling), length, kind)


def mlx(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """mlx-lm 0.32: ``rope_theta`` and ``rope_scaling``; ``rope_parameters`` in few models.

    It takes ``type`` before ``rope_type``. YaRN's ``attention_factor`` and ``truncate`` are not read, ``mscale`` is. A
    longrope's long factors are taken for every text and its scaling is always derived.
    """
    model = config.get("model_type", "llama")
    rope, theta = dict(config.get("rope_scaling") or {}), config.get("rope_theta")
    if model in MLX_READS_RECENT:
        recent = dict(config.get("rope_parameters") or {})
        rope = rope or recent
        theta = recent.get("rope_theta") if theta is None else theta
    if theta is None:
        theta = MLX_THETA.get(model, 10000.0)
    if theta is None:
        raise KeyError("rope_theta")
    length, head_dim = config["max_position_embeddings"], head_dim_of(config)
    kind = rope.get("type") or rope.get("rope_type", "default")
    scaling = 1.0
    if model in ("phi3", "phimoe"):
        if rope and not {"long_factor", "type"} <= set(rope):
            raise ValueError("its rope_scaling must have the keys long_factor and type")
        head_dim = int(head_dim * (config.get("partial_rotary_factor") or 1.0))
        kind = {"su": "longrope", "longrope": "longrope", "linear": "linear"}.get(kind, "default")
        rope.setdefault(
            "original_max_position_embeddings", config.get("original_max_position_embeddings", 4096)
        )
    if kind in ("default", "mrope"):
        inv_freq = default_inv_freq(theta, head_dim)
    elif kind == "linear":
        inv_freq = default_inv_freq(theta, head_dim) * (1 / rope["factor"])
    elif kind == "dynamic":
        inv_freq = growing(theta, head_dim, rope["factor"], length, tokens)
    elif kind == "llama3":
        low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        original = rope.get("original_max_position_embeddings", 8192)
        inv_freq = rope_types.llama3_mlx(theta, head_dim, rope["factor"], low, high, original)
    elif kind in ("yarn", "deepseek_yarn", "telechat3-yarn"):
        factor, original = rope["factor"], rope.get("original_max_position_embeddings", 4096)
        betas = {"beta_fast": rope.get("beta_fast", 32), "beta_slow": rope.get("beta_slow", 1)}
        inv_freq = rope_types.yarn_mlx(theta, head_dim, factor, original, **betas)
        mscales = rope.get("mscale", 1), rope.get("mscale_all_dim", 0)
        scaling = rope_types.yarn_mscale(factor, mscales[0]) / rope_types.yarn_mscale(factor, mscales[1])
        kind = "yarn"
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        inv_freq = rope_types.longrope(theta, head_dim, chosen_factors(rope, True))
        scaling = rope_types.longrope_scaling(length / original, original)
    elif kind == "proportional":
        rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        inv_freq = rope_types.proportional(theta, head_dim, rotary_dim)
        inv_freq = inv_freq / rope.get("factor", 1.0)
    else:
        raise ValueError(f"it knows no rope_type {kind!r}")
    return EngineConfig(inv_freq, float(scaling), length, kind)


def tensorrt_llm(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """TensorRT-LLM 1.x (``RopeParams.from_config``), after transformers 5.

    It takes ``type`` before ``rope_type``. YaRN's ``attention_factor`` and ``truncate`` are not read, ``mscale`` is; a
    longrope's scaling is derived; ``dynamic`` is the plain embedding but for an ``alpha``. ``tokens`` is its
    ``--max_seq_len``.
    """
    rope = standard_rope(config, top_level=False)
    theta, length = rope["rope_theta"], config["max_position_embeddings"]
    rotary_dim = rotary_dim_of(config, rope)
    original = rope.get("original_max_position_embeddings", 1024)
    kind = str(rope.get("type") or rope.get("rope_type") or "default").lower()
    factor, scaling = rope.get("factor", 1.0), 1.0
    plain = (1.0 / (theta ** (torch.arange(0, rotary_dim, 2).double() / rotary_dim)).float()).float()
    if kind in ("default", "none", "mrope"):
        inv_freq = factor * plain
    elif kind == "linear":
        inv_freq = (1.0 / factor) * plain
    elif kind == "dynamic":
        inv_freq = rope_types.dynamic_alpha(theta, rotary_dim, rope.get("alpha", 1.0))
    elif kind == "llama3":
        low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        inv_freq = rope_types.llama3(plain, factor, low, high, original)
    elif kind == "yarn":
        betas = {"beta_fast": rope.get("beta_fast", 32), "beta_slow": rope.get("beta_slow", 1)}
        inv_freq = rope_types.yarn(theta, rotary_dim, factor, original, **betas)
        mscales = rope.get("mscale", 1.0), rope.get("mscale_all_dim", 0.0)
        scaling = rope_types.yarn_mscale(factor, mscales[0]) / rope_types.yarn_mscale(factor, mscales[1])
    elif kind == "longrope":
        # It divides in another order, by up to an ulp.
        long = tokens is None or tokens > original
        inv_freq = rope_types.longrope(theta, rotary_dim, chosen_factors(rope, long))
        scaling = rope_types.longrope_scaling(length / original, original)
    else:
        raise ValueError(f"it knows no rope_type {kind!r}")
    return EngineConfig(inv_freq, float(scaling), length, kind)


def exllamav3(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
    """ExLlamaV3 1.6 (``util/rope.py``): ``rope_scaling``, else ``rope_parameters``; a top-level ``rope_theta`` first.

    YaRN's factor is ``max_position_embeddings`` over the original length where that is given, whatever ``factor`` says.
    A longrope's ``attention_factor`` is not read. ``tokens`` is the length that the model is loaded for.
    """
    rope = next(
        (dict(config[k]) for k in ("rope_scaling", "rope_parameters") if isinstance(config.get(k), Mapping)),
        {},
    )
    recent = config.get("rope_parameters") or {}

    def first(key: str, default: float) -> float:
        values = (v for v in (config.get(key), recent.get(key)) if isinstance(v, (int, float)))
        return float(next(values, default))

    theta, share = first("rope_theta", 10000.0), first("partial_rotary_factor", 1.0)
    length = config["max_position_embeddings"]
    rotary_dim = config.get("rotary_dim") or rotary_dim_of(config, {"partial_rotary_factor": share})
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = 1.0
    if kind in ("default", "mrope"):
        inv_freq = default_inv_freq(theta, rotary_dim)
    elif kind == "linear":
        inv_freq = rope_types.linear(theta, rotary_dim, rope.get("factor", 1.0))
    elif kind == "llama3":
        low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
        original = rope.get("original_max_position_embeddings", 8192)
        plain = default_inv_freq(theta, rotary_dim)
        inv_freq = rope_types.llama3(plain, rope.get("factor", 8.0), low, high, original)
    elif kind == "yarn":
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if original is None:
            original = length
        else:
            factor = length / original
        if factor is None:
            raise KeyError("factor")
        settings = {k: rope[k] for k in ("beta_fast", "beta_slow", "truncate") if k in rope}
        inv_freq = rope_types.yarn(theta, rotary_dim, factor, original, **settings)
        given, over, under = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
        if given is not None:
            scaling = given
        elif config.get("kv_lora_rank") is not None and over and under:
            scaling = rope_types.yarn_mscale(factor, over) / rope_types.yarn_mscale(factor, under)
        else:
            scaling = 1.0 if rope.get("llama_4_scaling_beta") else rope_types.yarn_mscale(factor)
    elif kind in ("longrope", "su"):
        original = rope.get(
            "original_max_position_embeddings", config.get("original_max_position_embeddings")
        )
        if original is None:
            raise KeyError("original_max_position_embeddings")
        inv_freq = rope_types.longrope(theta, rotary_dim, chosen_factors(rope, (tokens or length) > original))
        scaling, kind = rope_types.longrope_scaling(length / original, original), "longrope"
    elif kind == "proportional":
        head_dim = head_dim_of(config)
        inv_freq = rope_types.proportional(theta, head_dim, rotary_dim, rope.get("factor", 1.0))
    else:
        raise ValueError(f"it knows no rope_type {kind!r}")
    return EngineConfig(inv_freq, float(scaling), length, kind)


ENGINES: dict[str, Callable[..., EngineConfig]] = {
    "transformers-4": transformers_4,
    "vllm": vllm,
    "sglang": sglang,
    "mlx": mlx,
    "tensorrt-llm": tensorrt_llm,
    "exllamav3": exllamav3,
}
"""Engine -> its interpretation of a config. The installed transformers 5 is run itself (``stock.py``)."""


ONE_SET = {
    "sglang": "sglang chooses the factors of a whole batch by its longest text, whatever cached keys were made with",
    "mlx": "mlx reads every text by long_factor",
    "tensorrt-llm": "tensorrt-llm derives a scaling of cos and sin from the original and the extended length",
    "exllamav3": "exllamav3 derives a scaling of cos and sin from the original and the extended length",
}
"""Engine -> why a config with short and long factors that differ is not exact in it up to the trained length."""


def unable(engine: str, plan: RopePlan | DynamicPlan, form: str = "longrope") -> str | None:
    """Why ``engine`` cannot represent ``plan`` in a LLaMA's config of that form, or None if it can.

    Other models are in ``architectures.py``.
    """
    if isinstance(plan, DynamicPlan):
        return f"{ONE_SET[engine]}: export a static plan for it" if engine in ONE_SET else None
    if form == "longrope" and engine in ("mlx", "tensorrt-llm", "exllamav3") and plan.attention_scaling != 1:
        return (
            f"{engine} does not scale cos and sin of a longrope, and the plan scales them by "
            f"{plan.attention_scaling:.6g}: take a strategy that does not, e.g. dprope"
        )
    if engine == "mlx" and plan.rotary_dim != plan.head_dim:
        return f"mlx rotates whole heads, and the plan {plan.rotary_dim} of {plan.head_dim} dimensions"
    return None


def check_engines(
    plan: RopePlan | DynamicPlan, engines: Iterable[str] = (), form: str = "longrope", *, hint: str = ""
) -> None:
    """``ValueError`` for an unknown engine, or one that cannot represent the plan, or if none can."""
    if isinstance(plan, DynamicPlan):
        _check_one_scaling(plan)
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
        reason = unable(engine, plan, form)
        if reason is not None:
            raise ValueError(f"{reason}{hint}")


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
