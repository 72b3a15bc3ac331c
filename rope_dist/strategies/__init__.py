"""Context-extension strategies: functions from a pre-trained rotary embedding to one factor per pair.

Every strategy is a function of this signature, which is checked when this package is imported:

    ``strategy(rope: PretrainedRope, target_length: int, *, setting=default, ...) -> Scaling``

- It is listed once, with its settings and what each takes, in :data:`rope_dist.defaults.STRATEGIES`; planning, the
  comparison, exports and the command line know it from there.
- ``s`` is ``target_length / rope.length`` (:func:`base.scale_of` checks both lengths). A factor ``f_i`` divides the
  frequency of pair ``i``: ``theta_i / f_i`` radians per token after the extension.
- Settings are keyword-only, each with a default, and :attr:`Scaling.settings` records the values used. Bad values
  raise ``ValueError``.
- :func:`rope_dist.plan` passes on how it measures the disturbance to a strategy that has the settings of
  :data:`rope_dist.defaults.MEASURE_SETTINGS`.
"""

from __future__ import annotations

import inspect
from importlib import import_module

from .. import defaults
from ..defaults import DEFAULT_STRATEGY
from ..messages import unknown
from .auto import auto
from .auto_yarn import auto_yarn
from .base import (
    MAX_LENGTH,
    STILL,
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
from .combined import clip, cope, resonance
from .distributional import DPROPE_THRESHOLDS, default_threshold, dprope
from .formulas import dynamic_ntk, extrapolation, llama3, longrope, longrope2, ntk, ntk_mixed, pi, yarn
from .mixed_radix import mrrope_pro, mrrope_uni
from .refinement import refined


def _load(name: str) -> Strategy:
    """The function of a strategy; ``TypeError`` if its parameters are not those of its entry."""
    path, settings = defaults.STRATEGIES[name]
    module, _, attribute = path.rpartition(".")
    function: Strategy = getattr(import_module(f".{module}", __name__), attribute)
    parameters = list(inspect.signature(function).parameters.values())
    optional = all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[2:])
    if not optional or [p.name for p in parameters] != ["rope", "target_length", *settings]:
        expected = ", ".join(("rope", "target_length", *(["*", *settings] if settings else [])))
        raise TypeError(
            f"the strategy {name} in rope_dist/defaults.py is {attribute}({expected}) with a default for each setting, "
            f"but its function is {attribute}{inspect.signature(function)}"
        )
    return function


STRATEGIES: dict[str, Strategy] = {name: _load(name) for name in defaults.STRATEGIES}
"""Name -> function."""

__all__ = [
    "DEFAULT_STRATEGY",
    "DPROPE_THRESHOLDS",
    "MAX_LENGTH",
    "STILL",
    "STRATEGIES",
    "PretrainedRope",
    "Scaling",
    "Strategy",
    "auto",
    "auto_yarn",
    "check_factors",
    "check_length",
    "check_number",
    "check_rotary_dim",
    "check_whole",
    "clip",
    "cope",
    "default_inv_freq",
    "default_threshold",
    "dprope",
    "dynamic_ntk",
    "extrapolation",
    "get_strategy",
    "llama3",
    "longrope",
    "longrope2",
    "mrrope_pro",
    "mrrope_uni",
    "ntk",
    "ntk_mixed",
    "pi",
    "refined",
    "resonance",
    "yarn",
]


def get_strategy(name: str) -> Strategy:
    """The strategy of that name; ``ValueError`` with the nearest and all known ones otherwise."""
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ValueError(unknown("strategy", name, STRATEGIES))
    return STRATEGIES[name]
