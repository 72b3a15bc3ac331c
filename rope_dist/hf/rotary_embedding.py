"""What makes the tables of an enabled model: stock's own rotary embedding, in float32."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..dynamic import DynamicPlan, trained_config
from ..layer_types import extended_layers
from ..planning import RopePlan
from .applying import keep_pairs, pairs_of
from .forms import Form, Unsupported
from .stages import current_call, note_positions
from .window_calls import note_window_positions


class EnabledModule:
    """What every enabled module has: its stock class, and copies and pickles that need no enabled class by name."""

    stock: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class itself was made in this process; another makes its own from the stock class.
        _, _, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return (_blank, (self.stock,), *rest)


def _blank(stock: type[nn.Module]) -> nn.Module:
    from .enabled import enabled_class

    cls = enabled_class(stock)
    return cls.__new__(cls)


class EnabledRotaryEmbedding(EnabledModule):
    """Mixin of a stock rotary embedding: float32 tables, from frequencies that stay float32.

    Stock rounds cos and sin to 16 bits before the rotation, and lets ``.to(torch.bfloat16)`` round its frequencies,
    which is off by more than 2 pi within a few thousand tokens.
    """

    tables_of: Callable[..., Any]
    """Stock's forward as it is written, without decorators."""

    def reset_frequencies(self) -> None:
        """Set the frequencies to what the config says, in float32, on the device they are on.

        What was kept between calls (by frequencies that change with the length) is forgotten.
        """
        plan = self._rope_dist_swap.plan
        stages = []
        if isinstance(plan, DynamicPlan):
            stages = stock_stages(self.stock, trained_config(self._rope_dist_swap.config_before), plan)
        new = stages[0] if stages else new_stock(self.stock, self.config)
        device = next((buffer.device for buffer in self._buffers.values() if buffer is not None), None)
        for name in list(self._buffers):
            if name not in new._buffers:
                delattr(self, name)
        for name, buffer in new._buffers.items():
            self.register_buffer(
                name, buffer.to(device), persistent=name not in new._non_persistent_buffers_set
            )
        for name, value in new.__dict__.items():
            if not name.startswith("_") and name not in ("config", "training"):
                setattr(self, name, value)
        for name in list(self.__dict__):
            if name.endswith(("long_inv_freq", "max_seq_len_cached")) and name not in new.__dict__:
                delattr(self, name)
        if stages:
            self._keep_stages(stages, device)
        self._rope_dist_swap.by_length = frozenset() if stages else self._types_by_length()

    def _keep_stages(self, stages: list[nn.Module], device: torch.device | None) -> None:
        """Frequencies ``[stages, R/2]`` and attention scalings ``[stages]`` as buffers, and those in force as well.

        They change in place, so that a compiled graph reads what is in force and is never recorded again.
        """
        inv_freq, scaling = _names(trained_config(self._rope_dist_swap.config_before))
        scalings = torch.stack([_scaling(stage, scaling) for stage in stages])
        buffers = {
            "stage_inv_freq": torch.stack([getattr(stage, inv_freq).float() for stage in stages]),
            "stage_scaling": scalings,
        }
        if self.__dict__.pop(scaling, None) is not None:
            buffers[scaling] = scalings[0].clone()
        for name, value in buffers.items():
            self.register_buffer(name, value.to(device), persistent=False)
        self._rope_dist_swap.names, self._rope_dist_swap.stage = (inv_freq, scaling), 0

    def use_stage(self, stage: int) -> None:
        """Put the frequencies of a stage in force for compiled graphs and for calls outside of a decoder's."""
        swap = self._rope_dist_swap
        compiling = torch.compiler.is_compiling()
        if compiling or swap.stage != stage:
            inv_freq, scaling = swap.names
            getattr(self, inv_freq).copy_(self.stage_inv_freq[stage])
            if scaling in self._buffers:
                getattr(self, scaling).copy_(self.stage_scaling[stage])
            swap.stage = None if compiling else stage  # a graph that runs again does not say so

    def _at(self, stage: int) -> _With:
        inv_freq, scaling = self._rope_dist_swap.names
        return _With(self, {inv_freq: self.stage_inv_freq[stage], scaling: self.stage_scaling[stage]})

    def tables_at(
        self, stage: int, position_ids: torch.Tensor, dtype: torch.dtype, layer_type: str | None = None
    ) -> Any:
        """The tables of a model in ``dtype`` by the frequencies of a stage, whichever is in force; float32."""
        like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        made = self.tables_of.__func__(self._at(stage), like, position_ids, **kwargs)
        return rounded(made, dtype if self._rope_dist_swap.rounded else torch.float32)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self  # type: ignore[return-value]

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None, **kwargs: Any
    ) -> Any:
        """As stock, but in float32: its tables take dtype and device of ``x``, and nothing else."""
        swap = self._rope_dist_swap
        dtype = activation_dtype(x) if swap.rounded else torch.float32
        if x.dtype != torch.float32:
            x = torch.empty(0, dtype=torch.float32, device=x.device)
        if layer_type is not None:
            kwargs["layer_type"] = layer_type
        call = None
        if isinstance(swap.plan, DynamicPlan) and not torch.compiler.is_compiling():
            call = current_call(swap.plan)
        if call is not None:
            note_positions(call, position_ids)
            made = self.tables_of.__func__(self._at(call.stage), x, position_ids, **kwargs)
        elif layer_type in swap.by_length:
            made = super().forward(x, position_ids, **kwargs)  # type: ignore[misc]
        else:
            # Without its decorator, which looks at the positions of every call to choose between equal frequencies.
            made = self.tables_of(x, position_ids, **kwargs)
        made = rounded(made, dtype)
        if (windowing := self.__dict__.get("_rope_dist_window")) is not None:
            note_window_positions(windowing, position_ids)
        if not torch.compiler.is_compiling():
            keep_pairs(swap.tables, made)
        return made

    def _types_by_length(self) -> frozenset[str | None]:
        """The types of layers whose frequencies change with the length that is read."""
        found = set()
        for layer_type in layer_types(self):
            parameters = self.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            kind = parameters.get("rope_type", "default")
            same = list(parameters.get("short_factor", ())) == list(parameters.get("long_factor", ()))
            if "dynamic" in kind or (kind == "longrope" and not same):
                found.add(layer_type)
        return frozenset(found)


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a model with hidden states ``x`` projects queries and keys."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def rounded(made: Any, dtype: torch.dtype) -> Any:
    """Tables with their values rounded to a 16-bit ``dtype``, held as they were; others as they are."""
    if dtype not in (torch.float16, torch.bfloat16):
        return made
    if isinstance(made, torch.Tensor):  # complex
        parts = torch.view_as_real(made)
        return torch.view_as_complex(parts.to(dtype).to(parts.dtype))
    return tuple(table.to(dtype).to(table.dtype) for table in made)


