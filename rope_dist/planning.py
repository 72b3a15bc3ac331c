"""Plans: the factor of every rotary pair, its provenance, and the disturbance that it causes.

A :class:`RopePlan` is what the rest of the package passes around: made by :func:`plan` from a
model's config or from plain numbers, kept as JSON, applied by :func:`rope_dist.enable`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from .checking import check_plan, check_same_model, is_applied
from .defaults import MEASURE_SETTINGS, STRATEGY_SETTINGS
from .distribution import (
    DEFAULT_INTERVALS,
    Divergence,
    check_divergence,
    check_dtype,
    check_intervals,
    disturbances,
)
from .files import write_text
from .layer_types import EXTENDED_LAYERS, rope_parameters, too_short_a_window
from .messages import one_line
from .model_config import (
    GIVEN,
    ModelRope,
    extended_parameters,
    load_config,
    pretrained_rope,
    read_rope,
)
from .model_names import known_name
from .presets import PRESETS
from .strategies import (
    DEFAULT_STRATEGY,
    MAX_LENGTH,
    STILL,
    STRATEGIES,
    PretrainedRope,
    check_factors,
    check_length,
    check_number,
    check_rotary_dim,
    default_inv_freq,
    get_strategy,
)
from .trained_length import recorded_extension
from .version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "EXTENDED_LAYERS",
    "RopePlan",
    "check_plan",
    "check_same_model",
    "is_applied",
    "load_config",
    "plan",
    "pretrained_rope",
    "rope_parameters",
]

FORMAT = "rope_dist.plan"
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class RopePlan:
    """An extension for one target length: a scaling factor per rotary pair, and how it was made.

    Attributes:
        strategy: name of the strategy.
        settings: every setting it ran with.
        theta: RoPE base of the model.
        head_dim: dimensions of an attention head.
        rotary_dim: rotated dimensions of a head (``head_dim`` unless the model rotates a part).
        original_length, target_length: tokens, trained and to be read.
        factors: one per pair, float32 values, relative to ``theta ** (-2i / rotary_dim)``; the scaling
            that the model was trained with (``base_factors``) is included. :data:`rope_dist.strategies.STILL` for a
            pair that does not rotate.
        attention_scaling: factor of cos and sin.
        disturbance_per_pair: disturbance of each pair's rotary angle distribution, nats (eq. 8).
        intervals, divergence, dtype: how the disturbance was measured.
        base_factors: the trained model's own factors, or None for all ones.
        source: preset, path or hub id that the plan was made from, or None.
        original_length_from: which keys of a config ``original_length`` comes from, or None.
        notes: remarks for the user before the plan is applied.
    """

    strategy: str
    settings: dict[str, Any]
    theta: float
    head_dim: int
    rotary_dim: int
    original_length: int
    target_length: int
    factors: tuple[float, ...]
    attention_scaling: float
    disturbance_per_pair: tuple[float, ...]
    intervals: int = DEFAULT_INTERVALS
    divergence: Divergence = "pretrained-extended"
    dtype: str = "float32"
    base_factors: tuple[float, ...] | None = None
    source: str | None = field(default=None, compare=False)
    original_length_from: str | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_rotary_dim(self.head_dim, "head_dim")
        # Its own checks cover theta, the lengths and the base factors.
        rope = self.pretrained
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} is larger than head_dim {self.head_dim}")
        check_length(self.target_length, "the target length")
        if self.target_length < self.original_length:
            raise ValueError(
                f"the target length {self.target_length} is below the original length {self.original_length}"
            )
        check_factors(torch.tensor(self.factors, dtype=torch.float64, device="cpu"), rope.pairs)
        if len(self.disturbance_per_pair) != rope.pairs:
            raise ValueError(
                f"disturbance_per_pair must be {rope.pairs} numbers, got {len(self.disturbance_per_pair)}"
            )
        if not all(math.isfinite(d) for d in self.disturbance_per_pair):
            raise ValueError("disturbance_per_pair must be finite")
        if not (math.isfinite(self.attention_scaling) and self.attention_scaling > 0):
            raise ValueError(f"attention_scaling must be positive, got {self.attention_scaling}")
        check_intervals(self.intervals)
        check_divergence(self.divergence)
        check_dtype(self.dtype)

    @property
    def pretrained(self) -> PretrainedRope:
        """The embedding that is extended (its attention scaling is part of the plan's)."""
        return PretrainedRope(self.theta, self.rotary_dim, self.original_length, self.base_factors)

    @property
    def scale(self) -> float:
        """``s = target_length / original_length``."""
        return self.target_length / self.original_length

    @property
    def inv_freq(self) -> torch.Tensor:
        """``[rotary_dim / 2]`` float32, radians per token; equals stock's bit for bit where factors are 1."""
        factors = torch.tensor(self.factors, dtype=torch.float32, device="cpu")
        return default_inv_freq(self.theta, self.rotary_dim, factors)

    @property
    def disturbance(self) -> float:
        """Mean over rotating pairs of :attr:`disturbance_per_pair`, the paper's figure for a model (nats)."""
        rotating = self.pretrained.rotating().pairs
        return math.fsum(self.disturbance_per_pair[:rotating]) / rotating

    @property
    def interpolated_dims(self) -> int:
        """Dimensions (two per pair) whose frequency differs from the trained one: the paper's ``n``."""
        base = self.base_factors or (1.0,) * len(self.factors)
        return 2 * sum(f != b for f, b in zip(self.factors, base, strict=True))

    @property
    def threshold(self) -> float | None:
        """The threshold ``t`` of eq. 9, where the strategy used one."""
        return self.settings.get("threshold")

    def __repr__(self) -> str:
        parts = [
            f"{self.strategy}, {self.original_length} -> {self.target_length} ({self.scale:g}x)",
            f"theta={self.theta:g}",
            f"head_dim={self.head_dim}",
        ]
        if self.rotary_dim != self.head_dim:
            parts.append(f"rotary_dim={self.rotary_dim}")
        parts.append(f"{self.interpolated_dims} of {self.rotary_dim} dimensions interpolated")
        if self.threshold is not None:
            parts.append(f"threshold={self.threshold:g}")
        parts.append(f"attention_scaling={self.attention_scaling:.6g}")
        parts.append(f"disturbance={self.disturbance * 1e3:.2f}e-3")
        return f"RopePlan({', '.join(parts)})"

    def summary(self) -> str:
        """The plan as text: its ``repr``, notes, and a row for each run of pairs that share a factor."""
        base = self.base_factors or (1.0,) * len(self.factors)
        factors = [f / b for f, b in zip(self.factors, base, strict=True)]
        wavelengths = (2 * math.pi / self.pretrained.inv_freq.double()).tolist()
        rows = []
        rotating = self.pretrained.rotating().pairs
        for (factor, _), run in itertools.groupby(
            range(len(factors)), key=lambda i: (factors[i], i < rotating)
        ):
            pairs = list(run)
            first, last = pairs[0], pairs[-1]
            rows.append(
                (
                    f"{first}-{last}" if last > first else str(first),
                    f"{factor:.6g}" if self.factors[first] < STILL or factor == 1 else "does not rotate",
                    f"{wavelengths[first]:.4g}" + (f" - {wavelengths[last]:.4g}" if last > first else ""),
                    f"{math.fsum(self.disturbance_per_pair[i] for i in pairs) / len(pairs) * 1e3:.2f}",
                )
            )
        headers = ("pairs", "factor", "trained wavelength, tokens", "mean disturbance x 1e-3")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * 4)
        notes = [f"note: {note}" for note in self.notes]
        if self.original_length_from is not None:
            notes.insert(0, f"trained length: {self.original_length} tokens ({self.original_length_from})")
        return "\n\n".join([repr(self), *(["\n".join(notes)] if notes else []), table])

    def with_source(self, source: str | None) -> RopePlan:
        """The plan with another name of what it was made from."""
        return replace(self, source=source)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; :meth:`from_dict` gives an equal plan back."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rope_dist_version": __version__,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in own.items()},
            "settings": dict(self.settings),
            # Derived, for readers of the file; from_dict() checks inv_freq.
            "threshold": self.threshold,
            "interpolated_dims": self.interpolated_dims,
            "disturbance": self.disturbance,
            "inv_freq": self.inv_freq.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> RopePlan:
        """The plan that :meth:`to_dict` wrote; ``ValueError`` says what is wrong with anything else."""
        if isinstance(data, Mapping) and data.get("format") == "rope_dist.dynamic_plan":
            raise ValueError("a dynamic plan: read it with DynamicPlan.load")
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'not a rope_dist plan: the key "format" is not "{FORMAT}"')
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"plan format version {data.get('version')!r} is not known to rope_dist {__version__} "
                f"(it reads version {FORMAT_VERSION})"
            )
        plan = cls(**{f.name: _from_json(data, f.name, str(f.type)) for f in fields(cls)})
        written = torch.tensor(
            _from_json(data, "inv_freq", "tuple[float, ...]"), dtype=torch.float64, device="cpu"
        )
        if written.shape != plan.inv_freq.shape or not torch.allclose(
            written, plan.inv_freq.double(), rtol=1e-6, atol=0.0
        ):
            raise ValueError("the plan contradicts itself: its inv_freq does not follow from its factors")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a file already there is replaced only once the new one is whole."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RopePlan:
        """Read a plan; ``ValueError`` names the file and what is wrong with it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the plan {path}: {one_line(error)}") from None
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def config_overrides(self, config: PretrainedConfig | None = None) -> dict[str, Any]:
        """Entries of a transformers 5 config with which stock Hugging Face computes this plan's frequencies.

        The rotary parameters become a ``longrope`` whose short and long factors are equal and whose attention factor
        is written out: no engine has to choose between them or to derive a scaling. ``rope_dist`` records where the
        factors came from.

        Args:
            config: the config to be changed. Rotary parameters that do not determine frequencies stay
                (``mrope_section``, ``llama_4_scaling_beta``, ``mscale_all_dim``), and so do those of other layer types;
                lengths that it repeats under other names are raised, and a head dimension that it leaves open is
                written. Of a model with parts the entries belong into the config of its language model. None: a LLaMA.

        Raises:
            ValueError: stock cannot compute the plan from ``config``.
        """
        entries = extended_parameters(
            config,
            theta=self.theta,
            head_dim=self.head_dim,
            rotary_dim=self.rotary_dim,
            target_length=self.target_length,
            factors=list(self.factors),
            attention_scaling=self.attention_scaling,
        )
        original = self.original_length
        if config is not None and self.original_length_from != GIVEN:
            # The second of two extensions keeps the first original length.
            text = config.get_text_config(decoder=True)
            if original == text.max_position_embeddings:
                original = recorded_extension(text) or original
        return {
            **entries,
            "rope_dist": {
                "version": __version__,
                "strategy": self.strategy,
                "settings": {k: v for k, v in self.settings.items() if k != "factors"},
                "original_length": original,
                "target_length": self.target_length,
                "disturbance": self.disturbance,
            },
        }


# Annotation of a field -> the types that its value has in JSON; of a list: the annotation of its entries, their name.
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "Divergence": (str,),
    "int": (int,),
    "float": (int, float),
    "dict[str, Any]": (dict,),
}
_JSON_LISTS = {"tuple[float, ...]": ("float", "numbers"), "tuple[str, ...]": ("str", "texts")}


def _is_json(value: Any, kind: str) -> bool:
    if not isinstance(value, _JSON_TYPES[kind]) or isinstance(value, bool):
        return False
    # A whole number in JSON may be larger than any float.
    return kind != "float" or not isinstance(value, int) or abs(value) <= sys.float_info.max


def _from_json(data: Mapping[str, Any], key: str, annotation: str) -> Any:
    """The value of a plan's JSON as the type that :class:`RopePlan` annotates; ``ValueError`` for any other."""
    if key not in data:
        raise ValueError(f'the plan has no "{key}"')
    value, kind = data[key], annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    entry, entries = _JSON_LISTS.get(kind, (kind, ""))
    if not (isinstance(value, list) if entries else _is_json(value, kind)):
        raise ValueError(f'"{key}" of the plan is of the wrong type: {value!r:.80}')
    if not entries:
        return float(value) if kind == "float" else value
    if not all(_is_json(v, entry) for v in value):
        raise ValueError(f'"{key}" of the plan must be a list of {entries}')
    return tuple(float(v) if entry == "float" else v for v in value)


