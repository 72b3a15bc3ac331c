"""Passkey retrieval: prompts, the grader with models whose answers are known, and the command."""

import json
import re

import pytest
import torch
from conftest import llama_config
from helpers.model_families import model_of
from helpers.planted_llama import PlantedLlama
from transformers import LlamaForCausalLM

import rope_dist
from rope_dist.cli import main
from rope_dist.evaluation import (
    Record,
    Variant,
    describe,
    make_cases,
    make_variants,
    measure_passkey,
    passkey_tables,
)
from rope_dist.evaluation import passkey as passkey_module
from rope_dist.evaluation.models import cache_option
from rope_dist.evaluation.passkey import answered_key, passkey_prompt
from rope_dist.evaluation.prefix_cache import PrefixCachingModel
from rope_dist.evaluation.tables import Score, grids, scores, total

LENGTHS = (900, 1500)


class AskedForAKey(PlantedLlama):
    def answer(self, text, key):
        """The next letter of `` KEY.`` after the question, given what of it is there."""
        expected, given = f" {key}.", text.rpartition("pass key is")[2]
        return expected[len(given)] if expected.startswith(given) and given != expected else "x"


class Perfect(AskedForAKey):
    def next_letter(self, text):
        found = re.search(r"pass key is (\d+)\. Remember it", text)
        return self.answer(text, found[1]) if found else "x"


class Blind(AskedForAKey):
    """Sees nothing and always says the same number."""

    def next_letter(self, text):
        return self.answer(text, "50000")


class NearSighted(AskedForAKey):
    """Sees the last 700 letters."""

    def next_letter(self, text):
        found = re.search(r"pass key is (\d+)\. Remember it", text[-700:])
        return self.answer(text, found[1] if found else "50000")


@pytest.fixture
def measure(letters, tmp_path):
    def run(kind, cases, scorings=("generate", "decoys"), path="passkey.json", names=("stock",)):
        torch.manual_seed(0)
        model = kind(llama_config(num_hidden_layers=1)).eval()
        record = Record(tmp_path / path, "passkey", describe(model, "planted"))
        variants = make_variants(model, names, 128)
        return measure_passkey(model, letters, cases, variants, record, scorings=scorings, chunk=200)

    return run


def by_scoring(measurements, scoring):
    chosen = [m for _, m, _ in measurements if m["what"]["scoring"] == scoring]
    return {cell: score.accuracy for cell, score in scores(chosen).items()}


class TestGrader:
    def test_a_perfect_model_is_always_right(self, measure):
        found = list(measure(Perfect, make_cases(LENGTHS, trials=2)))
        assert len(found) == 2 * 5 * 2 * 2
        for scoring in ("generate", "decoys"):
            cells = by_scoring(found, scoring)
            assert set(cells) == {(n, d) for n in LENGTHS for d in (0.0, 0.25, 0.5, 0.75, 1.0)}
            assert set(cells.values()) == {1.0}

    def test_a_blind_model_is_right_by_chance(self, measure):
        found = list(measure(Blind, make_cases([600], trials=12)))
        generated = by_scoring(found, "generate").values()
        assert set(generated) == {0.0}
        guessed = by_scoring(found, "decoys").values()
        assert sum(guessed) / len(guessed) < 0.25  # one of ten by chance; 60 cases

    def test_a_near_sighted_model_shows_where_it_fails(self, measure):
        found = list(measure(NearSighted, make_cases(LENGTHS)))
        cells = by_scoring(found, "generate")
        for length in LENGTHS:
            assert cells[length, 1.0] == 1
            assert cells[length, 0.0] == 0
        assert cells[900, 0.75] == 1
        assert cells[1500, 0.25] == 0

    @pytest.mark.parametrize(
        ("answer", "key"),
        [
            (" 12345. Remember", "12345"),
            ("\n12345", "12345"),
            (" 123456", "123456"),
            (" 1234", "1234"),
            (" not known", None),
            ("", None),
            (" 54321 or 12345", "54321"),
        ],
    )
    def test_the_first_number_counts(self, answer, key):
        assert answered_key(answer) == key

    def test_an_equal_decoy_is_not_a_right_answer(self, measure):
        """A model without any opinion must not pass by the order of the candidates."""

        class Indifferent(PlantedLlama):
            def next_letter(self, text):
                return "x"

        found = list(measure(Indifferent, make_cases([600], [0.5], trials=4), ["decoys"]))
        assert not any(m["result"]["correct"] for _, m, _ in found)


