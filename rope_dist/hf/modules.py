"""What an enabled model's attention and rotary embedding run instead of the stock forward.

Each mixin is joined with a stock class by ``families.py``. An enabled module keeps its stock
``__init__``, parameters, buffers and name in the module tree: only its class differs, so that
checkpoints, sharding plans and hooks go on finding what they look for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
    float32 when the model is cast: stock lets ``.to(torch.bfloat16)`` round it, which is off by more than
    2 pi within a few thousand tokens.
    """

    stock: type[nn.Module]

    def rope_layer_types(self) -> tuple[str | None, ...]:
        """The types of layers that have frequencies of their own; None where one set serves all."""
        return (None,)

    def parameters_of(self, layer_type: str | None) -> dict[str, Any]:
        """The config's rotary parameters of a type of layers."""
        return self.config.rope_parameters

    def frequency_buffers(self) -> Iterator[str]:
        """Names of the buffers that hold frequencies."""
        for layer_type in self.rope_layer_types():
            prefix = _prefix(layer_type)
            yield f"{prefix}inv_freq"
            yield f"{prefix}original_inv_freq"

    def reset_frequencies(self) -> None:
        """Set the frequencies to what the config says, in float32, on the device they are on."""
        for layer_type in self.rope_layer_types():
            prefix, options = _prefix(layer_type), _options(layer_type)
            rope_type = self.parameters_of(layer_type)["rope_type"]
            init = self.compute_default_rope_parameters
            if rope_type != "default":
                init = ROPE_INIT_FUNCTIONS[rope_type]
            device = getattr(self, f"{prefix}inv_freq").device
            # On the CPU, as stock does: another device's pow may differ in the last bit.
            with torch.device("cpu"):
                inv_freq, scaling = init(self.config, **options)
            for name in (f"{prefix}inv_freq", f"{prefix}original_inv_freq"):
                self.register_buffer(name, inv_freq.clone().to(device), persistent=False)
            setattr(self, f"{prefix}attention_scaling", scaling)
            self._set_rope_type(layer_type, rope_type)
            # What stock's length-dependent types keep between calls.
            for name in ("long_inv_freq", "max_seq_len_cached"):
                self.__dict__.pop(f"{prefix}{name}", None)
        self.max_seq_len_cached = self.original_max_seq_len = self.config.max_position_embeddings

    def _set_rope_type(self, layer_type: str | None, rope_type: str) -> None:
        self.rope_type = rope_type

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name) for name in self.frequency_buffers()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _length_dependent(self, layer_type: str | None) -> bool:
        """Whether the frequencies change with the length that is read (stock updates them in forward)."""
        parameters = self.parameters_of(layer_type)
        if parameters["rope_type"] == "longrope":
            return list(parameters["short_factor"]) != list(parameters["long_factor"])
        return "dynamic" in parameters["rope_type"]

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each ``[B, S, R/2]`` float32 on the device of ``x``, for ``position_ids`` ``[B, S]``."""
        if self._length_dependent(layer_type):
            return _length_dependent_tables(self, x, position_ids, layer_type)
        return _tables(self, x, position_ids, layer_type)


class LayerTypedRotaryTables(RotaryTables):
    """:class:`RotaryTables` of models whose types of layers (sliding, full) have frequencies of their own."""

    def rope_layer_types(self) -> tuple[str, ...]:
        return tuple(self.rope_type)

    def parameters_of(self, layer_type: str | None) -> dict[str, Any]:
        return self.config.rope_parameters[layer_type]

    def _set_rope_type(self, layer_type: str | None, rope_type: str) -> None:
        self.rope_type[layer_type] = rope_type


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


def _options(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _tables(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = _prefix(layer_type)
    inv_freq = getattr(module, f"{prefix}inv_freq").to(device=x.device, dtype=torch.float32)
    return ops.cos_sin(inv_freq, position_ids.to(x.device), getattr(module, f"{prefix}attention_scaling"))


_length_dependent_tables = dynamic_rope_update(_tables)


class RotatedAttention:
    """Mixin of a stock ``*Attention`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.

    Queries and keys are rotated in ``[B, S, H, D]``, the order in which the projections leave them: by
    :func:`rope_dist.ops.qkv_rotary`, together with the projections, where the kernels run and each
    projection is nothing but its matrix; else by :func:`rope_dist.ops.rotary` after the modules.
    """

    stock: type[nn.Module]

    pre_rotary_norm: str | None = None
    """Of a family that normalises queries and keys between projection and rotation: so that they cannot be one."""

    def attention_options(self) -> dict[str, Any]:
        """What the stock forward hands to the attention function beside mask, dropout and scaling."""
        return {}

    def heads(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: ``[B, S, H, D]`` each, from ``[B, S, hidden]``."""
        if why_not_fused(self, hidden_states) is None:
            # Parameters in their dictionaries: looked up by attribute each takes nn.Module longer than a tensor's view.
            parameters = [projection._parameters for projection in self.projections()]
            weights, biases = [p["weight"] for p in parameters], [p["bias"] for p in parameters]
            return ops.qkv_rotary(hidden_states, *weights, *biases, head_dim=self.head_dim, cos=cos, sin=sin)
        q, k = self.projected(hidden_states)
        q, k = ops.rotary(q, k, cos, sin, inplace=self.can_rotate_inplace(q, k))
        return q, k, self._split(self.v_proj(hidden_states))

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Of queries, keys and values."""
        modules = self._modules
        return modules["q_proj"], modules["k_proj"], modules["v_proj"]

    def can_rotate_inplace(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether ``q`` and ``k`` are new tensors that no hook or gradient has seen.

        New tensors cost a CPU the operating system's zeroed pages, several times what the rotation takes.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.pre_rotary_norm is not None:
            return False
        if nn.modules.module._global_forward_hooks:
            return False
        modules = self._modules
        q_proj, k_proj = modules["q_proj"], modules["k_proj"]
        return (
            type(q_proj) is type(k_proj) is nn.Linear
            and type(q) is type(k) is torch.Tensor
            and not (q_proj._forward_hooks or k_proj._forward_hooks)
            and "forward" not in q_proj.__dict__
            and "forward" not in k_proj.__dict__
        )

    def projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys before the rotation, ``[B, S, H, D]``, by the modules themselves."""
        return self._split(self.q_proj(hidden_states)), self._split(self.k_proj(hidden_states))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        return x.view(batch, length, width // self.head_dim, self.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        *,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the stock forward: ``hidden_states`` ``[B, S, hidden]`` to the output and the attention weights.

        The key/value cache is ``past_key_values`` to transformers up to 5.23 and ``cache`` from 5.24 on, which hands
        it what the attention function gets as well.
        """
        q, k, v = self.heads(hidden_states, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        elif past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        # The eager attention is a function of the stock model's own file.
        eager = sys.modules[self.stock.__module__].eager_attention_forward
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, **self.attention_options()}
        output, weights = attention(self, q, k, v, attention_mask, **options, **kwargs)
        batch, length, _ = hidden_states.shape
        output = self.o_proj(output.reshape(batch, length, -1).contiguous())
        residual_dropout = self.__dict__.get("residual_dropout")
        if residual_dropout is not None:
            output = nn.functional.dropout(output, p=residual_dropout, training=self.training)
        return output, weights


class NormalizedHeads(RotatedAttention):
    """Queries and keys are normalised head by head before they are rotated (Qwen3, Gemma3)."""

    pre_rotary_norm = "queries and keys are normalised before the rotation"

    def projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = super().projected(hidden_states)
        return self.q_norm(q), self.k_norm(k)


class NormalizedProjections(RotatedAttention):
    """Queries and keys are normalised over all heads together before they are rotated (OLMo2)."""

    pre_rotary_norm = "queries and keys are normalised before the rotation"

    def projected(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_norm(self.q_proj(hidden_states))
        return self._split(q), self._split(self.k_norm(self.k_proj(hidden_states)))


def why_not_fused(attention: RotatedAttention, x: torch.Tensor) -> str | None:
    """Why projection and rotation of ``x`` are not one launch, or None where they are.

    Only dtype and device of ``x`` matter. Adapters, quantisation, sharding and hooks all change what calling a
    projection does; each shows as another type, a replaced forward, a hook or another dtype, and then the
    modules are called.
    """
    if attention.pre_rotary_norm is not None:
        return attention.pre_rotary_norm
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "only float16 and bfloat16 are projected by the kernels"
    if ops.backend_for(x) != "triton":
        return "no Triton kernels for this device"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtype of the projections"
    for projection in attention.projections():
        reason = why_not_its_weight(projection, x)
        if reason is not None:
            return reason
    return None


_MISSING = object()


def why_not_its_weight(projection: nn.Module, x: torch.Tensor) -> str | None:
    """Why a projection of ``x`` has to be called instead of computed from its weight, or None."""
    # The texts are constants, so that torch.compile can trace the choice.
    if type(projection) is not nn.Linear:
        return "not a plain nn.Linear (an adapter or quantised)"
    if "forward" in projection.__dict__:
        return "its forward has been replaced (offloading or sharding)"
    if (
        projection._forward_hooks
        or projection._forward_pre_hooks
        or projection._backward_hooks
        or projection._backward_pre_hooks
    ):
        return "it has hooks"
    for t in (projection._parameters.get("weight", _MISSING), projection._parameters.get("bias", _MISSING)):
        if t is not None:
            if type(t) not in (nn.Parameter, torch.Tensor):
                return "its weight is not a plain tensor (quantised or sharded)"
            if t.dtype != x.dtype:
                return "its weight has another dtype"
            # A weight without storage is asked about, not run (rope-dist info MODEL).
            if t.device != x.device and not t.is_meta:
                return "its weight is on another device"
    return None
