"""What an enabled model's attention and rotary embedding run instead of the stock forward.

Each mixin is joined with one stock class by ``families.py``. An enabled module keeps its stock
``__init__``, parameters, buffers and name in the module tree: only its class differs, so that
checkpoints, sharding plans and hooks go on finding what they look for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops


class RotaryTables:
    """Mixin of a stock ``*RotaryEmbedding``: float32 tables, made once a forward pass.

    Differs from stock in two ways. The tables stay float32 for a 16-bit model (stock rounds cos and
    sin to 16 bits before the rotation), and hold each pair once: ``[B, S, R/2]``. And ``inv_freq`` stays
    float32 when the model is cast: stock lets ``.to(torch.bfloat16)`` round it, which is wrong by whole
    turns within a few thousand tokens.
    """

    def reset_frequencies(self) -> None:
        """Set ``inv_freq`` to what the config says, in float32, on the device it is on."""
        self.rope_type = self.config.rope_parameters["rope_type"]
        init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            init = ROPE_INIT_FUNCTIONS[self.rope_type]
        device = self.inv_freq.device
        # On the CPU, as stock does: another device's pow may differ in the last bit.
        with torch.device("cpu"):
            inv_freq, self.attention_scaling = init(self.config)
        for name in ("inv_freq", "original_inv_freq"):
            self.register_buffer(name, inv_freq.clone().to(device), persistent=False)
        # What stock's length-dependent types keep between calls.
        self.__dict__.pop("long_inv_freq", None)
        self.max_seq_len_cached = self.original_max_seq_len = self.config.max_position_embeddings

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _length_dependent(self) -> bool:
        """Whether the frequencies change with the length that is read (stock updates them in forward)."""
        parameters = self.config.rope_parameters
        if self.rope_type == "longrope":
            return list(parameters["short_factor"]) != list(parameters["long_factor"])
        return "dynamic" in self.rope_type

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each ``[B, S, R/2]`` float32 on the device of ``x``, for ``position_ids`` ``[B, S]``."""
        if self._length_dependent():
            return _length_dependent_tables(self, x, position_ids)
        return _tables(self, x, position_ids)


def _tables(module: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq = module.inv_freq.to(device=x.device, dtype=torch.float32)
    return ops.cos_sin(inv_freq, position_ids.to(x.device), module.attention_scaling)


_length_dependent_tables = dynamic_rope_update(_tables)


class RotatedAttention:
    """Mixin of a stock ``*Attention`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.

    Queries and keys are rotated in ``[B, S, H, D]``, the order in which the projections leave them: by
    :func:`rope_dist.ops.qkv_rotary`, together with the projections, where the kernels run and each
    projection is nothing but its matrix; else by :func:`rope_dist.ops.rotary` after the modules.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock forward: ``hidden_states`` ``[B, S, hidden]`` to the output and the attention weights."""
        tokens = hidden_states.shape[:-1]
        cos, sin = position_embeddings
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if _can_fuse(hidden_states, projections):
            weights, biases = [p.weight for p in projections], [p.bias for p in projections]
            q, k, v = ops.qkv_rotary(
                hidden_states, *weights, *biases, head_dim=self.head_dim, cos=cos, sin=sin
            )
        else:
            q, k, v = (p(hidden_states).view(*tokens, -1, self.head_dim) for p in projections)
            q, k = ops.rotary(q, k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self._stock_module().eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*tokens, -1).contiguous()), weights

    @classmethod
    def _stock_module(cls):
        # The eager attention is a function of the stock model's own file.
        return sys.modules[cls.stock.__module__]


def _can_fuse(x: torch.Tensor, projections: tuple[nn.Module, ...]) -> bool:
    """Whether the projections of ``x`` may be computed from their weights, past the modules themselves.

    Adapters, quantisation, sharding and hooks all change what calling the module does; each shows as another
    type, a replaced forward, a hook or another dtype, and then the modules are called.
    """
    if (
        x.dtype not in (torch.float16, torch.bfloat16)
        or ops.backend_for(x) != "triton"
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    return all(_is_plain(projection, x) for projection in projections)


def _is_plain(projection: nn.Module, x: torch.Tensor) -> bool:
    if type(projection) is not nn.Linear or "forward" in projection.__dict__:
        return False
    if projection._forward_hooks or projection._forward_pre_hooks:
        return False
    if projection._backward_hooks or projection._backward_pre_hooks:
        return False
    return all(
        type(t) in (nn.Parameter, torch.Tensor) and t.dtype == x.dtype and t.device == x.device
        for t in (projection.weight, projection.bias)
        if t is not None
    )
