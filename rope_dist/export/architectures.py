"""Whether an engine's model of an architecture reads the rotary parameters of its config.

The formulas of ``engines.py`` are of an engine's rotary class; whether a model file hands it the config's parameters
is another question for every file. ``engine_models.json`` answers it for vLLM, SGLang, mlx-lm and ExLlamaV3; it is
written by ``tools/engine_models.py`` from the engines' source code. transformers 4 was tried. What is in no table is
"unknown".
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import layer_types
from .engines import ENGINES
from .stock import StockModel

STATUSES = ("yes", "ignored", "crash", "flag", "unknown")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

TRANSFORMERS_4 = frozenset((
    "apertus", "arcee", "aria_text", "bamba", "bitnet", "code_llama", "cohere", "deepseek_v2",
    "deepseek_v3", "diffllama", "doge", "dots1", "emu3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_h1",
    "flex_olmo", "gemma", "gemma2", "glm", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe",
    "lfm2", "llama", "longcat_flash", "minimax", "ministral", "mistral", "mixtral", "moshi", "olmoe",
    "persimmon", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "vaultgemma",
))  # fmt: skip
"""``model_type`` whose rotary embedding in transformers 4.57.6 computed a neutral longrope bit for bit (tried)."""

TRANSFORMERS_4_PARTS = frozenset((
    "aria", "deepseek_vl", "deepseek_vl_hybrid", "fuyu", "got_ocr2", "idefics2", "idefics3", "internvl",
    "janus", "lfm2_vl", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2",
    "paligemma", "perception_lm", "smolvlm", "video_llava", "vipllava",
))  # fmt: skip
"""``model_type`` of composite models whose language model was tried so."""

TRANSFORMERS_4_REFUSES = {
    **dict.fromkeys(
        ("chameleon", "olmo", "olmo2", "open-llama"),
        "its config accepts no rope_scaling but a `type` and a `factor`",
    ),
    **dict.fromkeys(
        ("phi3", "phi4_multimodal"),
        "its config accepts no rope_scaling but `type`, `short_factor` and `long_factor`",
    ),
    "llama4_text": "its rotary embedding is llama3's or none",
    "phimoe": "its rotary embedding keeps no frequencies",
}
"""``model_type`` that fails in transformers 4.57.6 (tried)."""


TENSORRT_LLM = frozenset(("llama",))
"""``model_type`` whose model in TensorRT-LLM takes ``RopeParams.from_config`` (read)."""


@functools.cache
def tables() -> dict[str, dict[str, Any]]:
    """Engine -> its version and how its models read each rope type, from ``engine_models.json``."""
    return json.loads(Path(__file__).with_name("engine_models.json").read_text(encoding="utf-8"))


VERSIONS: dict[str, str] = {
    "transformers-4": "4.57",
    "tensorrt-llm": "1.x",
    **{engine: table["version"] for engine, table in tables().items()},
}
"""Engine -> the version whose code was read or tried."""


class Reading(NamedTuple):
    """How an engine's model of an architecture reads the rotary parameters of its config.

    Attributes:
        how: "yes"; "ignored": it runs with other frequencies and says nothing; "crash"; "flag": it reads them if it is
            started with the flag that ``reason`` names; "unknown".
        version: of the engine that was read or tried; empty where none was.
        reason: why not "yes", with the place in the engine's source.
    """

    how: str
    version: str = ""
    reason: str = ""

    @property
    def flag(self) -> str:
        """The flag that ``reason`` names, after a space; empty where it needs none."""
        found = re.search(r" --[a-z-]+", self.reason) if self.how == "flag" else None
        return "" if found is None else found[0]


def reading(engine: str, model: StockModel, rope_type: str = "longrope") -> Reading:
    """How ``engine`` reads a ``rope_type`` of this model's config.

    Args:
        engine: "transformers", one of :data:`ENGINES`, or another one, of which nothing is known here.
        model: the model; its ``architectures``, or else the class of its ``model_type``, is looked up.
        rope_type: one of :data:`ROPE_TYPES`; "default" is another theta.
    """
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"unknown rope_type {rope_type!r}; there are {', '.join(ROPE_TYPES)}")
    if engine == "transformers":
        import transformers

        return Reading("yes", transformers.__version__)
    if model.layer_typed:
        how = "ignored" if engine in ("transformers-4", "mlx") else "unknown"
        return Reading(how, VERSIONS.get(engine, ""), PER_LAYER_TYPE)
    if engine == "transformers-4":
        return _transformers_4(model)
    if engine in tables():
        return _tabled(engine, model, rope_type)
    kind = model.text.model_type
    if engine == "tensorrt-llm" and kind in TENSORRT_LLM and model.text is model.config:
        return Reading("yes", VERSIONS[engine])
    return Reading("unknown", VERSIONS.get(engine, ""), f"what {engine} does with {kind} was not read")


def check_names(engines: Iterable[str]) -> None:
    """``ValueError`` for an unknown engine."""
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")


def tabled_type(kind: str) -> str:
    """The rope type in the tables for a name in a config: for one that they have not, one without exceptions."""
    kind = {"mrope": "default", "su": "longrope"}.get(kind, kind)
    return kind if kind in ROPE_TYPES else "linear"


def _transformers_4(model: StockModel) -> Reading:
    version, kind = VERSIONS["transformers-4"], model.text.model_type
    if kind in TRANSFORMERS_4_REFUSES:
        return Reading("crash", version, f"{kind}: {TRANSFORMERS_4_REFUSES[kind]}")
    if kind not in TRANSFORMERS_4:
        return Reading("unknown", version, f"{kind} was not tried in transformers {version}")
    if model.part is not None and model.config.model_type not in TRANSFORMERS_4_PARTS:
        return Reading(
            "unknown", version, f"{model.config.model_type} was not tried in transformers {version}"
        )
    return Reading("yes", version)


def _tabled(engine: str, model: StockModel, rope_type: str) -> Reading:
    version, models = VERSIONS[engine], tables()[engine]["models"]
    kind = model.text.model_type
    if engine in ("vllm", "sglang") and model.multimodal_positions and rope_type not in ("default", "yarn"):
        reason = (
            f"it has no {rope_type} for positions in time, height and width (mrope_section), which {kind} has"
        )
        return Reading("crash", version, reason)
    names = [model.config.model_type] if engine == "mlx" else _architectures(model.config)
    entry = next((models[name] for name in names if name in models), None)
    if entry is not None and "as" in entry:
        names = _architectures(model.text)
        entry = next((models[name] for name in names if name in models), None)
    if entry is None:
        return Reading(
            "unknown", version, f"{engine} {version} has no file of its own for {names[0] if names else kind}"
        )
    how, _, reason = entry.get(rope_type, entry["*"]).partition(": ")
    if (
        how == "yes"
        and "sliding" in entry
        and "sliding_attention" in (getattr(model.text, "layer_types", None) or ())
    ):
        how, _, reason = entry["sliding"].partition(": ")
    if how == "yes" and rope_type == "longrope" and engine != "exllamav3" and model.interleaved:
        return Reading(
            "unknown", version, f"{kind} pairs neighbouring dimensions, and its longrope rotates halves"
        )
    return Reading(how, version, reason)


def _architectures(config: Any) -> list[str]:
    """Names of the model's class: of the config, else those that transformers has for its type."""
    from transformers.models.auto import modeling_auto as auto

    names = list(config.architectures or ())
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        found = getattr(auto, mapping, {}).get(config.model_type, ())
        names += [found] if isinstance(found, str) else found
    return names


PER_LAYER_TYPE = (
    "the model has a rotary embedding per layer type, for which only transformers 5 has a form here"
)


def unextendable(model: StockModel) -> str | None:
    """Why no config makes an engine run this model by a plan, or None if one can."""
    return layer_types.unextendable(model.text)
