"""Plans: which factor every rotary pair gets, where that came from, and what it costs.

A :class:`RopePlan` is what the rest of the package passes around: made by :func:`plan` from a
model's config or from plain numbers, kept as JSON, applied by :func:`rope_dist.enable`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from .distribution import (
    DEFAULT_INTERVALS,
    Divergence,
    check_divergence,
    check_dtype,
    check_intervals,
    disturbances,
)
from .files import write_text
from .presets import PRESETS
from .strategies import (
    PretrainedRope,
    check_factors,
    check_length,
    check_rotary_dim,
    default_inv_freq,
    get_strategy,
)
from .version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "rope_dist.plan"
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False)
class RopePlan:
    """Factors of an extension with their provenance.

    Attributes:
        strategy: name of the strategy.
        settings: every setting it ran with.
        theta: RoPE base of the model.
        head_dim: dimensions of an attention head.
        rotary_dim: rotated dimensions of a head (``head_dim`` unless the model rotates a part).
        original_length, target_length: tokens, trained and to be read.
        factors: one a pair, float32 values, relative to ``theta ** (-2i / rotary_dim)``; the scaling
            that the model was trained with (``base_factors``) is included.
        attention_scaling: what cos and sin are multiplied by.
        disturbance_per_pair: disturbance of each pair's rotary angle distribution, nats (eq. 8).
        intervals, divergence, dtype: how the disturbance was measured.
        base_factors: the trained model's own factors, or None for all ones.
        source: what the plan was made from (a preset, a path, a hub id), or None.
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
    divergence: str = "pretrained-extended"
    dtype: str = "float32"
    base_factors: tuple[float, ...] | None = None
    source: str | None = field(default=None, compare=False)

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
        check_factors(torch.tensor(self.factors, dtype=torch.float64), rope.pairs)
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
        """``[rotary_dim / 2]`` float32, radians a token; equals stock's bit for bit where factors are 1."""
        return default_inv_freq(self.theta, self.rotary_dim, torch.tensor(self.factors, dtype=torch.float32))

    @property
    def disturbance(self) -> float:
        """Mean over pairs of :attr:`disturbance_per_pair`, the paper's figure for a model (nats)."""
        return math.fsum(self.disturbance_per_pair) / len(self.disturbance_per_pair)

    @property
    def interpolated_dims(self) -> int:
        """Dimensions (two a pair) whose frequency differs from the trained one: the paper's ``n``."""
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
        """The plan as text: its ``repr``, then a row for each run of pairs that share a factor."""
        base = self.base_factors or (1.0,) * len(self.factors)
        factors = [f / b for f, b in zip(self.factors, base, strict=True)]
        wavelengths = (2 * math.pi / self.pretrained.inv_freq.double()).tolist()
        rows = []
        for factor, run in itertools.groupby(range(len(factors)), key=lambda i: factors[i]):
            pairs = list(run)
            first, last = pairs[0], pairs[-1]
            rows.append(
                (
                    f"{first}-{last}" if last > first else str(first),
                    f"{factor:.6g}",
                    f"{wavelengths[first]:.4g}" + (f" - {wavelengths[last]:.4g}" if last > first else ""),
                    f"{math.fsum(self.disturbance_per_pair[i] for i in pairs) / len(pairs) * 1e3:.2f}",
                )
            )
        headers = ("pairs", "factor", "trained wavelength, tokens", "mean disturbance x 1e-3")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * 4)
        return f"{self!r}\n\n{table}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; :meth:`from_dict` gives an equal plan back."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rope_dist_version": __version__,
            "source": self.source,
            "strategy": self.strategy,
            "settings": dict(self.settings),
            "threshold": self.threshold,
            "theta": self.theta,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "original_length": self.original_length,
            "target_length": self.target_length,
            "interpolated_dims": self.interpolated_dims,
            "attention_scaling": self.attention_scaling,
            "intervals": self.intervals,
            "divergence": self.divergence,
            "dtype": self.dtype,
            "disturbance": self.disturbance,
            "disturbance_per_pair": list(self.disturbance_per_pair),
            "base_factors": None if self.base_factors is None else list(self.base_factors),
            "factors": list(self.factors),
            "inv_freq": self.inv_freq.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> RopePlan:
        """The plan that :meth:`to_dict` wrote; ``ValueError`` says what is wrong with anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'not a rope_dist plan: the key "format" is not "{FORMAT}"')
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"plan format version {data.get('version')!r} is not known to rope_dist {__version__} "
                f"(it reads version {FORMAT_VERSION})"
            )

        def get(key: str, *types: type) -> Any:
            if key not in data:
                raise ValueError(f'the plan has no "{key}"')
            value = data[key]
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f'"{key}" of the plan is of the wrong type: {value!r:.80}')
            return value

        def numbers(key: str) -> tuple[float, ...]:
            values = get(key, list)
            if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                raise ValueError(f'"{key}" of the plan must be a list of numbers')
            return tuple(float(v) for v in values)

        base = data.get("base_factors")
        plan = cls(
            strategy=get("strategy", str),
            settings=dict(get("settings", dict)),
            theta=float(get("theta", int, float)),
            head_dim=get("head_dim", int),
            rotary_dim=get("rotary_dim", int),
            original_length=get("original_length", int),
            target_length=get("target_length", int),
            factors=numbers("factors"),
            attention_scaling=float(get("attention_scaling", int, float)),
            disturbance_per_pair=numbers("disturbance_per_pair"),
            intervals=get("intervals", int),
            divergence=get("divergence", str),
            dtype=get("dtype", str),
            base_factors=None if base is None else numbers("base_factors"),
            source=get("source", str, type(None)),
        )
        written = torch.tensor(numbers("inv_freq"), dtype=torch.float64)
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
            raise ValueError(f"cannot read the plan {path}: {error}") from None
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def config_overrides(self, config: PretrainedConfig | None = None) -> dict[str, Any]:
        """Entries of a transformers 5 config with which stock Hugging Face computes this plan's frequencies.

        Where ``config``, the config to be changed, has rotary parameters per layer type, those of its full
        attention are replaced and the others stay; where it leaves the head dimension open, it is written.

        A ``longrope`` whose short and long factors are equal and whose attention factor is written
        out: no engine has to choose between them or to derive a scaling. ``rope_dist`` records where
        the factors came from.
        """
        parameters: dict[str, Any] = {
            "rope_type": "longrope",
            "rope_theta": self.theta,
            "factor": 1.0,
            "attention_factor": float(self.attention_scaling),
            "original_max_position_embeddings": self.target_length,
            "short_factor": list(self.factors),
            "long_factor": list(self.factors),
        }
        if self.rotary_dim != self.head_dim:
            share = self.rotary_dim / self.head_dim
            while int(self.head_dim * share) < self.rotary_dim:  # as readers truncate it, e.g. 30 of 44
                share = math.nextafter(share, 1.0)
            parameters["partial_rotary_factor"] = share
        if config is not None and _layer_typed(config.rope_parameters):
            parameters = {**config.rope_parameters, EXTENDED_LAYERS: parameters}
        # Stock's longrope multiplies a head_dim that is there but None (Mixtral).
        head_dim = {"head_dim": self.head_dim} if getattr(config, "head_dim", 0) is None else {}
        return {
            "max_position_embeddings": self.target_length,
            "rope_parameters": parameters,
            **head_dim,
            "rope_dist": {
                "version": __version__,
                "strategy": self.strategy,
                "settings": {k: v for k, v in self.settings.items() if k != "factors"},
                "original_length": self.original_length,
                "target_length": self.target_length,
                "disturbance": self.disturbance,
            },
        }


EXTENDED_LAYERS = "full_attention"
"""The layers whose frequencies a plan is for, where a model has a rotary embedding per layer type (Gemma3, OLMo3).
The others see a sliding window of positions, which does not grow with the text."""


def _layer_typed(parameters: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in parameters.values())


def rope_parameters(config: PretrainedConfig) -> Mapping[str, Any]:
    """The rotary parameters of a transformers 5 config that a plan extends: the only ones, or the full layers'."""
    parameters = config.rope_parameters
    return parameters[EXTENDED_LAYERS] if _layer_typed(parameters) else parameters


