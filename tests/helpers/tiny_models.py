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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, POSITIONS, WINDOW, EXPERTS = 2, 4, 2, 16, 64, 64, 16, 4

# Set wherever a config class has the key, whatever the type.
SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "lru_width"], HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"], HEAD_DIM),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"], 96),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["shared_experts_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["dense_intermediate_size", "prefix_dense_intermediate_size"], 96),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], POSITIONS),
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": HIDDEN**-0.5,  # with the usual 0.02 attention is nearly uniform at this size
    **dict.fromkeys(["sliding_window", "attention_window_size", "local_attention", "attention_chunk_size"], WINDOW),
    # All experts are active: a choice between them would hang on the last bit of a logit.
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"], EXPERTS),
    **dict.fromkeys(["n_group", "topk_group"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], HEAD_DIM),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
}
PER_LAYER = ["layer_types", "mlp_layer_types", "indexer_types", "layers_block_type"]
CHANGES: dict[str, dict] = {}
NOT_BUILT: dict[str, str] = {}


def _source(class_name: str) -> Path:
    """File of a class of transformers, without importing it."""
    module = transformers._class_to_module[class_name]
    return Path(transformers.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")


@functools.lru_cache(maxsize=None)
def _rotary_classes(file: Path) -> list[str]:
    names = re.findall(r"^class (\w*Rotary\w*)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in names if "Vision" not in name]


ROTARY_TYPES = sorted(
    kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if _rotary_classes(_source(name))
)


def model_class(model_type: str) -> type:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def config_class(model_type: str) -> type:
    """Config class of a type, or of its text tower where the model class takes that one."""
    wanted, own = model_class(model_type).config_class, CONFIG_MAPPING[model_type]
    return wanted if "text_config" in own.sub_configs else own


@functools.lru_cache(maxsize=None)
def _default(cls: type) -> transformers.PretrainedConfig:
    return cls()


def _rope(parameters):
    """The default rope_parameters with the lengths of a tiny model."""
    if not isinstance(parameters, dict):
        return parameters
    sizes = {"factor": 2.0, "original_max_position_embeddings": POSITIONS // 2, "max_position_embeddings": POSITIONS}
    return {key: _rope(value) if isinstance(value, dict) else sizes.get(key, value) for key, value in parameters.items()}


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


def _values(default: transformers.PretrainedConfig) -> dict:
    """What makes this config tiny, its parts (towers) included."""
    cls = type(default)
    known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    changes = CHANGES.get(cls.model_type, {})
    values = {**SIZES, **_layers(known, default, changes)}
    values["rope_parameters"] = _rope(getattr(default, "rope_parameters", None))
    if "kv_lora_rank" in known:  # the latent attention has as many keys as queries
        values["num_key_value_heads"] = HEADS
    values = {key: value for key, value in values.items() if key in known}
    parts = {key: getattr(default, key) for key in known}
    parts = {key: part for key, part in parts.items() if isinstance(part, transformers.PretrainedConfig)}
    for key, part in parts.items():
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


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa", **changes
) -> transformers.PreTrainedModel:
    cls = model_class(model_type)
    config = tiny_config(model_type, **changes)
    config._attn_implementation = attn_implementation if cls._supports_sdpa else "eager"
    torch.manual_seed(0)
    model = cls(config)
    _randomise(model)
    return model.to(dtype).eval()
