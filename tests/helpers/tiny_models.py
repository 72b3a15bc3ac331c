"""Tiny random models of every rotary causal language model type of the installed transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, EXPERTS = 2, 4, 2, 16, 64, 4
POSITIONS, ORIGINAL, WINDOW = 64, 16, 16

# Set wherever a config class has the key, whatever the type.
SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "lru_width"], HIDDEN),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads"], KV_HEADS),
    **dict.fromkeys(
        ["head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_channels"], HEAD_DIM
    ),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers"], LAYERS),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], POSITIONS),
    "original_max_position_embeddings": ORIGINAL,
    "rotary_dim": 8,
    **dict.fromkeys(["use_qk_norm", "qk_layernorm"], True),
    "clip_qkv": 1.0,
    # Embeddings
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": HIDDEN**-0.5,  # with the usual 0.02 attention is nearly uniform at this size
    "logit_scale": 0.5,
    "hidden_size_per_layer_input": 16,
    # MLP; all experts are active, as a choice between them would hang on the last bit of a logit
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"], 96),
    **dict.fromkeys(["dense_intermediate_size", "prefix_dense_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_experts_intermediate_size"], 32),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"], EXPERTS),
    **dict.fromkeys(["n_group", "topk_group"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    "mlp_only_layers": [0],
    # Latent, sparse and windowed attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "index_head_dim": 32,
    "index_n_heads": 8,  # with few heads many scores are zero after the ReLU, and the choice among them is arbitrary
    "index_topk": 8,
    "use_sliding_window": True,
    **dict.fromkeys(
        ["sliding_window", "attention_window_size", "local_attention", "attention_chunk_size"], WINDOW
    ),
    # Linear attention and state space
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], HEAD_DIM),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "block_size"], 8),
    # Vision and audio towers
    **dict.fromkeys(["depth", "num_blocks"], LAYERS),
    **dict.fromkeys(["num_heads", "attention_heads"], HEADS),
    **dict.fromkeys(
        ["embed_dim", "out_hidden_size", "ext_pw_out_channel", "depthwise_separable_out_channel"], HIDDEN
    ),
    **dict.fromkeys(
        ["nemo_conv_channels", "num_position_embeddings", "position_embedding_size", "mm_posemb_size"], 16
    ),
    **{
        key: [0]
        for key in ["deepstack_visual_indexes", "fullatt_block_indexes", "intermediate_layers_indices"]
    },
    **dict.fromkeys(
        ["mm_embed_dim", "output_proj_dims", "alignment_intermediate_size", "projector_hidden_size"], 64
    ),
    "num_global_layers": 1,
    "vision_output_dim": HIDDEN * 2,
}
PER_LAYER = ["layer_types", "mlp_layer_types", "indexer_types", "layers_block_type"]
CONV_FULL = {"layer_types": ["conv", "full_attention"]}
SLIDING_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
# Two layers that keep their keys and values, two that share them.
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
GEMMA4 = {**SHARED, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
# A quarter of the head is rotated: four pairs of a head of 32.
QUARTER = {"num_attention_heads": 2, "num_key_value_heads": 1}
QWEN35 = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
GRANITE_SWA = {
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "layer_rope_theta": [10000.0, 5000.0, 0],  # 0: a layer without rotation
}
# What a config needs beside its sizes, by the model type of the config or of a part of a composite config.
CHANGES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"head_dim": HEAD_DIM},
    "blt": {
        "num_hidden_layers": LAYERS,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "blt_local_encoder": {"hidden_size_global": HIDDEN * 2},
    "blt_local_decoder": {"hidden_size_global": HIDDEN * 2},
    "blt_global_transformer": {"hidden_size": HIDDEN * 2, "num_attention_heads": 8, "num_key_value_heads": 4},
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {
        **SLIDING_TYPES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 1.0, "rope_theta": 10000.0},
        # transformers 5.6 sizes the router by the hidden size of the experts.
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": HIDDEN,
            "moe_num_experts": EXPERTS,
            "moe_top_k": EXPERTS,
        },
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "rope_parameters": None,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note_text": {
        "rope_parameters": None,
        "head_dim": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": {**GEMMA4, "enable_moe_block": True},
    "gemma4_unified_text": GEMMA4,
    "glm4v_text": MROPE,
    "glm4v_moe_text": {
        "rope_parameters": {
            **MROPE["rope_parameters"],
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
    },
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "gpt_neox": QUARTER,
    "granite_swa": GRANITE_SWA,
    "granitemoe_swa": GRANITE_SWA,
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "hrm_text": {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 2},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "laguna": {"num_attention_heads_per_layer": [2, 4]},
    "lfm2": CONV_FULL,
    "lfm2_moe": CONV_FULL,
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1], "floor_scale": 8},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2, "moe_topk": EXPERTS + 2},
    "mimo_v2_flash": {"head_dim": 24},  # with the default partial factor 0.334: four pairs
    "minicpm3": {"dim_model_base": HIDDEN},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_head_dim": HEAD_DIM,
        "index_n_heads": KV_HEADS,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen3_vl_text": MROPE,
    "qwen3_vl_moe_text": MROPE,
    "qwen3_5_text": QWEN35,
    "qwen3_5_moe_text": QWEN35,
    "qwen3_next": {"head_dim": 32},
    "qwen4_exp_text": {
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "smollm3": {**SLIDING_TYPES, "no_rope_layers": [1, 0]},
    "stablelm": QUARTER,
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_key_value_heads": HEADS,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
        "adapter_rank": 8,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "router_hidden_size": 16},
}
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm; the text tower is gemma3n_text",
}


def _source(class_name: str) -> Path:
    """File of a class of transformers, without importing it."""
    module = transformers._class_to_module[class_name]
    return Path(transformers.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")


@functools.cache
def _rotary_classes(file: Path) -> list[str]:
    names = re.findall(r"^class (\w*Rotary\w*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in names if "Vision" not in name]


ROTARY_TYPES = sorted(
    kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if _rotary_classes(_source(name))
)


# Composite models whose text tower has rotary attention.
_MULTIMODAL = """
aria aya_vision cohere2_vision cohere_compass deepseek_vl exaone4_5 fuyu gemma3 gemma4 gemma4_unified glm4v
glm4v_moe got_ocr2 idefics2 idefics3 internvl lfm2_vl llava llava_next llava_onevision minimax_m3_vl mistral3 mllama
ovis2 paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm video_llama_3 video_llava
vipllava
"""
MULTIMODAL = [kind for kind in _MULTIMODAL.split() if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]


def model_class(model_type: str) -> type:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def config_class(model_type: str) -> type:
    """Config class of a type, or of its text tower where the model class takes that one."""
    wanted, own = model_class(model_type).config_class, CONFIG_MAPPING[model_type]
    return wanted if "text_config" in own.sub_configs else own


@functools.cache
def _default(cls: type) -> transformers.PretrainedConfig:
    return cls()


def _rope(parameters):
    """The default rope_parameters with the lengths of a tiny model."""
    if not isinstance(parameters, dict):
        return parameters
    sizes = {
        "factor": POSITIONS / ORIGINAL,
        "original_max_position_embeddings": ORIGINAL,
        "max_position_embeddings": POSITIONS,
    }
    return {
        key: _rope(value) if isinstance(value, dict) else sizes.get(key, value)
        for key, value in parameters.items()
    }


def _layers(known: set[str], default: transformers.PretrainedConfig, changes: dict) -> dict:
    """Every kind of layer once, in the order in which a full-size model has them."""
    kinds = {key: list(dict.fromkeys(getattr(default, key, None) or [])) for key in PER_LAYER if key in known}
    if kinds.get("layer_types") in (["full_attention"], ["sliding_attention"]) and "sliding_window" in known:
        kinds["layer_types"] = ["sliding_attention", "full_attention"]
    kinds = {key: values for key, values in {**kinds, **changes}.items() if key in PER_LAYER and values}
    number = max([LAYERS, *map(len, kinds.values())])
    return {
        "num_hidden_layers": number,
        **{key: (values + values[-1:] * number)[:number] for key, values in kinds.items()},
    }


def _changes(default: transformers.PretrainedConfig) -> dict:
    """``CHANGES`` of a config, with the names that the installed transformers has for its layers."""
    changes = CHANGES.get(default.model_type, {})
    if "mamba" in [kind for key in PER_LAYER for kind in getattr(default, key, None) or []]:
        older = {"linear_attention": "mamba", "full_attention": "attention"}
        return {k: [older.get(i, i) for i in v] if k in PER_LAYER else v for k, v in changes.items()}
    return changes


def _values(default: transformers.PretrainedConfig) -> dict:
    """What makes this config tiny, its parts (towers) included."""
    cls = type(default)
    known = {field.name for field in dataclasses.fields(cls)}
    changes = _changes(default)
    values = {**SIZES, **_layers(known, default, changes)}
    values["rope_parameters"] = _rope(getattr(default, "rope_parameters", None))
    if "kv_lora_rank" in known:  # the latent attention has as many keys as queries
        values["num_key_value_heads"] = HEADS
    values = {key: value for key, value in values.items() if key in known}
    for key in cls.sub_configs:
        part = getattr(default, key)
        if part is None and key == "vision_config":
            part = cls.sub_configs[key]()
        if isinstance(part, transformers.PretrainedConfig):
            values[key] = {**_values(part), "model_type": part.model_type}
    return {**values, **changes}


def tiny_config(model_type: str, **changes) -> transformers.PretrainedConfig:
    """Config of two or three layers that have every kind of layer of the type."""
    cls = config_class(model_type)
    return cls(**copy.deepcopy({**_values(_default(cls)), **changes}))


def _randomise(model: torch.nn.Module) -> None:
    """Norms, biases and sinks start as ones and zeros, which would hide their place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter) * 0.3)


def _built(cls: type, config: transformers.PretrainedConfig, dtype: torch.dtype, attn_implementation: str):
    config._attn_implementation = attn_implementation if cls._supports_sdpa else "eager"
    torch.manual_seed(0)
    model = cls(config)
    _randomise(model)
    tables = [
        (m, n, b) for m in model.modules() if "Rotary" in type(m).__name__ for n, b in m.named_buffers()
    ]
    model.to(dtype)
    for module, name, table in tables:  # float32, as from_pretrained leaves them
        setattr(module, name, table)
    return model.eval()


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa", **changes
) -> transformers.PreTrainedModel:
    """A seeded causal language model of the type in evaluation mode; eager attention where it has no sdpa.

    ``changes`` are keys of its config. Buffers of rotary embeddings stay float32 whatever ``dtype`` is.
    """
    return _built(model_class(model_type), tiny_config(model_type, **changes), dtype, attn_implementation)


def tiny_multimodal(model_type: str) -> transformers.PreTrainedModel:
    """A seeded image-text-to-text model of the type in evaluation mode; text token ids alone are enough for it."""
    cls = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    config = cls.config_class(**copy.deepcopy(_values(_default(cls.config_class))))
    return _built(cls, config, torch.float32, "sdpa")
