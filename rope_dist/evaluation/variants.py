"""Variants of a model to evaluate: stock frequencies, a strategy with its settings, or a plan from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..defaults import DYNAMIC
from ..dynamic import DynamicPlan, load_plan
from ..hf import enable
from ..planning import RopePlan

STOCK = "stock"
"""Label of the unchanged model, run by stock transformers."""


@dataclass(frozen=True)
class Variant:
    """A label and its plan (None: the stock model)."""

    label: str
    plan: RopePlan | DynamicPlan | None

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Context manager: the plan is applied to ``model`` inside it and removed after it."""
        return enable(model, plan=self.plan) if self.plan else nullcontext()

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the frequencies; ``stock`` for the stock model."""
        if self.plan is None:
            return STOCK
        computed: list[Any]
        if isinstance(self.plan, DynamicPlan):
            computed = [[length, *_computed(self.plan.at(length))] for length in self.plan.lengths]
        else:
            computed = _computed(self.plan)
        return hashlib.sha256(json.dumps(computed).encode()).hexdigest()[:12]

    @property
    def identity(self) -> dict[str, str]:
        """Its part of the key of a measurement (:class:`rope_dist.evaluation.Record`)."""
        return {"variant": self.label, "frequencies": self.fingerprint}


def _computed(plan: RopePlan) -> list[float]:
    return [plan.theta, plan.rotary_dim, plan.attention_scaling, *plan.factors]


def make_variants(model: PreTrainedModel, names: Iterable[str], target_length: int) -> list[Variant]:
    """Plan every variant for a model, so that errors show before anything is evaluated.

    Args:
        model: of a supported family; unchanged on return.
        names: ``stock``; a name of :data:`rope_dist.strategies.STRATEGIES`; the same with settings,
            ``dprope:threshold=0`` (comma-separated, values are JSON or plain strings); a name followed by
            ``+dynamic``, ``auto+dynamic:fast_periods=32``, for a plan that grows with the text; or the path of a
            plan, ending in ``.json``. Duplicates are ignored.
        target_length: tokens that strategies are planned for.

    Raises:
        ValueError: an unknown strategy or setting, a bad plan, a model of another family, a target below
            its trained length.
    """
    variants = {}
    for name in names:
        if name == STOCK:
            variants[name] = Variant(STOCK, None)
            continue
        if name.endswith(".json"):
            options: dict[str, Any] = {"plan": _load_plan(name)}
            label = Path(name).stem
        else:
            strategy, _, settings = name.partition(":")
            dynamic = strategy.endswith(DYNAMIC)
            options = {
                "target_length": target_length,
                "strategy": strategy.removesuffix(DYNAMIC),
                "dynamic": dynamic,
            }
            options |= _settings(name, settings)
            label = name
        with enable(model, **options) as enabled:
            made = Variant(label, enabled.plan)
        if variants.setdefault(label, made) != made:
            raise ValueError(f"two plans are called {label}: rename one of the files")
    return list(variants.values())


def _load_plan(path: str) -> RopePlan | DynamicPlan:
    if not Path(path).is_file():
        raise ValueError(f"there is no plan {path}: write one with rope-dist plan -o {path}")
    return load_plan(path)


def _settings(name: str, text: str) -> dict[str, Any]:
    settings = {}
    for setting in filter(None, text.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"{setting!r} in {name!r} is not KEY=VALUE, e.g. dprope:threshold=0")
        try:
            settings[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            settings[key.replace("-", "_")] = value
    return settings
