"""lm-evaluation-harness with an extended model: the model name ``rope-dist`` (needs the extra ``tasks``).

    python -m rope_dist.evaluation.harness run --model rope-dist \\
        --model_args pretrained=DIR,strategy=yarn,factor=2 --tasks hellaswag

is ``lm-eval`` with that name registered; everything else is as its own documentation says.
"""

from __future__ import annotations

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..defaults import DEFAULT_STRATEGY
from ..hf import enable
from ..planning import RopePlan
from .models import PACKAGED_MODELS, load_model


@register_model("rope-dist")
class ExtendedLM(HFLM):
    """lm-eval's Hugging Face model, extended by this package.

    Args:
        pretrained: a directory, a hub id, a name of :data:`rope_dist.evaluation.PACKAGED_MODELS`, or a model.
        strategy: as in :func:`rope_dist.enable`.
        factor, target_length: how far; with none of them and no ``plan`` the model keeps its frequencies.
        plan: the path of a plan instead.
        threshold, interpolated_dims: of ``dprope``.
        **options: of lm-eval's ``hf`` model: ``tokenizer``, ``dtype``, ``max_length``, ``device``, ...
            ``max_length`` is by default the length that the model is extended to.
    """

    def __init__(
        self,
        pretrained: Any,
        strategy: str = DEFAULT_STRATEGY,
        factor: float | None = None,
        target_length: int | None = None,
        plan: str | None = None,
        threshold: float | str | None = None,
        interpolated_dims: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str) and pretrained in PACKAGED_MODELS:
            pretrained, options["tokenizer"] = load_model(pretrained, options.get("device") or "cpu")
        super().__init__(pretrained=pretrained, **options)
        given = {
            "factor": factor,
            "target_length": target_length,
            "plan": RopePlan.load(plan) if plan else None,
            "threshold": threshold,
            "interpolated_dims": interpolated_dims,
        }
        given = {name: value for name, value in given.items() if value is not None}
        enable(self.model, strategy=strategy, **given)


if __name__ == "__main__":
    cli_evaluate()
