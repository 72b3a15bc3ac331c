"""The study of strategies: it goes on where it stopped, reads nothing twice, and its tables pair what was read."""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import llama_config
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report, results
from benchmarks.quality import answers, parts, readings, small_llama, study, summary
from rope_dist.evaluation import CORPORA, Record, Variant, describe, token_nll
from rope_dist.evaluation.paired import paired_difference, percent
from rope_dist.strategies import STRATEGIES


@pytest.fixture
def run(model_directory, tmp_path, monkeypatch, capsys):
    """The study on a small model that was trained to 64 tokens: two passages of a text."""
    monkeypatch.setattr(parts, "SMALL_TOKENS", 512)
    monkeypatch.setattr(study, "PARTS", (parts.Part("2x", 2, ("stock", "auto", "yarn")),))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def main(*arguments):
        command = ["study", "--model", str(model_directory), "--output", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        study.main()
        return capsys.readouterr()

    return main


def test_a_study_that_ran_out_of_time_goes_on(run, tmp_path):
    assert "1 measurements on record, the same command goes on" in run("--seconds", "1e-9").out
    captured = run("--losses", str(tmp_path / "losses"))
    assert "3 measurements on record, all there are" in captured.out
    assert "left out: the corpus moby-dick is not installed: npm install" in captured.out + captured.err
    assert run().out.count(": on record") == 3
    path = tmp_path / "results" / "quality_perplexity_small.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["model"]["name"] == "small_llama"
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    for m in record["measurements"]:
        assert m["what"]["passages"] == 2
        assert len(m["result"]["nll_by_position"]) == 2 * 128 // 64
    # The losses that were kept are those of the record.
    kept = {file.stem.split("-")[-1]: torch.load(file) for file in (tmp_path / "losses").rglob("*.pt")}
    assert len(kept) == 2
    for m in record["measurements"][1:]:
        own = kept[m["what"]["frequencies"]]
        assert own.shape == (2, 127)
        assert m["result"]["nll"] == pytest.approx(own.double().mean().item())
        assert m["result"]["nll_by_position"][3] == pytest.approx(own[1, 63:].mean().item(), abs=1e-4)
    assert all("seconds" in m["result"] for m in record["measurements"])
    # A reading that is made of kept losses takes no time, and says none.
    path.unlink()
    assert run("--losses", str(tmp_path / "losses")).out.count(": from kept losses") == 2
    again = json.loads(path.read_text(encoding="utf-8"))
    for m, before in zip(again["measurements"][1:], record["measurements"][1:], strict=True):
        assert m["result"] == {key: value for key, value in before["result"].items() if key != "seconds"}
    block, machine = summary.strategies(tmp_path / "results")
    assert "### A small LLaMA, trained to 64 tokens" in block
    assert "2 passages of 128 tokens of the Python language reference" in block
    assert "Errors are over parts of 64 positions." in block
    assert "torch" in machine


def test_a_model_that_does_not_exist_is_one_line(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--model", "nowhere")
    assert capsys.readouterr().err.count("\n") == 1


class TestParts:
    def test_what_a_stopped_study_should_have_comes_first(self):
        assert [part.name for part in parts.PARTS] == [
            "2x",
            "1.5x",
            "4x",
            "4x-rest",
            "window-2x",
            "window-4x",
        ]
        assert [part.scale for part in parts.PARTS] == [2, 1.5, 4, 4, 2, 4]
        first, second, third, last, *_ = (part.labels(8192) for part in parts.PARTS)
        assert first == second == third + last == parts.STRATEGIES
        assert {"stock", "auto", "auto-yarn", "yarn", "ntk", "yarn, auto's temperature"} <= set(third)

    def test_windows_are_of_the_trained_length(self):
        """A window of 1024 tokens would be all that a model that was trained to 256 reads at 4x."""
        model = LlamaForCausalLM(llama_config())
        for part in parts.PARTS[-2:]:
            labels = part.labels(64)
            assert labels[0] == parts.BASELINE
            for label in labels[1:]:
                variant = parts.planner(model)(label, int(64 * part.scale))
                assert variant.window.size in (8, 16)
                assert variant.window.size == int(label.partition("=")[2].partition("+")[0])
                assert variant.fingerprint != parts.planner(model)("auto", int(64 * part.scale)).fingerprint

    def test_every_strategy_is_read(self):
        """But those that need factors of their own or have another's."""
        read = {label.removesuffix(parts.OF_AUTO).partition(":")[0] for label in parts.STRATEGIES}
        assert read - {"stock"} == set(STRATEGIES) - {"extrapolation", "dynamic-ntk", "longrope"}
        assert len(set(parts.STRATEGIES)) == len(parts.STRATEGIES)

    def test_texts_exist_and_nothing_was_tuned_on_them(self):
        from benchmarks.quality import tuning

        assert len(parts.TEXTS) == 4
        assert set(parts.TEXTS) <= set(CORPORA) - {tuning.TEXT}

    def test_a_small_model_reads_many_passages(self, tmp_path):
        (tmp_path / small_llama.MODEL).mkdir()
        (tmp_path / small_llama.MODEL / "config.json").write_text('{"max_position_embeddings": 256}')
        model = parts.study_model(str(tmp_path))
        assert (model.trained, model.passages, model.width) == (256, 32, 64)
        assert model.source == str(tmp_path / small_llama.MODEL)
        assert model.kind == "perplexity_small"
        assert all(int(part.scale * 256) % model.width == 0 for part in parts.PARTS)
        assert parts.study_model("smollm2-135m") == parts.SMOLLM2
        (tmp_path / small_llama.MODEL / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="max_position_embeddings"):
            parts.study_model(str(tmp_path))

    def test_a_temperature_of_auto(self):
        variant = parts.planner(LlamaForCausalLM(llama_config()))
        for target in (96, 128, 256):
            auto, yarn, mixed = (
                variant(x, target).plan for x in ("auto", "yarn", "yarn, auto's temperature")
            )
            assert mixed.attention_scaling == auto.attention_scaling != yarn.attention_scaling
            assert mixed.factors == yarn.factors
            assert variant("yarn, auto's temperature", target).label == "yarn, auto's temperature"


@pytest.fixture
def reader(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval()
    entry = replace(parts.SMOLLM2, trained=64, passages=1)
    return study.Reader(entry, model, Record(tmp_path / "record.json", "perplexity", describe(model, "m")))


class TestReader:
    ids = torch.arange(3, 103)[None]

    def test_a_reading_is_that_of_the_command_line(self, reader):
        m, finished = reader.read("t", self.ids, Variant("stock", None))
        assert not finished
        assert list(m["what"]) == ["method", "text", "piece", "tokens", "digest", "variant", "frequencies"]
        nll = token_nll(reader.model, self.ids)
        assert m["result"]["nll"] == pytest.approx(nll.double().mean().item())
        assert m["result"]["nll_by_position"] == [round(nll.double().mean().item(), 6)]
        assert m["result"]["predicted"] == 99
        assert "width" not in m["result"]

    def test_frequencies_are_read_once_under_all_labels(self, reader, monkeypatch):
        variant = parts.planner(reader.model)("pi", 128)
        first, _ = reader.read("t", self.ids, variant)
        monkeypatch.setattr(study, "token_nll", None)  # would fail
        second, finished = reader.read("t", self.ids, Variant("another name", variant.plan))
        assert finished
        assert second["result"] == first["result"]
        assert [m["what"]["variant"] for m in reader.record] == ["pi", "another name"]
        assert reader.read("t", self.ids, variant)[1]
        assert len(reader.record) == 2

    def test_a_plan_that_is_what_it_was_before_is_the_newest_again(self, reader):
        variant = parts.planner(reader.model)
        first, other = (Variant("auto", variant(name, 128).plan) for name in ("pi", "ntk"))
        for one in (first, other):
            reader.read("t", self.ids, one)
        assert readings.newest(reader.record)["auto", 100] == other.fingerprint
        assert readings.superseded(reader.record) == [("auto", 100, ["t"])]
        assert reader.read("t", self.ids, first)[1]
        data = json.loads(reader.record.path.read_text())
        assert readings.newest(data["measurements"])["auto", 100] == first.fingerprint
        assert len(data["measurements"]) == 2


def reading(text, variant, below, past, frequencies=None, tokens=1024):
    """A measurement of a model trained to 512 tokens: losses of two parts below and two past it."""
    what = {"method": "whole", "text": text, "piece": 0, "tokens": tokens, "digest": "d"}
    what |= {"variant": variant, "frequencies": frequencies or variant}
    return {"what": what, "result": {"nll": 0, "predicted": tokens - 1, "nll_by_position": [*below, *past]}}


def record_of(*measurements):
    return {
        "model": {"name": "m", "dtype": "float32"},
        "plans": {"p": {"original_length": 512}},
        "measurements": list(measurements),
        "machines": [{"processor": "a processor", "torch": "2", "transformers": "5"}],
    }


AUTO = [reading(t, "auto", (2.0, 2.1), (2.2, 2.4)) for t in "ab"]
YARN = [reading("a", "yarn", (2.1, 2.2), (2.3, 2.6)), reading("b", "yarn", (2.0, 2.1), (2.1, 2.2))]


def cells(table):
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row[:2] != "|-"
    ]


class TestTables:
    def test_differences_are_paired_by_parts(self):
        found = readings.readings(record_of(*AUTO, *YARN), 1024)
        head, auto, yarn = cells(summary.strategies_table(found))
        assert head == [
            "",
            "below 512",
            "past 512",
            "below 512, against auto",
            "past 512, against auto",
            "texts",
        ]
        assert auto == ["auto", f"{math.exp(2.05):.2f}", f"{math.exp(2.3):.2f}", "", "", "2"]
        pairs = [0.1, 0.2, -0.1, -0.2]
        error = statistics.stdev(pairs) / 2
        assert yarn[4] == f"+0.00 ± {100 * error:.2f} %"
        below = statistics.stdev([0.1, 0.1, 0, 0]) / 2
        assert yarn[3] == f"{100 * math.expm1(0.05):+.2f} ± {100 * math.exp(0.05) * below:.2f} %"
        assert yarn[1:3] == [f"{math.exp(2.1):.2f}", f"{math.exp(2.3):.2f}"]

    def test_a_text_that_is_missing_is_left_out_of_its_row(self):
        found = readings.readings(record_of(*AUTO, YARN[0]), 1024)
        _, auto, yarn = cells(summary.strategies_table(found))
        assert (auto[5], yarn[5]) == ("2", "1")
        assert yarn[4] == percent(*paired_difference([2.3, 2.6], [2.2, 2.4]))
        head, row = cells(summary.texts_table(found))
        assert head == ["", "a", "b"]
        assert row == ["yarn", yarn[4], ""]

    def test_only_the_newest_plan_of_a_label_counts(self):
        old = [reading(t, "auto", (9, 9), (9, 9), "old") for t in "ab"]
        found = readings.readings(record_of(*old, AUTO[0], *YARN), 1024)
        assert found.losses["auto"] == {"a": [[2.0, 2.1, 2.2, 2.4]]}
        assert found.both("yarn", "auto") == ["a"]
        # At another length the label may have another plan.
        longer = reading("a", "auto", (1, 1), (1, 1), "at 1024 no longer", tokens=2048)
        found = readings.readings(record_of(*AUTO, longer), 1024)
        assert set(found.losses["auto"]) == {"a", "b"}

    def test_passages_of_a_small_model_are_apart(self):
        m = reading("a", "auto", (1, 2), (3, 4))
        m["what"] |= {"passages": 2, "tokens": 128}
        m["result"]["width"] = 64
        record = record_of(m)
        record["plans"]["p"]["original_length"] = 64
        found = readings.readings(record, 128)
        assert found.parts("auto", ["a"], *found.below) == [1, 3]
        assert found.parts("auto", ["a"], *found.past) == [2, 4]
        record["measurements"].append(reading("b", "auto", (1, 2), (3, 4), tokens=128))
        with pytest.raises(ValueError, match="cannot be compared"):
            readings.readings(record, 128)

    def test_windows_are_against_the_single_plan(self, tmp_path):
        label = "auto+window=64"
        window = [reading("a", label, (1.9, 2.0), (2.3, 2.3)), reading("b", label, (2.0, 2.1), (2.0, 2.3))]
        path = tmp_path / "quality_perplexity.json"
        path.write_text(json.dumps(record_of(*AUTO, *YARN)), encoding="utf-8")
        assert summary.windows(tmp_path) == ("", "")
        path.write_text(json.dumps(record_of(*AUTO, *YARN, *window)), encoding="utf-8")
        block, machine = summary.windows(tmp_path)
        assert "### SmolLM2-135M, 2x: 1024 tokens" in block
        assert "yarn" not in block
        assert "a processor" in machine
        by_position = next(t for t in block.split("\n\n") if "768-1024" in t)
        head, row = cells(by_position)
        assert head == ["", "0-256", "256-512", "512-768", "768-1024"]
        assert row[0] == label
        assert row[1] == percent(*paired_difference([1.9, 2.0], [2.0, 2.0]))
        assert row[4] == percent(*paired_difference([2.3, 2.3], [2.4, 2.4]))

    def test_needles_of_windows(self, tmp_path):
        def answered(label, length, right, task="single-key", of=answers.PROMPTS):
            same = {"variant": label, "length": length, "task": task, "frequencies": label}
            return [
                {"what": same | {"trial": trial}, "result": {"generated": trial < right, "decoys": True}}
                for trial in range(of)
            ]

        measured = answered("stock", 512, 19)
        for label in ("yarn", "auto+window=64", "auto"):
            measured += answered(label, 1024, 0)
        measured += answered("auto", 1024, 20, "multi-key")
        measured += answered("ntk", 1024, 3, of=19)  # one is not asked yet
        assert answers.needles(tmp_path) == ("", "")
        (tmp_path / "quality_synthetic.json").write_text(json.dumps(record_of(*measured)))
        head, *rows = cells(answers.needles(tmp_path)[0])
        assert head == ["", "512 tokens", "1024 tokens"]
        assert rows == [
            ["`stock`", "19/20, 20/20", ""],
            ["`auto`", "", "0/20, 20/20"],
            ["`yarn`", "", "0/20, 20/20"],
            ["`auto+window=64`", "", "0/20, 20/20"],
        ]

    def test_passkeys(self, tmp_path):
        def answer(label, trial, scoring, correct):
            what = {
                "variant": label,
                "length": 512,
                "depth": 0.5,
                "trial": trial,
                "seed": 0,
                "scoring": scoring,
            }
            return {"what": what | {"frequencies": label}, "result": {"correct": correct}}

        measured = [
            answer(label, trial, scoring, scoring == "decoys" or (label == "auto" and trial == 1))
            for label in ("grouped+window=64", "auto")
            for trial in range(answers.PROMPTS)
            for scoring in ("generate", "decoys")
        ]
        measured.append(answer("auto", 20, "generate", True))  # the other scoring was not reached
        assert answers.passkeys(tmp_path) == ("", "")
        (tmp_path / "quality_passkey_small.json").write_text(json.dumps(record_of(*measured)))
        text, machines = answers.passkeys(tmp_path)
        assert text.startswith("Another small LLaMA, trained to 256 tokens, float32:")
        assert "SmolLM2" not in text
        assert machines
        head, *rows = cells(text.split("\n\n")[1])
        assert head == ["", "512 tokens"]
        assert rows == [["`auto`", "1/20, 20/20"], ["`grouped+window=64`", "0/20, 20/20"]]

    def test_who_leads_is_decided_by_errors(self):
        close = reading("a", "ntk", (2, 2), (2.3, 2.31))  # +0.1 and -0.09
        found = readings.readings(record_of(*AUTO, *YARN, close), 1024)
        sentence = summary.where_others_lead(found)
        assert (
            "by more than one standard error in 1 of 3 comparisons, within one in 1, behind by more in 1"
            in sentence
        )
        mean, error = paired_difference([2.1, 2.2], [2.2, 2.4])
        assert sentence.endswith(f": yarn on b ({percent(mean, error)}).")
        assert summary.in_the_mean(found) == (
            "In the mean of the texts that both have read, past 512, ahead of `auto` by more than one standard "
            "error: none; within one: "
            f"yarn ({percent(*found.difference('yarn', 'auto', ['a', 'b'], 512, 1024))}), "
            f"ntk ({percent(*found.difference('ntk', 'auto', ['a'], 512, 1024))})."
        )

    def test_the_page_has_a_column_a_scale(self, tmp_path):
        record = record_of(*AUTO, *YARN, reading("a", "ntk", (2, 2), (2, 2)))
        longer = [reading("a", label, (1, 1), (1, 2), tokens=2048) for label in ("auto", "yarn")]
        for m in longer:
            m["result"]["nll_by_position"] = [2.0, 2.0, *[1.0 + (m["what"]["variant"] == "yarn")] * 6]
        record["measurements"] += longer
        (tmp_path / "quality_perplexity.json").write_text(json.dumps(record))
        text, machine = summary.block(tmp_path)
        table, note = text.split("\n\n")
        head, auto = cells(table)  # ntk has not read every text
        assert head == ["perplexity past 512", "2x", "4x"]
        against = [-0.1, -0.2, 0.1, 0.2]
        assert auto == ["auto", percent(0, statistics.stdev(against) / 2), percent(-1, 0)]
        assert "number of texts: 2 at 2x, 1 at 4x" in note
        assert "a processor" in machine

    def test_a_column_a_model_and_scale(self, tmp_path):
        assert summary.every_model(tmp_path)[0] == ""
        ntk = reading("a", "ntk", (2, 2), (2, 2))  # has not read text b
        (tmp_path / "quality_perplexity.json").write_text(json.dumps(record_of(*AUTO, *YARN, ntk)))
        (tmp_path / "quality_perplexity_small.json").write_text(json.dumps(record_of(AUTO[0], YARN[0], ntk)))
        table, note = summary.every_model(tmp_path)[0].split("\n\n")
        head, *rows = cells(table)
        assert head == ["against auto", "SmolLM2-135M, 2x", "A small LLaMA, 2x"]
        whole = percent(*paired_difference([2.3, 2.6, 2.1, 2.2], [2.2, 2.4, 2.2, 2.4]))
        first = percent(*paired_difference([2.3, 2.6], [2.2, 2.4]))
        of_ntk = percent(*paired_difference([2, 2], [2.2, 2.4]))
        assert {row[0]: row[1:] for row in rows} == {"yarn": [whole, first], "ntk": ["", of_ntk]}
        assert [row[0] for row in rows] == ["ntk", "yarn"]
        assert note == (
            "`auto` is ahead of the other extensions by more than one standard error in 1 of 3 comparisons; not of "
            f"yarn on SmolLM2-135M, 2x ({whole}), ntk on A small LLaMA, 2x ({of_ntk}). "
            "Number of texts: SmolLM2-135M, 2x: 2; A small LLaMA, 2x: 1."
        )

    def test_the_tuning_is_against_auto(self, tmp_path):
        (tmp_path / "quality_tuning.json").write_text(json.dumps(record_of(AUTO[0], YARN[0])))
        (tmp_path / "quality_tuning_small.json").write_text(json.dumps(record_of(AUTO[1], YARN[1])))
        title, table, note, title_of_small, *_ = summary.tuning(tmp_path)[0].split("\n\n")
        head, auto, yarn = cells(table)
        assert head[-1] == "past 512, against auto"  # of one text
        assert yarn[3:] == [
            percent(*paired_difference(*both))
            for both in (((2.1, 2.2), (2.0, 2.1)), ((2.3, 2.6), (2.2, 2.4)))
        ]
        assert auto[3:] == ["", ""]
        assert title == "m, a, the first 1024 tokens:"
        assert note == "m: float32; errors are over parts of 256 positions."
        assert title_of_small == "m, b, the first 1024 tokens:"

    def test_a_missing_record_names_its_command(self, tmp_path):
        with pytest.raises(ValueError, match=r"python -m benchmarks\.quality\.study"):
            summary.block(tmp_path)

    def test_what_is_not_measured_yet_is_left_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(results, "RESULTS", tmp_path)
        for name in ("longppl", "synthetic", "window-needles", "passkeys"):
            filled = report.fill(f"<!-- table: {name} -->old<!-- end -->")
            assert filled == f"<!-- table: {name} -->\n\n<!-- end -->"
            assert report.fill(filled) == filled
        (tmp_path / "quality_perplexity.json").write_text(json.dumps(record_of(*AUTO, *YARN)))
        assert "small" not in summary.strategies(tmp_path)[0]


def test_longppl_takes_the_losses_that_the_study_kept(tmp_path, model_directory, monkeypatch):
    pytest.importorskip("rope_dist.evaluation.longppl", reason="this tree has no LongPPL")
    from benchmarks.quality import study_longppl
    from rope_dist.evaluation import longppl

    entry = replace(
        parts.SMOLLM2, source=str(model_directory), trained=64, dtype="float32", texts=("python",), width=64
    )
    part = parts.Part("2x", 2, ("stock", "auto"), tokens=512)
    losses = tmp_path / "losses"
    assert len(list(study.measurements(entry, [part], tmp_path, losses))) == 2
    kept = {file.stem.split("-")[-1]: torch.load(file) for file in losses.rglob("*.pt")}
    monkeypatch.setattr(study, "token_nll", None)  # would fail
    # A model that was never trained gains nothing by context: any token that is predicted better counts.
    monkeypatch.setattr(
        study_longppl, "make_evaluator", lambda model: longppl.make_evaluator(model, alpha=1e-9, beta=-99)
    )
    for again in (False, True):
        lines = list(study_longppl.measurements(entry, (part,), tmp_path, losses))
        assert len(lines) == 3
        assert [one.endswith(": on record") for one in lines] == [again] * 3
        assert [one.endswith(": from kept losses") for one in lines[1:]] == [not again] * 2
    record = json.loads((tmp_path / "quality_longppl.json").read_text())
    found, *read = record["measurements"]
    positions = found["result"]["positions"]
    assert positions
    for m in read:
        nll = kept[m["what"]["frequencies"]][0]
        expected = [nll[position - 1].item() for position in positions]
        assert m["result"]["key_nll"] == pytest.approx(expected, abs=1e-4)
    text, _ = summary.longppl(tmp_path)
    assert text.count("SmolLM2-135M:\n") == 1
    assert "small LLaMA" not in text
    assert "## LongPPL" in text
    assert "| auto" in text or "\nauto" in text


class TestOptions:
    def test_strategies_of_a_part(self):
        windows = next(part for part in parts.PARTS if part.name == "window-2x")
        chosen = study.only(windows, ["grouped+window=2048", "auto"], 8192)
        assert chosen.labels(8192) == ("auto", "grouped+window=2048")
        assert study.only(windows, None, 8192).labels(8192) == windows.labels(8192)

    def test_an_unknown_strategy_is_named(self, monkeypatch, capsys, tmp_path):
        options = ["--strategies", "auto", "ayto", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["study", *options])
        with pytest.raises(SystemExit) as stopped:
            study.main()
        assert stopped.value.code == 2
        assert "no part has ayto; they have " in capsys.readouterr().err

    def test_float32_is_another_record(self):
        entry = study.in_dtype(parts.SMOLLM2, "float32")
        assert (entry.kind, entry.dtype) == ("perplexity_float32", "float32")
        assert study.in_dtype(parts.SMOLLM2, "bfloat16") == parts.SMOLLM2


def test_a_label_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from rope_dist import plots
    from rope_dist.evaluation import Bucket

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, note: figures.append(figure))
    labels = ("mrrope-pro, auto's temperature", "yarn, auto's temperature", "yarn", "yarn:beta_fast=16")
    curve = [Bucket(0, 256, 2.0), Bucket(256, 512, 2.0)]
    panels = {"two": dict.fromkeys(labels[1:], curve), "all": dict.fromkeys(labels, curve)}
    plots.plot_relative_perplexity(panels, 256, "title", tmp_path / "a.png")
    colours = [{line.get_label(): line.get_color() for line in axis.lines} for axis in figures[0].axes]
    assert len({colours[1][label] for label in labels}) == len(labels)
    assert {label: colours[1][label] for label in labels[1:]} == {
        label: colours[0][label] for label in labels[1:]
    }