def _resolve(
    source: Any,
    theta: float | None,
    head_dim: int | None,
    rotary_dim: int | None,
    original_length: int | None,
) -> tuple[ModelRope, str | None, PretrainedConfig | None]:
    """The rotary embedding to extend, the name of the source, and the config where it is a model."""
    numbers = {"theta": theta, "head_dim": head_dim, "rotary_dim": rotary_dim}
    if source is None:
        needed = {**numbers, "original_length": original_length}
        missing = [k for k in ("theta", "head_dim", "original_length") if needed[k] is None]
        if missing:
            raise ValueError(
                f"give a model (a preset, a directory, a hub id or a config) or all of theta, head_dim and "
                f"original_length; missing: {', '.join(missing)}"
            )
        head_dim = check_rotary_dim(head_dim, "head_dim")
        rotary_dim = head_dim if rotary_dim is None else check_rotary_dim(rotary_dim, "rotary_dim")
        length = check_length(original_length, "original_length")
        rope = PretrainedRope(check_number(theta, "theta"), rotary_dim, length)
        return ModelRope(rope, head_dim), None, None
    given = [k for k, v in numbers.items() if v is not None]
    if given:
        raise ValueError(f"{', '.join(given)} come from the model; give a model or plain numbers, not both")
    if isinstance(source, (str, os.PathLike)):
        name = known_name(source, PRESETS)
        if name is not None:
            rope = PRESETS[name]
            if original_length is not None:
                rope = replace(rope, length=check_length(original_length, "original_length"))
            length_from = None if original_length is None else GIVEN
            return ModelRope(rope, rope.rotary_dim, length_from), name, None
        config = load_config(source)
        try:
            return read_rope(config, original_length), str(source), config
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    config = getattr(source, "config", source)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"cannot plan from a {type(source).__name__}: expected a preset, a path, a hub id, a transformers "
            "config or model"
        )
    return read_rope(config, original_length), getattr(config, "_name_or_path", None) or None, config


