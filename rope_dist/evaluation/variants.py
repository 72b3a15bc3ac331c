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

from ..defaults import GROUPED
from ..dynamic import DynamicPlan, load_plan
from ..hf import Window, enable
from ..planning import RopePlan
from ..variant_names import split_variant

STOCK = "stock"
"""Label of the unchanged model, run by stock transformers."""


@dataclass(frozen=True)
class Variant:
    """A label, its plan (None: the stock model) and the window within which distances are the trained model's."""

    label: str
    plan: RopePlan | DynamicPlan | None
    window: Window | None = None

    def applied(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """Context manager: the plan is applied to ``model`` inside it and removed after it."""
        if self.plan is None:
            return nullcontext()
        return enable(model, plan=self.plan, **(self.window.arguments if self.window else {}))

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
        if self.window is not None:
            computed = [self.window.arguments, computed]
            # The size of the groups, of which a plan says nothing.
            plan, window = self.plan, self.window
            if window.grouped and isinstance(plan, DynamicPlan):
                computed.append([window.group_size(length, plan.original_length) for length in plan.lengths])
            elif window.grouped:
                computed.append(window.far_length(plan.target_length, plan.original_length))
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
            ``+dynamic``, ``auto+dynamic:fast_periods=32``, for a plan that grows with the text, then
            ``+window=1024`` for one that is for distances beyond a window; ``grouped`` or ``jet-long`` with a window,
            for far positions in groups; or the path of a plan, ending in ``.json``.
            Duplicates are ignored.
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
            parts = split_variant(name)
            if parts.strategy == STOCK:
                raise ValueError(
                    f"{name!r}: the stock model has no plan, so nothing can be added to its name"
                )
            options = {"target_length": target_length, "dynamic": parts.dynamic}
            if parts.window:
                options |= {"window": parts.window, "far_scaling": parts.scaling}
            options |= {"far": parts.strategy} if parts.strategy in GROUPED else {"strategy": parts.strategy}
            options |= _settings(name, parts.settings)
            label = name
        with enable(model, **options) as enabled:
            made = Variant(label, enabled.plan, enabled.window)
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
