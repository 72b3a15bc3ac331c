"""A forward pass of a model with a window: positions, angles, and the attention function of its layers.

Cached keys are rotated by the trained frequencies. Beyond the window queries and keys are rotated once more, by the
difference of the far angle and the trained one, each at its own position (docs/window.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..defaults import GROUPED
from ..dynamic import DynamicPlan
from ..ops.fixed_point import to_float64
from ..ops.window_angles import WindowAngles
from ..ops.window_blocks import WindowBlocks, visible_keys
from ..ops.window_decode import has_window_decode, window_decode
from ..ops.window_engines import flash_windowed, flex_windowed, has_flash
from ..ops.windowed_attention import windowed_attention
from ..planning import RopePlan
from .cache_record import CacheRecord
from .cached_keys import CachedKeys
from .stages import expected_length

FARS = ("plan", *GROUPED)
SCALINGS = ("none", "far", "all")


@dataclass(frozen=True)
class Window:
    """How near and far distances are told apart, and what the far ones become.

    Attributes:
        size: distances below it are the trained model's, in tokens.
        far: ``"plan"``: beyond it angles grow by the plan's frequencies; ``"grouped"`` or
            ``"jet-long"``: by the trained ones, over positions that are divided by :meth:`group_size` and rounded down.
        scaling: where the plan's attention scaling multiplies: ``"none"`` of the logits, the ``"far"`` ones or
            ``"all"`` in a text that is longer than the window.
    """

    size: int
    far: str = "plan"
    scaling: str = "none"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"window must be a positive whole number of tokens, got {self.size!r:.80}")
        for name, value, known in (("far", self.far, FARS), ("far_scaling", self.scaling, SCALINGS)):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r:.80}")
        if self.grouped and self.scaling != "none":
            raise ValueError(
                f"far_scaling is of the plan's frequencies, and far={self.far!r} has the trained ones"
            )

    @property
    def grouped(self) -> bool:
        """Whether far positions are in groups."""
        return self.far in GROUPED

    def far_length(self, target_length: int, original_length: int) -> int:
        """Tokens that a far plan is made for, so that a text of ``target_length`` has no angle past the trained ones.

        At the largest distance T a far angle is that of ``w + (T - w) / s`` trained tokens, where the plan divides a
        frequency by s. It is L at most, the trained length, for ``s = (T - w) / (L - w)``: Self-Extend's rule for its
        group size (Jin et al. 2024, section 3.2). A window of L tokens or more leaves no such s.
        """
        target, trained, size = target_length, original_length, self.size
        if target <= trained or size >= trained:
            return target
        return math.ceil(trained * (target - size) / (trained - size))

    def group_size(self, length: int, original_length: int) -> int:
        """Positions of a group in a text of ``length`` tokens: 1 up to the trained length.

        ``"grouped"``: the least that leaves no angle past the trained ones (:meth:`far_length`), Self-Extend's.
        ``"jet-long"``: the length over the trained length (Tang et al. 2026, arXiv 2607.07740), which leaves some.
        """
        if self.far == "grouped":
            length = self.far_length(length, original_length)
        return max(1, math.ceil(length / original_length))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of :func:`rope_dist.enable`."""
        return {"window": self.size, "far": self.far, "far_scaling": self.scaling}


