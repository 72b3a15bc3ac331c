"""Finds the rotary embeddings and attentions of a model's language model; other towers keep their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .enabled import enabled_class, is_rotary_embedding, stock_class
from .forms import Form, NotRotary, Unsupported
from .rotary_embedding import EnabledModule, check_tables, new_stock


def find(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The rotary embeddings and attentions to swap; ``ValueError`` unless all of them can be."""
    rotaries, attentions = [], []
    for name, module in language_modules(model):
        cls = type(module)
        stock = stock_class(cls)
        if stock is None:
            continue
        if cls is not stock and not isinstance(module, EnabledModule):
            raise ValueError(
                f"{name} is a {cls.__name__}, a changed {stock.__name__}: only the stock class is supported"
            )
        if "forward" in module.__dict__ and not hasattr(module, "_old_forward"):
            raise ValueError(
                f"the forward of {name} has been replaced on the instance: undo that before enable()"
            )
        if is_rotary_embedding(stock):
            rotaries.append(module)
        elif enabled_class(stock).rotates(module):
            attentions.append(module)
    if not rotaries or not attentions:
        raise NotRotary(
            f"{_described(model)} has no attention with a rotary embedding: there is nothing to enable"
        )
    _check_tables(rotaries, attentions)
    return rotaries, attentions


def _check_tables(rotaries: list[nn.Module], attentions: list[nn.Module]) -> None:
    """``ValueError`` unless each rotary embedding makes tables for each form that the attentions of its file take."""
    classes = {type(attention) for attention in attentions}
    stocks = {stock_class(cls) for cls in classes}
    forms: dict[str, set[Form]] = {}
    for stock in stocks:
        forms.setdefault(stock.__module__, set()).update(enabled_class(stock).forms)
    made = {stock_class(type(rotary)).__module__ for rotary in rotaries}
    if forms.keys() - made:
        raise Unsupported(
            f"no rotary embedding was found for the attention of {', '.join(sorted(forms.keys() - made))}"
        )
    for rotary in rotaries:
        stock = stock_class(type(rotary))
        new = new_stock(stock, rotary.config)
        for form in forms.get(stock.__module__, ()):
            check_tables(new, form)


def _described(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__}{f' (model_type {kind})' if kind else ''}"


def language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of ``model`` but those of other towers, in the order of ``named_modules``.

    A module is of the tower whose config it has, or its nearest parent with a config.
    """
    others = _other_configs(model)
    configs: dict[str, type] = {}
    for name, module in model.named_modules():
        own = module.__dict__.get("config")
        parent = configs.get(name.rpartition(".")[0], type(None))
        configs[name] = type(own) if isinstance(own, PretrainedConfig) else parent
        if configs[name] not in others:
            yield name, module


def _other_configs(model: nn.Module) -> set[type]:
    """The config classes of everything in ``model`` that is not a language model."""
    others: set[type] = set()
    language: set[type] = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        config = module.config
        try:
            text = config.get_text_config(decoder=True)
        except ValueError:  # several: which is meant is not known
            continue
        if text is not config:
            language.add(type(text))
            others |= {type(part) for part in _parts(config) if part is not text}
    return others - language


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield part
            yield from _parts(part)
