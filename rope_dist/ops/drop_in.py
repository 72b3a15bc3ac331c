"""Hugging Face's ``apply_rotary_pos_emb`` over these operators: change one import.

flash-attention's functions are in ``drop_in_flash_attention.py``, vLLM's and FlashInfer's in ``drop_in_engines.py``.
"""

from __future__ import annotations

from typing import Literal

import torch

from . import launch_cache, library, validation
from .arguments import Angles, present

TableLayout = Literal["cat", "repeat_interleave", "half"]
"""How cos and sin were made of one value a pair: ``torch.cat((x, x), -1)``, ``x.repeat_interleave(2, -1)``, ``x``."""


def apply_rotary_pos_emb(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    position_ids: None = None,
    *,
    interleaved: bool = False,
    table_layout: TableLayout | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As ``transformers.models.llama.modeling_llama.apply_rotary_pos_emb``, in one launch.

    Rotates in float32 and rounds once; the stock function rounds after every operation.

    Args:
        q: ``[B, Hq, S, D]``, or ``[B, S, Hq, D]`` with ``unsqueeze_dim=2``; None rotates ``k`` alone.
        k: the same with its own heads; None rotates ``q`` alone.
        cos, sin: ``[B or 1, S, width]`` or, as vision towers have them, ``[S, width]``, floating. The width is the
            number R of rotated dimensions, the first of each head, or R/2 with ``table_layout="half"``.
        unsqueeze_dim: where ``cos`` gets an axis for the heads, as in the stock function: 1 or 2, and with
            ``[S, width]`` 0 (``[B, H, S, D]``) or 1 (``[B, S, H, D]``, ``[S, H, D]``).
        position_ids: must be None. transformers before 5 had it in fifth place: index the tables instead.
        interleaved: pairs are ``(2i, 2i + 1)`` (GLM, Cohere, ERNIE 4.5) instead of ``(i, i + R/2)``.
        table_layout: where each pair's value is in the tables. The values are not compared, since that would wait
            for the device, so a wrong layout of a possible width rotates by wrong angles without an error.

            - ``"cat"``: in both halves (Llama and most others, GLM, ERNIE 4.5); the first half is used.
            - ``"repeat_interleave"``: in two neighbours (Cohere); only with ``interleaved``. The tables are copied.
            - ``"half"``: once (gpt-oss).
            - None: ``"cat"``. It must be given where another layout is as likely: with ``interleaved``, and where
              the width is D/2, which is ``"half"`` for the whole head or ``"cat"`` for half of it.

    Returns:
        Tensors shaped and typed as ``q`` and ``k`` (None for None). Differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, a width that the layout cannot have, a
            layout that has to be given and is not, or ``position_ids``.
    """
    # Of a call in the old order, unsqueeze_dim has the positions.
    if position_ids is not None or not isinstance(unsqueeze_dim, int):
        raise ValueError(
            "apply_rotary_pos_emb takes no position_ids (transformers before 5 did): make cos and sin those of the "
            "tokens, cos[position_ids] and sin[position_ids] if they are not yet, and leave position_ids out"
        )
    if cos.ndim not in (2, 3) or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be [B or 1, S, width] or [S, width], got {list(cos.shape)} and {list(sin.shape)}"
        )
    # The axis of the heads, counted from the last: that of tokens and heads which comes first differs.
    axis = unsqueeze_dim - cos.ndim - 1 if unsqueeze_dim >= 0 else unsqueeze_dim
    if axis not in (-3, -2):
        before = cos.ndim - 2
        raise ValueError(
            f"unsqueeze_dim must be {before} ([B, H, S, D]) or {before + 1} ([B, S, H, D]) for cos {list(cos.shape)}, "
            f"got {unsqueeze_dim}"
        )
    if q is None and k is None:
        raise ValueError("q and k are both None: there is nothing to rotate")
    given = [x for x in (q, k) if x is not None]
    axes = 3 if cos.ndim == 2 and given[0].ndim == 3 else 4
    if any(x.ndim != axes for x in given):
        shapes = " and ".join(str(None if x is None else list(x.shape)) for x in (q, k))
        raise ValueError(f"q and k must have four axes (or three, with cos [S, width]), got {shapes}")

    def moved(x: torch.Tensor) -> torch.Tensor:
        x = x if axis == -2 else x.transpose(-3, -2)
        return x if axes == 4 else x[None]

    pairs = _pairs(cos.shape[-1], given[0].shape[-1], interleaved, table_layout)
    first, second = moved(given[0]), moved(given[1]) if len(given) == 2 else None
    cos, sin = cos[..., pairs], sin[..., pairs]
    if pairs.step is not None:  # the kernels read whole rows, and a launch is kept for such only
        cos, sin = cos.contiguous(), sin.contiguous()
    angles = Angles(cos, sin, interleaved=interleaved)
    launch, key = launch_cache.find("apply_rotary_pos_emb", (first, second), angles)
    if launch is not None:
        rotated = launch(first, second, angles)
    else:
        validation.heads(first, second)
        cos, sin = validation.tables(first, cos, sin, rows=first.shape[1])
        angles = Angles(cos, sin, interleaved=interleaved)
        rotated = library.rotate(first, second, angles, key=key)

    def back(x: torch.Tensor) -> torch.Tensor:
        x = x if axes == 4 else x[0]
        return x if axis == -2 else x.transpose(-3, -2)

    outputs = [back(present(x)) for x in rotated[: len(given)]]
    return outputs.pop(0) if q is not None else None, outputs.pop(0) if k is not None else None


def _pairs(width: int, head_dim: int, interleaved: bool, layout: TableLayout | None) -> slice:
    """Where tables of that width have the values of the pairs.

    Raises:
        ValueError: a width that the layout cannot have, a layout that is missing or does not exist.
    """
    if layout is None:
        if interleaved:
            raise ValueError(
                "interleaved needs table_layout: 'cat' (each pair's value in both halves: GLM, ERNIE 4.5), "
                "'repeat_interleave' (in two neighbours: Cohere) or 'half' (once)"
            )
        if 2 * width == head_dim:
            raise ValueError(
                f"tables of width {width} for heads of {head_dim} have each pair's value once, or are for half of the "
                "head: give table_layout='half' (gpt-oss) or table_layout='cat' (partial rotary)"
            )
        layout = "cat"
    if layout not in ("cat", "repeat_interleave", "half"):
        raise ValueError(f"table_layout must be 'cat', 'repeat_interleave' or 'half', got {layout!r}")
    if layout == "repeat_interleave" and not interleaved:
        raise ValueError(
            "table_layout='repeat_interleave' belongs to interleaved pairs: give interleaved=True"
        )
    if layout == "half":
        if 2 * width > head_dim:
            raise ValueError(
                f"tables of width {width} with table_layout='half' rotate {2 * width} dimensions, the heads have "
                f"{head_dim}: with each pair's value twice give 'cat'"
            )
        return slice(None)
    if width % 2 or width > head_dim:
        raise ValueError(
            f"tables that have each pair's value twice must have an even width up to the {head_dim} dimensions of the "
            f"heads, got {width}: with each value once give table_layout='half'"
        )
    return slice(0, width // 2) if layout == "cat" else slice(0, width, 2)
