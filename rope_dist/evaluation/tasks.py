"""The tasks of lm-evaluation-harness with the variants of a model (needs the extra ``tasks``)."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..optional import require
from .memory import memory_errors_in_words
from .progress import announce, measure_pace
from .records import Record
from .variants import Variant


@dataclass(frozen=True)
class Task:
    """A task, group or tag by its name in lm-eval; ``shots`` None leaves the number of examples to it."""

    name: str
    shots: int | None = None


TASK_SETS: dict[str, tuple[Task, ...]] = {
    # The tag holds all 13; the group longbench_e leaves out summarisation and the synthetic tasks.
    "longbench-e": (Task("longbench_tasks_e"),),
    "ruler": (Task("ruler"),),
    "open-llm": (
        Task("truthfulqa_mc2", 0),
        Task("hellaswag", 0),
        Task("mmlu", 5),
        Task("arc_challenge", 25),
    ),
}
"""The benchmarks of Wu et al. 2024 by their names in lm-eval 0.4.13, with the paper's number of examples."""


def resolve_tasks(names: Sequence[str], shots: int | None = None) -> list[Task]:
    """Tasks from names of :data:`TASK_SETS`, lm-eval's own names, and either with ``@SHOTS``.

    Args:
        names: e.g. ``open-llm``, ``hellaswag``, ``arc_challenge@25``.
        shots: for the names that say nothing of it.

    Raises:
        ValueError: what follows ``@`` is no number of examples.
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


def measure_tasks(
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
    """Run every task with every variant; what ``record`` holds already is not run again.

    Args:
        model: of a supported family; each variant is applied to it while it works.
        tokenizer: the model's.
        tasks: from :func:`resolve_tasks`.
        variants: from :func:`rope_dist.evaluation.variants.make_variants`.
        record: where finished tasks are and go.
        include_path: a folder with task files of one's own (YAML, with data in JSONL beside them).
        limit: only so many examples a task.
        batch_size: examples at once, or ``"auto"``.
        max_length: tokens after which lm-eval cuts a prompt from the left; by default what each variant's
            config says, which is less for the stock model than for its extensions.
        ruler_lengths: lengths that RULER's prompts are made for (lm-eval's default is 4096).
        chat_template: put prompts into the tokenizer's chat template.

    Yields:
        The variant, the measurement as in the record, and whether it was taken from there.

    Raises:
        ValueError: an unknown task, or one whose data cannot be had here; says what to do.
        MissingPackageError: lm-eval is not installed.
    """
    lm_eval = require("lm_eval", "tasks", "running tasks")
    manager_module = require("lm_eval.tasks", "tasks", "running tasks")
    hf = require("lm_eval.models.huggingface", "tasks", "running tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # notes on settings that are meant as they are
    with tempfile.TemporaryDirectory(prefix="rope-dist-tokenizer-") as folder:
        # RULER makes its prompts with a tokenizer that it loads by name.
        tokenizer.save_pretrained(folder)
        metadata: dict[str, Any] = {"tokenizer": folder}
        if ruler_lengths:
            metadata["max_seq_lengths"] = list(ruler_lengths)
        manager = manager_module.TaskManager(include_path=include_path, metadata=metadata)
        for task in tasks:
            if task.name not in manager.all_tasks:
                raise ValueError(_unknown(task.name, manager.all_tasks, include_path))
        for task in tasks:
            for variant in variants:
                what = {
                    "task": task.name,
                    "shots": task.shots,
                    "limit": limit,
                    "max_length": max_length,
                    "ruler_lengths": list(ruler_lengths) if ruler_lengths else None,
                    "chat_template": chat_template,
                    "variant": variant.label,
                    "frequencies": variant.fingerprint,
                }
                result = record.get(what)
                finished = result is not None
                if result is None:
                    began = time.perf_counter()
                    with memory_errors_in_words(f"running {task.name}"), variant.applied(model):
                        lm = hf.HFLM(
                            pretrained=model,
                            tokenizer=tokenizer,
                            batch_size=batch_size,
                            max_length=max_length,
                        )
                        _announce_requests(lm, model)
                        try:
                            out = lm_eval.simple_evaluate(
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
                    result = {**_scores(out, task.name), "seconds": round(time.perf_counter() - began, 1)}
                    record.put(what, result, variant)
                yield variant, {"what": what, "result": result}, finished


def _announce_requests(lm: Any, model: PreTrainedModel) -> None:
    """Let lm-eval's model say how long its prompts take to read before it begins. Generated tokens come on top."""
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
        f"the data of the task {name} cannot be had here ({reason}): run it once where the Hugging Face hub can "
        "be reached and take that machine's HF_HOME with you, or give tasks of your own with --include-path"
    )


def _scores(out: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """The numbers of lm-eval's answer: metrics of every task and group, and how many examples.

    lm-eval has no mean for a tag, and of RULER only that at 4096 tokens: where several tasks were run, the
    plain mean of every metric that all of them have is added.
    """
    scores = {}
    for name, values in {**out["results"], **out.get("groups", {})}.items():
        scores[name] = {
            metric.removesuffix(",none"): value
            for metric, value in values.items()
            # RULER marks a length that was not asked with -1.
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


def tasks_table(measurements: Sequence[Mapping[str, Any]]) -> str:
    """A row a task and metric, a column a variant."""
    labels = list(dict.fromkeys(m["what"]["variant"] for m in measurements))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for m in measurements:
        shots = m["what"]["shots"]
        for name, metrics in m["result"]["scores"].items():
            for metric, value in metrics.items():
                row = cells.setdefault((name, "" if shots is None else str(shots), metric), {})
                row[m["what"]["variant"]] = f"{value:.4f}"
    rows = [[*key, *(row.get(label, "") for label in labels)] for key, row in cells.items()]
    align = ("left", "right", "left", *("right",) * len(labels))
    return tabulate(
        rows, ["task", "examples shown", "metric", *labels], disable_numparse=True, colalign=align
    )
