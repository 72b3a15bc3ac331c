"""``enable`` and ``disable``: swap a Hugging Face model's attention and rotary embedding, and back.

A model is swapped per instance, by giving each module the enabled subclass of its own class; nothing
of transformers is changed for other models. Without a model, ``from_pretrained`` and ``from_config``
are wrapped so that they swap what they return, and ``post_init``, which ends every constructor. Everything is checked
before the first change.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..defaults import TABLES
from ..dynamic import DynamicPlan
from ..planning import RopePlan, check_options
from ..strategies import DEFAULT_STRATEGY
from .constructing import ends_construction, is_left_alone, is_part, left_alone
from .enabled import EnabledAttention, enabled_class
from .finding import Found, find
from .forms import NotRotary, Unsupported
from .growing import (
    attach_compiled_call,
    attach_growth,
    detach_compiled_call,
    detach_growth,
)
from .model_plans import plans_and_growths, plans_and_windowings
from .reporting import LayerReport, report, summary
from .rotary_embedding import EnabledModule, EnabledRotaryEmbedding
from .window_calls import Window, Windowing
from .window_source import windowed_class
from .windowing import attach_window, detach_window, refuse_saving, windowing_of

_LOCK = threading.RLock()


@dataclass
class _Swap:
    """Kept on an enabled rotary embedding: what to restore, how its tables hold their values, whether these are rounded
    to the model's dtype, and for which types of layers they change with the length; of a dynamic plan also the names of
    its frequencies and its attention scaling, and the stage in force.

    Plain values, so that it copies and pickles.
    """

    dtypes_before: dict[str, torch.dtype]
    tables: str
    rounded: bool = False
    by_length: frozenset[str | None] = frozenset()
    plan: RopePlan | DynamicPlan | None = None
    config_before: PretrainedConfig | None = None
    names: tuple[str, str] = ("", "")
    stage: int | None = None


@dataclass(repr=False)
class Enabled:
    """What :func:`enable` did; a context manager that undoes it on leaving. Printed, it shows the path of each layer.

    Attributes:
        model: the enabled model, or None where models yet to be built are meant.
        plan: the plan in force, or None for the model's own frequencies.
        window: within which distances are the trained model's, and the plan is for those beyond; None without one.
        layers: number of attention layers that were swapped.
        why_static: why the model could not be given a dynamic plan; empty where it has one or none was wanted.
    """

    model: nn.Module | None
    plan: RopePlan | DynamicPlan | None
    layers: int = 0
    why_static: str = ""
    window: Window | None = None
    _previous: _Swap | None = None
    _previous_window: Windowing | None = None
    _global: _GlobalMode | None = None
    _previous_options: dict[str, Any] | None = None

    def __repr__(self) -> str:
        what = "models yet to be built" if self.model is None else type(self.model).__name__
        window = "" if self.window is None else f", window={self.window!r}"
        return f"Enabled({what}, {self.layers} attention layers, plan={self.plan!r}{window})"

    def report(self) -> list[LayerReport]:
        """Which path each attention layer takes now: see :func:`rope_dist.report`."""
        return report(self.model) if self.model is not None else []

    def __str__(self) -> str:
        static = [f"static plan: {self.why_static}"] if self.why_static else []
        return "\n".join([repr(self), *static, *([summary(self.report())] if self.model is not None else [])])

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        with _LOCK:
            if self.model is None:
                _leave_global(self._global, self._previous_options)
                return
            disable(self.model)
            if self._previous is not None:
                tables = "model" if self._previous.rounded else "float32"
                before = self._previous_window
                if before is None:
                    enable(self.model, plan=self._previous.plan, tables=tables)
                else:
                    enable(self.model, plan=before.plan, tables=tables, **before.window.arguments)


def enable(  # noqa: PLR0913
    model: nn.Module | None = None,
    *,
    target_length: int | None = None,
    factor: float | None = None,
    strategy: str = DEFAULT_STRATEGY,
    plan: RopePlan | DynamicPlan | None = None,
    dynamic: bool | None = None,
    stages: Sequence[int] | None = None,
    original_length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    tables: str = "float32",
    window: int | None = None,
    far: str = "plan",
    far_scaling: str = "none",
    **more_settings: Any,
) -> Enabled:
    """Enable a model: its rotary embedding runs on this package's kernels, and reads longer texts if a length is given.

    With neither a target nor a plan the model keeps its own frequencies, recomputed in float32 from its
    config, and only the computation is swapped. With one, the frequencies become the plan's and
    ``config.max_position_embeddings`` is raised; ``save_pretrained`` then writes a config from which stock
    transformers computes the same frequencies. Enabling twice is the same as enabling once, also after saving and
    loading in between; a new plan replaces the old one, and extends further a model that was loaded extended.
    cos and sin are computed as stock does, from positions times frequencies in float32.

    Args:
        model: a ``transformers`` model with a rotary embedding (:func:`rope_dist.supported`), or a module that holds
            one (a PEFT model). None: every such model that ``from_pretrained``, ``from_config`` or its class builds
            from now on, until :func:`disable`.
        target_length: tokens to read; the plan is made from the model's config.
        factor: instead, its multiple of the trained length; as in :func:`rope_dist.plan`, it counts from the length
            before where the model is loaded extended.
        strategy, settings, **more_settings: as in :func:`rope_dist.plan`.
        plan: a ready plan, instead of a target; made from this model, or the one that extended it already.
        dynamic: True plans an extension that grows with the text (:class:`rope_dist.DynamicPlan`): up to the trained
            length the model computes what it did, beyond it each text is read by the stage for its length, and cached
            keys are corrected where a growing text goes from one stage to the next. False: one plan for all lengths.
            None: dynamic where the keys that the model caches can be corrected, else static
            (:attr:`Enabled.why_static`).
        stages: lengths of the stages of a dynamic plan; see :func:`rope_dist.dynamic_plan`.
        original_length: tokens that the model was trained to read, where its config does not say or says wrongly.
        tables: dtype of the values of cos and sin. ``"float32"`` is the most exact, and what SGLang computes on CUDA.
            ``"model"`` rounds them to the dtype of the activations, and rotates what the model's own projections and
            norms return: bit for bit what vLLM's CUDA kernel computes, for trainers whose rollouts it writes. Models
            in float32 are the same by both.
        window: distances below it stay the trained model's, and the plan is for those beyond (docs/window.md): the
            attention of layers that see whole texts is computed in two parts. The config is left as it was, and
            ``save_pretrained`` refuses: no engine reads such a model from one.
        far: of a window: ``"plan"``, beyond it angles grow by the plan's frequencies; ``"grouped"``, by the trained
            ones over positions in groups, divided by a size and rounded down (Self-Extend), no text longer than its
            groups can reach; ``"jet-long"``, the same by Jet-Long's size, the length over the trained length. A dynamic
            plan takes the size for each text. Neither has a strategy.
        far_scaling: of a window: which logits the plan's attention scaling multiplies: ``"none"``, as in the published
            methods, the ``"far"`` ones, or ``"all"`` of texts longer than the window.

    Returns:
        What was done; leaving it as a context manager undoes it.

    Raises:
        ValueError: how the model rotates is not known, the plan is not for this model, or an argument is bad.
            The model is then as it was.
        TypeError: ``model`` is not a module or ``plan`` not a :class:`RopePlan`.
    """
    if plan is not None and not isinstance(plan, (RopePlan, DynamicPlan)):
        raise TypeError(f"plan must be a RopePlan or a DynamicPlan, got {type(plan).__name__}")
    factor, given = check_options(strategy, target_length, factor, settings, more_settings)
    targets = [target_length is not None, factor is not None, plan is not None]
    if sum(targets) > 1:
        raise ValueError("give one of target_length, factor and plan")
    targeted = any(targets[:2]) or stages is not None
    if given and not targeted:
        raise ValueError(f"{', '.join(given)} are of a strategy: give target_length or factor too")
    if original_length is not None and not targeted:
        raise ValueError("original_length is of a new plan: give target_length or factor too")
    if dynamic is not None and not isinstance(dynamic, bool):
        raise TypeError(f"dynamic must be True, False or None, got {dynamic!r:.80}")
    if stages is not None and dynamic is False:
        raise ValueError("stages are of a dynamic plan, and dynamic is False")
    if dynamic and not targeted:
        raise ValueError(
            "a dynamic plan needs an end: give target_length, factor or stages, or plan=DynamicPlan"
        )
    if stages is not None and plan is not None:
        raise ValueError("give either a plan or stages")
    if tables not in TABLES:
        raise ValueError(f"tables must be {' or '.join(map(repr, TABLES))}, got {tables!r:.80}")
    chosen = _window_of(window, far, far_scaling)
    if chosen is not None and not targeted and plan is None:
        raise ValueError("a window needs a far plan: give target_length, factor or plan too")
    if chosen is not None and chosen.grouped and (given or strategy != DEFAULT_STRATEGY):
        raise ValueError(f"far={far!r} has the trained frequencies: it takes no strategy and no settings")
    options = {
        "target_length": target_length,
        "factor": factor,
        "strategy": strategy,
        "plan": plan,
        "original_length": original_length,
        "settings": given,
        "dynamic": dynamic,
        "stages": stages,
        "tables": tables,
        "window": window,
        "far": far,
        "far_scaling": far_scaling,
    }
    with _LOCK:
        if model is None:
            return _enter_global(options)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        found = find(model)
        rotaries, attentions = found.rotaries, found.attentions
        previous, before = copy.copy(_swap_of(rotaries[0])), windowing_of(model)
        rounded = tables == "model"
        if chosen is None and before is not None and not targeted and plan is None:
            chosen, options["plan"] = before.window, before.plan
        if chosen is not None:
            return _enable_window(model, found, options, chosen, previous, before, rounded)
        plans, growths, why_static = plans_and_growths(model, found, options)
        if targeted or plan is not None:
            _share_configs(model, rotaries)
        _swap_rotaries(model, found, plans, rounded)
        _swap_attentions(attentions, rounded)
        for module in list(model.modules()):
            detach_window(module)
            if module in growths:
                attach_growth(module, growths[module])
            else:
                detach_growth(module)
            detach_compiled_call(module)
            if growths and isinstance(module, PreTrainedModel):
                attach_compiled_call(module)
        _ENABLED_MODELS.add(model)
        return Enabled(
            model, plans[0], len(attentions), why_static, _previous=previous, _previous_window=before
        )


def disable(model: nn.Module | None = None) -> None:
    """Undo :func:`enable`: restore the original classes, frequencies and config.

    Args:
        model: an enabled model; one that is not enabled is left alone. None: stop swapping new models and
            restore every model that :func:`enable` was given (a copy of one is restored by its own call).
    """
    with _LOCK:
        if model is None:
            _leave_global(_GLOBAL)
            for enabled in list(_ENABLED_MODELS):
                disable(enabled)
            return
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for module in model.modules():
            if isinstance(module, EnabledRotaryEmbedding):
                _restore_rotary(module)
            elif isinstance(module, EnabledAttention):
                module.__dict__.pop("_rope_dist_rounded", None)
                _set_class(module, type(module).stock)
            detach_growth(module)
            detach_window(module)
            detach_compiled_call(module)
        _ENABLED_MODELS.discard(model)


# --- one model ---------------------------------------------------------------------------------

_ENABLED_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _swap_of(rotary: nn.Module) -> _Swap | None:
    return rotary.__dict__.get("_rope_dist_swap")


def _swap_attentions(attentions: list[nn.Module], rounded: bool) -> None:
    for attention in attentions:
        enabled = enabled_class(getattr(type(attention), "stock", type(attention)))
        if type(attention) is not enabled:
            _set_class(attention, enabled)
        attention._rope_dist_rounded = rounded


def _window_of(size: int | None, far: str, scaling: str) -> Window | None:
    if size is not None:
        return Window(size, far, scaling)
    if (far, scaling) != (Window.far, Window.scaling):
        raise ValueError("far and far_scaling are of a window: give window too")
    return None


def _enable_window(
    model: nn.Module,
    found: Found,
    options: dict[str, Any],
    window: Window,
    previous: _Swap | None,
    before: Windowing | None,
    rounded: bool,
) -> Enabled:
    """The end of :func:`enable` with a window: the trained frequencies stay, and the plan is for far distances."""
    plans, windowings, why_static = plans_and_windowings(model, found, options, window)
    if previous is not None:
        disable(model)  # everything was checked
    _swap_rotaries(model, found, [None] * len(found.rotaries), rounded)
    _swap_attentions(found.attentions, rounded)
    for decoder, (windowing, rotaries, attentions) in windowings.items():
        attach_window(decoder, windowing, rotaries, attentions)
        for attention in attentions:
            _set_class(attention, windowed_class(type(attention).stock))
    refuse_saving(model)
    _ENABLED_MODELS.add(model)
    return Enabled(
        model,
        plans[0],
        len(found.attentions),
        why_static,
        window,
        _previous=previous,
        _previous_window=before,
    )


def _share_configs(model: nn.Module, rotaries: list[nn.Module]) -> None:
    """Give rotary embeddings that have a copy of the model's config the config itself, which is what is saved.

    Raises:
        ValueError: the copy differs.
    """
    configs = {
        id(c): c for m in model.modules() if m not in rotaries and _is_config(c := m.__dict__.get("config"))
    }
    shared = []
    for rotary in rotaries:
        if id(rotary.config) not in configs:
            same = [c for c in configs.values() if c.to_dict() == rotary.config.to_dict()]
            if not same:
                raise ValueError(
                    f"a {type(rotary).__name__} of the model has a config of its own, which save_pretrained does not "
                    "write: the model cannot be extended"
                )
            shared.append((rotary, same[0]))
    for rotary, config in shared:
        rotary.config = config


def _swap_rotaries(
    model: nn.Module, found: Found, plans: list[RopePlan | DynamicPlan | None], rounded: bool
) -> None:
    rotaries, swaps = found.rotaries, []
    for rotary in rotaries:
        swap = _swap_of(rotary)
        if swap is None:
            dtypes = {name: buffer.dtype for name, buffer in rotary.named_buffers(recurse=False)}
            swap = rotary._rope_dist_swap = _Swap(dtypes, found.tables[type(rotary).__module__])
            _set_class(rotary, enabled_class(type(rotary)))
        swap.rounded = rounded
        swaps.append(swap)
    # Before any config changes: a model may have a rotary embedding in each layer, all with one config.
    first = {
        id(r.config): r.config
        for r, swap, plan in zip(rotaries, swaps, plans, strict=True)
        if plan and not swap.plan
    }
    for rotary, swap in zip(rotaries, swaps, strict=True):
        if id(rotary.config) in first:
            swap.config_before = rotary.config
    for config in first.values():
        _give_own_config(model, config)
    for rotary, swap, plan in zip(rotaries, swaps, plans, strict=True):
        if plan is not None and plan is not swap.plan:
            swap.plan = plan
            rotary.config.__dict__.update(plan.config_overrides(swap.config_before))
        rotary.reset_frequencies()


def _give_own_config(model: nn.Module, config: PretrainedConfig) -> None:
    """Let the modules of ``model`` have copies of ``config`` and of those that it is a part of.

    Another model may have the same objects. Copied together, the text config of a multimodal model stays a part of
    the whole model's config, which is what is saved.
    """
    configs = {id(c): c for m in model.modules() if _is_config(c := m.__dict__.get("config"))}
    whole = [c for c in configs.values() if c is config or _has_part(c, config)]
    copies: dict[int, Any] = {}
    for one in whole:
        copy.deepcopy(one, copies)
    for module in model.modules():
        own = module.__dict__.get("config")
        if _is_config(own) and id(own) in copies:
            module.config = copies[id(own)]


def _is_config(value: Any) -> bool:
    return isinstance(value, PretrainedConfig)


def _has_part(config: PretrainedConfig, part: PretrainedConfig) -> bool:
    return any(v is part or (_is_config(v) and _has_part(v, part)) for v in config.__dict__.values())


def _restore_rotary(rotary: nn.Module) -> None:
    swap = _swap_of(rotary)
    if swap.plan is not None:
        # Only what the plan set: other changes to the config since then are the user's.
        for key in swap.plan.config_overrides(swap.config_before):
            if key in swap.config_before.__dict__:
                setattr(rotary.config, key, copy.deepcopy(getattr(swap.config_before, key)))
            else:
                rotary.config.__dict__.pop(key, None)  # gone already where rotary embeddings share the config
    swap.plan = None
    rotary.reset_frequencies()
    for name, dtype in swap.dtypes_before.items():
        if name in rotary._buffers:
            rotary._buffers[name] = rotary._buffers[name].to(dtype)
    del rotary._rope_dist_swap
    _set_class(rotary, type(rotary).stock)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        # accelerate's hook calls the forward it found when it was attached: give it the new class's.
        module._old_forward = types.MethodType(cls.forward, module)


# --- models yet to be built --------------------------------------------------------------------


@dataclass
class _GlobalMode:
    options: dict[str, Any]
    stock: dict[str, Any]
    models: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)


_GLOBAL: _GlobalMode | None = None
_BUILDERS = ("from_pretrained", "_from_config")


def _enter_global(options: dict[str, Any]) -> Enabled:
    global _GLOBAL
    before = None
    if _GLOBAL is not None:
        before, _GLOBAL.options = _GLOBAL.options, options
    else:
        stock = {name: PreTrainedModel.__dict__[name] for name in _BUILDERS}
        _GLOBAL = _GlobalMode(options, stock)
        for name, builder in stock.items():
            setattr(PreTrainedModel, name, classmethod(_enabling(builder.__func__)))
        stock["post_init"] = PreTrainedModel.post_init
        PreTrainedModel.post_init = _enabling_at_the_end(PreTrainedModel.post_init)
    return Enabled(None, options["plan"], _global=_GLOBAL, _previous_options=before)


def _leave_global(mode: _GlobalMode | None, previous_options: dict[str, Any] | None = None) -> None:
    """End ``mode``, or go back to the options of a context around it. A mode that has ended stays so."""
    global _GLOBAL
    if mode is None or mode is not _GLOBAL:
        return
    if previous_options is not None:
        mode.options = previous_options
        return
    for name, builder in mode.stock.items():
        setattr(PreTrainedModel, name, builder)
    _GLOBAL = None
    for model in list(mode.models):
        disable(model)


def _enabling(builder: Any) -> Any:
    """``builder`` (the function under a classmethod of ``PreTrainedModel``), then :func:`enable`."""

    @functools.wraps(builder)
    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        if builder.__name__ == "_from_config" and is_part():
            return builder(cls, *args, **kwargs)  # enabled with the whole, whose config it shares
        with left_alone():
            result = builder(cls, *args, **kwargs)
        if not is_left_alone():
            # from_pretrained(output_loading_info=True) returns a pair.
            _enable_built(result[0] if isinstance(result, tuple) else result)
        return result

    return build


def _enabling_at_the_end(post_init: Any) -> Any:
    """``PreTrainedModel.post_init``, then :func:`enable` where it ends the construction by a class itself."""

    @functools.wraps(post_init)
    def end(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        if not is_left_alone() and ends_construction(self):
            _enable_built(self)

    return end


def _enable_built(model: nn.Module) -> None:
    mode = _GLOBAL
    if mode is None:
        return
    try:
        enable(model, **mode.options)
    except NotRotary:
        return
    except Unsupported as error:
        warnings.warn(f"{type(model).__name__} is left as it is: {error}", stacklevel=3)
        return
    mode.models.add(model)


def enabled_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of ``model`` that run this package's code."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, EnabledModule))
