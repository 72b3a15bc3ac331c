"""Models with a window: which layers have one, what they share, and the hooks of their decoders."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from .. import ops
from ..dynamic import DynamicPlan, trained_config
from ..layer_types import extended_layers, rope_parameters
from ..planning import RopePlan
from ..trained_length import recorded_extension
from .cache_record import CacheRecord, attach, cached_tokens, is_paged, record_of, recorded
from .enabled import stock_class
from .finding import Found
from .forms import Unsupported
from .growing import CACHE_NAMES, cache_of, decoder_around, inputs_of, remove_hooks, tokens_of
from .rotary_embedding import far_frequencies
from .window_calls import Window, WindowCall, Windowing, begin_window_call, end_window_call
from .window_source import windowed_class

Windowed = tuple[Windowing, list[nn.Module], list[nn.Module]]
"""What a decoder shares with its attentions, its rotary embeddings, and the attentions that have the window."""


def find_windowings(
    model: nn.Module, found: Found, plans: list[Any], window: Window
) -> dict[nn.Module, Windowed]:
    """For each decoder what it shares with its attentions, its rotary embeddings, and the attentions that have it.

    Args:
        found: rotary embeddings and attentions of the model.
        plans: of each rotary embedding: its far plan.

    Raises:
        Unsupported: a layer that sees whole texts cannot have a window.
        ValueError: the frequencies are not those of the trained model, or there are several kinds.
    """
    names = {module: name for name, module in model.named_modules()}
    rotaries: dict[nn.Module, list[tuple[nn.Module, Any]]] = {}
    for rotary, plan in zip(found.rotaries, plans, strict=True):
        if plan is None:
            raise ValueError("a window needs a far plan: give target_length, factor or plan too")
        rotaries.setdefault(decoder_around(model, names, rotary), []).append((rotary, plan))
    made = {}
    for decoder, own in rotaries.items():
        configs = {id(rotary.config) for rotary, _ in own}
        if len(configs) > 1 or len({type(rotary) for rotary, _ in own}) > 1:
            raise Unsupported(
                f"{type(decoder).__name__} has several kinds of rotary embeddings: it cannot have a window"
            )
        (rotary, plan), inside = own[0], set(decoder.modules())
        config = _trained(rotary)
        attentions = _seeing_all([one for one in found.attentions if one in inside], config)
        windowing = _windowing(stock_class(type(rotary)), config, plan, window, attentions)
        made[decoder] = (windowing, [one for one, _ in own], attentions)
    return made


def _trained(rotary: nn.Module) -> PretrainedConfig:
    """The config of the trained model; ``ValueError`` where it was loaded extended."""
    swap = rotary.__dict__.get("_rope_dist_swap")
    config = swap.config_before if swap is not None and swap.plan is not None else rotary.config
    if config is not trained_config(config) or recorded_extension(config) is not None:
        raise ValueError(
            "the model was loaded extended, and a window needs its trained frequencies: load the trained model"
        )
    parameters = rope_parameters(config)
    kind = parameters.get("rope_type", "default")
    if "mrope_section" in parameters:
        raise Unsupported(f"{type(config).__name__} has positions of several axes: it cannot have a window")
    factors = [list(parameters.get(key) or ()) for key in ("short_factor", "long_factor")]
    if kind == "dynamic" or factors[0] != factors[1]:
        raise Unsupported(
            f"the frequencies of {type(config).__name__} change with the length (rope_type {kind!r}): it cannot have "
            "a window"
        )
    return config


def _seeing_all(attentions: list[nn.Module], config: PretrainedConfig) -> list[nn.Module]:
    """The attentions that see whole texts; the others, within a sliding window, stay as they are."""
    layer_type, types = extended_layers(config), getattr(config, "layer_types", None)
    chosen = []
    for attention in attentions:
        index = getattr(attention, "layer_idx", None)
        if layer_type is not None and types is not None:
            if not isinstance(index, int) or not 0 <= index < len(types):
                raise Unsupported(
                    f"a {type(attention).__name__} does not say which of {len(types)} layers it is in (layer_idx "
                    f"{index!r}): whether it sees whole texts is not known, so it cannot have a window"
                )
            if types[index] != layer_type:
                continue
        cls = windowed_class(getattr(type(attention), "stock", type(attention)))
        if not cls.sees_all(attention):
            continue
        if not cls.keys.cached_by(attention):
            raise Unsupported(f"layer {index} reads the keys of another one: it cannot have a window")
        if not getattr(attention, "is_causal", True):
            raise Unsupported(f"layer {index} is not causal: it cannot have a window")
        chosen.append(attention)
    if not chosen:
        raise Unsupported("every layer sees a sliding window of tokens: there is nothing beyond a window")
    return chosen


def _windowing(
    stock: type[nn.Module],
    config: PretrainedConfig,
    plan: RopePlan | DynamicPlan,
    window: Window,
    attentions: list[nn.Module],
) -> Windowing:
    forms = {windowed_class(getattr(type(one), "stock", type(one))).keys for one in attentions}
    kinds = {(form.first, form.interleaved) for form in forms}
    if len(kinds) != 1:
        raise Unsupported("the layers rotate in several forms: they cannot have a window")
    trained, far, scalings = far_frequencies(stock, config, plan)
    change = trained[None] if window.grouped else far.double() - trained.double()
    return Windowing(window, plan, trained, far, ops.to_fixed_point(change), scalings, forms.pop())


def attach_window(
    decoder: nn.Module, windowing: Windowing, rotaries: list[nn.Module], attentions: list[nn.Module]
) -> None:
    """Let a decoder whose modules are enabled read by a window from now on."""
    detach_window(decoder)
    decoder._rope_dist_window = windowing
    decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
    decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True)
    for rotary in rotaries:
        rotary._rope_dist_window = windowing
    for attention in attentions:
        attention._rope_dist_window = windowing


def detach_window(module: nn.Module) -> None:
    """Undo :func:`attach_window` for a module, also of a copy; an attention keeps its class."""
    module.__dict__.pop("_rope_dist_window", None)
    remove_hooks(module, before_forward, after_forward)
    saving = module.__dict__.get("save_pretrained")
    if isinstance(saving, functools.partial) and saving.func is _refuse_to_save:
        del module.save_pretrained


def refuse_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with a window say why it is not saved."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = functools.partial(_refuse_to_save, type(module).__name__)


def _refuse_to_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"no config says that {name} has a window, so what is saved would be read without it: rope_dist.disable(model) "
        "first, and enable() the loaded model again"
    )


def windowing_of(model: nn.Module) -> Windowing | None:
    """What a model with a window shares, or None."""
    found = (m.__dict__.get("_rope_dist_window") for m in model.modules())
    return next((windowing for windowing in found if windowing is not None), None)


# --- a decoder's hooks ---------------------------------------------------------------------------


@torch.compiler.disable(reason="a model with a window chooses its far angles by the tokens read")
def before_forward(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Choose the far angles of a call, and remember how many tokens its cache has.

    A layer that is run again in a backward pass finds its stage by the tensor of its positions: each call has its own.
    """
    windowing: Windowing = decoder._rope_dist_window
    inputs = inputs_of(decoder, args, kwargs)
    new, cache = tokens_of(inputs), cache_of(inputs)
    if is_paged(cache):
        raise ValueError("continuous batching has no attention by a window: disable() it")
    record, past = None, 0
    if cache is not None:
        record = recorded(cache, windowing.plan)
        if record.stage != 0:
            raise ValueError(
                "the keys in the cache were corrected for another stage of the plan: a window needs those of the "
                "trained model"
            )
        past, record.announced = cached_tokens(cache, record, new), 0
    begin_window_call(WindowCall(decoder, windowing, record, past, windowing.stage(past + new)))
    positions = kwargs.get("position_ids")
    if isinstance(positions, torch.Tensor):
        kwargs = {**kwargs, "position_ids": positions.view_as(positions)}
    return args, kwargs


@torch.compiler.disable(reason="a model with a window keeps the positions of the cached keys")
def after_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Give the cache that a call has made the record of its keys; of a call that failed, ``output`` is None."""
    call = end_window_call(decoder)
    if call is None or call.record is not None or call.positions is None:
        return
    parts = output if isinstance(output, tuple) else (getattr(output, name, None) for name in CACHE_NAMES)
    cache = next((part for part in parts if isinstance(part, Cache)), None)
    if cache is not None and record_of(cache) is None:
        record = CacheRecord(call.windowing.plan)
        record.write(0, call.positions)
        attach(cache, record)