@dataclass(eq=False)
class Windowing:
    """What a decoder and its attentions share: plain values and tensors on the CPU, so that it copies and pickles.

    Attributes:
        window: what was asked for.
        plan: the far plan.
        trained: ``[R/2]`` float32, the model's frequencies.
        far: ``[stages, R/2]`` float32, the frequencies beyond the window.
        change_q64: ``[stages, 2, R/2]`` int32, ``far`` less the trained ones in fixed point; of groups the
            trained ones, ``[1, 2, R/2]``.
        scalings: of the logits at each stage, relative to the trained model's; of the rotated dimensions, as tables do.
        keys: how queries and keys are rotated.
    """

    window: Window
    plan: RopePlan | DynamicPlan
    trained: torch.Tensor
    far: torch.Tensor
    change_q64: torch.Tensor
    scalings: tuple[float, ...]
    keys: CachedKeys

    def stage(self, length: int) -> int:
        """Row of ``far`` for a text of ``length`` tokens, or the size of groups."""
        length = max(length, expected_length(), 1)
        plan = self.plan
        if self.window.grouped:
            if not isinstance(plan, DynamicPlan):
                length = plan.target_length
            return self.window.group_size(length, plan.original_length)
        return plan.stage(length) if isinstance(plan, DynamicPlan) else 0

    def is_trained(self, stage: int) -> bool:
        """Whether the far angles of a stage are the trained ones."""
        if self.window.grouped:
            return stage == 1
        return bool(torch.equal(self.far[stage], self.trained)) and self.scalings[stage] == 1.0

    def rotations(
        self, positions: torch.Tensor, stage: int, *, of_queries: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[B or 1, S, R/2]`` float32 of what is added to the trained angles at ``positions``.

        The trained angles are those that the model computes, a product rounded to float32: the far ones are exact.
        """
        device = positions.device
        p = to_float64(positions[..., None])
        trained = self.trained.to(p.device)
        rounded = (p.float() * trained).double()
        theta, size = trained.double(), self.window.size
        if self.window.grouped:
            angles = (p / stage).floor() * theta
            if of_queries:
                angles = angles + (size - size // stage) * theta
        else:
            far = self.far[stage].to(p.device).double()
            angles = p * far
            if of_queries:
                angles = angles + size * (theta - far)
        difference = angles - rounded
        return difference.cos().float().to(device), difference.sin().float().to(device)


@dataclass
class _KeyRotations:
    """cos and sin of the cached keys, kept with the record of their positions; new ones are appended in place."""

    of: tuple[str, int]
    length: int
    cos: torch.Tensor
    sin: torch.Tensor

    def serves(self, of: tuple[str, int], positions: torch.Tensor) -> bool:
        """Whether it is of this stage and batch, and may be written to."""
        inference = self.cos.is_inference() and not torch.is_inference_mode_enabled()
        return self.of == of and self.cos.shape[0] == positions.shape[0] and not inference


@dataclass
class WindowCall:
    """A forward pass that is running in this thread.

    Attributes:
        decoder: which module runs.
        windowing: of the decoder.
        record: of its cache; None where it has none yet.
        past: tokens in the cache.
        stage: of the far angles.
        positions: ``[B or 1, S]`` of the tokens of the call, once the rotary embedding has seen them.
    """

    decoder: nn.Module | None
    windowing: Windowing
    record: CacheRecord | None
    past: int
    stage: int
    positions: torch.Tensor | None = None
    _blocks: dict[int, tuple[Any, WindowBlocks]] = field(default_factory=dict)
    _seen: dict[int, tuple[Any, torch.Tensor | None]] = field(default_factory=dict)
    _angles: dict[torch.device, WindowAngles] = field(default_factory=dict)
    _rotations: tuple[torch.Tensor, ...] | None = None
    _flash_mask: torch.Tensor | None = None
    _is_stock: bool | None = None

    def note(self, positions: torch.Tensor) -> None:
        """Keep the positions of the tokens of the call; of several rotary embeddings, the first's."""
        if positions.ndim != 2:
            raise ValueError(
                f"a window needs one position a token, [B, S], got position_ids {list(positions.shape)}"
            )
        if self.positions is None:
            self.positions = positions
            _STAGES[positions] = self.stage
            if self.record is not None:
                self.record.write(self.past, positions)

    @property
    def key_positions(self) -> torch.Tensor:
        """``[B or 1, T]`` of all tokens, those in the cache first."""
        if self.record is None:
            return self.positions
        return self.record.positions(0, self.record.length)

    @property
    def is_stock(self) -> bool:
        """Whether every angle is a trained one, so that stock's attention does."""
        if self._is_stock is None:
            window = self.windowing.window
            within = self.positions.max() - self.key_positions.min() < window.size
            # The beginning of a longer text, read in pieces, is scaled as the whole would be.
            scaled = window.scaling == "all" and expected_length() > window.size
            self._is_stock = self.windowing.is_trained(self.stage) or (bool(within) and not scaled)
        return self._is_stock

    def blocks(self, mask: torch.Tensor | None) -> WindowBlocks:
        """The blocks of the call under a mask."""
        known = self._blocks.get(id(mask))
        if known is None:
            made = WindowBlocks(self.positions, self.key_positions, self.windowing.window.size, mask)
            known = self._blocks[id(mask)] = (mask, made)  # with the mask, whose id is then no other's
        return known[1]

    def seen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """``[B or 1, 1, S, T]`` bool: which keys the queries see; None: themselves and those before."""
        if mask is None:
            return None
        if id(mask) not in self._seen:
            tokens = self.positions.shape[-1], self.key_positions.shape[-1]
            self._seen[id(mask)] = mask, visible_keys(mask, *tokens)
        return self._seen[id(mask)][1]

    def angles(self, device: torch.device, head_dim: int) -> WindowAngles:
        """Those of a kernel that corrects keys as it reads them, on ``device``."""
        if device not in self._angles:
            windowing, stage = self.windowing, self.stage
            window, keys, grouped = windowing.window, windowing.keys, windowing.window.grouped
            scaling = 1.0 if window.scaling == "none" else windowing.scalings[stage]
            tensors = self.positions, self.key_positions, windowing.trained
            self._angles[device] = WindowAngles(
                *(x.to(device) for x in tensors),
                windowing.change_q64[0 if grouped else stage].to(device),
                window.size,
                group=stage if grouped else 0,
                first=0 if keys.first else head_dim - 2 * windowing.trained.shape[0],
                interleaved=keys.interleaved,
                near_scaling=scaling if window.scaling == "all" else 1.0,
                far_scaling=scaling,
            )
        return self._angles[device]

    def flash_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """``[B or 1, 1, S, T]`` bool of what flash attention is given: a mask of keys ``[B, T]``, or packed texts."""
        positions, keys = self.positions, self.key_positions
        steps = keys.diff(dim=-1, prepend=keys[:, :1] - 1)
        begins = steps <= 0  # 0 after a text of one token
        packed = mask is None and self.past == 0 and positions.shape[0] == 1 and bool(begins.any())
        if mask is None and not packed:
            return None
        if self._flash_mask is None:
            order = torch.arange(keys.shape[-1], device=keys.device)
            seen = (order[None] <= order[-positions.shape[-1] :, None])[None, None]
            if packed:
                text = begins.cumsum(-1)
                self._flash_mask = seen & (text[:, None, :, None] == text[:, None, None])
            else:
                self._flash_mask = seen & mask[:, None, None, : keys.shape[-1]].bool()
        return self._flash_mask

    def rotations(self) -> tuple[torch.Tensor, ...]:
        """cos and sin for the queries, with the attention scaling, and for all keys."""
        if self._rotations is None:
            cos, sin = self.windowing.rotations(self.positions, self.stage, of_queries=True)
            if self.windowing.window.scaling != "none":
                factor = self.windowing.scalings[self.stage]
                cos, sin = cos * factor, sin * factor
            self._rotations = (cos, sin, *self._key_rotations())
        return self._rotations

    def _key_rotations(self) -> tuple[torch.Tensor, torch.Tensor]:
        positions, record = self.key_positions, self.record
        if record is None or torch.is_grad_enabled():  # a backward pass needs tables that do not change
            return self.windowing.rotations(positions, self.stage, of_queries=False)
        kept: _KeyRotations | None = record.rotations
        of, length = (self.windowing.window.far, self.stage), positions.shape[-1]
        if kept is not None and not kept.serves(of, positions):
            kept = None
        known = 0 if kept is None else min(kept.length, length)
        cos, sin = self.windowing.rotations(positions[:, known:], self.stage, of_queries=False)
        if kept is None or length > kept.cos.shape[1]:
            room = [x.new_empty(x.shape[0], length + length // 4 + 16, x.shape[2]) for x in (cos, sin)]
            if kept is not None:
                room[0][:, :known], room[1][:, :known] = kept.cos[:, :known], kept.sin[:, :known]
            kept = _KeyRotations(of, known, *room)
        kept.cos[:, known:length], kept.sin[:, known:length] = cos, sin
        kept.length, record.rotations = length, kept
        return kept.cos[:, :length], kept.sin[:, :length]


# --- the call of this thread ---------------------------------------------------------------------

_LOCAL = threading.local()
_STAGES = WeakTensorKeyDictionary()
"""By the positions of a call the stage of its far angles, for a layer that is run again in a backward pass: in another
thread, and after :func:`rope_dist.expect_length` has ended."""


def begin_window_call(call: WindowCall) -> None:
    """A forward pass starts in this thread."""
    _LOCAL.call = call


def end_window_call(decoder: nn.Module) -> WindowCall | None:
    """The forward pass of ``decoder`` that ends in this thread, or None."""
    call = getattr(_LOCAL, "call", None)
    if call is None or call.decoder is not decoder:
        return None
    _LOCAL.call = None
    return call


@torch.compiler.disable(reason="a model with a window keeps the positions of its tokens")
def note_window_positions(windowing: Windowing, positions: torch.Tensor) -> None:
    """A rotary embedding of a model with a window makes tables for ``positions``."""
    call = getattr(_LOCAL, "call", None)
    if call is not None and call.windowing is windowing:
        call.note(positions)


def _call_of(
    module: nn.Module, windowing: Windowing, query: torch.Tensor, key: torch.Tensor, positions: Any
) -> WindowCall:
    call = getattr(_LOCAL, "call", None)
    if call is not None and call.windowing is windowing:
        if call.positions is None:
            raise ValueError(f"the rotary embedding of {type(module).__name__} has not seen its positions")
        return call
    # Run again for its gradient (checkpointing), or by itself.
    if positions is None or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).stock.__name__} has a window and runs outside of its model: it needs position_ids, and no "
            "cache"
        )
    stage = _STAGES.get(positions)
    call = WindowCall(None, windowing, None, 0, windowing.stage(query.shape[2]) if stage is None else stage)
    call.note(positions)
    return call


