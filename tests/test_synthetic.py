"""Synthetic tasks: prompts that have their answers, the grader with a model that solves them, and the command."""

import json
import math
import re
from collections import Counter

import pytest
import torch
from conftest import llama_config
from helpers.planted_llama import PlantedLlama
from transformers import LlamaForCausalLM

import rope_dist
from rope_dist.cli import main
from rope_dist.evaluation import (
    SYNTHETIC_TASKS,
    Record,
    Variant,
    describe,
    make_synthetic_cases,
    make_variants,
    measure_synthetic,
    synthetic,
    synthetic_prompts,
    synthetic_tables,
)
from rope_dist.evaluation.synthetic import first_word

LENGTH = 1700
TEXT = "".join(
    f"Sentence {i} says nothing of interest, it is here to be read over.{' ' if i % 3 else chr(10)}"
    for i in range(90)
)


def solve(prompt):
    """The answer to a prompt, worked out from its text alone."""
    text, question = prompt.rsplit("\n\n", 1)
    if asked := re.search(r"The (.*) is$", question):
        return re.search(rf"The {asked[1]} is (\d+)\.", text)[1]
    given = set(re.findall(r"\w+", question.rsplit("? ", 1)[1]))
    if "access codes" in question:
        place = re.search(r"codes of the (\w+)\?", question)[1]
        items = re.findall(rf"One of the access codes of the {place} is (\d+)\.", text)
    elif "variables" in question:
        values = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(source, source)
        items = [name for name, value in values.items() if value in question]
    else:
        items = [word for word, _ in Counter(text.split("\n\n")[1].split()).most_common(5)]
    assert len(items) == 5
    (left,) = set(items) - given
    return left


def prompts_of(letters, trials=6, tasks=tuple(SYNTHETIC_TASKS), lengths=(LENGTH,), **options):
    cases = make_synthetic_cases(lengths, tasks, trials=trials, **options)
    return synthetic_prompts(letters, cases, "the text", TEXT)


class TestPrompts:
    def test_the_text_has_the_answer(self, letters):
        for prompt in prompts_of(letters, trials=10):
            assert solve(prompt.text) == prompt.answer
            assert len({prompt.answer, *prompt.decoys}) == 10

    def test_decoys_are_in_the_text_but_where_there_is_one_key(self, letters):
        for prompt in prompts_of(letters):
            inside = [decoy in prompt.text for decoy in prompt.decoys]
            assert not any(inside) if prompt.case.task == "single-key" else all(inside)

    @pytest.mark.parametrize("length", [1500, 1999])
    def test_they_fill_the_length(self, letters, length):
        for prompt in prompts_of(letters, lengths=[length]):
            assert length - 120 < len(letters(prompt.text).input_ids) <= length

    def test_needles_are_spread_over_the_text(self, letters):
        for prompt in prompts_of(letters, trials=1, tasks=["multi-key"]):
            body = prompt.text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
            places = [m.start() / len(body) for m in re.finditer("The access code", body)]
            assert len(places) == 10
            for tenth, place in enumerate(places):
                assert tenth / 10 - 0.06 < place < (tenth + 1) / 10 + 0.06

    def test_a_case_depends_on_the_seed_and_itself_alone(self, letters):
        few = prompts_of(letters, 3, ["variables"])
        many = prompts_of(letters, 6, lengths=(1600, LENGTH))
        assert set(few) < set(many)
        assert len({p.text for p in many}) == len(many) == 2 * 5 * 6
        assert not set(few) & set(prompts_of(letters, 3, ["variables"], seed=1))

    def test_questions_share_a_context(self, letters):
        for task in SYNTHETIC_TASKS:
            n = 10 if task in ("single-key", "multi-key") else 5
            prompts = prompts_of(letters, n + 2, [task])
            contexts = [p.text.rsplit("\n\n", 1)[0] for p in prompts]
            assert len(set(contexts[:n])) == 1
            assert len(set(contexts)) == 2
            assert len({p.text for p in prompts}) == n + 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lengths": []}, "at least one length and one task"),
            ({"tasks": ["needle"]}, "unknown task 'needle'; known: single-key, multi-key"),
            ({"trials": 0}, "trials must be at least 1"),
            ({"lengths": [100]}, r"a prompt of single-key needs at least \d+ tokens, got the length 100"),
            ({"lengths": [9000]}, "the text has too few tokens for a prompt of 9000"),
        ],
    )
    def test_refuses_bad_settings(self, letters, options, message):
        with pytest.raises(ValueError, match=message):
            prompts_of(letters, **options)


