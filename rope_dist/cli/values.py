"""Types of argument values: what is wrong is reported while the arguments are parsed, before torch is imported."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from typer import BadParameter

from .. import defaults
from ..defaults import PACKAGED_MODEL_NAMES, PRESETS, STRATEGY_NAMES, STRATEGY_SETTINGS, THRESHOLD_NAMES
from ..messages import one_line, unknown
from ..variant_names import split_variant

# --- numbers -----------------------------------------------------------------------------------


def whole(least: int = -(2**63)) -> Callable[[str], int]:
    """The type of whole numbers of at least ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise BadParameter(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise BadParameter(f"must be at least {least}, got {text}")
        if value >= 2**63:
            raise BadParameter(f"must be below 2^63, got {text}")
        return value

    return number


def real(allowed: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    """The type of finite numbers that are ``allowed``; others "must be ``rule``"."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise BadParameter(f"must be a number, got {text!r}") from None
        if not math.isfinite(value):
            raise BadParameter(f"must be a finite number, got {text}")
        if not allowed(value):
            raise BadParameter(f"must be {rule}, got {text}")
        return value

    return number


seed = whole()
tokens = whole(2)


def lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens between commas."""
    return tuple(tokens(part) for part in text.split(","))


not_negative = real(lambda value: value >= 0, "at least 0")
positive = real(lambda value: value > 0, "above 0")
scaling_factor = real(lambda value: value >= 1, "at least 1 (the length is only extended)")
theta = real(lambda value: value > 1, "above 1")
share = real(lambda value: 0 <= value <= 1, "from 0 to 1")


def even(text: str) -> int:
    value = whole(2)(text)
    if value % 2:
        raise BadParameter(f"must be even (a rotary pair has two dimensions), got {text}")
    return value


def threshold(text: str) -> float | str:
    if text in THRESHOLD_NAMES:
        return text
    try:
        return not_negative(text)
    except BadParameter:
        names = ", ".join(THRESHOLD_NAMES)
        raise BadParameter(f"must be a number of at least 0, or {names}, got {text!r}") from None


# --- names -------------------------------------------------------------------------------------


def one_of(what: str, names: Collection[str]) -> Callable[[str], str]:
    """The type of a name out of ``names``."""

    def name(text: str) -> str:
        if text not in names:
            raise BadParameter(unknown(what, text, names))
        return text

    return name


strategy = one_of("strategy", STRATEGY_NAMES)
stock_or_strategy = one_of("strategy", ("stock", *STRATEGY_NAMES))
engine = one_of("engine", defaults.ENGINE_NAMES)


def variant(text: str) -> str:
    """What ``eval`` measures: ``stock``, a strategy with or without ``+dynamic``, a window and settings, or a plan."""
    if text.endswith(".json"):
        return readable_file(text)
    try:
        parts = split_variant(text)
    except ValueError as error:
        raise BadParameter(str(error)) from None
    name, settings = parts.strategy, parts.settings
    if name in defaults.GROUPED:
        return text
    if text != "stock" and name not in STRATEGY_NAMES:
        raise BadParameter(unknown("strategy", name, ("stock", *STRATEGY_NAMES), ", or a plan (PATH.json)"))
    for part in filter(None, settings.split(",")):
        check_setting(name, *setting(part))
    return text


def model(text: str) -> str:
    """What can be planned from: a preset, a directory, a config.json or a hub id."""
    return _model(text, PRESETS)


def weights(text: str) -> str:
    """What can be loaded: a packaged model, a directory or a hub id."""
    if text in PRESETS and text not in PACKAGED_MODEL_NAMES and not os.path.exists(text):
        raise BadParameter(
            f"the preset {text} has frequencies and no weights: give a directory or the hub id {PRESETS[text][0]}"
        )
    return _model(text, PACKAGED_MODEL_NAMES)


def _model(text: str, names: Collection[str]) -> str:
    if text in names or os.path.exists(text):
        return text
    if text.count("/") != 1 or text[0] in "./~" or text[-1] == "/":
        if "/" in text:
            raise BadParameter(f"no such file or directory: {text}")
        # A misspelt name should not wait for the hub to say no.
        raise BadParameter(
            unknown(
                "model", text, names, "; or give a directory with a config.json, or a hub id (owner/name)"
            )
        )
    return text


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|(cuda|xpu|hpu|npu)(:\d{1,3})?", text):
        raise BadParameter(f"unknown device {text!r}; known: cpu, cuda, cuda:N")
    return text


# --- files -------------------------------------------------------------------------------------


def readable_file(text: str) -> str:
    try:
        with open(text, "rb"):
            return text
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read {text}: {one_line(error)}") from None


def corpus(text: str) -> str:
    if text not in defaults.CORPUS_NAMES and not os.path.exists(text):
        raise BadParameter(unknown("text", text, defaults.CORPUS_NAMES, "; or give a text file"))
    return text


def output_file(text: str) -> str:
    """A path whose folder is there."""
    folder = Path(text).parent
    if not text or os.path.isdir(text):
        raise BadParameter(f"cannot write {text!r}: it is a directory")
    if not os.path.isdir(folder):
        raise BadParameter(f"cannot write {text}: there is no directory {folder}")
    return text


# --- settings of a strategy --------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` with the value as JSON, else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadParameter(f"{text!r} is not KEY=VALUE, e.g. beta_fast=16")
    try:
        return key.replace("-", "_"), json.loads(value)
    except (ValueError, RecursionError):
        return key.replace("-", "_"), value


def check_setting(strategy_name: str, name: str, value: Any) -> None:
    """``BadParameter`` unless the strategy has the setting ``name`` and ``value`` is of its kind."""
    known = STRATEGY_SETTINGS[strategy_name]
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise BadParameter(f"the strategy {strategy_name} has no setting {name!r}; {has}")
    kind = known[name]
    if not _KINDS[kind](value):
        raise BadParameter(f"{name} of {strategy_name} must be {kind}, got {json.dumps(value)[:80]}")
    if kind in (defaults.NAME, defaults.NAMES):
        for named in value if kind == defaults.NAMES else (value,):
            strategy(named)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


_KINDS: dict[str, Callable[[Any], bool]] = {
    defaults.NUMBER: _is_number,
    defaults.INTEGER: lambda value: _is_number(value) and value == int(value),
    defaults.BOOLEAN: lambda value: isinstance(value, bool),
    defaults.NUMBERS: _is_list_of(_is_number),
    defaults.NAME: lambda value: isinstance(value, str),
    defaults.NAMES: _is_list_of(lambda value: isinstance(value, str)),
    defaults.THRESHOLD: lambda value: _is_number(value) or value in THRESHOLD_NAMES,
    defaults.DIVERGENCE: lambda value: value in defaults.DIVERGENCE_NAMES,
    defaults.DTYPE: lambda value: value in defaults.MEASURE_DTYPES,
}
