"""Names of what ``rope-dist eval`` measures, taken apart: ``auto+dynamic+window=1024:fast_periods=32``."""

from __future__ import annotations

from dataclasses import dataclass

from .defaults import DYNAMIC, GROUPED, SCALING, WINDOW

_SCALINGS = ("far", "all")


@dataclass(frozen=True)
class VariantName:
    """The parts of a name.

    Attributes:
        strategy: or ``"grouped"`` or ``"jet-long"``.
        dynamic: the plan grows with the text.
        window: distances below it are the trained model's; 0 where there is no window.
        scaling: whose logits beyond or of a window the plan's attention scaling multiplies.
        settings: of the strategy, as text.
    """

    strategy: str
    dynamic: bool
    window: int
    scaling: str
    settings: str


def split_variant(name: str) -> VariantName:
    """The parts of ``STRATEGY[+dynamic][+window=TOKENS[+scaling=far|all]][:SETTINGS]``.

    Raises:
        ValueError: a window that is not a positive whole number, a scaling that is not known, ``grouped`` or
            ``jet-long`` without a window or with settings.
    """
    start, _, settings = name.partition(":")
    start, windowed, size = start.partition(WINDOW)
    size, scaled, scaling = size.partition(SCALING)
    dynamic, strategy = start.endswith(DYNAMIC), start.removesuffix(DYNAMIC)
    if windowed and not (size.isdecimal() and int(size)):
        raise ValueError(
            f"the window of {name!r} must be a positive whole number of tokens, e.g. auto{WINDOW}1024"
        )
    if scaled and scaling not in _SCALINGS:
        raise ValueError(f"the scaling of {name!r} must be {' or '.join(_SCALINGS)}, got {scaling!r}")
    if strategy in GROUPED and (not windowed or scaled or settings):
        raise ValueError(f"{name!r} must be {strategy}[{DYNAMIC}]{WINDOW}TOKENS, without settings")
    return VariantName(strategy, dynamic, int(size) if windowed else 0, scaling or "none", settings)