class _With:
    """A rotary embedding with other frequencies than those in force, for stock's forward."""

    def __init__(self, rotary: nn.Module, values: dict[str, torch.Tensor]) -> None:
        self.__dict__ = {"_rotary": rotary, **values}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rotary, name)


def _names(config: PretrainedConfig) -> tuple[str, str]:
    """What a stock rotary embedding calls the frequencies and the attention scaling that a plan changes."""
    layer_type = extended_layers(config.get_text_config(decoder=True))
    prefix = "" if layer_type is None else f"{layer_type}_"
    return f"{prefix}inv_freq", f"{prefix}attention_scaling"


def _scaling(rotary: nn.Module, name: str) -> torch.Tensor:
    return torch.tensor(float(getattr(rotary, name, 1.0)), device="cpu")


def stock_stages(stock: type[nn.Module], config: PretrainedConfig, plan: DynamicPlan) -> list[nn.Module]:
    """A stock rotary embedding at each stage of a plan, on the CPU.

    Args:
        config: of the trained model.
    """
    configs = [config]
    for stage in plan.stages[1:]:
        extended = copy.deepcopy(config)
        extended.get_text_config(decoder=True).__dict__.update(stage.config_overrides(config))
        configs.append(extended)
    return [new_stock(stock, config) for config in configs]