class Solver(PlantedLlama):
    def next_letter(self, text):
        prompt, _, given = text.rpartition(" is" if " is" in text.rpartition("? ")[2] else " and")
        prompt = text[: len(text) - len(given)]
        if "?" not in prompt.rpartition("\n\n")[2]:
            return "x"
        expected = f" {self.say(prompt)}."
        return expected[len(given)] if expected.startswith(given) and given != expected else "x"

    def say(self, prompt):
        return solve(prompt)


def last_word(prompt):
    return re.findall(r"\w+", prompt.rsplit("\n\n", 1)[0])[-1]


class Mistaken(Solver):
    """Always answers with the last number or name of the text."""

    def say(self, prompt):
        return last_word(prompt)


@pytest.fixture
def measure(letters, tmp_path):
    def run(kind, prompts, names=("stock",), path="synthetic.json"):
        torch.manual_seed(0)
        model = kind(llama_config(num_hidden_layers=1)).eval()
        record = Record(tmp_path / path, "synthetic", describe(model, "planted"))
        return measure_synthetic(model, letters, prompts, make_variants(model, names, 128), record, chunk=300)

    return run


class TestGrader:
    def test_a_model_that_solves_the_tasks_is_always_right(self, measure, letters):
        found = list(measure(Solver, prompts_of(letters)))
        assert len(found) == 5 * 6
        for _, m, _ in found:
            assert m["result"]["generated"], m
            assert m["result"]["decoys"], m
            assert m["result"]["log_probability"] > m["result"]["best_decoy"] + 5

    def test_a_mistaken_model_is_wrong(self, measure, letters):
        prompts = prompts_of(letters, 5, ["single-key", "multi-value"])
        prompts = [prompt for prompt in prompts if prompt.answer != last_word(prompt.text)]
        assert len(prompts) >= 8
        found = list(measure(Mistaken, prompts))
        assert not any(m["result"]["generated"] or m["result"]["decoys"] for _, m, _ in found)

    def test_the_log_probability_is_the_models(self, measure, letters):
        (prompt,) = prompts_of(letters, 1, ["multi-key"])
        ((_, m, _),) = measure(Solver, [prompt])
        # Logits are 10 for the right letter and 0 for the others: the space, and five digits.
        assert m["result"]["log_probability"] == pytest.approx(-6 * math.log1p(127 * math.exp(-10)), abs=1e-4)

    @pytest.mark.parametrize(
        ("continuation", "word"),
        [
            (" 12345. It", "12345"),
            ("\n12345", "12345"),
            (" 123456", "123456"),
            (" the 12345", "the"),
            (".", None),
        ],
    )
    def test_the_first_word_counts(self, continuation, word):
        assert first_word(continuation) == word


