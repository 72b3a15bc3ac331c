"""Which layers of a model a plan is for, from its config, and why there may be none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXTENDED_LAYERS = "full_attention"
"""The layers whose frequencies a plan is for, where a model has a rotary embedding per layer type (Gemma3, OLMo3).
The others see a sliding window of positions, which does not grow with the text."""

ROTATES_WINDOWS_ONLY: dict[str, str] = {
    "afmoe": "sliding_window",
    "cohere2": "sliding_window",
    "cohere2_moe": "sliding_window",
    "exaone4": "sliding_window",
    "exaone4_5_text": "sliding_window",
    "exaone_moe": "sliding_window",
    "flint": "sliding_window",
    "kolibri1": "sliding_window",
    "lara_mini": "sliding_window",
    "llama4_text": "attention_chunk_size",
    "recurrent_gemma": "attention_window_size",
}
"""``model_type`` of families whose full attention, if any, has no rotary embedding, and the key of the window size."""

_WINDOWS = {"sliding_attention", "chunked_attention", "hybrid_sliding"}

WINDOW_OF_ALL_LAYERS = frozenset((
    "doge", "ministral3", "minimax", "mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "qwen3_moe",
    "starcoder2", "voxtral_realtime_text",
))  # fmt: skip
"""``model_type`` of families whose ``sliding_window``, where it is not None, is of every layer that attends, whatever
``layer_types`` say."""

_WITHOUT_ATTENTION = {"conv", "linear_attention", "mamba", "moe"}
"""Types of layers that keep a state in place of keys, or none."""

_EXTENDED_LABELS = {"deepseek_v4": "compress"}
"""``model_type`` whose rotary parameters have names of their own -> the one of the layers that see whole texts."""

_ROTARY_IF = {
    "falcon": ("alibi", False),
    "granitemoehybrid": ("position_embedding_type", "rope"),
    "zamba2": ("use_mem_rope", True),
}
"""``model_type`` of families with and without a rotary embedding -> the entry of a config that has one."""


def layer_typed(parameters: Mapping[str, Any]) -> bool:
    """Whether rotary parameters are given per layer type."""
    return any(isinstance(value, Mapping) for value in parameters.values())


def extended_layers(config: PretrainedConfig) -> str | None:
    """The layer type that a plan extends, or None where all layers have the same rotary parameters.

    Raises:
        ValueError: there is none, or it is not known which of several sees whole texts.
    """
    parameters = config.rope_parameters
    if not layer_typed(parameters):
        return None
    name = type(config).__name__
    types = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    full = [key for key in types if key not in _WINDOWS]
    label = _EXTENDED_LABELS.get(config.model_type)
    if label in types:
        return label
    if EXTENDED_LAYERS in types:
        full = [EXTENDED_LAYERS]
    elif not full or EXTENDED_LAYERS in parameters:
        raise ValueError(f"there is nothing to extend: the full attention of {name} has no positions")
    if len(full) > 1:
        raise ValueError(
            f"{name} has a rotary embedding per layer type ({', '.join(types)}), and which of them sees whole texts "
            "is not known to this version"
        )
    if full[0] not in (getattr(config, "layer_types", None) or full):
        raise ValueError(f"there is nothing to extend: {name} has no layers of type {full[0]}")
    return full[0]


def rope_parameters(config: PretrainedConfig) -> Mapping[str, Any]:
    """The rotary parameters of a transformers 5 config that a plan extends: the only ones, or the full layers'."""
    layers = extended_layers(config)
    return config.rope_parameters if layers is None else config.rope_parameters[layers]


def attention_window(config: PretrainedConfig) -> tuple[str, int] | None:
    """The key and the tokens of the window that every attention layer of a (text) config has; None where one has none.

    Attention at a distance of so many tokens or more does not happen, in a text of whatever length.
    """
    types = set(getattr(config, "layer_types", None) or ()) - _WITHOUT_ATTENTION
    if config.model_type in WINDOW_OF_ALL_LAYERS or (types and types <= _WINDOWS):
        chunked = types == {"chunked_attention"}
        key = "attention_chunk_size" if chunked else "sliding_window"
        window = getattr(config, key, None)
        return (key, window) if window else None
    return None