def check_options(
    strategy: str,
    target_length: int | None,
    factor: float | None,
    settings: Mapping[str, Any] | None,
    more: Mapping[str, Any],
) -> tuple[float | None, dict[str, Any]]:
    """Check the options of :func:`plan` that do not depend on the model; returns the factor and the settings.

    Beside ``target_length`` a ``factor`` is the strategy's setting of that name (``llama3``, ``dynamic-ntk``).

    Raises:
        ValueError: an option is unknown, given twice or of the wrong type.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"settings must be a mapping of names to values, got {settings!r:.80}")
    given = dict(settings or {})
    for name, value in more.items():
        if name in given:
            raise ValueError(f"the setting {name!r} is given twice")
        given[name] = value
    get_strategy(strategy)
    known = STRATEGY_SETTINGS[strategy]
    if factor is not None and target_length is not None and "factor" in known and "factor" not in given:
        given["factor"], factor = factor, None
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            others = [other for other in STRATEGIES if name in STRATEGY_SETTINGS[other]]
            hint = f" (strategies that have it: {', '.join(others)})" if others else ""
            raise ValueError(f"the strategy {strategy} has no setting {name!r}; {has}{hint}")
    if factor is not None:
        factor = check_number(factor, "factor", positive=True)
    return factor, given


def _target(found: ModelRope, factor: float) -> int:
    """``factor`` times the trained length; of a model that rope_dist extended, the length before that."""
    start, length = found.recorded or found.rope.length, found.rope.length
    target = min(start * factor, 2.0 * MAX_LENGTH)
    target = check_length(round(target), f"factor {factor:g} times the original length {start}")
    if found.recorded is None or target == length:
        return target
    extended = f"rope_dist extended the model from {start} to {length} tokens already"
    if target < length:
        raise ValueError(
            f"{extended}, and factor {factor:g} counts from the {start}: give a larger factor, target_length, or "
            f"original_length={length} if it was trained at that length since"
        )
    warnings.warn(
        f"{extended}; factor {factor:g} counts from the {start}, and the model is extended further from what it has",
        stacklevel=3,
    )
    return target


def plan(  # noqa: PLR0913  (public)
    source: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel | None = None,
    *,
    theta: float | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    original_length: int | None = None,
    target_length: int | None = None,
    factor: float | None = None,
    strategy: str = DEFAULT_STRATEGY,
    intervals: int = DEFAULT_INTERVALS,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
    settings: Mapping[str, Any] | None = None,
    **more_settings: Any,
) -> RopePlan:
    """Make a :class:`RopePlan`, an extension for one length, from a model, its config or plain numbers.

    Args:
        source: a preset (``"llama2-7b"``), a directory with a ``config.json``, a hub id, or a
            ``transformers`` config or model. None to give the numbers instead.
        theta, head_dim, rotary_dim, original_length: the plain numbers (``rotary_dim`` by default
            ``head_dim``). ``original_length`` also beside a model whose config does not say, or says wrongly, what
            length it was trained to read; see :func:`rope_dist.trained_length.trained_length`.
        target_length: tokens to read, at least the original length.
        factor: instead of ``target_length``, its multiple of the original length. Of a model that this package
            extended, and that says so in its config, it counts from the length before: extended twofold and saved,
            a model is planned with ``factor=2`` as it is. Beside ``target_length`` it is the setting of that name.
        strategy: a name of :data:`rope_dist.strategies.STRATEGIES`.
        intervals, divergence, dtype: how the disturbance is measured, see :mod:`rope_dist.distribution`.
        settings: of the strategy, by name, e.g. ``{"factor": 8}`` for ``llama3``.
        **more_settings: the same as keyword arguments, e.g. ``threshold=0`` for ``dprope`` or ``beta_fast=16``
            for ``yarn``.

    Raises:
        ValueError: anything out of range, of the wrong type or unknown, with what would be right.
        TypeError: ``source`` is of another kind.
    """
    factor, given = check_options(strategy, target_length, factor, settings, more_settings)
    found, name, config = _resolve(source, theta, head_dim, rotary_dim, original_length)
    rope = found.rope
    if found.loss is not None:
        warnings.warn(found.loss, stacklevel=2)
    if (target_length is None) == (factor is None):
        raise ValueError("give either target_length (tokens) or factor (times the original length)")
    if factor is not None:
        target_length = _target(found, factor)
    target_length = check_length(target_length, "the target length")
    window = None if config is None else too_short_a_window(config, rope.length, target_length)
    if window is not None:
        warnings.warn(window, stacklevel=2)
    intervals = check_intervals(given.pop("intervals", intervals))
    divergence = check_divergence(given.pop("divergence", divergence))
    dtype = check_dtype(given.pop("dtype", dtype))
    # A strategy that looks at the disturbance looks at the one that is reported.
    measure = {"intervals": intervals, "divergence": divergence, "dtype": dtype}
    given.update({name: measure[name] for name in MEASURE_SETTINGS if name in STRATEGY_SETTINGS[strategy]})
    rotating = rope.rotating()
    scaling = get_strategy(strategy)(rotating, target_length, **given)
    per_pair = scaling.disturbance
    if per_pair is None:
        (per_pair,) = disturbances(
            rope.inv_freq[: rotating.pairs],
            rope.length,
            [scaling.factors],
            target_length,
            intervals=intervals,
            divergence=divergence,
            dtype=dtype,
        )
    factors = rope.base_factors.clone()
    factors[: rotating.pairs] *= scaling.factors
    factors.clamp_(max=STILL)
    made = RopePlan(
        strategy=strategy,
        settings=scaling.settings,
        theta=rope.theta,
        head_dim=found.head_dim,
        rotary_dim=rope.rotary_dim,
        original_length=rope.length,
        target_length=target_length,
        factors=tuple(factors.float().tolist()),
        attention_scaling=rope.attention_scaling * scaling.attention_scaling,
        disturbance_per_pair=(*per_pair.tolist(), *[0.0] * (rope.pairs - rotating.pairs)),
        intervals=intervals,
        divergence=divergence,
        dtype=str(dtype).removeprefix("torch."),
        base_factors=rope.factors,
        source=name,
        original_length_from=found.length_from,
        notes=(*found.notes, *(note for note in (found.loss, window) if note)),
    )
    if config is not None:
        made.config_overrides(config)  # raises where stock could not run it
    return made