# --- the attention function ----------------------------------------------------------------------


@torch.compiler.disable(reason="the attention by a window chooses its pieces by the positions")
def attend(
    stock: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a layer with a window; ``stock``, to the bit, where no distance is beyond it.

    Args:
        stock, implementation: the attention function of transformers that the model has, and its name.
        query, key, value: ``[B, H, S, D]`` and ``[B, Hkv, T, D]``, rotated by the trained frequencies.
        attention_mask: as ``implementation`` has it.
    """
    windowing: Windowing | None = module._rope_dist_window
    arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
    if windowing is None:
        return stock(module, query, key, value, attention_mask, **arguments)
    call = _call_of(module, windowing, query, key, kwargs.get("position_ids"))
    size = windowing.window.size
    if call.is_stock:
        return stock(module, query, key, value, attention_mask, **arguments)
    if dropout:
        raise ValueError(
            "attention by a window has no dropout: set the config's attention_dropout to 0, or disable()"
        )
    tokens = call.key_positions.shape[-1]
    if key.shape[2] < tokens:
        raise ValueError(f"the cache returned keys of {key.shape[2]} tokens where {tokens} were read")
    key, value = key[:, :, :tokens], value[:, :, :tokens]  # without the room of a static cache
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_flex, mask = hasattr(attention_mask, "mask_mod"), attention_mask
    if implementation.startswith("flash"):
        mask = call.flash_mask(attention_mask)
    if not is_flex and has_window_decode(query, key, value):
        angles = call.angles(query.device, query.shape[-1])
        out = window_decode(query, key, value, angles, call.seen(mask), scale)
        return out.transpose(1, 2).contiguous(), None
    # Of a model on several devices the layers elsewhere need copies.
    cos_q, sin_q, cos_k, sin_k = (table.to(query.device) for table in call.rotations())
    if windowing.window.scaling == "all":
        # As the plan's tables do it, of the dimensions that are rotated.
        factor = torch.full_like(cos_q, windowing.scalings[call.stage])
        near_query = _rotated(query, factor, torch.zeros_like(factor), windowing.keys)
    else:
        near_query = query
    far_query = _rotated(query, cos_q, sin_q, windowing.keys)
    far_key = _rotated(key, cos_k, sin_k, windowing.keys)
    if is_flex:
        out = flex_windowed(
            near_query,
            key,
            far_query,
            far_key,
            value,
            positions=call.positions,
            key_positions=call.key_positions,
            window=size,
            mask_mod=attention_mask.mask_mod,
            scale=scale,
        )
        return out.transpose(1, 2).contiguous(), None
    blocks = call.blocks(mask)
    if blocks.contiguous and has_flash(query, key, value):
        out = flash_windowed(near_query, key, far_query, far_key, value, size, scale)
    else:
        out = windowed_attention(near_query, key, far_query, far_key, value, blocks, scale)
    return out.transpose(1, 2).contiguous(), None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: CachedKeys) -> torch.Tensor:
    """Heads ``[B, H, S, D]``, rotated further in the dimensions that a model rotates."""
    heads, rotary_dim = x.transpose(1, 2), 2 * cos.shape[-1]
    start = 0 if how.first else heads.shape[-1] - rotary_dim
    rotated, _ = ops.rotary(heads.narrow(-1, start, rotary_dim), None, cos, sin, interleaved=how.interleaved)
    if rotary_dim < heads.shape[-1]:
        rotated = torch.cat((heads[..., :start], rotated, heads[..., start + rotary_dim :]), dim=-1)
    return rotated.transpose(1, 2)
