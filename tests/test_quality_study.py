"""The quality study goes on where it stopped, and its tables count only what every strategy finished."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality import study, summary
from rope_dist.evaluation import CORPORA


@pytest.fixture
def run(model_directory, tmp_path, monkeypatch, capsys, bfloat16_attention):
    """The study on a small model that was trained to 64 tokens."""
    part = study.Part(128, ("python", "moby-dick"), 300, (400, 500), (0, 1), ("stock", "pi"))
    monkeypatch.setattr(study, "MODEL", str(model_directory))
    monkeypatch.setattr(study, "PARTS", (part,))
    monkeypatch.setattr(summary, "TRAINED", 64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["study", "--output", str(tmp_path / "results"), *arguments])
        study.main()
        return capsys.readouterr()

    return main


def test_a_study_that_ran_out_of_time_goes_on(run, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert "1 measurements on record, the same command goes on" in run("--seconds", "1e-9").out
    captured = run()
    # One text, two lengths, two depths, two scorings; two strategies of everything.
    assert "18 measurements on record, all there are" in captured.out
    assert "left out: the corpus moby-dick is not installed: npm install" in captured.out + captured.err
    assert run().out.count(": on record") == 18
    block, machine = summary.block(tmp_path / "results")
    assert "Perplexity of the first 300 tokens of the Python language reference" in block
    assert ". Extended to 128:" in block
    assert "| pi" in block
    assert "seed of the passkeys 0" in block
    assert "torch" in machine
    assert str(tmp_path) not in block


def reading(text, variant, nll, tokens=16384):
    """A measurement whose perplexity is ``exp(nll)`` up to 8192 and ``exp(2 nll)`` past it."""
    widths = tokens // 256
    by_position = [nll] * (widths // 2) + [2 * nll] * (widths // 2)
    return {
        "what": {"method": "whole", "text": text, "tokens": tokens, "variant": variant},
        "result": {"nll": 1.5 * nll, "predicted": tokens - 1, "nll_by_position": by_position, "seconds": 1},
    }


def answer(variant, length, depth, correct, scoring="generate"):
    what = {"variant": variant, "length": length, "depth": depth, "scoring": scoring, "seed": 0}
    return {"what": what, "result": {"correct": correct}}


class TestTables:
    def test_perplexity_counts_texts_that_all_strategies_read(self):
        record = {
            "measurements": [
                reading("a", "stock", 1.0),
                reading("a", "pi", 0.5),
                reading("b", "stock", 2.0),
                reading("b", "pi", 0.7),
                reading("c", "stock", 9.0),
                reading("a", "stock", 5.0, tokens=32768),
            ]
        }
        assert set(summary.finished_readings(record, 16384)) == {"a", "b"}
        table = summary.perplexity_table(record, 16384)
        stock = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
        overall, past = math.exp((1.5 + 3.0) / 2), math.exp((2.0 + 4.0) / 2)
        assert stock[:3] == ["stock", f"{overall:.2f}", f"{past:.2f}"]
        assert stock[3] == f"{math.exp(2):.2f} - {math.exp(4):.2f}"
        assert stock[4:] == [f"{math.exp(1.5):.2f}"] * 4 + [f"{past:.2f}"] * 4
        assert "6-8k |" in table.splitlines()[0]
        assert "8-10k* |" in table.splitlines()[0]

    def test_where_another_reads_better_is_listed(self):
        def record(nll):
            auto = [reading("a", "auto", nll), reading("b", "auto", 1.0)]
            stock = [reading(text, "stock", 0.1) for text in "ab"]
            return {"measurements": [reading("a", "yarn", 0.8), reading("b", "yarn", 1.1), *stock, *auto]}

        behind = summary.where_others_lead(record(0.9), 16384)
        assert behind.startswith(
            "Text by text `auto` is the best extension in 4 of 8 parts past 8192; not in a, 8-10k (yarn "
        )
        assert f"yarn {math.exp(1.6):.2f}, auto {math.exp(1.8):.2f}" in behind
        assert summary.where_others_lead(record(0.7), 16384).endswith("8 of 8 parts past 8192.")
        assert summary.where_others_lead(record(0.7), 16384, "refined") == ""

    def test_passkeys_count_lengths_that_all_strategies_finished(self):
        finished = [
            answer(variant, 8192, depth, right, scoring)
            for variant, right in (("stock", False), ("pi", True))
            for depth in (0.0, 1.0)
            for scoring in ("generate", "decoys")
        ]
        finished[0]["result"]["correct"] = True
        begun = [answer("stock", 16384, 0.0, True, s) for s in ("generate", "decoys")]
        table = summary.passkey_table({"measurements": finished + begun})
        assert "16384" not in table
        assert [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()[2:]] == [
            ["stock", "1/2, 0/2"],
            ["pi", "2/2, 2/2"],
        ]

    def test_a_missing_record_names_its_command(self, tmp_path):
        with pytest.raises(ValueError, match=r"python -m benchmarks\.quality\.study"):
            summary.block(tmp_path)


def test_the_study_reads_texts_that_exist():
    assert {text for part in study.PARTS for text in part.texts} <= set(CORPORA)