def too_short_a_window(config: PretrainedConfig, original_length: int, target_length: int) -> str | None:
    """Why a plan to read ``target_length`` tokens is too long for a model whose layers all slide; None where it is not.

    Args:
        config: of a model, or of one with parts (then its language model is read).
        original_length, target_length: tokens.
    """
    text = config.get_text_config(decoder=True)
    found = attention_window(text)
    if found is None or target_length <= original_length or found[1] >= target_length:
        return None
    key, window = found
    seen = f"every attention layer of {type(text).__name__} sees the last {window} tokens only ({key})"
    if window <= original_length:
        return (
            f"there is nothing to extend: {seen}, and was trained to read {original_length}, so that a longer text has "
            "no distance that is new to it"
        )
    return f"{seen}: a plan for {window} tokens has every distance that a text of {target_length} has"


def notes_of_windows(config: PretrainedConfig) -> list[str]:
    """What a plan does to the sliding layers of a (text) config that has layers of both kinds: remarks for the user."""
    types = set(getattr(config, "layer_types", None) or ())
    layers = extended_layers(config)
    if layers is not None:
        others = [
            kind
            for kind, value in config.rope_parameters.items()
            if isinstance(value, Mapping) and kind != layers and (kind not in _WINDOWS or kind in types)
        ]
        kept = f"only {layers} layers are extended: {' and '.join(others)} layers keep their own frequencies"
        return [kept] if others else []
    windows = sorted(types & _WINDOWS)
    if not windows or attention_window(config) is not None or not types - _WINDOWS - _WITHOUT_ATTENTION:
        return []
    return [f"{' and '.join(windows)} layers share the frequencies of the others, and are extended with them"]


def unextendable(config: PretrainedConfig) -> str | None:
    """Why no plan extends a model, from the config of its language model; None where one can.

    ``plan()``, every export and ``verify()`` refuse a model for this reason.
    """
    name, kind = type(config).__name__, getattr(config, "model_type", "")
    windows = _rotates_windows_only(config)
    if windows is not None:
        return windows
    parts = [p for p in config.sub_configs if getattr(getattr(config, p, None), "rope_parameters", None)]
    if len(parts) > 1:
        return f"{name} has several transformers with rotary embeddings of their own ({', '.join(parts)})"
    for key in ("rope_parameters", "max_position_embeddings"):
        if not getattr(config, key, None):
            return f"{name} has no rotary embedding that a plan can extend (no {key})"
    if kind in _ROTARY_IF:
        key, value = _ROTARY_IF[kind]
        found = getattr(config, key, None)
        if found != value:
            return f"{name} has no rotary embedding: its {key} is {found!r}, not {value!r}"
    if kind == "olmo3" and not layer_typed(config.rope_parameters):
        return (
            "this version of transformers would scale the sliding layers of olmo3 too: from 5.13 on its types of "
            "layers have frequencies of their own"
        )
    if config.__dict__.get("global_head_dim") not in (None, config.__dict__.get("head_dim")):
        return (
            f"this version of transformers computes a longrope of {kind} by the head_dim of its sliding layers: from "
            "5.15 on types of layers may have head_dims of their own"
        )
    try:
        extended_layers(config)
    except ValueError as error:
        return str(error)
    return _bases_of_layers(config)


def _rotates_windows_only(config: PretrainedConfig) -> str | None:
    kind = getattr(config, "model_type", "")
    key = ROTATES_WINDOWS_ONLY.get(kind)
    window = getattr(config, key, None) if key else None
    everywhere = kind == "recurrent_gemma"
    if not window or not (everywhere or _WINDOWS & set(getattr(config, "layer_types", None) or ())):
        return None
    return (
        f"there is nothing to extend: {kind} rotates only the layers that see {window} tokens ({key}), and a longer "
        "text needs no other frequencies"
    )


def _bases_of_layers(config: PretrainedConfig) -> str | None:
    """Of a model whose layers have RoPE bases of their own (granite_swa): why it cannot be extended, or None."""
    bases = getattr(config, "layer_rope_theta", None)
    if not bases:
        return None
    types = getattr(config, "layer_types", None) or [EXTENDED_LAYERS] * len(bases)
    full = {base for base, kind in zip(bases, types, strict=False) if base and kind not in _WINDOWS}
    if not full:
        return f"there is nothing to extend: the full attention of {type(config).__name__} has no positions"
    rotating = {base for base in bases if base}
    if rotating != {config.rope_parameters.get("rope_theta")}:
        return (
            f"layers of {type(config).__name__} have RoPE bases of their own (layer_rope_theta: "
            f"{', '.join(f'{base:g}' for base in sorted(rotating))}), and its config keeps one list of factors"
        )
    return None
