"""Rotary operators on tensors. They know no model.

The functions here check their arguments; ``reference.py`` defines the mathematics, ``dispatch.py`` chooses the backend.
"""

from .dispatch import backend_for
from .dispatch import use as use_backend
from .drop_in import apply_rotary_emb, apply_rotary_pos_emb
from .fixed_point import to_fixed_point
from .projection import decode_rotary, projection_paths, qkv_rotary
from .reference import cos_sin
from .rotation import rotary, rotary_at

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_pos_emb",
    "backend_for",
    "cos_sin",
    "decode_rotary",
    "projection_paths",
    "qkv_rotary",
    "rotary",
    "rotary_at",
    "to_fixed_point",
    "use_backend",
]