class TestRuns:
    def test_a_stopped_run_goes_on_and_measures_nothing_twice(self, measure, letters, monkeypatch):
        prompts = prompts_of(letters, 2, ["multi-key"])
        unbroken = [m for _, m, _ in measure(Solver, prompts, ("stock", "pi"), "whole.json")]
        run = measure(Solver, prompts, ("stock", "pi"))
        next(run)
        run.close()
        resumed = list(measure(Solver, prompts, ("stock", "pi")))
        assert [finished for *_, finished in resumed] == [True, False, False, False]
        assert [m["what"] for _, m, _ in resumed] == [m["what"] for m in unbroken]
        monkeypatch.setattr(synthetic, "_answer", lambda *a: pytest.fail("evaluated again"))
        assert all(finished for *_, finished in measure(Solver, prompts, ("stock", "pi")))
        monkeypatch.undo()
        assert not any(f for *_, f in measure(Solver, prompts_of(letters, 2, ["multi-key"], seed=1)))

    def test_the_context_is_read_once(self, measure, letters):
        read = []

        class Counting(Solver):
            def forward(self, input_ids, cache=None, past_key_values=None, **options):
                read.append(input_ids.shape[1])
                return super().forward(input_ids, cache, past_key_values, **options)

        list(measure(Counting, prompts_of(letters, 5, ["multi-key"])))
        assert sum(n for n in read if n > 100) < LENGTH

    def test_a_dynamic_plan_reads_a_prompt_by_the_stage_for_its_length(self, letters, tmp_path):
        torch.manual_seed(0)
        config = llama_config(num_hidden_layers=2, max_position_embeddings=1000, initializer_range=0.2)
        model = LlamaForCausalLM(config).eval()
        plan, lengths = rope_dist.dynamic_plan(model, factor=2, strategy="pi"), (800, 1500)
        variants = [Variant("dynamic", plan), *(Variant(str(n), plan.at(n)) for n in lengths)]
        record = Record(tmp_path / "s.json", "synthetic", describe(model, "random"))
        prompts = prompts_of(letters, 1, ["multi-key"], lengths)
        found = {
            (v.label, m["what"]["length"]): m["result"]["log_probability"]
            for v, m, _ in measure_synthetic(model, letters, prompts, variants, record)
        }
        for length in lengths:
            assert found["dynamic", length] == pytest.approx(found[str(length), length], abs=2e-3)
        assert found["dynamic", 1500] != pytest.approx(found["800", 1500], abs=2e-3)

    def test_tables(self):
        def measurement(variant, task, trial, right, log_p):
            what = {"variant": variant, "task": task, "trial": trial, "length": 200, "digest": "0"}
            return {"what": what, "result": {"generated": right, "decoys": True, "log_probability": log_p}}

        found = [measurement("stock", "multi-key", i, i < 16, -1.0 - i) for i in range(20)]
        found += [
            measurement("pi", "multi-key", i, False, -1.0 - i + (0.5 if i % 2 else 0.1)) for i in range(20)
        ]
        table = synthetic_tables(found, 100)
        # 16 of 20 and 20 of 20 by Wilson; differences of 0.1 and 0.5: 0.2 * sqrt(20 / 19) / sqrt(20) is their error.
        assert re.search(r"200\* tokens", table)
        assert re.search(r"multi-key +stock +80% \(58-92\) +100% \(84-100\) +-10.50 *\n", table)
        assert re.search(r"multi-key +pi +0% \(0-16\) +100% \(84-100\) +-10.20 +\+0.30 ± 0.05", table)
        assert "all tasks" not in table
        assert "+0.30" not in synthetic_tables(found, 100, "pi")
        found += [measurement("stock", "variables", 0, True, -2.0)]
        table = synthetic_tables(found, 100)
        assert re.search(r"all tasks +stock +81% ", table)
        assert not re.search(r"all tasks +pi", table)  # it has not answered one of them
        table = synthetic_tables(found, 100, "pi")
        assert re.search(r"multi-key +stock .*-0.30 ± 0.05", table)
        assert re.search(r"all tasks +stock .* -\d+\.\d+ *\n", table)  # and is not compared with
        with pytest.raises(ValueError, match="'yarn' is not one of stock, pi"):
            synthetic_tables(found, 100, "yarn")
        assert "against" not in synthetic_tables(found[:20], 100)


class TestCommand:
    @pytest.fixture
    def command(self, model_directory, tmp_path, capsys):
        capsys.readouterr()
        (tmp_path / "t.txt").write_text(TEXT)

        def run(*arguments):
            common = ["--model", model_directory, "-o", tmp_path / "out", "--text", tmp_path / "t.txt"]
            common += ["--strategies", "stock", "pi", "--lengths", "900"]
            code = main([str(a) for a in ("eval", "synthetic", *common, *arguments)])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return run

    def test_table_and_record(self, command, tmp_path):
        options = ("--tasks", "multi-key", "variables", "--trials", "2", "--against", "pi")
        code, out, _ = command(*options)
        assert code == 0
        assert "log p against pi" in out
        record = json.loads((tmp_path / "out" / "synthetic.json").read_text())
        assert len(record["measurements"]) == 2 * 2 * 2
        code, out, _ = command(*options)
        assert out.count("(on record)") == 8

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--lengths", "50"), "a prompt of single-key needs at least"),
            (("--trials", "0"), "--trials: must be at least 1"),
            (("--text", "NOWHERE"), "unknown text 'NOWHERE'"),
            (("--against", "yarn", "--tasks", "multi-key"), "'yarn' is not one of stock, pi"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, command, arguments, message):
        code, _, error = command(*arguments)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
