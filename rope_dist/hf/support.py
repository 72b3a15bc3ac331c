"""What :func:`rope_dist.enable` does with each model type of the installed transformers: :func:`supported`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from ..stock_rotary import OTHER_TOWERS, model_class
from .cached_keys import cached_keys
from .enabled import enabled_class, is_rotary_embedding, stock_class
from .forms import Form, Unsupported
from .reporting import FUSED, FUSED_NORM, JOINT, NORM, ROTARY
from .rotary_embedding import check_tables, layer_types, new_stock, sample_tables
from .window_source import windowed_class

REFUSED = "refused"


@dataclass(frozen=True)
class ModelSupport:
    """One model type.

    Attributes:
        model_type: as in a ``config.json``.
        path: ``"projection + rotary"`` or ``"projection + norm + rotary"`` (one launch where the Triton kernels run),
            ``"norm + rotary"`` (one launch after the layer's own projections), ``"rotary"`` (one launch after its own
            projections and norms) or ``"refused"``.
        reason: why not the first; empty where it is.
        why_static: why its cached keys cannot be corrected, so that it has no dynamic plan; empty where they can.
        why_no_window: why its attention cannot be computed with a window (``enable(window=)``); empty where it can.
    """

    model_type: str
    path: str
    reason: str = ""
    why_static: str = ""
    why_no_window: str = ""


def supported(*model_types: str) -> dict[str, ModelSupport]:
    """List every rotary language model type of the installed transformers, and what ``enable()`` does with it.

    Nothing is built or downloaded: the model files of the installed transformers are imported and read, which takes
    some seconds for all of them. A model with parts (Llava) that has no attention of its own is what its language
    model is.

    Args:
        model_types: those only.

    Raises:
        ValueError: transformers has no language model of such a type, or one without a rotary embedding.
    """
    classes = _classes()
    unknown = [name for name in model_types if name not in classes]
    if unknown:
        raise ValueError(
            f"transformers {transformers.__version__} has no language model of type {', '.join(unknown)}"
        )
    found = {name: _support(name, classes[name]) for name in model_types or sorted(classes)}
    without = [name for name in model_types if found[name] is None]
    if without:
        raise ValueError(f"{', '.join(without)} has no attention with a rotary embedding of its own")
    return {name: one for name, one in found.items() if one is not None}


def _classes() -> dict[str, str]:
    """Names of the classes that generate text, by model type."""
    names = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        | modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    return {kind: model_class(name) for kind, name in names.items()}


def _support(model_type: str, class_name: str) -> ModelSupport | None:
    try:
        module = sys.modules[getattr(transformers, class_name).__module__]
    except (ImportError, AttributeError):  # a package that it needs is not installed
        return None
    own = [
        cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__
    ]
    stocks = [
        cls
        for cls in own
        if stock_class(cls) is cls and not any(tower in cls.__name__ for tower in OTHER_TOWERS)
    ]
    rotaries = [cls for cls in stocks if is_rotary_embedding(cls)]
    attentions = [cls for cls in stocks if not is_rotary_embedding(cls)]
    # Before indexers, whose reasons matter less.
    attentions.sort(key=lambda cls: "Attention" not in cls.__name__)
    if not rotaries or not attentions:
        return None
    try:
        enabled = [enabled_class(cls) for cls in attentions]
        for rotary in rotaries:
            _check_tables(model_type, rotary, {form for cls in enabled for form in cls.forms})
    except Unsupported as error:
        return ModelSupport(model_type, REFUSED, *[str(error)] * 3)
    found = [cached_keys(cls) for cls in attentions]
    why_static = next((keys for keys in found if isinstance(keys, str)), "")
    without = why_static, next(filter(None, map(_why_no_window, attentions)), "")
    for cls in enabled:
        if cls.norms is not None:
            separate = cls.why_separate or (JOINT if cls.norms.joint else "")
            return ModelSupport(model_type, NORM if separate else FUSED_NORM, separate, *without)
        if not cls.why_separate:
            return ModelSupport(model_type, FUSED, "", *without)
    return ModelSupport(model_type, ROTARY, enabled[0].why_separate, *without)


def _why_no_window(attention: type[nn.Module]) -> str:
    try:
        windowed_class(attention)
    except Unsupported as error:
        return str(error)
    return ""


def _check_tables(model_type: str, rotary: type[nn.Module], forms: set[Form]) -> None:
    """Of a rotary embedding with the type's default config, which may lack the sections of position axes."""
    try:
        config = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
        new = new_stock(rotary, config)
        if not _makes_tables(new):
            pairs = new.inv_freq.numel()
            config.rope_parameters["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
            new = new_stock(rotary, config)
    except Exception:  # no config of defaults, or not of this class: enable() looks at the model's own
        return
    for form in forms:
        check_tables(new, form)


def _makes_tables(rotary: nn.Module) -> bool:
    try:
        return all(sample_tables(rotary, layer_type) for layer_type in layer_types(rotary))
    except Unsupported:
        return False
