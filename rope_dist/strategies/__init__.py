"""Context-extension strategies: a pre-trained rotary embedding in, one factor a pair out.

Every strategy is a plain function of one signature,

    ``strategy(rope: PretrainedRope, target_length: int, **settings) -> Scaling``

and :data:`STRATEGIES` holds them under their names. A factor ``f_i >= 1`` slows pair ``i`` down:
it turns at ``theta_i / f_i`` radians a token after the extension. ``s`` is always
``target_length / rope.length``.
"""

from __future__ import annotations

from ..defaults import DEFAULT_STRATEGY
from ..messages import unknown
from .auto import auto
from .base import (
    MAX_LENGTH,
    PretrainedRope,
    Scaling,
    Strategy,
    check_factors,
    check_length,
    check_number,
    check_rotary_dim,
    check_whole,
    default_inv_freq,
)
from .distributional import DPROPE_THRESHOLDS, default_threshold, dprope
from .formulas import dynamic_ntk, extrapolation, llama3, longrope, ntk, pi, yarn
from .refinement import refined

STRATEGIES: dict[str, Strategy] = {
    "extrapolation": extrapolation,
    "pi": pi,
    "ntk": ntk,
    "dynamic-ntk": dynamic_ntk,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
    "dprope": dprope,
    "refined": refined,
    "auto": auto,
}

__all__ = [
    "DEFAULT_STRATEGY",
    "DPROPE_THRESHOLDS",
    "MAX_LENGTH",
    "STRATEGIES",
    "PretrainedRope",
    "Scaling",
    "Strategy",
    "auto",
    "check_factors",
    "check_length",
    "check_number",
    "check_rotary_dim",
    "check_whole",
    "default_inv_freq",
    "default_threshold",
    "dprope",
    "dynamic_ntk",
    "extrapolation",
    "get_strategy",
    "llama3",
    "longrope",
    "ntk",
    "pi",
    "refined",
    "yarn",
]


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; ``ValueError`` with the nearest and all known ones otherwise."""
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ValueError(unknown("strategy", name, STRATEGIES))
    return STRATEGIES[name]
