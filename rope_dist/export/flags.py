"""A plan as command line flags, with which an engine serves the unchanged model by it: no file is written."""

from __future__ import annotations

import copy
import functools
import json
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..defaults import FLAG_ENGINES
from ..dynamic import DynamicPlan
from ..messages import unknown
from ..planning import RopePlan
from .architectures import reading, tabled_type
from .forms import ROUNDING, Form, inexact_yarn, native_form, yarn_attention
from .gguf_file import METADATA, check_file
from .gguf_reading import BASES_OF_LAYERS, bases_of_layers, read
from .hf_directory import check_model, config_entries, possible_forms
from .stock import StockModel
from .verification import Check, by_formula, compared

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GGUF_NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "arcee": "arcee",
    "gemma": "gemma",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
"""``model_type`` -> the name of its architecture in GGUF (``conversion/`` of llama.cpp)."""


def flags(
    engine: str,
    plan: RopePlan | DynamicPlan,
    config: PretrainedConfig | None = None,
    *,
    architecture: str | None = None,
    gguf: str | os.PathLike[str] | None = None,
) -> str:
    """Flags, quoted for a shell, with which ``engine`` serves the unchanged model by ``plan``.

    Args:
        engine: ``"vllm"``, ``"sglang"`` or ``"llama-server"``.
        plan: the extension.
        config: of the model (the whole one, where it has parts). Without it nothing but the plan is known: the model
            is then taken for one whose config is a LLaMA's.
        architecture: of the GGUF file (``general.architecture``), for llama-server; by default that of ``gguf`` or of
            ``config``.
        gguf: the file that llama-server serves; it is compared with the plan.

    Raises:
        ValueError: the plan is of another model, flags of this engine cannot express it, or the engine does not follow
            them in this model or is not known to.
    """
    if engine == "vllm":
        return vllm_arguments(plan, config)
    if engine == "sglang":
        return sglang_arguments(plan, config)
    if engine == "llama-server":
        if gguf is not None and isinstance(plan, RopePlan):
            source = read(gguf)
            if source.architecture in BASES_OF_LAYERS:
                raise ValueError(bases_of_layers(source.architecture))
            check_file(source, plan, exported=False)
            architecture = architecture or source.architecture
        if config is not None:
            model = StockModel(config)
            check_model(model, plan)
            if model.layer_typed:
                raise ValueError(bases_of_layers(model.text.model_type))
            architecture = architecture or GGUF_NAMES.get(model.text.model_type)
        return llama_server_arguments(plan, architecture)
    if engine == "transformers":
        raise ValueError(
            "transformers serve has no flag for rotary parameters: write the extended model with rope-dist export hf, "
            "and serve its directory"
        )
    raise ValueError(unknown("engine", engine, FLAG_ENGINES))


def vllm_overrides(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None = None, form: Form | None = None
) -> dict[str, Any]:
    """The value of vLLM's ``hf_overrides`` with which it runs the unchanged model by the plan.

    Args:
        plan: the extension.
        config: of the model (the whole one, where it has parts). Without it nothing but the plan is known: the model
            is then taken for one whose config is a LLaMA's.
        form: see :func:`rope_dist.export.hf`.

    Raises:
        ValueError: the plan is of another model, or vLLM cannot run this one by it.
    """
    return _overrides("vllm", plan, config, form)[0]


def vllm_arguments(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None = None, form: Form | None = None
) -> str:
    """:func:`vllm_overrides` as arguments of ``vllm serve``, quoted for a shell."""
    overrides, flag = _overrides("vllm", plan, config, form)
    return f"--max-model-len {plan.target_length} --hf-overrides {shlex.quote(_json(overrides))}{flag}"


def sglang_arguments(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None = None, form: Form | None = None
) -> str:
    """Arguments of ``python -m sglang.launch_server``, quoted for a shell; errors as :func:`vllm_overrides`."""
    overrides, flag = _overrides("sglang", plan, config, form)
    return f"--context-length {plan.target_length} --json-model-override-args {shlex.quote(_json(overrides))}{flag}"


def _json(overrides: Mapping[str, Any]) -> str:
    return json.dumps(overrides, separators=(",", ":"), allow_nan=False)


