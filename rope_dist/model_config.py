"""Reads a model's rotary embedding from its transformers config, and writes an extension into it."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .messages import unknown
from .presets import PRESETS
from .strategies import PretrainedRope, check_length, check_number, check_rotary_dim
from .trained_length import LENGTH_KEYS, recorded_extension, trained_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXTENDED_LAYERS = "full_attention"
"""The layers whose frequencies a plan is for, where a model has a rotary embedding per layer type (Gemma3, OLMo3).
The others see a sliding window of positions, which does not grow with the text."""

GIVEN = "given as original_length"
"""``length_from`` of a trained length that the caller gave beside a model."""

REFUSED: dict[str, str] = {
    "cohere": "its pairs are interleaved",
    "cohere2": "its pairs are interleaved",
    "deepseek_v3": "it rotates a part of the queries and one key that all heads share (MLA)",
    "exaone4": "its sliding and full layers use the rotary embedding differently",
    "glm": "its pairs are interleaved and only a part of each head is rotated",
    "glm4": "its pairs are interleaved and only a part of each head is rotated",
    "gpt_neox": "queries, keys and values are one projection, and only a part of each head is rotated",
    "gpt_oss": "its attention has sinks and its rotary embedding another layout",
    "helium": "its pairs are interleaved",
    "hunyuan_v1_dense": "queries and keys are normalised after the rotation",
    "hunyuan_v1_moe": "queries and keys are normalised after the rotation",
    "llama4": "its pairs are interleaved, as complex numbers",
    "ministral3": "queries are scaled by their position after the rotation",
    "phi3": "queries, keys and values are one projection, and only a part of each head may be rotated",
}
"""``model_type`` of families that look like LLaMA but that ``enable()`` refuses, and why."""

ROTATES_WINDOWS_ONLY: dict[str, str] = {
    "afmoe": "sliding_window",
    "cohere2": "sliding_window",
    "cohere2_moe": "sliding_window",
    "exaone4": "sliding_window",
    "exaone4_5_text": "sliding_window",
    "exaone_moe": "sliding_window",
    "flint": "sliding_window",
    "kolibri1": "sliding_window",
    "llama4_text": "attention_chunk_size",
}
"""``model_type`` of families whose full attention has no rotary embedding, and the key of their window's size."""

# Keys of the rotary parameters that determine the frequencies: an extension replaces them. All others
# (mrope_section, llama_4_scaling_beta, mscale_all_dim, ...) are read elsewhere in a model and stay.
_FREQUENCY_KEYS = {
    "alpha",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "high_freq_factor",
    "long_factor",
    "long_mscale",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "short_mscale",
    "truncate",
    "type",
}


_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class ModelRope:
    """A model's rotary embedding as read from its config.

    Attributes:
        rope: the embedding that the model was trained with.
        head_dim: dimensions of an attention head.
        length_from: where ``rope.length`` comes from.
        recorded: the length before rope_dist extended the model, where the config records that; else None.
        notes: remarks for the user before extending it.
        loss: a capability that an extension removes, worth a warning; else None.
    """

    rope: PretrainedRope
    head_dim: int
    length_from: str | None = None
    recorded: int | None = None
    notes: tuple[str, ...] = ()
    loss: str | None = None


def load_config(source: str | os.PathLike[str]) -> PretrainedConfig:
    """The ``transformers`` config of a directory, a ``config.json`` or a hub id.

    Raises:
        ValueError: there is none, or it is at fault: names the file and, where transformers does, the key.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name, path = str(source), Path(source)
    if name in PRESETS and not path.exists():
        raise ValueError(
            f"{name!r} is a preset, which has no config: give a directory or a hub id (owner/name)"
        )
    if "/" not in name and not path.exists():
        # A mistyped preset should not wait for the hub to say no.
        other = "; or give a directory with a config.json, or a hub id (owner/name)"
        raise ValueError(unknown("model", name, PRESETS, other))
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ValueError(f"no config of a model at {name}: the directory has no config.json")
    try:
        return AutoConfig.from_pretrained(source)
    except (
        StrictDataclassError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = _reason(error)
    if file.exists():
        raise ValueError(f"{file} is not a config that transformers reads: {reason}")
    raise ValueError(f"no config of a model at {name}, neither a directory nor on the hub: {reason}")


def _reason(error: Exception) -> str:
    """transformers' error in one line. Its validation errors have the reason in their last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":"):
        return lines[0][:300]
    return lines[-1].partition(" Errors: ")[0].partition("Error: ")[2][:300] or lines[-1][:300]


