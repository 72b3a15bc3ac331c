"""Dynamic plans at work: the stage of each call, and the correction of cached keys where it changes.

A decoder with a dynamic plan has hooks: before each call the number of tokens that it will have seen decides the
stage. Keys that were cached under another one are multiplied, as complex numbers, by the new tables divided by the old
at their own positions: they become what the new stage would have made of them, attention scaling included.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..dynamic import DynamicPlan, trained_config
from ..layer_types import extended_layers
from .cache_record import CacheRecord, attach, cached_tokens, is_paged, record_of, recorded
from .cached_keys import cached_layers
from .correcting import change_stage
from .enabled import enabled_class, stock_class
from .finding import Found
from .forms import Unsupported
from .rotary_embedding import check_stages
from .stages import Call, Growth, begin_call, end_call

CACHE_NAMES = ("cache", "past_key_values")
"""What decoders call their cache, in newer and older versions."""

# --- models ---------------------------------------------------------------------------------------


def find_growths(model: nn.Module, found: Found, plans: list[Any]) -> dict[nn.Module, Growth]:
    """What each decoder of ``model`` keeps of its dynamic plan.

    Args:
        found: rotary embeddings and attentions of the model.
        plans: of each rotary embedding; those that are not dynamic are left out.

    Raises:
        Unsupported: the cached keys of the model cannot be corrected, or its tables are of more than frequencies.
    """
    growths: dict[nn.Module, Growth] = {}
    names = {module: name for name, module in model.named_modules()}
    for rotary, plan in zip(found.rotaries, plans, strict=True):
        if not isinstance(plan, DynamicPlan):
            continue
        decoder = decoder_around(model, names, rotary)
        if decoder not in growths:
            swap = rotary.__dict__.get("_rope_dist_swap")
            config = swap.config_before if swap is not None and swap.plan is not None else rotary.config
            growths[decoder] = _growth(decoder, rotary, found, plan, trained_config(config))
        elif type(rotary) is not type(decoder.get_submodule(growths[decoder].rotary)):
            raise Unsupported(f"{type(decoder).__name__} has several kinds of rotary embeddings: {_STATIC}")
        else:
            of_decoder = {module: name for name, module in decoder.named_modules()}
            growths[decoder].others += (of_decoder[rotary],)
    return growths


_STATIC = "give it a static plan (dynamic=False)"


def decoder_around(model: nn.Module, names: dict[nn.Module, str], rotary: nn.Module) -> nn.Module:
    """The model around a rotary embedding that is given the cache."""
    path = names[rotary]
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, PreTrainedModel) and set(CACHE_NAMES) & set(_parameters(type(module))):
            return module
    raise Unsupported(f"no model around {names[rotary] or type(rotary).__name__} is given a cache: {_STATIC}")


def _growth(decoder: nn.Module, rotary: nn.Module, found: Found, plan: DynamicPlan, config: Any) -> Growth:
    layer_type, types = extended_layers(config), getattr(config, "layer_types", None)
    inside = set(decoder.modules())
    attentions = [attention for attention in found.attentions if attention in inside]
    stock = stock_class(type(rotary))
    check_stages(stock, config, plan)
    try:
        layers = cached_layers(attentions)
    except Unsupported as error:
        raise Unsupported(f"{error}; {_STATIC}") from None
    if layer_type is not None:
        layers = {i: of for i, of in layers.items() if types[i] == layer_type}
    forms = {
        (form.tables, form.negative)
        for attention, _ in layers.values()
        for form in enabled_class(stock_class(type(attention))).forms
    }
    if len(forms) != 1:
        raise Unsupported(f"the layers of {type(decoder).__name__} rotate in several forms: {_STATIC}")
    names = {module: name for name, module in decoder.named_modules()}
    return Growth(plan, names[rotary], layer_type, {i: keys for i, (_, keys) in layers.items()}, *forms.pop())


def attach_growth(decoder: nn.Module, growth: Growth) -> None:
    """Let a decoder read by a dynamic plan from now on."""
    detach_growth(decoder)
    decoder._rope_dist_growth = growth
    decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
    decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True)


def attach_compiled_call(model: nn.Module) -> None:
    """Let ``generate`` make each call of a model that it compiles ready, outside of the graph."""
    if hasattr(type(model), "get_compiled_call"):
        model.get_compiled_call = functools.partial(_get_compiled_call, model)


def detach_compiled_call(model: nn.Module) -> None:
    """Undo :func:`attach_compiled_call`, also of a copy."""
    own = model.__dict__.get("get_compiled_call")
    if isinstance(own, functools.partial) and own.func is _get_compiled_call:
        del model.get_compiled_call


def _get_compiled_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    compiled = type(model).get_compiled_call(model, *args, **kwargs)

    def call(**inputs: Any) -> Any:
        cache = cache_of(inputs)
        for decoder in model.modules() if cache is not None else ():
            if "_rope_dist_growth" in decoder.__dict__:
                decoder._rope_dist_growth.by_hand = True
                _prepare(decoder, cache, tokens_of(inputs), inputs.get("position_ids"))
        return compiled(**inputs)

    return call


def detach_growth(decoder: nn.Module) -> None:
    """Undo :func:`attach_growth`, also of a copy."""
    decoder.__dict__.pop("_rope_dist_growth", None)
    remove_hooks(decoder, before_forward, after_forward)


def remove_hooks(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Remove two functions from the hooks of a module, also of a copy: by what they are, not by a handle."""
    for hooks, with_kwargs, own in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, before),
        (module._forward_hooks, module._forward_hooks_with_kwargs, after),
    ):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


