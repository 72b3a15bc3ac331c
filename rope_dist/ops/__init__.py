"""Rotary operators on tensors. They know no model.

The functions here check their arguments; ``reference.py`` defines the mathematics, ``dispatch.py`` chooses the backend.
"""

from .dispatch import backend_for
from .dispatch import use as use_backend
from .drop_in import apply_rotary_pos_emb
from .drop_in_engines import (
    apply_rope,
    apply_rope_inplace,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    rotary_embedding,
)
from .drop_in_flash_attention import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from .fixed_point import mrope_frequencies, to_fixed_point
from .kv_cache import rotary_write_cache
from .norm_projection import qkv_norm_rotary
from .norm_rotation import norm_rotary, norm_rotary_at
from .projection import decode_rotary, projection_paths, qkv_rotary
from .reference import cos_sin
from .rotation import rerotate_, rotary, rotary_at

__all__ = [
    "RotaryEmbedding",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_pos_emb",
    "backend_for",
    "cos_sin",
    "decode_rotary",
    "mrope_frequencies",
    "norm_rotary",
    "norm_rotary_at",
    "projection_paths",
    "qkv_norm_rotary",
    "qkv_rotary",
    "rerotate_",
    "rotary",
    "rotary_at",
    "rotary_embedding",
    "rotary_write_cache",
    "to_fixed_point",
    "use_backend",
]
