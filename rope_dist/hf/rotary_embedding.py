"""What makes the tables of an enabled model: stock's own rotary embedding, in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .applying import keep_pairs, pairs_of
from .forms import Form, Unsupported


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
        new = new_stock(self.stock, self.config)
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
        self._rope_dist_swap.by_length = self._types_by_length()

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
        if x.dtype != torch.float32:
            x = torch.empty(0, dtype=torch.float32, device=x.device)
        if layer_type is not None:
            kwargs["layer_type"] = layer_type
        swap = self._rope_dist_swap
        if layer_type in swap.by_length:
            made = super().forward(x, position_ids, **kwargs)  # type: ignore[misc]
        else:
            # Without its decorator, which looks at the positions of every call to choose between equal frequencies.
            made = self.tables_of(x, position_ids, **kwargs)
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


def sample_tables(rotary: nn.Module, layer_type: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a stock rotary embedding on the CPU; :class:`Unsupported` if it makes none from positions."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    tokens = torch.tensor(_POSITIONS, device="cpu")
    forward = inspect.unwrap(type(rotary).forward)  # by the frequencies that are there, whatever the length
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
    raise Unsupported(f"{type(rotary).__name__} makes no tables from positions")
