"""Small random models of Llama and the families closest to it."""

from __future__ import annotations

import torch
import transformers

SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 16}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
OWN_HEAD_DIM = {"head_dim": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}  # all: a choice would hang on the last bit

TIER_A = {
    "Llama": {"attention_bias": True},
    "Mistral": WINDOW,
    "Mixtral": {**WINDOW, **EXPERTS},
    "Ministral": {**SLIDING_THEN_FULL, **OWN_HEAD_DIM},
    "Granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "SeedOss": {**OWN_HEAD_DIM, "attention_bias": True},
    "Arcee": {},
    "Gemma": OWN_HEAD_DIM,
    "Gemma2": {
        **SLIDING_THEN_FULL,
        **OWN_HEAD_DIM,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 20,
    },
    "SmolLM3": {"no_rope_layers": [1, 0], "use_sliding_window": True, **WINDOW},
}
TIER_B = {
    "Qwen3": {**OWN_HEAD_DIM, "attention_bias": True},
    "Qwen3Moe": {**OWN_HEAD_DIM, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Olmo2": {},
    "Olmo3": SLIDING_THEN_FULL,
    "Gemma3": {**SLIDING_THEN_FULL, **OWN_HEAD_DIM, "query_pre_attn_scalar": 20},
}
FAMILIES = {**TIER_A, **TIER_B}


def config_of(name: str, **changes) -> transformers.PretrainedConfig:
    """A config of the family, with grouped keys, whatever the family has beside LLaMA, and 64 trained tokens."""
    kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    return getattr(transformers, kind)(**{**SMALL, **FAMILIES.get(name, OWN_HEAD_DIM), **changes})


def model_of(name: str, *, dtype: torch.dtype = torch.float32, **changes) -> transformers.PreTrainedModel:
    """A random causal language model of the family, in evaluation mode."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_of(name, **changes))
    with torch.no_grad():
        # Norms and biases start as ones and zeros, which would hide their place.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()
