"""The context length that a model was trained with, from every key of its config that states it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from .strategies import check_length, check_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LENGTH_KEYS = (
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "seq_len",
    "model_max_length",
    "n_positions",
)
"""Names under which configs repeat ``max_position_embeddings``; an engine may take the smallest."""

# No model of these families was trained on less before it was scaled, and none on more with a base of 10000.
_SHORTEST_TRAINED = 2048
_LONGEST_WITH_BASE_10000 = 8192
# Factors are written with few digits.
_ROUNDING = 0.02


def trained_length(
    config: PretrainedConfig,
    text: PretrainedConfig,
    parameters: Mapping[str, Any],
    *,
    per_layer_type: bool = False,
) -> tuple[int, str]:
    """The context length in tokens that a model was trained for, any scaling included, and where that comes from.

    ``max_position_embeddings`` (M below) is the length before the scaling in some configs and after it in others:

    - no scaling, or one that acts past the trained length only (``dynamic``): M.
    - ``yarn``: factor x original length. M may be either, or between (Qwen3), but not more.
    - ``llama3`` and ``longrope``: M (their factor is no multiple of the length), or factor x original length where M
      is still the original.
    - ``linear``: factor x original length where the original is written; M where parameters are per layer type
      (Gemma3). Else M is the original, as transformers 4 documented (vicuna-16k), unless only M / factor can have been
      trained without scaling (LLaMA-2-7B-32K: base 10000 and M 32768). Where both can, another key or the tokenizer's
      ``model_max_length`` decides.

    Args:
        config: of the whole model, whose folder may have a ``tokenizer_config.json``.
        text: of its language model.
        parameters: the rotary parameters that are extended.
        per_layer_type: whether other layers have parameters of their own.

    Raises:
        ValueError: no key settles it, or two contradict each other.
    """
    name = type(text).__name__
    written = check_length(text.max_position_embeddings, f"max_position_embeddings of {name}")
    if recorded_extension(text) is not None:
        return written, "extended by rope_dist"
    own = text.__dict__
    others = {key: own[key] for key in LENGTH_KEYS if _is_length(own.get(key))}
    kind = parameters.get("rope_type", "default")
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    if factor is not None:
        factor = check_number(factor, f"factor of {name}", positive=True)
    if original is not None:
        original = check_length(original, f"original_max_position_embeddings of {name}")
    plain = written, f"max_position_embeddings {written}"
    if kind in ("default", "dynamic") or factor is None or factor == 1:
        found = plain
    elif original is None:
        found = plain if per_layer_type else _unscaled_or_scaled(config, parameters, written, factor, others)
    else:
        scaled = _nearby(written, round(original * factor))
        product = scaled, f"factor {factor:g} x original_max_position_embeddings {original}"
        if kind in ("llama3", "longrope") and written > original:
            found = plain
        elif original <= written <= scaled:
            found = product
        else:
            raise _unclear(name, [plain[1], product[1]])
    for key, value in others.items():
        if value != _nearby(value, found[0]) and value != original:
            raise _unclear(name, [found[1], f"{key} {value}"])
    return found


def _unscaled_or_scaled(
    config: PretrainedConfig,
    parameters: Mapping[str, Any],
    written: int,
    factor: float,
    others: Mapping[str, int],
) -> tuple[int, str]:
    """``max_position_embeddings`` before or after a linear scaling whose config does not state the original length."""
    base_10000 = check_number(parameters.get("rope_theta"), "rope_theta") <= 10000

    def trained(length: float) -> bool:
        return length >= _SHORTEST_TRAINED and not (base_10000 and length > _LONGEST_WITH_BASE_10000)

    scaled = round(written * factor)
    before = f"factor {factor:g} x max_position_embeddings {written}"
    after = f"max_position_embeddings {written}, which is factor {factor:g} x {written / factor:g}"
    meanings = {scaled: before, written: after}
    possible = [
        length for length, start in ((scaled, written), (written, written / factor)) if trained(start)
    ]
    possible = possible or [scaled]
    values = dict(others)
    tokenizer = tokenizer_length(config)
    if tokenizer is not None and tokenizer >= written:
        values["model_max_length of the tokenizer"] = tokenizer
    agreed = [length for length in possible if all(_nearby(v, length) == v for v in values.values())]
    if len(agreed) != 1:
        says = [f"{meanings[length]} is {length}" for length in possible]
        raise _unclear(type(config).__name__, [*says, *(f"{k} {v}" for k, v in values.items())])
    also = f", as {' and '.join(values)} {'say' if len(values) > 1 else 'says'}" if values else ""
    return agreed[0], meanings[agreed[0]] + also


def _nearby(written: int, computed: int) -> int:
    """``written`` where a rounded factor gives about the same."""
    return written if math.isclose(written, computed, rel_tol=_ROUNDING) else computed


def _unclear(name: str, says: list[str]) -> ValueError:
    return ValueError(
        f"the length that {name} was trained to read is not clear: {'; '.join(says)}. Give it as original_length "
        "(--original on the command line)"
    )


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 2


def recorded_extension(config: PretrainedConfig) -> int | None:
    """The length before rope_dist extended the model, where its config records that and still reads so long."""
    record = getattr(config, "rope_dist", None)
    if not isinstance(record, Mapping):
        return None
    original, target = record.get("original_length"), record.get("target_length")
    if not (_is_length(original) and _is_length(target)):
        return None
    return original if original <= target == config.max_position_embeddings else None


def recorded_theta(config: PretrainedConfig) -> float | None:
    """The RoPE base before rope_dist changed it, where its config records that; else None."""
    if recorded_extension(config) is None:
        return None
    theta = config.rope_dist.get("rope_theta")
    return (
        None if theta is None else check_number(theta, "rope_theta of the record of rope_dist", positive=True)
    )


def tokenizer_length(config: PretrainedConfig) -> int | None:
    """``model_max_length`` of the tokenizer beside a config that was read from a directory or the hub, or None."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    path = Path(name)
    file = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    if not path.exists():
        from transformers.utils import cached_file

        try:
            found = cached_file(name, "tokenizer_config.json")
        except (OSError, ValueError):
            return None
        file = Path(found) if found else file
    try:
        length = json.loads(file.read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    # Tokenizers without a limit say 1e30.
    if isinstance(length, bool) or not isinstance(length, (int, float)) or not 2 <= length < 2**31:
        return None
    return int(length)