class TestPrompts:
    @pytest.mark.parametrize("length", [450, 900, 901, 2000])
    @pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
    def test_fill_the_length_with_the_key_at_its_depth(self, letters, length, depth):
        (case,) = make_cases([length], [depth])
        prompt = passkey_prompt(letters, case)
        filler = passkey_module.FILLER
        assert length - len(filler) - 2 <= len(letters(prompt).input_ids) <= length
        assert prompt.count(case.key) == 2
        assert prompt.endswith("What is the pass key? The pass key is")
        before = prompt[: prompt.index(case.key)].count(filler)
        assert before == round(depth * prompt.count(filler))

    def test_keys_follow_the_seed_and_the_case_alone(self):
        few, many = make_cases([500]), make_cases([400, 500], [0, 0.25, 0.5, 0.75, 1, 0.1], trials=3)
        assert set(few) <= set(many)
        assert few != make_cases([500], seed=1)
        assert len({c.key for c in many}) > 30
        for case in make_cases([500], trials=20, digits=2, decoys=20):
            assert len({case.key, *case.decoys}) == 21
            assert all(re.fullmatch(r"[1-9]\d", n) for n in (case.key, *case.decoys))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"depths": [1.1]}, "from 0 to 1"),
            ({"trials": 0}, "trials must be at least 1"),
            ({"digits": 0}, "digits must be at least 1"),
            ({"digits": 30}, "digits must be at most 18"),
            ({"digits": 1, "decoys": 9}, "only 9 numbers"),
            ({"lengths": []}, "at least one length"),
        ],
    )
    def test_refuses_bad_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_cases(**{"lengths": [500], **options})

    def test_a_length_that_holds_no_prompt_is_refused(self, letters):
        (case,) = make_cases([100], [0.5])
        with pytest.raises(ValueError, match=r"needs at least 2\d\d tokens, got the length 100"):
            passkey_prompt(letters, case)


def test_a_dynamic_plan_reads_a_prompt_by_the_stage_for_its_length(letters, tmp_path):
    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=2, max_position_embeddings=1000, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    plan = rope_dist.dynamic_plan(model, factor=2, strategy="pi")
    variants = [Variant("dynamic", plan), *(Variant(str(n), plan.at(n)) for n in LENGTHS)]
    record = Record(tmp_path / "passkey.json", "passkey", describe(model, "random"))
    cases = make_cases(LENGTHS, (0.2, 0.9))
    found = {}
    for variant, m, _ in measure_passkey(model, letters, cases, variants, record, scorings=["decoys"]):
        result = m["result"]["key_log_probability"], m["result"]["best_decoy"]
        found[variant.label, m["what"]["length"], m["what"]["depth"]] = result
    for case in cases:
        of = case.length, case.depth
        assert found["dynamic", *of] == pytest.approx(found[str(case.length), *of], abs=2e-3)
    other = found[str(LENGTHS[0]), LENGTHS[1], 0.2]  # trained frequencies, past their length
    assert found["dynamic", LENGTHS[1], 0.2] != pytest.approx(other, abs=2e-3)


class TestPrefixCachingModel:
    """A shared cache changes nothing: every answer equals one of the model alone, on the whole prompt."""

    PROMPTS = ("abc" * 60, "abc" * 40 + "x" * 70, "abc" * 40 + "x" * 20, "q", "abc" * 60)

    @pytest.fixture(params=["Llama", "Llama, eager", "Llama, windowed", "Qwen3", "Mistral", "Gemma3"])
    def model(self, request):
        """Mistral's layers, and some of Gemma3's, see a sliding window of 16 tokens."""
        architecture, _, how = request.param.partition(", ")
        model = model_of(architecture, vocab_size=128)
        if how == "eager":
            model.set_attn_implementation("eager")
        elif how:
            rope_dist.enable(model, factor=4, window=8, dynamic=False)
        return model

    @pytest.mark.parametrize("chunk", [50, 1000])
    def test_generates_what_the_model_generates(self, model, letters, chunk):
        reader = PrefixCachingModel(model, letters, chunk=chunk)
        for prompt in self.PROMPTS:
            ids = letters(prompt, return_tensors="pt").input_ids
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            expected = letters.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
            assert reader.generate(prompt, 8) == expected

    @pytest.mark.parametrize("chunk", [50, 1000])
    def test_log_probabilities_are_the_models(self, model, letters, chunk):
        reader = PrefixCachingModel(model, letters, chunk=chunk)
        for prompt in self.PROMPTS:
            candidates = ["12345", "99999", "7"]
            found = reader.log_probabilities(prompt, candidates)
            for candidate, value in zip(candidates, found, strict=True):
                ids = letters(f"{prompt} {candidate}", return_tensors="pt").input_ids
                with torch.no_grad():
                    log_p = model(ids).logits[0].double().log_softmax(-1)
                begin = len(prompt)
                expected = sum(log_p[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1]))
                assert value == pytest.approx(expected, abs=1e-4)

    def test_a_prompt_that_shares_little_is_read_in_one_pass(self, letters):
        """Behind a few cached tokens it would need a mask, with which attention takes twice the time."""
        passes = []

        class Counted(LlamaForCausalLM):
            def forward(self, input_ids, cache=None, past_key_values=None, **options):
                cache = cache if cache is not None else past_key_values
                passes.append((cache.get_seq_length(), input_ids.shape[1]))
                return super().forward(input_ids, **cache_option(super(), cache), **options)

        reader = PrefixCachingModel(Counted(llama_config(vocab_size=128)).eval(), letters, chunk=1000)
        for prompt in ("abc" * 60, "abc" * 40 + "x" * 70, "abc" * 20 + "y" * 70):
            reader.generate(prompt, 1)
        assert passes == [(0, 179), (179, 1), (120, 69), (189, 1), (0, 129), (129, 1)]