def layer_typed(parameters: Mapping[str, Any]) -> bool:
    """Whether rotary parameters are given per layer type."""
    return any(isinstance(value, Mapping) for value in parameters.values())


def extended_layers(config: PretrainedConfig) -> str | None:
    """The layer type that a plan extends, or None where all layers have the same rotary parameters."""
    parameters = config.rope_parameters
    if not layer_typed(parameters):
        return None
    types = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if EXTENDED_LAYERS in types:
        return EXTENDED_LAYERS
    if EXTENDED_LAYERS in parameters:
        raise ValueError(
            f"there is nothing to extend: the full attention of {type(config).__name__} has no positions"
        )
    full = [key for key in types if "sliding" not in key]
    if len(full) == 1:
        return full[0]
    raise ValueError(
        f"{type(config).__name__} has a rotary embedding per layer type ({', '.join(parameters)}), and "
        f"which of them sees whole texts is not known; plan from plain numbers: theta, head_dim and original_length"
    )


def rope_parameters(config: PretrainedConfig) -> Mapping[str, Any]:
    """The rotary parameters of a transformers 5 config that a plan extends: the only ones, or the full layers'."""
    layers = extended_layers(config)
    return config.rope_parameters if layers is None else config.rope_parameters[layers]


def pretrained_rope(
    config: PretrainedConfig, original_length: int | None = None
) -> tuple[PretrainedRope, int]:
    """The trained rotary embedding and the head dimension of a model: :func:`read_rope` without its reasons."""
    found = read_rope(config, original_length)
    return found.rope, found.head_dim


def read_rope(config: PretrainedConfig, original_length: int | None = None) -> ModelRope:
    """Read a model's rotary embedding from its ``transformers`` config.

    Any static ``rope_type`` counts as what the model was trained with: its factors and attention scaling become the
    starting point, computed by transformers' own functions. ``dynamic`` changes nothing within the trained length,
    so that the model was trained with the plain frequencies.

    Args:
        config: of a model, or of one with parts (then its language model is read).
        original_length: tokens that the model was trained to read, where the config does not say or is wrong.

    Raises:
        ValueError: the config has no rotary embedding that a plan can extend, a key is of the wrong type, or its
            keys contradict each other about the trained length.
    """
    text = _text_config(config)
    name = type(text).__name__
    nothing = rotates_windows_only(text)
    if nothing is not None:
        raise ValueError(nothing)
    layers = extended_layers(text)
    parameters = rope_parameters(text)
    kind = parameters.get("rope_type", "default")
    theta = _number(parameters, "rope_theta", name)
    head_dim = _head_dim(text, layers)
    if kind not in _ROPE_TYPES:
        raise ValueError(
            f"the rope_type {kind!r} of {name} is not known ({', '.join(_ROPE_TYPES)} are); plan from plain numbers: "
            "theta, head_dim and original_length"
        )
    loss = None
    notes = [
        f"enable() does not take this family: {REFUSED[t]}" for t in _model_types(config) if t in REFUSED
    ]
    if original_length is None:
        length, length_from = trained_length(config, text, parameters, per_layer_type=layers is not None)
    else:
        length, length_from = check_length(original_length, "original_length"), GIVEN
    rotary_dim = _rotary_dim(text, parameters, layers, head_dim)
    plain = PretrainedRope(theta, rotary_dim, length)
    if kind == "default":
        rope = plain
    elif kind == "dynamic":
        if parameters.get("alpha"):
            raise ValueError(
                f"{name} has a dynamic rope_type with alpha, which changes theta; plan from plain numbers: "
                "theta, head_dim and original_length"
            )
        rope = plain
        notes.append(
            "the plan replaces the model's dynamic NTK scaling, which starts past the trained length"
        )
    else:
        rope = _scaled(text, parameters, kind, layers, plain)
        if kind == "longrope" and list(parameters["short_factor"]) != list(parameters["long_factor"]):
            loss = (
                "the model's short_factor is discarded: texts of up to "
                f"{parameters['original_max_position_embeddings']} tokens too are read with the extension of its "
                "long_factor"
            )
    recorded = recorded_extension(text) if original_length is None else None
    if recorded is not None and recorded < length:
        notes.append(
            f"rope_dist extended the model from {recorded} tokens already, which is what a factor counts from"
        )
    return ModelRope(rope, head_dim, length_from, recorded, tuple(notes), loss)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    if not getattr(text, "rope_parameters", None) or not hasattr(text, "max_position_embeddings"):
        raise ValueError(
            f"{type(text).__name__} has no rotary embedding (no rope_parameters or max_position_embeddings)"
        )
    return text


