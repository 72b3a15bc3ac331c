"""Model types that an engine runs with a plan's longrope, beyond what the formulas of ``engines.py`` tell.

Known failures are listed. In transformers 4 and MLX every model reads its config in its own way, so that the model
types known to work are listed instead: tested for transformers 4, from the source code for MLX.
"""

from __future__ import annotations

from .. import layer_types
from .stock import StockModel

TRANSFORMERS_4 = frozenset((
    "apertus", "arcee", "aria_text", "bamba", "bitnet", "code_llama", "cohere", "deepseek_v2",
    "deepseek_v3", "diffllama", "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1",
    "flex_olmo", "gemma", "gemma2", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe",
    "lfm2", "llama", "longcat_flash", "minimax", "ministral", "mistral", "mixtral", "moshi", "olmoe",
    "persimmon", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "vaultgemma",
))  # fmt: skip
"""``model_type`` whose rotary embedding in transformers 4.57.6 computed a neutral longrope bit for bit (tried)."""

TRANSFORMERS_4_PARTS = frozenset((
    "aria", "deepseek_vl", "deepseek_vl_hybrid", "fuyu", "got_ocr2", "idefics2", "idefics3", "internvl",
    "janus", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2",
    "paligemma", "perception_lm", "smolvlm", "video_llava", "vipllava",
))  # fmt: skip
"""``model_type`` of composite models whose language model was tried so."""

TRANSFORMERS_4_REFUSES = {
    **dict.fromkeys(
        ("chameleon", "olmo", "olmo2", "open-llama"),
        "its config accepts no rope_scaling but a `type` and a `factor`",
    ),
    **dict.fromkeys(
        ("phi3", "phi4_multimodal"),
        "its config accepts no rope_scaling but `type`, `short_factor` and `long_factor`",
    ),
    "llama4_text": "its rotary embedding is llama3's or none",
    "phimoe": "its rotary embedding keeps no frequencies",
}
"""``model_type`` that fails in transformers 4.57.6 (tried)."""

MLX = frozenset((
    "apertus", "bitnet", "dots1", "exaone", "exaone4", "falcon_h1", "granite", "granitemoe", "llama", "mimo",
    "mistral", "olmo2", "olmoe", "qwen2", "qwen3", "seed_oss", "smollm3",
))  # fmt: skip
"""``model_type`` whose model in mlx-lm 0.32 hands ``rope_scaling`` to a rotary embedding that knows longrope (read)."""


def unextendable(model: StockModel) -> str | None:
    """Why no config makes an engine run this model by a plan, or None if one can."""
    return layer_types.unextendable(model.text)


def unable_model(engine: str, model: StockModel) -> str | None:
    """Why ``engine`` cannot run this model by a plan; None where no reason is known."""
    if engine == "transformers":
        return None
    text = model.text
    kind = text.model_type
    if model.layer_typed:
        return (
            "the model has a rotary embedding per layer type, for which only transformers 5 has a form here"
        )
    if model.multimodal_positions and engine != "transformers-4":
        return f"it has no longrope for positions in time, height and width (mrope_section), which {kind} has"
    latent = getattr(text, "kv_lora_rank", None) is not None  # multi-head latent attention
    if latent and engine in ("vllm", "sglang"):
        return f"it takes every rotary scaling of {kind} (MLA) for DeepSeek's YaRN"
    if engine in ("vllm", "sglang", "mlx") and (latent or model.interleaved):
        return f"its longrope rotates halves of a head, and {kind} pairs neighbouring dimensions"
    if engine == "transformers-4":
        reason = TRANSFORMERS_4_REFUSES.get(kind)
        if reason is not None:
            return f"{kind}: {reason}"
        if kind not in TRANSFORMERS_4:
            return f"{kind} was not tried in transformers 4.57"
        if model.part is not None and model.config.model_type not in TRANSFORMERS_4_PARTS:
            return f"{model.config.model_type} was not tried in transformers 4.57"
    if engine == "mlx" and kind not in MLX:
        return f"mlx-lm does not scale the rotary embedding of {kind} by its config, as far as it was read"
    if engine in ("mlx", "tensorrt-llm") and text is not model.config:
        return f"what it does with a language model inside {model.config.model_type} is not known"
    if engine == "tensorrt-llm" and latent:
        return f"what it does with a longrope of {kind} (MLA) is not known"
    return None