# --- a decoder's hooks ---------------------------------------------------------------------------


def before_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Choose the stage of a call, and correct its cache."""
    growth: Growth = decoder._rope_dist_growth
    inputs = inputs_of(decoder, args, kwargs)
    new = tokens_of(inputs)
    cache = cache_of(inputs)
    if is_paged(cache):
        _use_last_stage(decoder, growth)
        return
    if torch.compiler.is_compiling():
        if cache is None:
            growth.use(decoder, growth.stage(new))
        elif not growth.by_hand:
            _prepare_outside(decoder, cache, new, inputs.get("position_ids"))
        return
    record, past, before = None, 0, 0
    if cache is not None:
        record = recorded(cache, growth.plan)
        past, before = cached_tokens(cache, record, new), record.stage or 0
        record.announced = 0
    stage = growth.stage(past + new, before)
    if record is not None:
        change_stage(decoder, cache, record, past, stage)
    growth.use(decoder, stage)
    begin_call(Call(decoder, stage, record, past))


def _use_last_stage(decoder: nn.Module, growth: Growth) -> None:
    """Read every text of a paged cache by one stage: it has no layers whose keys could be corrected."""
    last = len(growth.plan.stages) - 1
    if not torch.compiler.is_compiling():
        warnings.warn(
            "continuous batching reads every text by the last stage of the dynamic plan, for "
            f"{growth.plan.target_length} tokens: keys in pages are not corrected",
            stacklevel=2,
        )
        begin_call(Call(decoder, last, None, 0))
    growth.use(decoder, last)


def after_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Give the cache that a call has made the record of its keys; of a call that failed, ``output`` is None."""
    if torch.compiler.is_compiling():
        return
    call = end_call(decoder)
    if call is None or call.record is not None or call.positions is None:
        return
    parts = output if isinstance(output, tuple) else (getattr(output, name, None) for name in CACHE_NAMES)
    cache = next((part for part in parts if isinstance(part, Cache)), None)
    if cache is not None and record_of(cache) is None:
        record = CacheRecord(call.decoder._rope_dist_growth.plan)
        record.stage = call.stage
        record.write(0, call.positions)
        attach(cache, record)


def inputs_of(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(type(decoder)), args, strict=False)), **kwargs} if args else kwargs


def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    names = _PARAMETERS.get(cls)
    if names is None:
        names = _PARAMETERS[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return names


_PARAMETERS: dict[type, tuple[str, ...]] = {}


def tokens_of(inputs: dict[str, Any]) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name].shape[1]
    return 0  # stock says what is missing


def cache_of(inputs: dict[str, Any]) -> Cache | None:
    for name in CACHE_NAMES:
        if inputs.get(name) is not None:
            return inputs[name]
    return None


def prepare_cache(model: nn.Module, cache: Cache, tokens: int) -> None:
    """Prepare a cache and a model with a dynamic plan for a compiled call with ``tokens`` more tokens a sequence.

    Eager models and ``generate`` do it themselves, compiled models between two graphs. A graph of the whole model
    (``fullgraph=True``, CUDA graphs) reads whatever frequencies are set, so that it is never recorded again: call this
    before each of its calls with a cache, the first one included.

    Args:
        model: enabled with a dynamic plan.
        cache: of transformers, which the next call is given.
        tokens: of the next call, counted from the end of the cache.

    Raises:
        ValueError: the model has no dynamic plan, or the cache is of another plan or cannot be corrected.
    """
    decoder = next((m for m in model.modules() if "_rope_dist_growth" in m.__dict__), None)
    if decoder is None:
        raise ValueError("the model has no dynamic plan: rope_dist.enable(model, factor=2, dynamic=True)")
    decoder._rope_dist_growth.by_hand = True
    _prepare(decoder, cache, tokens, None)


@torch.compiler.disable(
    reason="a dynamic plan needs rope_dist.prepare_cache(model, cache, tokens) before each call of a graph with a cache"
)
def _prepare_outside(decoder: nn.Module, cache: Cache, tokens: int, positions: torch.Tensor | None) -> None:
    """As :func:`prepare_cache`, between two graphs."""
    _prepare(decoder, cache, tokens, positions)


def _prepare(decoder: nn.Module, cache: Cache, tokens: int, positions: torch.Tensor | None) -> None:
    growth: Growth = decoder._rope_dist_growth
    record = recorded(cache, growth.plan)
    past = cached_tokens(cache, record)
    stage = growth.stage(past + tokens, record.stage or 0)
    change_stage(decoder, cache, record, past, stage)
    growth.use(decoder, stage)
    if positions is None:
        device = decoder.get_submodule(growth.rotary).stage_inv_freq.device
        positions = torch.arange(past, past + tokens, device=device)[None]
    record.write(past, positions)
    record.announced = tokens
