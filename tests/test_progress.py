"""Time of an evaluation: the estimate, the lines of progress, and how the demonstration uses them."""

from __future__ import annotations

import io
import math
import time

import pytest
import torch

import rope_dist.demo as demo
from rope_dist.evaluation import (
    Passage,
    Record,
    describe,
    longppl,
    make_variants,
    passkey,
    perplexity,
    prefix_cache,
    progress,
)
from rope_dist.evaluation.perplexity import sliding_window_nll, token_nll
from rope_dist.evaluation.progress import Pace, Progress, duration, measure_pace, work


def test_seconds_of_a_reading_are_those_of_its_parts():
    pace = Pace(token=0.002, context=1e-6)
    # Every token costs 2 ms and 1 us for each token before it.
    assert pace.seconds(1000) == pytest.approx(1000 * 0.002 + 1e-6 * sum(range(1000)), rel=1e-3)
    assert pace.seconds(700) + pace.seconds(1000, 700) == pytest.approx(pace.seconds(1000))


def test_the_pace_is_that_of_the_reading_that_follows(make_llama):
    model = make_llama(max_position_embeddings=8192, hidden_size=128, intermediate_size=512)
    ids = torch.randint(3, 128, (1, 3072))
    ratios = []
    for _ in range(5):
        pace = measure_pace(model)
        began = time.perf_counter()
        token_nll(model, ids, chunk=256)
        ratios.append((time.perf_counter() - began) / pace.seconds(3072))
    # A shared machine changes its speed from one to the next: the best of five is within a factor.
    assert 1 / 3 < min(ratios, key=lambda ratio: abs(math.log(ratio))) < 3


def test_operations_grow_with_the_context(llama):
    assert work(llama, 0, 10) + work(llama, 10, 30) == pytest.approx(work(llama, 0, 30))
    assert work(llama, 20, 30) > work(llama, 0, 10)


def test_a_line_every_half_minute_without_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", out)
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(progress, "LINE_SECONDS", 30)
    with Progress("evaluating", 100) as bar:
        bar._time = lambda: now[0]
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(9):
            now[0] += 10
            bar.update(10)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "evaluating: 30 %",
        "evaluating: 60 %",
        "evaluating: 90 %",
    ]
    assert lines[0] == "evaluating: 30 %, 00:30 elapsed, about 01:10 left"
    assert "\r" not in out.getvalue()


def test_a_bar_with_the_time_left_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", out)
    with Progress("evaluating", 100) as bar:
        bar.start_t -= 20
        bar.update(40)
        bar.refresh()
    assert "evaluating:  40%" in out.getvalue()
    assert "00:20<00:30" in out.getvalue()


def test_short_work_and_no_description_print_nothing(capsys):
    for description in ("evaluating", None):
        with Progress(description, 100) as bar:
            bar.update(100)
    assert capsys.readouterr() == ("", "")


def test_progress_ends_at_all_of_the_work(llama, ids, monkeypatch):
    for read, total in (
        (lambda: token_nll(llama, ids[0], chunk=7, description="evaluating"), work(llama, 0, 39)),
        (
            lambda: sliding_window_nll(
                llama, ids[0], window=20, stride=10, chunk=7, description="evaluating"
            ),
            3 * work(llama, 0, 19),
        ),
    ):
        done, totals = [], []
        monkeypatch.setattr(Progress, "update", lambda self, n=1, done=done: done.append(n))
        monkeypatch.setattr(Progress, "close", lambda self, totals=totals: totals.append(self.total))
        read()
        assert sum(done) == pytest.approx(totals[0]) == total


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (50, "50 s"), (89, "89 s"), (110, "2 min"), (7200, "2.0 h")]
)
def test_durations_are_for_reading(seconds, text):
    assert duration(seconds) == text


class TestAnnouncements:
    """Commands say how long they will take; here every token takes two minutes."""

    @pytest.fixture(autouse=True)
    def slow(self, monkeypatch):
        for module in (perplexity, prefix_cache, longppl):
            monkeypatch.setattr(module, "measure_pace", lambda model: Pace(120.0, 0.0))

    @pytest.fixture
    def record(self, llama, tmp_path):
        return lambda kind: Record(tmp_path / "record.json", kind, describe(llama, "llama"))

    def test_perplexity(self, llama, ids, record, capsys):
        def read(**options):
            text = perplexity.Passage("text", 0, ids[:1])
            variants = make_variants(llama, ["stock", "pi"], 128)
            record_now = record("perplexity")
            options = {"lengths": [20], "stride": 10, "progress": True, **options}
            list(perplexity.measure_perplexity(llama, [text], variants, record_now, **options))
            return capsys.readouterr().err

        # Two variants of 20 tokens, whole; then of three windows of 20.
        assert read(methods=["whole"]) == "evaluation takes about 80 min on this machine\n"
        assert read() == "evaluation takes about 4.0 h on this machine\n"
        assert read() == ""  # all of it is on record

    def test_passkeys(self, llama, letters, record, capsys):
        cases = passkey.make_cases([500], (0.5, 1.0), trials=1)
        variants = make_variants(llama, ["stock"], 128)
        list(passkey.measure_passkey(llama, letters, cases, variants, record("passkey"), progress=True))
        # The prompt with the late key is read whole, the other from its key on: between one and two of 500 tokens.
        hours = float(capsys.readouterr().err.removeprefix("evaluation takes about ").split()[0])
        assert 500 / 30 < hours < 1.8 * 500 / 30

    def test_longppl(self, llama, ids, record, capsys):
        text, variants = Passage("text", 0, ids[:1, :20]), make_variants(llama, ["stock"], 128)
        evaluator = longppl.make_evaluator(llama, window=12, short=4, alpha=1e-9, beta=-90)
        run = longppl.measure_longppl(
            llama, [text], variants, record("longppl"), evaluator=evaluator, progress=True
        )
        next(run)
        run.close()
        # Four windows of 12, sixteen of 5, and the text.
        assert capsys.readouterr().err == "evaluation takes about 4.9 h on this machine\n"
        list(
            longppl.measure_longppl(
                llama, [text], variants, record("longppl"), evaluator=evaluator, progress=True
            )
        )
        assert capsys.readouterr().err == "evaluation takes about 40 min on this machine\n"  # the text


