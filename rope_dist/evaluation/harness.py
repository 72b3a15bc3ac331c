"""lm-evaluation-harness with an extended model: the model name ``rope-dist`` (needs the extra ``tasks``).

    python -m rope_dist.evaluation.harness run --model rope-dist \\
        --model_args pretrained=DIR,strategy=yarn,factor=2 --tasks hellaswag

is ``lm-eval`` with that model name registered; see its documentation for all other options.
"""

from __future__ import annotations

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..defaults import DEFAULT_STRATEGY, DYNAMIC
from ..dynamic import load_plan
from ..hf import enable
from .models import load_model, packaged_model


@register_model("rope-dist")
class ExtendedLM(HFLM):
    """lm-eval's Hugging Face model with an extended context.

    Args:
        pretrained: a directory, a hub id, a name of :data:`rope_dist.evaluation.PACKAGED_MODELS`, or a model.
        strategy: as in :func:`rope_dist.enable`; followed by ``+dynamic`` its plan grows with the text.
        factor, target_length: one of them; with neither and no ``plan`` the model keeps its frequencies.
        plan: path of a plan, instead of a strategy.
        threshold, interpolated_dims: settings of ``dprope``.
        **options: of lm-eval's ``hf`` model: ``tokenizer``, ``dtype``, ``max_length``, ``device``, ...
            ``max_length`` defaults to the extended length.
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
        if isinstance(pretrained, str) and packaged_model(pretrained) is not None:
            pretrained, options["tokenizer"] = load_model(pretrained, options.get("device") or "cpu")
        super().__init__(pretrained=pretrained, **options)
        given: dict[str, Any] = {
            "factor": factor,
            "target_length": target_length,
            "plan": load_plan(plan) if plan else None,
            "threshold": threshold,
            "interpolated_dims": interpolated_dims,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if given and not plan:
            given["dynamic"] = strategy.endswith(DYNAMIC)
        enable(self.model, strategy=strategy.removesuffix(DYNAMIC), **given)


if __name__ == "__main__":
    cli_evaluate()
