"""Entries of a ``config.json`` and the files beside it that contradict each other, in sentences for the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .mlx_models import MLX_READS_RECENT

BOTH_SCHEMAS = (
    "Write both schemas (rope_scaling with rope_theta, and rope_parameters), as `rope-dist export hf` does."
)
NEEDS_ORIGINAL = ("yarn", "llama3", "longrope", "su")


def faults(file: Mapping[str, Any], text: Mapping[str, Any]) -> list[str]:
    """Contradictions and gaps of the rotary entries.

    Args:
        file: the contents of ``config.json``.
        text: the entries of its language model, with one set of rotary parameters.
    """
    old, new = text.get("rope_scaling"), text.get("rope_parameters")
    found = []
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(k for k in {*old, *new} - {"type", "rope_theta"} if _value(old, k) != _value(new, k))
        if keys and old:
            said = ", ".join(f"{k} {_value(old, k)!r:.40} and {_value(new, k)!r:.40}" for k in keys)
            found.append(
                f"rope_scaling and rope_parameters contradict each other ({said}): transformers 5 takes the first, "
                "others either. Keep one set of values."
            )
    kind_new = _kind(new) if isinstance(new, Mapping) else "default"
    if "rope_scaling" in text and old is None and kind_new != "default":
        found.append(
            f"rope_scaling is null beside rope_parameters of type {kind_new!r}: readers of the old schema take the "
            f"model for an unscaled one. {BOTH_SCHEMAS}"
        )
    theta, nested = text.get("rope_theta"), new.get("rope_theta") if isinstance(new, Mapping) else None
    if theta is not None and nested is not None and theta != nested:
        found.append(
            f"rope_theta is {theta} at the top level and {nested} in rope_parameters: keep one value."
        )
    rope = old or new
    if not isinstance(rope, Mapping):
        return found
    kind = _kind(rope)
    if (
        rope.get("type") is not None
        and rope.get("rope_type") is not None
        and rope["type"] != rope["rope_type"]
    ):
        found.append(
            f"its type is {rope['type']!r} and its rope_type {rope['rope_type']!r}: engines take either."
        )
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    length, top = text.get("max_position_embeddings"), text.get("original_max_position_embeddings")
    if kind in NEEDS_ORIGINAL and original is None and top is None:
        found.append(
            f"original_max_position_embeddings is missing of {kind}: transformers takes max_position_embeddings, "
            f"{length}, mlx-lm 4096 (yarn) or 8192 (llama3). Write the length before the scaling."
        )
    if original is not None and top is not None and original != top:
        found.append(
            f"original_max_position_embeddings is {top} at the top level, which transformers 5 and vLLM prefer, and "
            f"{original} among the rotary parameters: keep one value."
        )
    if kind in ("linear", "dynamic", "yarn", "llama3") and factor is None and rope.get("alpha") is None:
        found.append(
            f"the factor of {kind} is lost: transformers 5 and vLLM refuse the file. Write it again."
        )
    if kind == "default" and factor not in (None, 1, 1.0):
        found.append(
            f"there is a factor of {factor} without a rope_type: nothing scales by it. Write the rope_type."
        )
    sizes = [v for v in (original, factor, length) if isinstance(v, (int, float)) and v > 0]
    if kind == "yarn" and len(sizes) == 3 and abs(sizes[2] / sizes[0] / sizes[1] - 1) > 0.02:
        found.append(
            f"max_position_embeddings is {length}, and factor {factor:g} x original length {original} "
            f"{round(sizes[1] * sizes[0])}: engines allow the first (ExLlamaV3 takes their ratio for the factor). "
            "Write max_position_embeddings as the length to be read."
        )
    if kind in ("longrope", "su") and top is not None and length is not None and top < length:
        found.append(
            f"vLLM starts with {top} tokens and the short factors, unless --max-model-len says more; from then on it "
            "takes the long factors for every text."
        )
    if kind == "linear" and original is None and "gemma3" not in str(text.get("model_type")):
        found.append(
            f"max_position_embeddings {length} of a linear scaling: vLLM and SGLang multiply it by the factor, all "
            "others do not."
        )
    return found


def neighbours(directory: Path, text: Mapping[str, Any]) -> list[str]:
    """Lengths in small files beside the config that are smaller than its own."""
    length, found = text.get("max_position_embeddings"), []
    for name, key, effect in (
        ("tokenizer_config.json", "model_max_length", "some engines and trainers stop there"),
        ("generation_config.json", "max_length", "generate() stops there"),
    ):
        try:
            value = json.loads((directory / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        # 20 is the default of max_length.
        if isinstance(value, int) and isinstance(length, int) and 20 < value < length:
            found.append(f"{key} of {name} is {value}, below the context of {length}: {effect}.")
    return found


def cause(engine: str, text: Mapping[str, Any]) -> str | None:
    """What of the config an engine does not read, and what to do about it; None where nothing of it is known."""
    old, new = text.get("rope_scaling"), text.get("rope_parameters")
    reads_old = engine == "transformers-4" or (
        engine == "mlx" and text.get("model_type") not in MLX_READS_RECENT
    )
    recent = isinstance(new, Mapping) and new and (_kind(new) != "default" or text.get("rope_theta") is None)
    if reads_old and not old and recent:
        return f"It does not read rope_parameters, which alone the file has. {BOTH_SCHEMAS}"
    rope = old or new
    if not isinstance(rope, Mapping):
        return None
    kind = _kind(rope)
    if engine == "exllamav3" and text.get("rope_theta") not in (
        None,
        rope.get("rope_theta", text["rope_theta"]),
    ):
        return "It takes the rope_theta of the top level."
    if kind == "yarn":
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if (
            engine == "exllamav3"
            and original
            and text.get("max_position_embeddings") != original * (factor or 1)
        ):
            return "It takes max_position_embeddings / original_max_position_embeddings for the factor."
        unread = []
        if engine in ("sglang", "mlx", "tensorrt-llm") and rope.get("attention_factor") is not None:
            unread.append(
                "attention_factor (write mscale, with mscale_all_dim 0, beside it: `rope-dist export hf`)"
            )
        if engine in ("mlx", "tensorrt-llm") and rope.get("truncate") is False:
            unread.append("truncate: it always rounds the bounds of the ramp")
        if unread:
            return f"It does not read {' or '.join(unread)}."
    if kind in ("longrope", "su") and rope.get("attention_factor") is not None and engine != "transformers-4":
        return "It does not read attention_factor of a longrope: it derives the scaling from the lengths."
    if kind == "dynamic" and engine in ("vllm", "sglang", "tensorrt-llm"):
        return "It computes dynamic NTK once, not by the length: use yarn, or serve up to the trained length."
    if kind == "linear" and engine in ("vllm", "sglang"):
        return "It multiplies max_position_embeddings by the factor: give it the length to be read as an argument."
    return None


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _value(rope: Mapping[str, Any], key: str) -> Any:
    return _kind(rope) if key == "rope_type" else rope.get(key)
