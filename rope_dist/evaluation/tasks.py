"""Tasks of lm-evaluation-harness for several variants of a model (needs the extra ``tasks``)."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..optional import require
from .progress import announce, measure_pace
from .records import Record
from .variants import Variant


@dataclass(frozen=True)
class Task:
    """A task, group or tag of lm-eval; ``shots`` None: the number of few-shot examples is the task's own."""

    name: str
    shots: int | None = None


TASK_SETS: dict[str, tuple[Task, ...]] = {
    # The tag has all 13 tasks; the group longbench_e lacks summarisation and the synthetic tasks.
    "longbench-e": (Task("longbench_tasks_e"),),
    "ruler": (Task("ruler"),),
    "open-llm": (
        Task("truthfulqa_mc2", 0),
        Task("hellaswag", 0),
        Task("mmlu", 5),
        Task("arc_challenge", 25),
    ),
}
"""The benchmarks of Wu et al. 2024, as named in lm-eval 0.4.13, with the paper's number of few-shot examples."""


def resolve_tasks(names: Sequence[str], shots: int | None = None) -> list[Task]:
    """Resolve names of :data:`TASK_SETS` and of lm-eval, each optionally with ``@SHOTS``.

    Args:
        names: e.g. ``open-llm``, ``hellaswag``, ``arc_challenge@25``.
        shots: few-shot examples of names without ``@SHOTS``.

    Raises:
        ValueError: ``@`` is not followed by a number.
    """
    tasks: list[Task] = []
    for name in names:
        base, at, number = name.partition("@")
        if at and not number.isdigit():
            raise ValueError(f"{name!r}: a number of examples must follow @, e.g. arc_challenge@25")
        given = int(number) if at else shots
        for task in TASK_SETS.get(base, (Task(base),)):
            tasks.append(task if given is None else Task(task.name, given))
    return list(dict.fromkeys(tasks))


def measure_tasks(  # noqa: PLR0913  (public)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    variants: Sequence[Variant],
    record: Record,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int | str = 1,
    max_length: int | None = None,
    ruler_lengths: Sequence[int] | None = None,
    chat_template: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Run every task with every variant, except for results that are in ``record``.

    Args:
        model: of a supported family; every variant is applied to it in turn.
        tokenizer: the model's.
        tasks: from :func:`resolve_tasks`.
        variants: from :func:`rope_dist.evaluation.variants.make_variants`.
        record: results of earlier runs; new ones are added.
        include_path: folder with further task files (YAML, with JSONL data).
        limit: number of examples a task; None: all.
        batch_size: examples a batch, or ``"auto"``.
        max_length: longer prompts are truncated on the left. None: the length in the config, which is shorter for
            the stock model than for its extensions.
        ruler_lengths: prompt lengths of RULER, tokens (lm-eval's default is 4096).
        chat_template: apply the tokenizer's chat template.

    Yields:
        Variant, measurement and whether it was in the record already. Results are saved before they are yielded.

    Raises:
        ValueError: an unknown task, or its data cannot be loaded; the message says what to do.
        MissingPackageError: lm-eval is not installed.
    """
    lm_eval = require("lm_eval", "tasks", "running tasks")
    manager_module = require("lm_eval.tasks", "tasks", "running tasks")
    hf = require("lm_eval.models.huggingface", "tasks", "running tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warnings about settings chosen on purpose
    with tempfile.TemporaryDirectory(prefix="rope-dist-tokenizer-") as folder:
        # RULER loads the tokenizer for its prompts by name.
        tokenizer.save_pretrained(folder)
        metadata: dict[str, Any] = {"tokenizer": folder}
        if ruler_lengths:
            metadata["max_seq_lengths"] = list(ruler_lengths)
        manager = manager_module.TaskManager(include_path=include_path, metadata=metadata)
        for task in tasks:
            if task.name not in manager.all_tasks:
                raise ValueError(_unknown(task.name, manager.all_tasks, include_path))

        def scores(task: Task) -> dict[str, Any]:
            lm = hf.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
            _announce_requests(lm, model)
            try:
                results = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=[task.name],
                    num_fewshot=task.shots,
                    limit=limit,
                    task_manager=manager,
                    metadata=metadata,
                    apply_chat_template=chat_template,
                    log_samples=False,
                    bootstrap_iters=0,
                )
            except (OSError, _data_errors()) as error:
                raise ValueError(_no_data(task.name, error)) from error
            return _scores(results, task.name)

        for task in tasks:
            what = {
                "task": task.name,
                "shots": task.shots,
                "limit": limit,
                "max_length": max_length,
                "ruler_lengths": list(ruler_lengths) if ruler_lengths else None,
                "chat_template": chat_template,
            }
            for variant in variants:
                yield record.measure(what, variant, model, partial(scores, task), f"running {task.name}")


def _announce_requests(lm: Any, model: PreTrainedModel) -> None:
    """Make lm-eval's model print an estimate of its prefill time. Generated tokens are not included."""
    pace = measure_pace(model)
    score, generate = lm._loglikelihood_tokens, lm.generate_until

    def seconds(tokens: int) -> float:
        return pace.seconds(min(tokens, lm.max_length))

    def announced_score(
        requests: Sequence[tuple[Any, list[int], list[int]]], *options: Any, **more: Any
    ) -> Any:
        announce(sum(seconds(len(context) + len(continuation)) for _, context, continuation in requests))
        return score(requests, *options, **more)

    def announced_generate(requests: Sequence[Any], *options: Any, **more: Any) -> Any:
        announce(sum(seconds(len(lm.tok_encode(request.args[0]))) for request in requests))
        return generate(requests, *options, **more)

    lm._loglikelihood_tokens, lm.generate_until = announced_score, announced_generate


def _data_errors() -> type[Exception]:
    return require("datasets.exceptions", "tasks", "running tasks").DatasetsError


def _unknown(name: str, known: Sequence[str], include_path: str | None) -> str:
    close = [k for k in known if name.lower() in k.lower()][:8]
    hint = f"; close: {', '.join(close)}" if close else ""
    where = f" or in {include_path}" if include_path else "; --include-path adds a folder of your own"
    return f"no task, group or tag {name!r} in lm-eval{where}{hint}; sets: {', '.join(TASK_SETS)}"


def _no_data(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot load the data of the task {name} ({reason}): run it once with access to the Hugging Face hub and copy "
        "that machine's HF_HOME, or give tasks of your own with --include-path"
    )


def _scores(out: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """Metrics and number of examples of every task and group in the results of lm-eval.

    lm-eval has no mean for a tag, and for RULER only that at 4096 tokens: for several tasks, the unweighted mean of
    every metric that they share is added.
    """
    scores = {}
    for name, values in {**out["results"], **out.get("groups", {})}.items():
        scores[name] = {
            metric.removesuffix(",none"): value
            for metric, value in values.items()
            # RULER reports -1 for lengths that were not requested.
            if isinstance(value, (int, float)) and not metric.startswith("sample_len") and value != -1
            if "_stderr" not in metric
        }
    examples = {name: counts["effective"] for name, counts in out["n-samples"].items()}
    if len(examples) > 1:
        parts = [scores[name] for name in examples]
        shared = [metric for metric in parts[0] if all(metric in part for part in parts)]
        if shared:
            scores[f"{asked}, mean of {len(parts)} tasks"] = {
                metric: sum(part[metric] for part in parts) / len(parts) for metric in shared
            }
    return {"scores": scores, "examples": examples, "versions": dict(out["versions"])}