def far_frequencies(
    stock: type[nn.Module], config: PretrainedConfig, plan: RopePlan | DynamicPlan
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """Frequencies ``[R/2]`` of the trained model and ``[stages, R/2]`` of a plan, float32 on the CPU.

    The third are the factors of the logits at each stage: attention scaling squared, relative to the trained one.

    Args:
        config: of the trained model.
    """
    inv_freq, scaling = _names(config)
    if isinstance(plan, DynamicPlan):
        check_stages(stock, config, plan)
        trained, *_ = stages = stock_stages(stock, config, plan)
    else:
        extended = copy.deepcopy(config)
        extended.get_text_config(decoder=True).__dict__.update(plan.config_overrides(config))
        trained, stages = new_stock(stock, config), [new_stock(stock, extended)]
    own = float(getattr(trained, scaling, 1.0))
    factors = tuple((float(getattr(stage, scaling, 1.0)) / own) ** 2 for stage in stages)
    far = torch.stack([getattr(stage, inv_freq).float() for stage in stages])
    return getattr(trained, inv_freq).float().clone(), far, factors


@torch.no_grad()
def check_stages(stock: type[nn.Module], config: PretrainedConfig, plan: DynamicPlan) -> None:
    """:class:`Unsupported` unless frequencies and attention scaling are all that tells the stages' tables apart.

    Args:
        stock, config, plan: as for :func:`stock_stages`.
    """
    stages = stock_stages(stock, config, plan)
    inv_freq, scaling = _names(config)
    for stage in stages[1:]:
        mixed = _With(stages[0], {inv_freq: getattr(stage, inv_freq), scaling: _scaling(stage, scaling)})
        for layer_type in layer_types(stage):
            tables = zip(
                sample_tables(mixed, layer_type, stock), sample_tables(stage, layer_type), strict=True
            )
            if not all(torch.allclose(a, b, rtol=0.0, atol=_ROUGHLY) for a, b in tables):
                raise Unsupported(
                    f"{stock.__name__} makes its tables of more than frequencies and an attention scaling: give the "
                    "model a static plan (dynamic=False)"
                )


def new_stock(stock: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """A rotary embedding of the class ``stock`` on the CPU, whatever the default device and dtype are."""
    with torch.device("cpu"):
        return stock(config)


_POSITIONS = (0, 1, 2, 7, 40, 1000)
_ROUGHLY = 1e-3
"""The first cos of a process in several threads may be off by 2e-4 on a CPU (torch 2.13, in 3 of 40 processes)."""


@torch.no_grad()
def check_tables(rotary: nn.Module, form: Form) -> None:
    """:class:`Unsupported` unless the tables of a stock rotary embedding are of rotations in ``form``.

    They are looked at for positions of several axes that all differ, where the embedding has axes.

    Args:
        rotary: on the CPU (:func:`new_stock`).
    """
    for layer_type in layer_types(rotary):
        cos, sin = sample_tables(rotary, layer_type)
        for table in (cos, sin):
            first = pairs_of(form.tables, table)
            both = {"twice": torch.cat((first, first), -1), "pairs": first.repeat_interleave(2, -1)}
            if not torch.allclose(table, both.get(form.tables, first), rtol=0.0, atol=_ROUGHLY):
                raise Unsupported(
                    f"{type(rotary).__name__} gives the two dimensions of a pair different angles: no rotation does"
                )
        radius = cos.square() + sin.square()
        if not torch.allclose(radius, radius.flatten()[0].expand_as(radius), rtol=_ROUGHLY, atol=0.0):
            raise Unsupported(f"the tables of {type(rotary).__name__} are not cos and sin of an angle")


def layer_types(rotary: nn.Module) -> tuple[str | None, ...]:
    """The types of layers that have frequencies of their own; None where one set serves all."""
    kinds = getattr(rotary, "rope_type", None)
    return tuple(kinds) if isinstance(kinds, dict) else (None,)


def sample_tables(
    rotary: nn.Module | _With, layer_type: str | None, stock: type[nn.Module] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a stock rotary embedding on the CPU; :class:`Unsupported` if it makes none from positions.

    Args:
        stock: its class, by default ``type(rotary)``.
    """
    stock = stock or type(rotary)
    options = {} if layer_type is None else {"layer_type": layer_type}
    tokens = torch.tensor(_POSITIONS, device="cpu")
    forward = inspect.unwrap(stock.forward)  # by the frequencies that are there, whatever the length
    for axes in (4, 3, 2, 1):
        positions = torch.stack([tokens * (axis + 1) for axis in range(axes)])[:, None]
        try:
            tables = forward(
                rotary, torch.zeros(1, device="cpu"), positions if axes > 1 else positions[0], **options
            )
        except Exception:  # another number of axes
            continue
        cos, sin = (tables.real, tables.imag) if isinstance(tables, torch.Tensor) else tables
        # [B, S, R], or [3, B, S, R] before transformers 5.17: else the axes were taken for something else.
        if cos.shape[:-1] in ((1, len(tokens)), (axes, 1, len(tokens))):
            return cos, sin
    raise Unsupported(f"{stock.__name__} makes no tables from positions")
