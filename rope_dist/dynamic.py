"""Dynamic plans: the trained model up to its length, and beyond it a plan for as long as the text has become.

A :class:`DynamicPlan` is a ladder of static plans. :func:`rope_dist.enable` reads every text by the shortest that
covers it, and corrects cached keys where a growing text goes from one to the next.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .checking import check_same_model
from .files import write_text
from .layer_types import rope_parameters, unextendable
from .messages import one_line
from .model_config import GIVEN
from .model_names import known_name
from .planning import RopePlan, load_config, plan, pretrained_rope
from .presets import PRESETS
from .strategies import DEFAULT_STRATEGY, PretrainedRope, check_length, check_number
from .trained_length import recorded_extension
from .version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "rope_dist.dynamic_plan"
FORMAT_VERSION = 1

TRAINED = "extrapolation"
"""Strategy of the first stage: it changes nothing."""

STAGE_RATIO = 2 ** (1 / 3)
"""Neighbouring stages of a ladder differ at most by this factor: three stages a doubling.

Measured on texts that grow to twice the trained length (docs/quality.md): one stage a doubling reads worse, two as well
within the error, six slightly better. Each stage costs one correction of the cached keys, and 16-bit keys one rounding.
"""


@dataclass(frozen=True, repr=False)
class DynamicPlan:
    """A dynamic plan: extensions for rising lengths, of which each text is read by the first that covers it.

    Attributes:
        stages: at least two plans for rising lengths. The first is the trained model itself, up to its length; the
            others extend it by one strategy. The last is for the target length, and for anything longer.
    """

    stages: tuple[RopePlan, ...]

    def __post_init__(self) -> None:
        stages = tuple(self.stages)
        object.__setattr__(self, "stages", stages)
        for stage in stages:
            if not isinstance(stage, RopePlan):
                raise TypeError(f"stages must be RopePlans, got {type(stage).__name__}")
        if len(stages) < 2:
            raise ValueError(f"a dynamic plan has at least two stages, got {len(stages)}")
        first = stages[0]
        same = first.target_length == first.original_length and not first.interpolated_dims
        if first.strategy != TRAINED or not same:
            raise ValueError("the first stage must be the trained model: its own frequencies and length")
        for before, after in itertools.pairwise(stages):
            if after.target_length <= before.target_length:
                raise ValueError(
                    f"the lengths of the stages must rise, got {before.target_length} before {after.target_length}"
                )
            if _model_of(after) != _model_of(first):
                raise ValueError("all stages must extend one model")
            if after.strategy != stages[1].strategy:
                raise ValueError(
                    f"all stages must extend by one strategy, got {stages[1].strategy} and {after.strategy}"
                )

    @property
    def strategy(self) -> str:
        """Of every stage but the first."""
        return self.stages[1].strategy

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that the last stage ran with."""
        return self.stages[-1].settings

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each stage is for."""
        return tuple(stage.target_length for stage in self.stages)

    @property
    def original_length(self) -> int:
        """Tokens that the model was trained to read."""
        return self.stages[0].target_length

    @property
    def target_length(self) -> int:
        """Tokens to be read."""
        return self.stages[-1].target_length

    @property
    def scale(self) -> float:
        """``target_length / original_length``."""
        return self.stages[-1].scale

    @property
    def pretrained(self) -> PretrainedRope:
        """The embedding that is extended."""
        return self.stages[0].pretrained

    @property
    def source(self) -> str | None:
        """Preset, path or hub id that the plan was made from, or None."""
        return self.stages[-1].source

    def stage(self, length: int) -> int:
        """Index of the stage that reads a text of ``length`` tokens, a positive whole number (else ``ValueError``)."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"the length of a text must be a positive whole number of tokens, got {length!r}"
            )
        return next((i for i, most in enumerate(self.lengths) if length <= most), len(self.stages) - 1)

    def at(self, length: int) -> RopePlan:
        """The static plan that reads a text of ``length`` tokens."""
        return self.stages[self.stage(length)]

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        return f"DynamicPlan({self.strategy}, {self.scale:g}x, theta={self.pretrained.theta:g}, stages: {lengths})"

    def summary(self) -> str:
        """The plan as text: its ``repr``, notes and a row a stage."""
        rows = [
            (
                f"{before + 1} - {stage.target_length}",
                stage.strategy if i else "as trained",
                f"{stage.scale:g}",
                str(stage.interpolated_dims),
                f"{stage.attention_scaling:.6g}",
                f"{stage.disturbance * 1e3:.2f}",
            )
            for i, (before, stage) in enumerate(zip((0, *self.lengths), self.stages, strict=False))
        ]
        headers = ("tokens", "frequencies", "scale", "dimensions", "attention scaling", "disturbance x 1e-3")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("right", "left", *["right"] * 4))
        last = self.stages[-1]
        notes = [f"note: {note}" for note in last.notes]
        if last.original_length_from is not None:
            notes.insert(0, f"trained length: {self.original_length} tokens ({last.original_length_from})")
        return "\n\n".join([repr(self), *(["\n".join(notes)] if notes else []), table])

    def with_source(self, source: str | None) -> DynamicPlan:
        """The plan with another name of what it was made from."""
        return DynamicPlan(tuple(stage.with_source(source) for stage in self.stages))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; :meth:`from_dict` gives an equal plan back."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rope_dist_version": __version__,
            "lengths": list(self.lengths),
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, data: Any) -> DynamicPlan:
        """The plan that :meth:`to_dict` wrote; ``ValueError`` says what is wrong with anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f'not a dynamic plan of rope_dist: the key "format" is not "{FORMAT}"')
        if data.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"version {data.get('version')!r} of the format of dynamic plans is not known to rope_dist "
                f"{__version__} (it reads version {FORMAT_VERSION})"
            )
        stages = data.get("stages")
        if not isinstance(stages, list):
            raise ValueError('"stages" of the plan must be a list of plans')
        made = cls(tuple(RopePlan.from_dict(stage) for stage in stages))
        if data.get("lengths") != list(made.lengths):
            raise ValueError('the plan contradicts itself: its "lengths" are not those of its stages')
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; a file already there is replaced only once the new one is whole."""
        write_text(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DynamicPlan:
        """Read a plan; ``ValueError`` names the file and what is wrong with it."""
        loaded = load_plan(path)
        if not isinstance(loaded, cls):
            raise ValueError(f"{path} is a static plan: read it with RopePlan.load")
        return loaded

    def config_overrides(self, config: PretrainedConfig | None = None) -> dict[str, Any]:
        """Entries of a transformers 5 config with which stock Hugging Face computes the last stage's frequencies.

        Stock reads every text by them. ``rope_dist`` records the stages, and what the entries were before, so that
        :func:`dynamic_plan` and :func:`rope_dist.enable` find the trained model again.

        Raises:
            ValueError: stock cannot compute the plan from ``config``.
        """
        config = config if config is None else trained_config(config)
        return self.recorded(self.stages[-1].config_overrides(config), config)

    def recorded(self, entries: Mapping[str, Any], trained: PretrainedConfig | None = None) -> dict[str, Any]:
        """``entries`` of a config with the record of the stages, and of what the ``trained`` one had in their place."""
        record = {**entries["rope_dist"], "stages": list(self.lengths)}
        if trained is not None:
            own = trained.get_text_config(decoder=True).__dict__
            record["trained"] = {key: copy.deepcopy(own[key]) for key in entries if key in own}
            record["added"] = [key for key in entries if key not in own]
        return {**entries, "rope_dist": record}


def _model_of(stage: RopePlan) -> tuple[Any, ...]:
    return (stage.theta, stage.head_dim, stage.rotary_dim, stage.original_length, stage.base_factors)


def check_trained(plan: DynamicPlan, config: PretrainedConfig) -> None:
    """``ValueError`` unless ``plan`` starts from the trained model of ``config`` (:func:`trained_config`)."""
    first = plan.stages[0]
    given = first.original_length if first.original_length_from == GIVEN else None
    rope, head_dim = pretrained_rope(trained_config(config), original_length=given)
    check_same_model(first, rope, head_dim)
    if not math.isclose(first.attention_scaling, rope.attention_scaling, rel_tol=1e-6):
        raise ValueError(
            f"the plan is for an attention scaling of {first.attention_scaling:.6g}, the model has "
            f"{rope.attention_scaling:.6g}"
        )


def load_plan(path: str | os.PathLike[str]) -> RopePlan | DynamicPlan:
    """Read a static or a dynamic plan; ``ValueError`` names the file and what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the plan {path}: {one_line(error)}") from None
    try:
        data = json.loads(text)
        if isinstance(data, Mapping) and data.get("format") == FORMAT:
            return DynamicPlan.from_dict(data)
        return RopePlan.from_dict(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a whole JSON file: {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def ladder(original_length: int, target_length: int, ratio: float = STAGE_RATIO) -> tuple[int, ...]:
    """Lengths of the stages past ``original_length``: evenly spaced by factors of at most ``ratio``.

    Raises:
        ValueError: a target that is not past the original length, or a ratio of 1 or less.
    """
    original_length = check_length(original_length, "the original length")
    target_length = check_length(target_length, "the target length")
    if target_length <= original_length:
        raise ValueError(
            f"a dynamic plan needs a target length past the original length {original_length}, got {target_length}"
        )
    ratio = check_number(ratio, "the ratio of stages")
    if not ratio > 1:
        raise ValueError(f"the ratio of stages must be above 1, got {ratio:g}")
    scale = target_length / original_length
    steps = max(1, math.ceil(math.log(scale) / math.log(ratio) - 1e-9))
    lengths = {round(original_length * scale ** (i / steps)) for i in range(1, steps)} | {target_length}
    return tuple(sorted(lengths - {original_length}))


def trained_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config before a dynamic plan extended the model, where it records that; else ``config`` itself."""
    text = config.get_text_config(decoder=True)
    record = text.__dict__.get("rope_dist")
    before, added = (
        (record.get("trained"), record.get("added")) if isinstance(record, Mapping) else (None, None)
    )
    if not isinstance(before, Mapping) or not isinstance(added, list) or recorded_extension(text) is None:
        return config
    trained = copy.deepcopy(config)
    own = trained.get_text_config(decoder=True).__dict__
    for key in added:
        own.pop(key, None)
    own.update(copy.deepcopy(dict(before)))
    return trained


def dynamic_plan(
    source: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel | None = None,
    *,
    target_length: int | None = None,
    factor: float | None = None,
    strategy: str = DEFAULT_STRATEGY,
    stages: Sequence[int] | None = None,
    **options: Any,
) -> DynamicPlan:
    """Make a :class:`DynamicPlan`, an extension that grows with the text.

    Args:
        source, target_length, factor, strategy, **options: as in :func:`rope_dist.plan`. A model that a dynamic plan
            has extended is planned for anew from its trained frequencies.
        stages: lengths past the original one, rising; the last is the target, which then need not be given. None:
            :func:`ladder`.

    Raises:
        ValueError: as :func:`rope_dist.plan`, and a target or stages that do not rise past the original length.
        TypeError: ``source`` is of another kind.
    """
    lengths = None if stages is None else _lengths(stages)
    if lengths is not None and target_length is None and factor is None:
        target_length = lengths[-1]
    source = _trained_source(source)
    common = {"strategy": strategy, **options}
    # Beside a target it is the strategy's setting of that name.
    setting = None if target_length is None else factor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = plan(source, target_length=target_length, factor=factor, **common)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    original = last.original_length
    if lengths is None:
        lengths = ladder(original, last.target_length)
    elif lengths[0] <= original:
        raise ValueError(f"stages must be past the original length {original}, got {lengths[0]}")
    elif lengths[-1] != last.target_length:
        raise ValueError(
            f"the last stage must be for the target length {last.target_length}, got {lengths[-1]}"
        )
    own = {key: value for key, value in options.items() if key in _OF_EVERY_STRATEGY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said above
        first = plan(source, target_length=original, strategy=TRAINED, **own)
        between = [plan(source, target_length=length, factor=setting, **common) for length in lengths[:-1]]
    return DynamicPlan((first, *between, last))


_OF_EVERY_STRATEGY = set(inspect.signature(plan).parameters) - {
    "source",
    "strategy",
    "settings",
    "more_settings",
}


def _lengths(stages: Sequence[int]) -> tuple[int, ...]:
    if isinstance(stages, (str, bytes)) or not isinstance(stages, Sequence) or not stages:
        raise ValueError(f"stages must be a list of lengths in tokens, got {stages!r:.80}")
    lengths = tuple(check_length(length, "the length of a stage") for length in stages)
    if any(a >= b for a, b in itertools.pairwise(lengths)):
        raise ValueError(f"the lengths of the stages must rise, got {', '.join(map(str, lengths))}")
    return lengths


def _trained_source(source: Any) -> Any:
    """What :func:`plan` makes the stages from.

    Raises:
        ValueError: the model has frequencies for long texts of its own.
    """
    if isinstance(source, (str, os.PathLike)):
        name = known_name(source, PRESETS)
        if name is not None:
            return name
        source = load_config(source)
    config = getattr(source, "config", source)
    if not hasattr(config, "get_text_config"):
        return source  # plan() says what it takes
    config = trained_config(config)
    text = config.get_text_config(decoder=True)
    if unextendable(text) is None:
        parameters = rope_parameters(text)
        factors = [list(parameters.get(key) or ()) for key in ("short_factor", "long_factor")]
        if factors[0] != factors[1]:
            raise ValueError(
                f"{type(text).__name__} has frequencies of its own for long texts (short_factor and long_factor "
                "differ): give it a static plan (dynamic=False), which replaces both"
            )
    return config