def pretrained_rope(config: PretrainedConfig) -> tuple[PretrainedRope, int]:
    """Read a model's rotary embedding from its ``transformers`` config.

    Any static ``rope_type`` counts as what the model was trained with: its factors and attention
    scaling become the starting point, computed by transformers' own functions.

    Returns:
        The embedding and the head dimension.

    Raises:
        ValueError: the config has no rotary embedding, several of which none is of full attention, or one
            that changes with the length at run time (``dynamic``).
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config.get_text_config(decoder=True)
    name = type(config).__name__
    parameters = getattr(config, "rope_parameters", None)
    length = getattr(config, "max_position_embeddings", None)
    if not parameters or length is None:
        raise ValueError(f"{name} has no rotary embedding (no rope_parameters or max_position_embeddings)")
    typed = _layer_typed(parameters)
    if typed and EXTENDED_LAYERS not in parameters:
        raise ValueError(
            f"{name} has a rotary embedding per layer type ({', '.join(parameters)}), none of them "
            f"{EXTENDED_LAYERS}; plan from plain numbers: theta, head_dim and original_length"
        )
    # transformers' functions take the type of layers where there are several.
    options = {"layer_type": EXTENDED_LAYERS} if typed else {}
    parameters = rope_parameters(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    check_rotary_dim(head_dim, "head_dim")
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    plain = PretrainedRope(theta, rotary_dim, length)
    if kind == "default":
        return plain, head_dim
    if kind == "longrope":
        original = parameters.get("original_max_position_embeddings", length)
        key = "long_factor" if length > original else "short_factor"
        factors = torch.tensor(parameters[key], dtype=torch.float64)
        _, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, **options)
    elif kind in ("linear", "llama3", "yarn"):
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, **options)
        factors = (plain.inv_freq.double() / inv_freq.double()).float().double()
        if kind == "yarn":
            # A YaRN config may keep the length before YaRN; what it can read is factor times that.
            original = parameters.get("original_max_position_embeddings", length)
            length = max(length, round(parameters["factor"] * original))
    else:
        raise ValueError(
            f"the rope_type {kind!r} of {name} has no fixed frequencies to extend; "
            "plan from plain numbers (theta, head_dim, original_length) or change the config to default"
        )
    return PretrainedRope(
        theta, rotary_dim, length, tuple(factors.tolist()), float(attention_scaling)
    ), head_dim


def check_same_model(plan: RopePlan, rope: PretrainedRope, head_dim: int) -> None:
    """``ValueError`` if ``plan`` was made for another rotary embedding than ``rope``, with what differs."""
    for what, planned, own in (
        ("head_dim", plan.head_dim, head_dim),
        ("rotary_dim", plan.rotary_dim, rope.rotary_dim),
        ("theta", plan.theta, rope.theta),
        ("the trained length", plan.original_length, rope.length),
    ):
        if planned != own:
            raise ValueError(f"the plan is for {what} {planned}, the model has {own}")
    if plan.base_factors != rope.factors:
        raise ValueError(
            "the plan and the model start from different frequencies (one of them is scaled already): make the plan "
            "from this model"
        )


def load_config(source: str | os.PathLike[str]) -> PretrainedConfig:
    """The ``transformers`` config of a directory, a ``config.json`` or a hub id; ``ValueError`` if there is none."""
    from transformers import AutoConfig

    name = str(source)
    if "/" not in name and not Path(name).exists():
        # A mistyped preset should not wait for the hub to say no.
        raise ValueError(
            f"unknown model {name!r}: give a preset ({', '.join(PRESETS)}), a directory with a config.json, "
            "or a hub id (owner/name)"
        )
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no config of a model at {name}, neither a directory nor on the hub: {reason}"
        ) from None


def _resolve(
    source: Any,
    theta: float | None,
    head_dim: int | None,
    rotary_dim: int | None,
    original_length: int | None,
) -> tuple[PretrainedRope, int, str | None]:
    """The embedding to extend, the head dimension and the source's name."""
    numbers = {
        "theta": theta,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "original_length": original_length,
    }
    if source is None:
        missing = [k for k in ("theta", "head_dim", "original_length") if numbers[k] is None]
        if missing:
            raise ValueError(
                f"give a model (a preset, a directory, a hub id or a config) or all of theta, head_dim and "
                f"original_length; missing: {', '.join(missing)}"
            )
        check_rotary_dim(head_dim, "head_dim")
        if rotary_dim is None:
            rotary_dim = head_dim
        rotary_dim = check_rotary_dim(rotary_dim, "rotary_dim")
        return (
            PretrainedRope(float(theta), rotary_dim, check_length(original_length, "original_length")),
            head_dim,
            None,
        )
    given = [k for k, v in numbers.items() if v is not None]
    if given:
        raise ValueError(f"{', '.join(given)} come from the model; give a model or plain numbers, not both")
    if isinstance(source, (str, os.PathLike)):
        if str(source) in PRESETS:
            rope = PRESETS[str(source)].rope
            return rope, rope.rotary_dim, str(source)
        return *pretrained_rope(load_config(source)), str(source)
    config = getattr(source, "config", source)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"cannot plan from a {type(source).__name__}: expected a preset, a path, a hub id, a transformers "
            "config or model"
        )
    return *pretrained_rope(config), getattr(config, "_name_or_path", None) or None