def _model_types(config: PretrainedConfig) -> list[str]:
    return list(dict.fromkeys((config.model_type, config.get_text_config(decoder=True).model_type)))


def rotates_windows_only(config: PretrainedConfig) -> str | None:
    """Why there is nothing to extend in a model of :data:`ROTATES_WINDOWS_ONLY`; None for every other model."""
    key = ROTATES_WINDOWS_ONLY.get(config.model_type)
    window = getattr(config, key, None) if key else None
    windowed = {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ())
    if not (window and windowed):
        return None
    return (
        f"there is nothing to extend: {config.model_type} rotates only the layers that see {window} tokens "
        f"({key}), and its full attention has no positions; a longer text needs no other frequencies"
    )


def _number(values: Mapping[str, Any], key: str, name: str, default: Any = None) -> float:
    return check_number(values.get(key, default), f"{key} of {name}")


def _heterogeneous(config: PretrainedConfig) -> bool:
    """Whether layers have sizes of their own (Gemma4's head_dim), which cannot be read from the whole config."""
    return bool(getattr(config, "is_heterogeneous", False))


def _head_dim(config: PretrainedConfig, layers: str | None) -> int:
    if _heterogeneous(config):
        by_layer: Any = config.per_layer_config  # by a type of layers too, which its annotation leaves out
        config = by_layer[layers or EXTENDED_LAYERS]
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
            raise ValueError(
                f"{type(config).__name__} says no head_dim: it has hidden_size {hidden} and num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    return check_rotary_dim(head_dim, f"head_dim of {type(config).__name__}")


def _rotary_dim(
    config: PretrainedConfig, parameters: Mapping[str, Any], layers: str | None, head_dim: int
) -> int:
    """Rotated dimensions of a head, as the model's own class has them: some families ignore partial_rotary_factor."""
    name = type(config).__name__
    share = parameters.get("partial_rotary_factor")
    share = 1.0 if share is None else check_number(share, f"partial_rotary_factor of {name}")
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor of {name} must be above 0 and at most 1, got {share:g}")
    kind = parameters.get("rope_type", "default")
    if share == 1:
        return head_dim
    if kind == "proportional":
        raise ValueError(
            f"{name} is of rope_type 'proportional' with partial_rotary_factor {share:g}: its other pairs do not "
            "rotate, which factors cannot express"
        )
    own = _own_inv_freq(config, layers)
    rotary_dim = int(head_dim * share)
    if own is not None and 2 * own.numel() != rotary_dim:
        if 2 * own.numel() != head_dim or kind not in ("default", "dynamic"):
            raise ValueError(
                f"partial_rotary_factor {share:g} of {name} gives {rotary_dim} rotated dimensions of {head_dim}, the "
                f"model's own code {2 * own.numel()}"
            )
        rotary_dim = head_dim
    return check_rotary_dim(rotary_dim, f"the rotated part of head_dim of {name}")


def _own_inv_freq(config: PretrainedConfig, layers: str | None) -> torch.Tensor | None:
    """Frequencies without scaling by the model's own class, ``[pairs]``; None where it has no such function."""
    from transformers import MODEL_MAPPING

    try:
        model = MODEL_MAPPING[type(config)]
    except (KeyError, ImportError):
        return None  # custom code, or a package that it needs is missing
    module = sys.modules[model_class(model).__module__]
    for name, value in vars(module).items():
        if name.endswith("RotaryEmbedding") and hasattr(value, "compute_default_rope_parameters"):
            with torch.device("cpu"):
                return value.compute_default_rope_parameters(config, **_layer_option(layers))[0]
    return None


def model_class(mapped: Any) -> Any:
    """The class in an entry of transformers' ``MODEL_MAPPING``: some (Funnel) are a tuple of two."""
    return mapped[0] if isinstance(mapped, tuple) else mapped


def _layer_option(layers: str | None) -> dict[str, str]:
    # transformers' functions take the type of layers where there are several.
    return {} if layers is None else {"layer_type": layers}


def _scaled(
    config: PretrainedConfig,
    parameters: Mapping[str, Any],
    kind: str,
    layers: str | None,
    plain: PretrainedRope,
) -> PretrainedRope:
    """The embedding of a model that was trained with a scaling of its own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = type(config).__name__
    try:
        with torch.device("cpu"):
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, **_layer_option(layers))
        if kind == "longrope":
            original = parameters["original_max_position_embeddings"]
            key = "long_factor" if config.max_position_embeddings > original else "short_factor"
            factors = torch.tensor(parameters[key], dtype=torch.float64, device="cpu")
            if config.model_type == "phimoe":
                # It has its own keys for the attention scaling.
                scaling = parameters[key.replace("factor", "mscale")]
        else:
            factors = (plain.inv_freq.double() / inv_freq.double()).float().double()
        return PretrainedRope(
            plain.theta, plain.rotary_dim, plain.length, tuple(factors.tolist()), float(scaling)
        )
    except KeyError as error:
        raise ValueError(
            f"the rotary parameters of {name} lack {error.args[0]!r}, rope_type {kind!r}"
        ) from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"the rotary parameters of {name} are not what rope_type {kind!r} takes: {_reason(error)}"
        ) from None


def extended_parameters(
    config: PretrainedConfig | None,
    *,
    theta: float,
    head_dim: int,
    rotary_dim: int,
    target_length: int,
    factors: list[float],
    attention_scaling: float,
) -> dict[str, Any]:
    """Entries of a transformers 5 (text) config that make stock compute these frequencies and change nothing else.

    Args:
        config: the config to be changed; None for a plain LLaMA.
        theta, head_dim, rotary_dim, target_length, factors, attention_scaling: as in :class:`RopePlan`.

    Raises:
        ValueError: stock cannot compute them from this config.
    """
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": float(attention_scaling),
        "original_max_position_embeddings": target_length,
        "short_factor": list(factors),
        "long_factor": list(factors),
    }
    if rotary_dim != head_dim:
        share = rotary_dim / head_dim
        while int(head_dim * share) < rotary_dim:  # as readers truncate it, e.g. 30 of 44
            share = math.nextafter(share, 1.0)
        parameters["partial_rotary_factor"] = share
    if config is None:
        return {"max_position_embeddings": target_length, "rope_parameters": parameters}
    config = _text_config(config)
    own, layers = rope_parameters(config), extended_layers(config)
    if "partial_rotary_factor" in own or getattr(config, "partial_rotary_factor", None) is not None:
        # transformers would fill in a missing one.
        parameters.setdefault("partial_rotary_factor", 1.0)
    kept = {key: copy.deepcopy(value) for key, value in own.items() if key not in _FREQUENCY_KEYS}
    if own.get("rope_type", "default") == "default":
        # Models with multi-head latent attention read these only beside another type.
        kept = {key: value for key, value in kept.items() if key not in ("mscale", "mscale_all_dim")}
    # Some models read the scaling's own numbers for more than frequencies. Both are free here: the two factors are
    # equal and the attention factor is written out.
    if kept.get("mscale_all_dim") and own.get("factor") is not None:
        parameters["factor"] = own["factor"]
    if kept.get("llama_4_scaling_beta") and "original_max_position_embeddings" in own:
        parameters["original_max_position_embeddings"] = own["original_max_position_embeddings"]
    if config.model_type == "phimoe":
        parameters["short_mscale"] = parameters["long_mscale"] = float(attention_scaling)
    parameters = {**kept, **parameters}
    entries: dict[str, Any] = {
        "max_position_embeddings": target_length,
        "rope_parameters": parameters if layers is None else {**config.rope_parameters, layers: parameters},
    }
    for key in LENGTH_KEYS:
        length = config.__dict__.get(key)
        if isinstance(length, int) and not isinstance(length, bool) and length < target_length:
            entries[key] = target_length
    if config.__dict__.get("original_max_position_embeddings") is not None:
        # transformers prefers it to the one of the rotary parameters.
        entries["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    # Stock's longrope multiplies a head_dim that is there but None (Mixtral).
    if not _heterogeneous(config) and getattr(config, "head_dim", 0) is None:
        entries["head_dim"] = head_dim
    _check_represented(config, entries, layers, theta, rotary_dim, target_length, factors)
    return entries


def _check_represented(
    config: PretrainedConfig,
    entries: dict[str, Any],
    layers: str | None,
    theta: float,
    rotary_dim: int,
    target_length: int,
    factors: list[float],
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = type(config).__name__
    if _heterogeneous(config):
        raise ValueError(f"{name} has layers of several head_dims, for which stock's longrope has no form")
    trial = copy.deepcopy(config)
    trial.__dict__.update(copy.deepcopy(entries))
    planned = PretrainedRope(theta, rotary_dim, target_length, tuple(factors)).inv_freq
    try:
        with torch.device("cpu"):
            found, _ = ROPE_INIT_FUNCTIONS["longrope"](trial, seq_len=target_length, **_layer_option(layers))
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"stock transformers cannot run this plan in {name}: {_reason(error)}") from None
    if not torch.equal(found, planned):
        raise ValueError(f"stock transformers would compute other frequencies from {name} than planned")
