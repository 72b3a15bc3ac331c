"""Tiny random models with the config.json of published ones: their rotary embedding and lengths, few and small layers.

The entries are those of each model's ``config.json`` on the Hugging Face hub, in its schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        **LLAMA,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "head_dim": 128,
    },
    "meta-llama/Llama-3.1-8B": {
        **LLAMA,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "mistralai/Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "google/gemma-3-1b-pt": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config_entries(repository: str, shrink: int = 1) -> dict[str, Any]:
    """``config.json`` of the small model; with ``shrink`` it was trained to read so many times fewer tokens."""
    # Gemma 3's sixth layer is the first that attends to the whole text.
    entries = {**PUBLISHED[repository], **SMALL}
    entries["num_hidden_layers"] = entries.get("sliding_window_pattern", 2)
    entries["max_position_embeddings"] //= shrink
    if entries.get("sliding_window"):
        entries["sliding_window"] = max(entries["sliding_window"] // shrink, 8)
    scaling = entries.get("rope_scaling")
    if scaling:
        original = scaling["original_max_position_embeddings"] // shrink
        entries["rope_scaling"] = {**scaling, "original_max_position_embeddings": original}
    return entries


def save_published(repository: str, directory: Path, tokenizer: Any, shrink: int = 1) -> Path:
    """The small model as a directory: weights, tokenizer, and the config as it is on the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_entries(repository, shrink), indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # As it was published, where transformers 5 has written its own schema.
    (directory / "config.json").write_text(text, encoding="utf-8")
    return directory
