"""Reads a model's rotary embedding from its transformers config, and writes an extension into it."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import stock_rotary
from .layer_types import EXTENDED_LAYERS, extended_layers, notes_of_windows, rope_parameters, unextendable
from .messages import unknown
from .presets import PRESETS
from .strategies import (
    STILL,
    PretrainedRope,
    check_length,
    check_number,
    check_rotary_dim,
    default_inv_freq,
)
from .trained_length import LENGTH_KEYS, recorded_extension, recorded_theta, trained_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIVEN = "given as original_length"
"""``length_from`` of a trained length that the caller gave beside a model."""

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
    layers = extended_layers(text)
    parameters = rope_parameters(text)
    kind = parameters.get("rope_type", "default")
    theta = _number(parameters, "rope_theta", name)
    head_dim = _head_dim(text, layers)
    if kind not in _ROPE_TYPES:
        raise ValueError(f"the rope_type {kind!r} of {name} is not known ({', '.join(_ROPE_TYPES)} are)")
    share = parameters.get("partial_rotary_factor")
    share = 1.0 if share is None else check_number(share, f"partial_rotary_factor of {name}")
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor of {name} must be above 0 and at most 1, got {share:g}")
    if original_length is None:
        length, length_from = trained_length(config, text, parameters, per_layer_type=layers is not None)
    else:
        length, length_from = check_length(original_length, "original_length"), GIVEN
    recorded = recorded_extension(text) if original_length is None else None
    # An extension by a change of base: factors are relative to the base that the model was trained with.
    theta = recorded_theta(text) or theta
    rope = _trained(text, parameters, layers, theta, length)
    loss, notes = None, notes_of_windows(text)
    if kind == "dynamic" and not parameters.get("alpha"):
        notes.append(
            "the plan replaces the model's dynamic NTK scaling, which starts past the trained length"
        )
    if kind == "longrope" and list(parameters["short_factor"]) != list(parameters["long_factor"]):
        loss = (
            "the model's short_factor is discarded: texts of up to "
            f"{parameters['original_max_position_embeddings']} tokens too are read with the extension of its "
            "long_factor"
        )
    still = sum(factor == STILL for factor in rope.factors or ())
    if still:
        notes.append(f"{still} of the {rope.pairs} pairs of a head do not rotate, and stay so")
    if recorded is not None and recorded < length:
        notes.append(
            f"rope_dist extended the model from {recorded} tokens already, which is what a factor counts from"
        )
    return ModelRope(rope, head_dim, length_from, recorded, tuple(notes), loss)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    reason = unextendable(text)
    if reason is not None:
        raise ValueError(reason)
    return text


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


def _trained(
    config: PretrainedConfig, parameters: Mapping[str, Any], layers: str | None, theta: float, length: int
) -> PretrainedRope:
    """The embedding that the model's own class computes, as factors of the plain one of as many pairs."""
    kind = parameters.get("rope_type", "default")
    name = type(config).__name__
    try:
        inv_freq, scaling = stock_rotary.frequencies(config, layers)
        plain = default_inv_freq(theta, 2 * inv_freq.numel())
        factors: torch.Tensor | None = None
        if kind == "longrope":
            original = parameters["original_max_position_embeddings"]
            key = "long_factor" if config.max_position_embeddings > original else "short_factor"
            factors = torch.tensor(parameters[key], dtype=torch.float64, device="cpu")
            if config.model_type == "phimoe":
                # It has its own keys for the attention scaling.
                scaling = parameters[key.replace("factor", "mscale")]
        elif not torch.allclose(inv_freq, plain, rtol=1e-6, atol=0.0):
            factors = (plain.double() / inv_freq.double()).float().double()
            factors[inv_freq == 0] = STILL
        given = None if factors is None else tuple(factors.tolist())
        return PretrainedRope(theta, 2 * inv_freq.numel(), length, given, float(scaling))
    except KeyError as error:
        raise ValueError(
            f"the rotary parameters of {name} lack {error.args[0]!r}, rope_type {kind!r}"
        ) from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
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
    if own.get("rope_type", "default") == "default" or not own.get("mscale_all_dim"):
        # Models with multi-head latent attention read these only beside another type, and a zero as none.
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
    if layers is None and config.__dict__.get("partial_rotary_factor") is not None:
        # Beside the rotary parameters, and preferred there by older versions (5.6).
        entries["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if _heterogeneous(config):
        # Stock computes a longrope by the head_dim of the layer, but reads the model's to check the number of factors.
        entries["allow_global_per_layer_attribute_access"] = True
    elif getattr(config, "head_dim", 0) is None:
        # Stock's longrope multiplies a head_dim that is there but None (Mixtral).
        entries["head_dim"] = head_dim
    planned = PretrainedRope(theta, rotary_dim, target_length, tuple(factors), attention_scaling)
    _check_represented(config, entries, layers, planned)
    return entries


def _check_represented(
    config: PretrainedConfig,
    entries: dict[str, Any],
    layers: str | None,
    planned: PretrainedRope,
) -> None:
    """``ValueError`` unless stock computes ``planned`` from the config when it is saved and loaded, to the last bit."""
    from huggingface_hub.errors import StrictDataclassError

    name = type(config).__name__
    trial = copy.deepcopy(config)
    trial.__dict__.update(copy.deepcopy(entries))
    try:
        with stock_rotary.without_remarks():
            loaded = type(trial)(**trial.to_diff_dict())  # which also validates it
        found, scaling = stock_rotary.frequencies(loaded, layers)
    except (StrictDataclassError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"stock transformers cannot run this plan in {name}: {_reason(error)}") from None
    if not torch.equal(found, planned.inv_freq):
        raise ValueError(f"stock transformers would compute other frequencies from {name} than planned")
    if not math.isclose(scaling, planned.attention_scaling, rel_tol=1e-6):
        raise ValueError(
            f"stock transformers would scale cos and sin of {name} by {scaling:.6g}, the plan by "
            f"{planned.attention_scaling:.6g}"
        )
