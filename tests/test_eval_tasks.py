"""lm-evaluation-harness with variants of a model, on local tasks; its own command with our model name."""

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import rope_dist
from rope_dist.cli import main
from rope_dist.evaluation import load_model, resolve_tasks
from rope_dist.evaluation.tasks import TASK_SETS, Task

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install 'rope-dist[tasks]'",
)

QUESTIONS = [
    {"question": f"{'ab' * n} and then", "choices": ["abc", "xyz", "123"], "answer": n % 3}
    for n in range(30, 50, 2)
]


@pytest.fixture
def tasks_folder(tmp_path):
    """A multiple-choice task of one's own: YAML, with its data as JSONL beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "riddles.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "riddles.yaml").write_text(
        "task: riddles\n"
        "tag: puzzles\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_choice: choices\n"
        "doc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    (folder / "backwards.yaml").write_text(
        "include: riddles.yaml\ntask: backwards\ndoc_to_target: '{{2 - answer}}'\n"
    )
    return folder


def expected_accuracy(model, tokenizer):
    """How often the right choice is the likeliest, from the model's own logits."""
    right = 0
    for q in QUESTIONS:
        scores = []
        for choice in q["choices"]:
            ids = tokenizer(f"{q['question']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                log_p = model(ids).logits[0].log_softmax(-1)
            begin = len(q["question"])
            scores.append(sum(log_p[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1])))
        right += scores.index(max(scores)) == q["answer"]
    return right / len(QUESTIONS)


@pytest.fixture
def command(model_directory, tasks_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def run(*arguments):
        common = ["--model", model_directory, "-o", tmp_path / "out", "--include-path", tasks_folder]
        code = main([str(a) for a in ("eval", "tasks", *common, *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def local_only(monkeypatch):
    """lm-eval's own thousands of task files are not read: seconds a command."""
    import lm_eval.tasks

    local = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", local)


@needs_lm_eval
class TestLocalTasks:
    @pytest.mark.usefixtures("local_only")
    def test_scores_are_those_of_the_extended_model(self, command, model_directory, tmp_path):
        options = ("--tasks", "riddles", "--strategies", "stock", "pi", "--factor", "4")
        code, out, error = command(*options)
        assert code == 0
        assert error.count("evaluation takes about 1 s on this machine") == 2
        record = json.loads((tmp_path / "out" / "tasks.json").read_text())
        found = {m["what"]["variant"]: m["result"] for m in record["measurements"]}
        model, tokenizer = load_model(str(model_directory))
        assert found["stock"]["scores"]["riddles"]["acc"] == expected_accuracy(model, tokenizer)
        rope_dist.enable(model, factor=4, strategy="pi")
        assert found["pi"]["scores"]["riddles"]["acc"] == expected_accuracy(model, tokenizer)
        assert found["pi"]["examples"] == {"riddles": len(QUESTIONS)}
        assert "riddles" in out
        code, out, _ = command(*options)
        assert out.count("(on record)") == 2

    @pytest.mark.usefixtures("local_only")
    def test_the_tasks_of_a_tag_have_a_mean(self, command, tmp_path):
        code, out, error = command("--tasks", "puzzles", "--strategies", "stock")
        assert code == 0, error
        (m,) = json.loads((tmp_path / "out" / "tasks.json").read_text())["measurements"]
        scores = m["result"]["scores"]
        both = scores["riddles"]["acc"] + scores["backwards"]["acc"]
        assert scores["puzzles, mean of 2 tasks"] == {"acc": both / 2}
        assert "puzzles, mean of 2 tasks" in out

    @pytest.mark.usefixtures("local_only")
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--tasks", "riddle"), "no task, group or tag 'riddle'"),
            (("--tasks", "riddles@many"), "a number of examples must follow @"),
            (("--tasks", "riddles", "--include-path", "nowhere"), "is not a folder"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, command, arguments, message):
        code, _, error = command(*arguments)
        assert code == 2
        (line,) = [line for line in error.splitlines() if line.startswith("rope-dist: error:")]
        assert message in line

    def test_data_that_cannot_be_had_is_said_in_one_line(self, command):
        code, _, error = command("--tasks", "hellaswag")
        assert code == 2
        (line,) = [line for line in error.splitlines() if line.startswith("rope-dist: error:")]
        assert "cannot load the data of the task hellaswag" in line

    def test_lm_evals_own_command_knows_the_model_name(self, model_directory, tasks_folder, tmp_path):
        arguments = ["run", "--model", "rope-dist", "--include_path", str(tasks_folder), "--tasks", "riddles"]
        arguments += ["--model_args", f"pretrained={model_directory},strategy=pi,factor=4"]
        arguments += ["--device", "cpu", "--output_path", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "rope_dist.evaluation.harness", *arguments],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (written,) = Path(tmp_path / "out").rglob("results_*.json")
        model, tokenizer = load_model(str(model_directory))
        rope_dist.enable(model, factor=4, strategy="pi")
        results = json.loads(written.read_text())["results"]
        assert results["riddles"]["acc,none"] == expected_accuracy(model, tokenizer)

    def test_the_papers_benchmarks_are_there_by_these_names(self):
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        for tasks in TASK_SETS.values():
            for task in tasks:
                assert task.name in manager.all_tasks
        in_tag = [n for n, e in manager.task_index.items() if "longbench_tasks_e" in (e.tags or ())]
        assert len(in_tag) == 13


def test_sets_and_numbers_of_examples():
    assert resolve_tasks(["open-llm", "x@3", "y"], None) == [
        Task("truthfulqa_mc2", 0),
        Task("hellaswag", 0),
        Task("mmlu", 5),
        Task("arc_challenge", 25),
        Task("x", 3),
        Task("y"),
    ]
    assert resolve_tasks(["y", "x@3", "y"], 2) == [Task("y", 2), Task("x", 3)]


def test_without_lm_eval_its_extra_is_named(model_directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "tasks", "--model", str(model_directory), "--tasks", "ruler"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'rope-dist[tasks]'" in error
    assert error.count("\n") == 1
