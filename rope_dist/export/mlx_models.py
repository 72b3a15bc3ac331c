"""What model files of mlx-lm 0.32.2 read of a config beside ``rope_scaling``: read from their source."""

from __future__ import annotations

MLX_READS_RECENT = frozenset((
    "exaone_moe", "gemma4_text", "glm_moe_dsa", "granitemoehybrid", "laguna", "lfm2", "lfm2_moe", "mellum",
    "minimax_m3_vl", "ministral3", "mistral4", "muse_glimmer", "muse_spark", "olmo_hybrid", "qwen3", "qwen3_5",
    "spark2_5",
))  # fmt: skip
"""``model_type`` that takes ``rope_parameters``; all others take a file with these alone for a plain model."""

MLX_THETA: dict[str, float | None] = {
    **dict.fromkeys(
        (
            "Klear", "apertus", "baichuan_m1", "bailing_hybrid", "bailing_moe", "bailing_moe_linear", "dots1",
            "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "gemma3n", "glm4", "glm4_moe", "granite", "granitemoe",
            "helium", "hunyuan", "kimi_linear", "lille-130m", "llama4", "llama4_text", "longcat_flash",
            "longcat_flash_ngram", "mimo_v2_flash", "minimax", "olmo3", "qwen3", "qwen3_moe", "qwen3_next",
            "recurrent_gemma", "solar_open", "stablelm", "telechat3",
        ),
        None,
    ),
    **dict.fromkeys(("exaone_moe", "gear", "gemma3_text", "glm4_moe_lite", "lfm2", "lfm2_moe", "minicpm"), 1e6),
    **dict.fromkeys(("minicpm3", "mixtral", "plamo3", "qwen2", "qwen2_moe", "talkie"), 1e6),
    **dict.fromkeys(("iquestloopcoder", "muse_glimmer", "nemotron-nas"), 5e5),
    **dict.fromkeys(("qwen3_5", "starcoder2"), 1e5),
    "afm7": 5e4,
    "bailing_moe_v3": 6e6,
    "cohere": 8e6,
    "cohere2": 5e4,
    "deepseek_v41": 1.6e5,
    "falcon_h1": 1e11,
    "gpt_oss": 1.5e5,
    "minimax_m3_vl": 5e6,
    "youtu_llm": 1.6e6,
}  # fmt: skip
"""``model_type`` -> ``rope_theta`` of a config without it, where that is not 10000; None: it fails."""
