"""Rotary embedding in one launch, forward and backward, for the slot ``rotary_pos_emb`` of transformers."""

from . import layers
from .drop_in import apply_rotary_pos_emb

__all__ = ["apply_rotary_pos_emb", "layers"]
