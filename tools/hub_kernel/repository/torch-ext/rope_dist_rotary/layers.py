"""Layers that ``kernels.kernelize`` puts in the place of transformers' functions.

A layer looks at the function that it replaces, once: it rotates as that one does, and leaves to it whatever it does not
know or does not take.
"""

from __future__ import annotations

import torch
from torch import nn

from . import replaced
from .drop_in import apply_rotary_pos_emb


class apply_rotary_transformers(nn.Module):
    """``apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)`` of any model file of transformers."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self, apply_rotary_transformers):  # called by itself: it replaces nothing
            return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        form = replaced.form_for(type(self), (q, k), cos, sin, unsqueeze_dim)
        if form is None:
            return type(self).forward(self, q, k, cos, sin, unsqueeze_dim)
        return replaced.rotate(form, q, k, cos, sin, unsqueeze_dim)


class apply_rotary_transformers_single(nn.Module):
    """``apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=1)``: one tensor."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> torch.Tensor:
        if isinstance(self, apply_rotary_transformers_single):
            return apply_rotary_pos_emb(x, None, cos, sin, unsqueeze_dim)[0]
        form = replaced.form_for(type(self), (x,), cos, sin, unsqueeze_dim)
        if form is None:
            return type(self).forward(self, x, cos, sin, unsqueeze_dim)
        return replaced.rotate(form, x, None, cos, sin, unsqueeze_dim)[0]
