"""What the function that a layer replaces computes, found by trying it on a few numbers.

Functions of one slot differ: most pair dimensions ``(i, i + D/2)`` and take each value of cos and sin twice, gpt-oss
takes it once, openai_privacy_filter pairs ``(2i, 2i + 1)``, nanochat rotates by the negative angles. Shapes alone do
not tell.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from .drop_in import TableLayout, apply_rotary_pos_emb
from .launch_cache import transformed

logger = logging.getLogger(__name__)


class Form(NamedTuple):
    """A rotation.

    Attributes:
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        layout: of the tables, see :func:`apply_rotary_pos_emb`.
        negative: by the negative angles.
        keeps_dtype: heads keep their dtype where the tables have a wider one; else they take it.
    """

    interleaved: bool
    layout: TableLayout
    negative: bool
    keeps_dtype: bool


_PAIRS: tuple[tuple[bool, TableLayout], ...] = (
    (False, "cat"), (False, "half"), (True, "cat"), (True, "repeat_interleave"), (True, "half"),
)  # fmt: skip


def form_for(
    function: type, heads: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int
) -> Form | None:
    """How ``function``, a module around the replaced one, rotates such tensors; None: it has to do that itself."""
    if not _fits(heads, cos, sin, unsqueeze_dim):
        return None
    form = _known(function, len(heads), heads[0].shape[-1], cos.shape[-1])
    if form is None:
        return None
    x = heads[0]
    # Under autocast what follows has the narrow dtype anyway.
    widens = torch.promote_types(x.dtype, cos.dtype) != x.dtype and not torch.is_autocast_enabled(
        x.device.type
    )
    return None if widens and not form.keeps_dtype else form


def _fits(heads: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int) -> bool:
    """Whether the kernel takes these tensors."""
    q = heads[0]
    if any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in (*heads, cos, sin)) or transformed():
        return False
    if cos.ndim not in (2, 3) or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    if not q.dtype.is_floating_point or not cos.dtype.is_floating_point:
        return False
    if cos.requires_grad or sin.requires_grad or not q.device == cos.device == sin.device:
        return False
    axis = unsqueeze_dim - cos.ndim - 1 if unsqueeze_dim >= 0 else unsqueeze_dim
    if q.ndim != 4 or axis not in (-3, -2):
        return False
    tokens = -2 if axis == -3 else -3
    if cos.shape[-2] != q.shape[tokens] or (cos.ndim == 3 and cos.shape[0] not in (1, q.shape[0])):
        return False
    return all(
        x.ndim == 4 and x.dtype == q.dtype and x.device == q.device and x.shape[0] == q.shape[0]
        and x.shape[tokens] == q.shape[tokens] and x.shape[-1] == q.shape[-1]
        for x in heads[1:]
    )  # fmt: skip


def rotate(
    form: Form,
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the function of that form."""
    if form.negative:
        sin = -sin
    return apply_rotary_pos_emb(
        q, k, cos, sin, unsqueeze_dim, interleaved=form.interleaved, table_layout=form.layout
    )


@torch.compiler.assume_constant_result  # the compiler takes the answer; it does not trace the trial
def _known(function: type, count: int, head_dim: int, width: int) -> Form | None:
    return _try(function, count, head_dim, width)


@functools.cache
def _try(function: type, count: int, head_dim: int, width: int) -> Form | None:
    def stock(dtype: torch.dtype, heads: list[torch.Tensor], *tables: torch.Tensor) -> list[torch.Tensor]:
        out = function.forward(None, *(x.to(dtype) for x in heads), *tables, 1)
        return [out] if count == 1 else list(out)

    ran = False
    with torch.no_grad():
        heads = [_numbers(1, 2 - i, 3, head_dim) for i in range(count)]
        for interleaved, layout in _PAIRS:
            pairs = width if layout == "half" else width // 2
            if 2 * pairs > head_dim or (layout != "half" and width % 2):
                continue
            cos, sin = (_laid_out(_numbers(1, 3, pairs).roll(turn, -1), layout) for turn in (0, 1))
            found = _outputs(lambda: stock(torch.float64, heads, cos, sin))  # noqa: B023
            if found is None:
                continue
            ran = True
            for negative in (False, True):
                form = Form(interleaved, layout, negative, False)
                expected = rotate(form, heads[0], heads[1] if count == 2 else None, cos, sin, 1)[:count]
                if all(map(_same, found, expected)):
                    wide = _outputs(lambda: stock(torch.float32, heads, cos, sin))  # noqa: B023
                    return form._replace(keeps_dtype=wide is not None and wide[0].dtype == torch.float32)
    if ran:
        logger.warning(
            "%s: no rotation that this kernel knows (heads of %d, tables of %d); the function stays as it is",
            getattr(function, "kernel_layer_name", function.__name__), head_dim, width,
        )  # fmt: skip
    return None


def _outputs(call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor] | None:
    try:
        return call()
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
        return None  # tables of that width are not for this function


def _numbers(*shape: int) -> torch.Tensor:
    """Numbers without a pattern, of the CPU, and of no random generator."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64, device="cpu").square().mul(0.7).sin().view(shape)


def _laid_out(pairs: torch.Tensor, layout: TableLayout) -> torch.Tensor:
    if layout == "cat":
        return torch.cat((pairs, pairs), dim=-1)
    return pairs.repeat_interleave(2, dim=-1) if layout == "repeat_interleave" else pairs


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # A function may compute in float32 whatever it gets.
    return found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