class TestHowMuchTheDemonstrationReads:
    """``_choose``: lengths, strategies and the seconds that are left, by the measured pace of the machine."""

    def choose(self, monkeypatch, gigaflops, lengths=(12288, 11264), strategies=None, left=210.0):
        # Operations of SmolLM2-135M (270 million a token, 69,120 a token of context), as faults were reported with.
        pace = Pace(270e6 / gigaflops / 1e9, 69120 / gigaflops / 1e9)
        monkeypatch.setattr(progress, "measure_pace", lambda model: pace)
        return demo._choose(None, lengths, strategies, left)[:2]

    def test_a_fast_machine_reads_all(self, monkeypatch):
        assert self.choose(monkeypatch, 150) == (12288, ("stock", "auto", "dprope"))

    def test_a_slower_one_reads_less(self, monkeypatch):
        assert self.choose(monkeypatch, 120) == (11264, ("stock", "auto", "dprope"))

    def test_two_cores_of_40_gigaflops_show_two_readings_in_four_minutes(self, monkeypatch):
        tokens, strategies = self.choose(monkeypatch, 80)
        assert (tokens, strategies) == (11264, ("stock", "auto"))

    def test_what_was_asked_for_is_read_at_any_speed(self, monkeypatch):
        asked = ("stock", "pi", "yarn", "ntk")
        assert self.choose(monkeypatch, 1, (500,), asked) == (500, asked)
        assert self.choose(monkeypatch, 0.1) == (11264, ("stock", "auto"))


def test_the_last_strategy_is_left_out_when_the_machine_gets_slower(llama, ids):
    lines = []
    labels = [
        result.label
        for result in demo._evaluate(
            llama, ids[:1], ("stock", "auto", "dprope"), 128, lines.append, time.perf_counter()
        )
    ]
    assert labels == ["stock", "auto"]
    assert len(demo._evaluate(llama, ids[:1], ("stock", "auto", "dprope"), 128, lines.append, None)) == 3


def test_a_text_between_the_two_lengths_is_read_as_far_as_it_goes(model_directory, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = tmp_path / "text.txt"
    lines = []
    options = {"model_name": str(model_directory), "text": str(text), "output": tmp_path, "log": lines.append}
    text.write_text("abcd" * 23)  # 92 tokens of the 96 and 88 that are read of a model trained to 64
    assert demo.run(**options)["tokens"] == 88
    assert demo.run(**options, tokens=70, minutes=1e-9)["tokens"] == 70
    assert any("(more than the 1e-09 min of --minutes: as requested)" in line for line in lines)
    assert any(
        "left out for lack of time: dprope; --strategies stock auto dprope evaluates all" in x for x in lines
    )
    text.write_text("abcd" * 20)
    with pytest.raises(ValueError, match="has 80 tokens, fewer than the 88 to be read"):
        demo.run(**options)


def test_the_table_has_the_trained_length_and_then_eighths(llama, ids):
    nll = torch.arange(1, 100, dtype=torch.float32) / 50
    parts = demo.table_rows([demo_reading("stock", nll), demo_reading("auto", 2 * nll)], 64)
    edges = [(p["start"], p["end"]) for p in parts]
    assert edges == [(0, 64), (64, 72), (72, 80), (80, 88), (88, 96), (96, 100)]
    # The token at position i has the entry i - 1: positions 64 to 71 are entries 63 to 70, of 64/50 to 71/50 nats.
    assert parts[1]["perplexity"]["stock"] == pytest.approx(torch.tensor(67.5 / 50).exp().item(), rel=1e-6)
    assert parts[1]["perplexity"]["auto"] == pytest.approx(torch.tensor(67.5 / 25).exp().item(), rel=1e-6)


def demo_reading(label, nll):
    from rope_dist.evaluation import PerplexityResult

    return PerplexityResult(label, None, nll)


def test_a_packaged_or_logged_model_loads_without_bars(model_directory, capfd):
    from rope_dist.evaluation import load_model

    load_model(str(model_directory))
    assert "Loading weights" not in capfd.readouterr().err
