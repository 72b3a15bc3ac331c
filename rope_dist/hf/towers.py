"""Which modules of a model belong to its language model: a vision or audio tower keeps its own rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


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