class TestRuns:
    def test_a_stopped_run_goes_on(self, measure, monkeypatch):
        cases = make_cases([600], [0.0, 1.0])
        unbroken = [m for _, m, _ in measure(Perfect, cases, path="whole.json", names=("stock", "pi"))]
        run = measure(Perfect, cases, names=("stock", "pi"))
        for _ in range(3):
            next(run)
        run.close()
        resumed = list(measure(Perfect, cases, names=("stock", "pi")))
        assert [finished for *_, finished in resumed] == [True] * 3 + [False] * 5
        assert [m["what"] for _, m, _ in resumed] == [m["what"] for m in unbroken]
        monkeypatch.setattr(passkey_module, "_answer", lambda *a: pytest.fail("evaluated again"))
        assert all(finished for *_, finished in measure(Perfect, cases, names=("stock", "pi")))

    def test_other_keys_are_other_measurements(self, measure):
        list(measure(Perfect, make_cases([600], [0.5])))
        for cases in (make_cases([600], [0.5], seed=1), make_cases([600], [0.5], digits=4)):
            assert not any(finished for *_, finished in measure(Perfect, cases))

    def test_grids_and_tables(self, measure):
        found = [m for _, m, _ in measure(NearSighted, make_cases(LENGTHS, [0, 1]))]
        assert set(grids(found)) == {"stock, generate", "stock, decoys"}
        assert set(grids([m for m in found if m["what"]["scoring"] == "decoys"])) == {"stock"}
        table = passkey_tables(found, trained_length=1000)
        assert re.search(r"stock, generate +900 +1500\*", table)
        assert re.search(r"depth 0 +0/1 +0/1\n", table)
        assert re.search(r"depth 1 +1/1 +1/1\n", table)
        assert re.search(r"all depths +1/2 +1/2\n", table)

    def test_twenty_prompts_have_an_interval(self):
        cells = {"variant": "stock", "scoring": "generate", "length": 500}
        found = [{"what": {**cells, "depth": d / 4}, "result": {"correct": d > 0}} for d in range(5)] * 4
        # 16 of 20: from 58.4 to 91.9 % (Wilson).
        assert re.search(r"all depths +80% \(58-92\)", passkey_tables(found, 1000))

    def test_a_few_prompts_are_counted_and_many_are_a_share(self):
        assert [str(Score(2, n)) for n in (3, 19)] == ["2/3", "2/19"]
        assert [str(Score(right, n)) for right, n in ((5, 20), (67, 100))] == ["25%", "67%"]
        assert total([Score(1, 3), Score(3, 3)]) == Score(4, 6)
        assert total([Score(1, 3), Score(3, 3)]).accuracy == pytest.approx(2 / 3)


class TestCommand:
    @pytest.fixture
    def command(self, model_directory, tmp_path, capsys):
        def run(*arguments):
            common = ["--model", model_directory, "-o", tmp_path / "out", "--strategies", "stock", "yarn"]
            code = main([str(a) for a in ("eval", "passkey", *common, *arguments)])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return run

    def test_tables_record_and_heat_map(self, command, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        options = ("--lengths", "400", "500", "--depths", "0", "1", "--trials", "2")
        options += ("--scoring", "generate", "decoys")
        code, out, _ = command(*options)
        assert code == 0
        assert "yarn, decoys" in out
        assert (tmp_path / "out" / "passkey.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((tmp_path / "out" / "passkey.json").read_text())
        assert len(record["measurements"]) == 2 * 2 * 2 * 2 * 2
        code, out, _ = command(*options)
        assert out.count("(on record)") == 32

    def test_a_length_has_twenty_prompts_by_default(self, command, monkeypatch):
        asked = []
        monkeypatch.setattr("rope_dist.evaluation.make_cases", lambda *a, **k: asked.append((a, k)) or 1 / 0)
        for depths, trials in ((), 4), (("--depths", "0", "0.5", "1"), 7), (("--quick",), 1):
            with pytest.raises(ZeroDivisionError):
                command("--no-plot", *depths)
            assert asked[-1][1]["trials"] == trials

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--lengths", "50"), "a passkey prompt needs at least"),
            (("--depths", "2"), "from 0 to 1"),
            (("--trials", "0"), "--trials: must be at least 1"),
            (("--strategies", "magic"), "unknown strategy"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, command, arguments, message):
        code, _, error = command("--no-plot", *arguments)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
