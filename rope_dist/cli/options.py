"""Options that several commands have. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any

import typer

from .. import defaults
from . import values


def option(parser: Callable[[str], Any], metavar: str, help: str, *names: str) -> Any:
    """An option, by default with its parameter's name; with a metavar in ``...`` it takes several values."""
    return typer.Option(*names, parser=parser, metavar=metavar, help=help)


def choice(known: Collection[str], help: str, more: str = "") -> Any:
    """An option that takes one of the ``known`` values, or with ``more="..."`` several."""
    return option(values.one_of("value", known), "|".join(known) + more, help)


def flag(name: str, help: str) -> Any:
    return typer.Option(name, help=help)


_MODEL = f"Preset ({', '.join(defaults.PRESETS)}), directory with a config.json, or hub id (owner/name)."
Source = Annotated[str | None, typer.Argument(parser=values.model, metavar="MODEL", help=_MODEL)]
Theta = Annotated[float | None, option(values.theta, "BASE", "Base of RoPE, instead of MODEL.")]
HeadDim = Annotated[int | None, option(values.even, "N", "Dimensions of a head, instead of MODEL.")]
RotaryDim = Annotated[int | None, option(values.even, "N", "Rotated dimensions (default: all).")]
Original = Annotated[int | None, option(values.tokens, "TOKENS", "Trained context length, instead of MODEL.")]
Target = Annotated[int | None, option(values.tokens, "TOKENS", "Context length to extend to.")]
Factor = Annotated[
    float | None, option(values.scaling_factor, "S", "Scaling factor: target / trained length.")
]
Strategy = Annotated[str, option(values.strategy, "NAME", f"Strategy: {', '.join(defaults.STRATEGY_NAMES)}.")]
Threshold = Annotated[
    Any,
    option(
        values.threshold,
        "T",
        f"Threshold of dprope (eq. 9): a number, {' or '.join(defaults.THRESHOLD_NAMES)}.",
    ),
]
Intervals = Annotated[int, option(values.whole(2), "N", "Intervals of the angle distribution.")]
Divergence = Annotated[
    Any, choice(defaults.DIVERGENCE_NAMES, "KL divergence of the paper's Table 3, or of its eq. 8.")
]
MeasureDtype = Annotated[str, choice(defaults.MEASURE_DTYPES, "Dtype of the angles (the paper: float32).")]
Settings = Annotated[
    list[Any] | None,
    option(values.setting, "KEY=VALUE", "Setting of the strategy, as JSON. Repeatable.", "--set"),
]
Json = Annotated[bool, flag("--json", "Print JSON.")]
Plot = Annotated[str | None, option(values.output_file, "FILE", "Plot factors and disturbance.")]
Engines = Annotated[
    list[str] | None,
    option(
        values.engine,
        "NAME",
        f"Engine that must load the plan: {', '.join(defaults.ENGINE_NAMES)}. Repeatable.",
    ),
]
Weights = Annotated[
    str,
    option(values.weights, "MODEL", f"{', '.join(defaults.PACKAGED_MODEL_NAMES)}, a directory or a hub id."),
]
Device = Annotated[
    str | None, option(values.device, "DEVICE", "cpu, cuda or cuda:N (default: a GPU if there is one).")
]
ModelDtype = Annotated[
    str | None,
    choice(
        ("float32", "bfloat16", "float16", "auto"),
        "Dtype of the model; auto: as saved (default: float32 on a CPU, else auto).",
    ),
]
Text = Annotated[
    str, option(values.corpus, "NAME", f"Text file, or corpus: {', '.join(defaults.CORPUS_NAMES)}.")
]
Texts = Annotated[
    list[str],
    option(values.corpus, "NAME...", f"Text files, or corpora: {', '.join(defaults.CORPUS_NAMES)}."),
]

DEFAULT_TEXTS = [defaults.CORPUS_NAMES[0]]


def at_most_one(required: bool = False, **given: Any) -> None:
    """``ValueError`` where several of the options are given, or none although one is ``required``."""
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"give {' or '.join(names)}, not both")
    if required and not names:
        raise ValueError(f"give {' or '.join(f'--{name}' for name in given)}")


def settings(strategy: str, given: Iterable[tuple[str, Any]] | None) -> dict[str, Any]:
    """The settings of ``--set``; ``ValueError`` or ``BadParameter`` unless the strategy has them."""
    found = dict(given or ())
    for name, value in found.items():
        if name in defaults.MEASURE_SETTINGS:
            raise ValueError(f"{name} has an option of its own: give --{name} to rope-dist plan")
        values.check_setting(strategy, name, value)
    return found


def extension(target: int | None, factor: float | None, strategy: str) -> dict[str, Any]:
    """Arguments of ``rope_dist.plan`` and ``rope_dist.enable``; by default twice the trained length."""
    at_most_one(target=target, factor=factor)
    factor = 2.0 if target is None and factor is None else factor
    return {"target_length": target, "factor": factor, "strategy": strategy}


def rope(source: str | None, **numbers: Any) -> dict[str, Any]:
    """Arguments of ``rope_dist.plan`` for a model or plain numbers; ``ValueError`` for both, or part of the numbers."""
    given = [f"--{k.removesuffix('_length').replace('_', '-')}" for k, v in numbers.items() if v is not None]
    missing = [name for name in ("--theta", "--head-dim", "--original") if name not in given]
    if source is not None and given:
        raise ValueError(f"give a model or plain numbers, not both: {', '.join(given)}")
    if source is None and missing:
        raise ValueError(
            f"give a MODEL, or --theta, --head-dim and --original; missing: {', '.join(missing)}"
        )
    return {"source": source, **numbers}
