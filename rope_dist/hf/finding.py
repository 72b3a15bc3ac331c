"""Finds the rotary embeddings and attentions of a model's language model; other towers keep their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .enabled import check_unchanged, enabled_class, is_rotary_embedding, stock_class
from .forms import Form, NotRotary, Unsupported
from .rotary_embedding import EnabledModule, check_tables, new_stock


@dataclass(frozen=True)
class Found:
    """What there is to swap.

    Attributes:
        rotaries, attentions: modules of the language model, in its order.
        tables: for the file (module) of each rotary embedding, how its tables hold their values (:class:`Form`).
    """

    rotaries: list[nn.Module]
    attentions: list[nn.Module]
    tables: dict[str, str]


def find(model: nn.Module) -> Found:
    """The rotary embeddings and attentions of ``model``.

    Raises:
        NotRotary: there are none.
        Unsupported: a function that rotates, or the tables it takes, are not known.
        ValueError: a class or a forward was changed by somebody else.
    """
    rotaries, attentions = [], []
    checked: set[type] = set()
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
            continue
        enabled = enabled_class(stock)
        if cls is stock and stock not in checked:
            check_unchanged(enabled)
            checked.add(stock)
        if enabled.rotates(module):
            attentions.append(module)
    if not rotaries or not attentions:
        raise NotRotary(
            f"{_described(model)} has no attention with a rotary embedding: there is nothing to enable"
        )
    return Found(rotaries, attentions, _checked_tables(rotaries, attentions))


def _checked_tables(rotaries: list[nn.Module], attentions: list[nn.Module]) -> dict[str, str]:
    """How the tables of each file hold their values, once they are seen to be of the forms that its attentions take."""
    forms: dict[str, set[Form]] = {}
    for stock in {stock_class(type(attention)) for attention in attentions}:
        forms.setdefault(stock.__module__, set()).update(enabled_class(stock).forms)
    without = forms.keys() - {stock_class(type(rotary)).__module__ for rotary in rotaries}
    if without:
        raise Unsupported(f"no rotary embedding was found for the attention of {', '.join(sorted(without))}")
    for rotary in {(type(rotary), id(rotary.config)): rotary for rotary in rotaries}.values():
        stock = stock_class(type(rotary))
        new = new_stock(stock, rotary.config)
        for form in forms.setdefault(stock.__module__, set()):
            check_tables(new, form)
    kinds = {file: {form.tables for form in own} for file, own in forms.items()}
    return {file: kind.pop() if len(kind) == 1 else "once" for file, kind in kinds.items()}


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
