"""The frequencies that the installed transformers computes from a language model's config, by the model's own class."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

OTHER_TOWERS = ("Vision", "Audio")
"""What transformers has in the names of classes that are not a language model's."""

_REMARKS = {
    # It does not know the keys for other engines, and counts factors by the wrong head where layers have several.
    "transformers.modeling_rope_utils": (
        "Unrecognized keys in `rope_parameters`",
        "_factor field must have length",
    ),
    "transformers.integrations.heterogeneity.configuration_utils": ("Reading global config value",),
}


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """No remarks of transformers on what a plan writes on purpose."""
    loggers = {logging.getLogger(name): remarks for name, remarks in _REMARKS.items()}
    filters = {
        logger: lambda record, remarks=remarks: not any(r in record.getMessage() for r in remarks)
        for logger, remarks in loggers.items()
    }
    for logger, keep in filters.items():
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger, keep in filters.items():
            logger.removeFilter(keep)


def model_class(mapped: Any) -> Any:
    """The class in an entry of transformers' ``MODEL_MAPPING``: some (Funnel) are a tuple of two."""
    return mapped[0] if isinstance(mapped, tuple) else mapped


def rotary_class(config: PretrainedConfig) -> type[nn.Module] | None:
    """The rotary embedding class of a language model's config; None where transformers has none (custom code)."""
    module = _modeling_module(config)
    if module is None:
        return None
    found = [
        value
        for name, value in vars(module).items()
        if name.endswith("RotaryEmbedding")
        and getattr(value, "__module__", None) == module.__name__
        and not any(tower in name for tower in OTHER_TOWERS)
    ]
    # A file may have several: the one that says it takes this config, else the one of the model around it.
    return min(found, key=lambda cls: _distance(cls, config), default=None)


def _distance(cls: type, config: PretrainedConfig) -> int:
    first = next(iter(inspect.signature(cls).parameters.values()), None)
    takes = getattr(first, "annotation", "")
    takes = takes if isinstance(takes, str) else getattr(takes, "__name__", "")
    if takes in (base.__name__ for base in type(config).__mro__):
        return 0
    return 1 if takes and type(config).__name__.startswith(takes.removesuffix("Config")) else 2


def _modeling_module(config: PretrainedConfig) -> ModuleType | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        try:
            return sys.modules[model_class(mapping[type(config)]).__module__]
        except (KeyError, ImportError):
            continue  # not there, custom code, or a package that it needs is missing
    name = type(config).__module__
    if not name.startswith("transformers.models."):
        return None
    try:
        # Some language models have no class of their own.
        return importlib.import_module(name.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None


def layer_option(layers: str | None) -> dict[str, str]:
    """transformers' functions take the type of layers where there are several."""
    return {} if layers is None else {"layer_type": layers}


def frequencies(config: PretrainedConfig, layers: str | None) -> tuple[torch.Tensor, float]:
    """``[pairs]`` float32 in radians per token, and the factor of cos and sin, of a type of layers (None: of all).

    Of a longrope the short factors, of a dynamic type those within the trained length. By transformers' own functions
    where the model has no class of its own.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError: transformers fails on the
            config.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)  # transformers fills in missing entries
    cls = rotary_class(config)
    # On the CPU even where a model is being built on the meta device.
    with torch.device("cpu"), torch.no_grad():
        if cls is not None:
            rotary, prefix = cls(config), "" if layers is None else f"{layers}_"
            scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
            return getattr(rotary, f"{prefix}inv_freq").float(), float(scaling)
        parameters = config.rope_parameters if layers is None else config.rope_parameters[layers]
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            parameters.update(rope_type="linear", factor=1.0)
        init = ROPE_INIT_FUNCTIONS["linear" if kind == "default" else kind]
        inv_freq, scaling = init(config, **layer_option(layers))
        return inv_freq.float(), float(scaling)