def _overrides(
    engine: str, plan: RopePlan | DynamicPlan, config: PretrainedConfig | None, form: Form | None
) -> tuple[dict[str, Any], str]:
    """In the first form that ``engine`` runs, as its formula says of the config with these entries; and a flag."""
    if isinstance(plan, DynamicPlan):
        raise ValueError(_one_set(engine, plan))
    if config is None:
        return _changes(config_entries(plan, None, form)), ""
    model = StockModel(config)
    check_model(model, plan, (engine,), form)
    reason = None
    for tried in possible_forms(plan, model.text, form):
        changes = _changes(config_entries(plan, model.text, tried))
        after = StockModel(copy.deepcopy(config))
        after.text.update(copy.deepcopy(changes))
        found = reading(engine, after, tabled_type(after.parameters["rope_type"]))
        reason = _difference(engine, plan, after) if found.how in ("yes", "flag") else found.reason
        if reason is None:
            # An entry that is itself a config is merged.
            return changes if model.part is None else {model.part: changes}, found.flag
    raise ValueError(f"{engine} does not follow the plan by flags: {reason}")


def _changes(entries: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "max_position_embeddings",
        "rope_parameters",
        "model_max_length",
        # Phi-3's config puts its own over that of the rotary parameters.
        "original_max_position_embeddings",
        # transformers' longrope multiplies one that is there but None (Mixtral).
        "head_dim",
    )
    return {key: entries[key] for key in keys if key in entries}


def _difference(engine: str, plan: RopePlan, after: StockModel) -> str | None:
    """What ``engine`` computes otherwise than planned from the changed config, or None."""
    file = after.config.to_dict()
    relative = 0.0 if after.parameters["rope_type"] == "longrope" else ROUNDING
    read_file = functools.partial(by_formula, engine, file, after)
    return compared(read_file, plan, Check(engine, None), relative=relative).reason


def _one_set(engine: str, plan: DynamicPlan) -> str:
    name = {"vllm": "vLLM", "sglang": "SGLang"}.get(engine, engine)
    length = "--max-model-len" if engine == "vllm" else "its context length"
    return (
        f"{name} takes one set of frequencies for all texts, by {length}: give it a static plan, or none for texts of "
        f"up to {plan.original_length} tokens"
    )


def llama_server_arguments(plan: RopePlan | DynamicPlan, architecture: str | None) -> str:
    """Arguments of ``llama-server`` for an unchanged GGUF file, quoted for a shell.

    llama.cpp has YaRN, linear scaling and another base. It scales cos and sin by ``1 + 0.1 ln s`` of YaRN, times the
    metadata entry ``rope.scaling.attn_factor``; ``--yarn-attn-factor`` has no effect there since PR 17945. The server
    limits a context to ``context_length``. Both are overridden by ``--override-kv``.

    Args:
        plan: the extension.
        architecture: ``general.architecture`` of the file.

    Raises:
        ValueError: flags cannot express the plan, or the architecture is not known.
    """
    if isinstance(plan, DynamicPlan):
        raise ValueError(_one_set("llama-server", plan))
    if architecture in BASES_OF_LAYERS:
        raise ValueError(bases_of_layers(architecture))
    form = native_form(plan)
    if plan.base_factors is not None:
        raise ValueError(
            "flags of llama-server cannot express a plan of a model that was trained with a scaling: write a file with "
            "rope-dist export gguf"
        )
    if form is None or form.rope_type == "llama3":
        raise ValueError(
            f"flags of llama-server cannot express the factors of {plan.strategy}, only those of yarn, auto-yarn, pi "
            "and ntk: take auto-yarn, or write a file with rope-dist export gguf"
        )
    if architecture is None:
        raise ValueError(
            "llama-server's flags name the architecture of the GGUF file, which is not known here: give the file"
        )
    if architecture not in METADATA:
        raise ValueError(
            f"it is not known whether every layer of the architecture {architecture!r} follows flags in llama.cpp; it "
            f"is of {', '.join(sorted(METADATA))}"
        )
    attn_factor = yarn_attention(form, plan.attention_scaling)
    words = ["-c", str(plan.target_length)]
    if form.rope_type == "linear":
        words += ["--rope-scaling", "linear", "--rope-scale", repr(form.parameters["factor"])]
    elif form.rope_type == "yarn":
        reason = inexact_yarn(form, plan.theta, plan.rotary_dim)
        if reason is not None:
            raise ValueError(reason)
        words += ["--rope-scaling", "yarn", "--rope-scale", repr(form.parameters["factor"])]
        words += ["--yarn-orig-ctx", str(plan.original_length), "--yarn-ext-factor", "1.0"]
        words += ["--yarn-beta-fast", repr(form.parameters["beta_fast"])]
        words += ["--yarn-beta-slow", repr(form.parameters["beta_slow"])]
    elif form.theta != plan.theta:
        words += ["--rope-freq-base", repr(form.theta)]
    words += ["--override-kv", f"{architecture}.context_length=int:{plan.target_length}"]
    if attn_factor != 1:
        words += ["--override-kv", f"{architecture}.rope.scaling.attn_factor=float:{attn_factor!r}"]
    return shlex.join(words)