def check_options(strategy: str, settings: Mapping[str, Any], factor: float | None) -> None:
    """``ValueError`` for what is wrong with an extension whatever the model: its strategy, settings or factor."""
    known = [
        n for n in inspect.signature(get_strategy(strategy)).parameters if n not in ("rope", "target_length")
    ]
    for name in settings:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the strategy {strategy} has no setting {name!r}; {has}")
    if factor is not None and not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be a positive number, got {factor!r}")


def plan(
    source: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel | None = None,
    *,
    theta: float | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    original_length: int | None = None,
    target_length: int | None = None,
    factor: float | None = None,
    strategy: str = "dprope",
    intervals: int = DEFAULT_INTERVALS,
    divergence: Divergence = "pretrained-extended",
    dtype: torch.dtype | str = torch.float32,
    **settings: Any,
) -> RopePlan:
    """Plan an extension: a model's config, or plain numbers, to a :class:`RopePlan`.

    Args:
        source: a preset (``"llama2-7b"``), a directory with a ``config.json``, a hub id, or a
            ``transformers`` config or model. None to give the numbers instead.
        theta, head_dim, rotary_dim, original_length: the plain numbers (``rotary_dim`` by default
            ``head_dim``).
        target_length: tokens to read, at least the original length.
        factor: instead of ``target_length``, its multiple of the original length.
        strategy: a name of :data:`rope_dist.strategies.STRATEGIES`.
        intervals, divergence, dtype: how the disturbance is measured, see :mod:`rope_dist.distribution`.
        **settings: of the strategy, e.g. ``threshold=0`` for ``dprope`` or ``beta_fast=16`` for ``yarn``.

    Raises:
        ValueError: anything out of range or unknown, with what would be right.
        TypeError: ``source`` is of another kind.
    """
    check_options(strategy, settings, factor)
    rope, head_dim, name = _resolve(source, theta, head_dim, rotary_dim, original_length)
    if (target_length is None) == (factor is None):
        raise ValueError("give either target_length (tokens) or factor (times the original length)")
    if target_length is None:
        target_length = round(rope.length * factor)
    intervals = check_intervals(intervals)
    dtype = check_dtype(dtype)
    measure = {"intervals": intervals, "divergence": divergence, "dtype": dtype}
    function = get_strategy(strategy)
    # A strategy that looks at the disturbance looks at the one that is reported.
    measured = {n: v for n, v in measure.items() if n in inspect.signature(function).parameters}
    scaling = function(rope, target_length, **{**measured, **settings})
    per_pair = scaling.disturbance
    if per_pair is None:
        per_pair = disturbances(rope.inv_freq, rope.length, [scaling.factors], target_length, **measure)[0]
    return RopePlan(
        strategy=strategy,
        settings=scaling.settings,
        theta=rope.theta,
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        original_length=rope.length,
        target_length=int(target_length),
        factors=tuple((rope.base_factors * scaling.factors).float().tolist()),
        attention_scaling=rope.attention_scaling * scaling.attention_scaling,
        disturbance_per_pair=tuple(per_pair.tolist()),
        intervals=intervals,
        divergence=divergence,
        dtype=str(dtype).removeprefix("torch."),
        base_factors=rope.factors,
        source=name,
    )
