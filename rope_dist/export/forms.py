"""Native forms of a plan: the rotary parameters of a published scaling, where they give its frequencies.

``longrope`` writes any factors bit for bit. ``yarn``, ``linear``, ``llama3`` and a new ``rope_theta`` are what engines
have fused kernels and flags for, and what more of their model files read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import stock_rotary
from ..layer_types import layer_typed
from ..planning import RopePlan
from ..strategies import get_strategy
from ..trained_length import LENGTH_KEYS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..dynamic import DynamicPlan

Form = Literal["native", "longrope"]
FORMS: tuple[Form, ...] = ("native", "longrope")
NATIVE_STRATEGIES = ("yarn", "auto-yarn", "pi", "ntk", "dynamic-ntk", "llama3", "extrapolation")
"""Strategies whose static plans have a native form where the model was trained without a scaling."""

ROUNDING = 2**-21
"""Relative: the largest difference between two float32 computations of a frequency.

``theta ** exponent`` in float32 alone is up to 3.5e-7 from the exact value, in every form and in stock itself. Native
and longrope frequencies differed by at most 3.1e-7 over all strategies, bases from 1e4 to 5e6 and head dimensions from
16 to 256.
"""


def check_form(form: Any) -> None:
    """``ValueError`` unless ``form`` is one of :data:`FORMS` or None."""
    if form is not None and form not in FORMS:
        raise ValueError(f"the form must be one of {', '.join(FORMS)}, got {form!r:.80}")


# Of rotary parameters: they belong to a longrope alone, and are replaced.
_OF_LONGROPE = (
    "rope_type", "rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "short_factor",
    "long_factor", "short_mscale", "long_mscale",
)  # fmt: skip
# Rotary parameters that models read together with the scaling's own, and entries of models that require a longrope.
_TIED = ("mscale_all_dim", "llama_4_scaling_beta")
_LONGROPE_ONLY = ("original_max_position_embeddings", "allow_global_per_layer_attribute_access")


@dataclass(frozen=True)
class NativeForm:
    """A plan as a published scaling.

    Attributes:
        rope_type: ``default``, ``linear``, ``yarn`` or ``llama3``.
        theta: RoPE base, the plan's own but for a change of base.
        parameters: of that type, by transformers' names.
    """

    rope_type: str
    theta: float
    parameters: dict[str, Any]


def native_form(plan: RopePlan | DynamicPlan) -> NativeForm | None:
    """The native form of a plan from its strategy and settings; None where it has none.

    A dynamic plan, and one of a model that was trained with a scaling, have factors of two kinds at once.
    """
    if not isinstance(plan, RopePlan) or plan.base_factors is not None:
        return None
    s, settings, scaling = plan.scale, plan.settings, plan.attention_scaling
    if scaling == 1 and all(factor == 1 for factor in plan.factors):
        return NativeForm("default", plan.theta, {})
    if s == 1:
        return None
    original = {"original_max_position_embeddings": plan.original_length}
    if plan.strategy in ("yarn", "auto-yarn"):
        parameters: dict[str, Any] = {
            "factor": s,
            **original,
            "attention_factor": scaling,
            **{key: settings[key] for key in ("beta_fast", "beta_slow", "truncate") if key in settings},
        }
        # SGLang, MLX and TensorRT-LLM read no attention_factor, but (0.1 mscale ln s + 1) / (0 + 1).
        if not math.isclose(scaling, 0.1 * math.log(s) + 1, rel_tol=1e-9):
            parameters.update(mscale=(scaling - 1) / (0.1 * math.log(s)), mscale_all_dim=0.0)
        found = NativeForm("yarn", plan.theta, parameters)
    elif scaling != 1:
        return None
    elif all(factor == plan.factors[0] for factor in plan.factors) and math.isclose(
        plan.factors[0], s, rel_tol=ROUNDING
    ):
        return NativeForm("linear", plan.theta, {"factor": _factor(plan)})
    elif plan.strategy in ("ntk", "dynamic-ntk"):
        by = settings.get("factor", 1.0)
        scale = by * s - (by - 1)
        found = NativeForm("default", plan.theta * scale ** (plan.rotary_dim / (plan.rotary_dim - 2)), {})
    elif plan.strategy == "llama3":
        found = NativeForm("llama3", plan.theta, {**settings, **original})
    else:
        return None
    return found if _follows_from_settings(plan) else None


def _factor(plan: RopePlan) -> float:
    """Engines that multiply a length by it must not truncate the product below the target."""
    factor = plan.scale
    while int(plan.original_length * factor) < plan.target_length:
        factor = math.nextafter(factor, math.inf)
    return factor


def _follows_from_settings(plan: RopePlan) -> bool:
    """Whether a plan's factors are those of its strategy, and not of a model's own scaling or of an edited file."""
    try:
        scaling = get_strategy(plan.strategy)(plan.pretrained, plan.target_length, **plan.settings)
    except (TypeError, ValueError):
        return False
    planned = torch.tensor(plan.factors, dtype=torch.float32, device="cpu")
    return torch.allclose(scaling.factors.float(), planned, rtol=ROUNDING, atol=0.0)


def native_entries(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None = None
) -> dict[str, Any] | None:
    """Entries of a transformers 5 config with the plan's native form, as :meth:`RopePlan.config_overrides`.

    None where the plan has none, or where stock transformers computes other frequencies from it than planned (by more
    than :data:`ROUNDING`) or another scaling.

    ``max_position_embeddings`` is the target length. vLLM and SGLang multiply the length that they read by the factor
    of a ``linear`` scaling, but prefer ``model_max_length``, which then is the length before.

    Args:
        plan: the extension.
        config: of the language model that is extended. None: a LLaMA.

    Raises:
        ValueError: stock cannot compute the plan from ``config`` in any form.
    """
    form = native_form(plan)
    if form is None or not isinstance(plan, RopePlan):
        return None
    entries = plan.config_overrides(config)
    rope = entries["rope_parameters"]
    kept = {key: value for key, value in rope.items() if key not in _OF_LONGROPE}
    if layer_typed(rope) or any(key in entries for key in _LONGROPE_ONLY) or any(map(kept.get, _TIED)):
        return None
    if config is not None and config.get_text_config(decoder=True).model_type == "phimoe":
        return None  # Its config requires the keys of a longrope.
    kept = {key: value for key, value in kept.items() if key not in (*_TIED, "mscale")}
    parameters = {**kept, "rope_type": form.rope_type, "rope_theta": form.theta, **form.parameters}
    entries = {**entries, "rope_parameters": parameters}
    if form.rope_type == "linear":
        repeated = {key: plan.original_length for key in LENGTH_KEYS if key in entries}
        entries.update(repeated, model_max_length=plan.original_length)
    if form.theta != plan.theta:
        # read_rope() takes the trained base from here.
        entries["rope_dist"] = {**entries["rope_dist"], "rope_theta": plan.theta}
    return entries if config is None or _represented(plan, config, entries) else None


def _represented(plan: RopePlan, config: PretrainedConfig, entries: Mapping[str, Any]) -> bool:
    """Whether stock computes the plan from a config with ``entries`` when it is saved and loaded."""
    from huggingface_hub.errors import StrictDataclassError

    trial = copy.deepcopy(config.get_text_config(decoder=True))
    trial.__dict__.update(copy.deepcopy(dict(entries)))
    try:
        with stock_rotary.without_remarks():
            loaded = type(trial)(**trial.to_diff_dict())
            found, scaling = stock_rotary.frequencies(loaded, None)
    except (StrictDataclassError, LookupError, TypeError, ValueError, RuntimeError, AttributeError):
        return False
    planned = plan.inv_freq
    return (
        found.shape == planned.shape
        and torch.allclose(found.double(), planned.double(), rtol=ROUNDING, atol=0.0)
        and math.isclose(scaling, plan.attention_scaling, rel_tol=1e-6)
    )


def yarn_attention(form: NativeForm, scaling: float) -> float:
    """llama.cpp's ``rope.scaling.attn_factor``, by which it multiplies what its YaRN scales cos and sin by itself."""
    own = 1 + 0.1 * math.log(form.parameters["factor"]) if form.rope_type == "yarn" else 1.0
    ratio = scaling / own
    return 1.0 if math.isclose(ratio, 1, rel_tol=1e-7) else ratio


def inexact_yarn(form: NativeForm, theta: float, rotary_dim: int) -> str | None:
    """Why llama.cpp's ramp, which begins and ends at whole pairs in float32, is not that of a YaRN; None if it is."""
    parameters = form.parameters
    if not parameters["truncate"]:
        return "llama.cpp rounds the ramp of YaRN to whole pairs, and the plan does not: make it with truncate=true"
    for beta in (parameters["beta_fast"], parameters["beta_slow"]):
        periods = parameters["original_max_position_embeddings"] / (beta * 2 * math.pi)
        pair = rotary_dim * math.log(periods) / (2 * math.log(theta))
        if 0 < pair < rotary_dim - 1 and abs(pair - round(pair)) < 1e-4:
            return (
                f"the bound of YaRN's ramp at {beta:g} periods is so near to pair {round(pair)} that llama.cpp may "
                "round it to another: take a slightly different beta"
            )
    return None
