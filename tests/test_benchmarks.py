"""The benchmarks: wrong is refused, slow is last, and bad input is one line."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "rotary",
    "projection",
    "decode",
    "attention_block",
    "model_prefill",
    "model_decode",
    "model_train_step",
    "planning",
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def doubling(**changes):
    """A case that asks for twice its input, answered by providers of every sort."""
    from benchmarks.harness import Absent, Case, Provider

    def way(number):
        return lambda x: lambda: [x * number]

    def slow(x):
        def call():
            time.sleep(0.02)
            return [x + x]

        return call

    def fails(x):
        raise RuntimeError("no kernel for this\nmachine")

    def wrong_at_the_end(x):
        def call():
            y = x * 2
            y[-1] = x[-1]
            return [y]

        return call

    providers = [
        Provider("slow", slow),
        Provider("stock", way(2), kind="stock"),
        Provider("wrong", way(2.1)),
        Provider("wrong at one token", wrong_at_the_end),
        Provider("not a number", way(float("nan"))),
        Provider("fails", fails),
        Provider("large", way(2), need=1 << 60),
        Provider("copy", lambda x: lambda: x.clone(), kind="limit"),
        Absent("missing", "not installed"),
    ]
    values = {
        "name": "twice",
        "inputs": lambda: torch.randn(64, 32, generator=torch.Generator().manual_seed(0)),
        "providers": lambda _: providers,
        "exact": lambda x: [x.double() * 2],
        "tolerance": 1e-2,
        "labels": {"model": "m", "tokens": 64, "dtype": "fp32"},
    }
    return Case(**{**values, **changes})


class TestHarness:
    def test_the_slow_is_last_and_the_wrong_is_not_timed(self):
        from benchmarks.harness import measure

        found = measure(doubling(), CPU, seconds=1.0)
        assert found["ranking"] == ["stock", "slow"]
        results = found["results"]
        assert results["slow"]["seconds"]["p50"] > 0.02
        assert results["slow"]["to stock"] > 10
        assert results["stock"]["limit share"] > 0
        for name in ("wrong", "wrong at one token", "not a number"):
            assert "seconds" not in results[name]
            assert results[name]["refused"].startswith("wrong: ")
        assert results["wrong"]["error"] == pytest.approx(0.05, rel=1e-3)
        assert results["fails"]["failed"] == "RuntimeError: no kernel for this"
        assert "GiB of memory" in results["large"]["skipped"]
        assert results["missing"]["skipped"] == "not installed"
        json.dumps(found, allow_nan=True)

    def test_inputs_changed_in_place_are_fresh_for_the_next_check(self):
        from benchmarks.harness import Provider, measure

        class Inputs:
            def __init__(self):
                self.before = torch.ones(8, 4)
                self.x = self.before.clone()

            def reset(self):
                self.x.copy_(self.before)

        def in_place(inputs):
            return lambda: [inputs.x.mul_(2)]

        ways = [Provider("first", in_place, kind="stock"), Provider("second", in_place)]
        case = doubling(
            inputs=Inputs, providers=lambda _: ways, exact=lambda inputs: [inputs.before.double() * 2]
        )
        assert set(measure(case, CPU, seconds=0.1)["ranking"]) == {"first", "second"}

    def test_too_little_memory_is_said_before_anything_is_made(self):
        from benchmarks.harness import BenchmarkError, measure

        with pytest.raises(BenchmarkError, match=r"needs .* GiB of memory on cpu, .* are free"):
            measure(doubling(need=1 << 60, inputs=None), CPU, seconds=1.0)

    def test_memory_that_runs_out_is_said_in_one_line(self):
        from benchmarks.harness import BenchmarkError, measure

        def too_much():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

        with pytest.raises(
            BenchmarkError, match=r"^twice ran out of memory on cpu: choose smaller --lengths"
        ):
            measure(doubling(inputs=too_much), CPU, seconds=1.0)

    def test_on_a_gpu_graphs_are_captured_and_timed_cold_and_warm(self, monkeypatch):
        """The calls of the GPU's path, with a GPU's functions played by what this machine has."""
        from benchmarks import harness
        from rope_dist import machine, timing

        said = []

        class Graph:
            def __init__(self, call):
                self.call = call

            def replay(self):
                said.append("replay")
                self.call()

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                said.append("record")
                self.at = time.perf_counter()

            def synchronize(self):
                said.append("synchronize")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(harness, "captured", Graph)
        monkeypatch.setattr(machine, "last_level_cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 34)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("wait"), raising=False)
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
        empty = torch.empty
        flushes = []

        def on_the_cpu(*sizes, device=None, **more):
            if device is not None and device.type == "cuda":
                flushes.append(sizes[0])
            return empty(*sizes, **more)

        monkeypatch.setattr(torch, "empty", on_the_cpu)
        found = harness.measure(doubling(), torch.device("cuda"), seconds=0.3)
        stock = found["results"]["stock"]
        assert found["ranking"] == ["stock", "slow"]
        assert stock["peak_bytes"] == 250
        assert stock["seconds"]["rounds"] >= 3
        assert stock["warm_seconds"]["rounds"] >= 3
        # A buffer of twice the cache is overwritten for the first, none for the second.
        assert flushes == [2 << 20, 0]
        # The GPU waits until what is timed is enqueued, and so is not timed with its launch.
        first = said.index("wait")
        timed = ["wait", "record", "replay", "record", "synchronize"]
        assert said[first:] == timed * (len(said[first:]) // len(timed))

    def test_a_call_that_no_graph_holds_is_named(self, monkeypatch):
        from benchmarks import harness

        def refuse(call):
            raise RuntimeError("operation not permitted when stream is capturing\n...")

        monkeypatch.setattr(harness, "captured", refuse)
        monkeypatch.setattr(harness, "peak_memory", lambda call, device: 0)
        monkeypatch.setattr(harness, "release", lambda device: None)
        monkeypatch.setattr(harness.machine, "free_bytes", lambda device: None)
        found = harness.measure(doubling(), torch.device("cuda"), seconds=0.1)
        assert found["ranking"] == []
        assert found["results"]["stock"]["failed"] == (
            "cannot be captured in a CUDA graph: operation not permitted when stream is capturing"
        )


class TestTiming:
    def test_rounds_go_on_until_the_median_is_known_or_time_is_up(self):
        from rope_dist.timing import sample

        steady = sample({"a": lambda: None}, lambda call: 1.0, most=50)
        assert len(steady["a"]) == 5
        uneven = iter([1.0, 2.0] * 50)
        assert len(sample({"a": lambda: None}, lambda call: next(uneven), most=50)["a"]) == 50
        uneven = iter([1.0, 2.0] * 50)
        assert len(sample({"a": lambda: None}, lambda call: next(uneven), seconds=0.0)["a"]) == 3

    def test_order_is_forwards_and_backwards(self):
        from rope_dist.timing import sample

        calls = []
        ways = {name: (lambda name=name: calls.append(name)) for name in "ab"}
        sample(ways, lambda call: call() or 1.0, least=3, most=3)
        assert "".join(calls) == "abbaab"

    def test_a_ratio_outlives_noise_that_hits_both(self):
        from rope_dist.timing import ratio, spread

        noise = [1, 9, 1, 9, 1, 9, 9, 9, 9]
        base = [1.0 * n for n in noise]
        ours = [0.5 * n for n in noise]
        assert ratio(ours, base) == 0.5
        assert spread(base).quiet == 1.0
        assert (spread([3.0]).p20, spread([3.0]).p80) == (3.0, 3.0)

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (10.04, "10.0"),
            (28.0, "28.0"),
            (49, "49.0"),
            (0.84, "0.840"),
            (1.4, "1.40"),
            (9.996, "10.0"),
            (99.94, "99.9"),
            (99.96, "100"),
            (123.4, "123"),
            (16789.6, "16790"),
            (0.001, "0.00100"),
            (0, "0.00"),
        ],
    )
    def test_figures_have_three_digits(self, value, shown):
        from rope_dist.timing import three_digits

        assert three_digits(value) == shown

    def test_the_worst_vector_counts(self):
        from rope_dist.timing import error

        right = torch.ones(1000, 4)
        wrong = right.clone()
        wrong[7] = 0
        assert error(right, right) == 0
        assert error(wrong, right) == pytest.approx(1)
        assert error(right[:5], right) == float("inf")


class TestScripts:
    @pytest.mark.parametrize("question", QUESTIONS)
    def test_quick(self, question, tmp_path, capsys, request):
        import importlib

        if question.startswith(("attention", "model")):
            request.getfixturevalue("bfloat16_attention")
        threads = torch.get_num_threads()
        # Two wait for each other on a busy machine: a minute and more for a thousand small steps.
        torch.set_num_threads(1)
        module = importlib.import_module(f"benchmarks.{question}")
        # Compiling is torch's own; without it a script takes a second.
        peers = ["--peers"] if module.QUESTION.peers else []
        try:
            arguments = ["--device", "cpu", "--quick", "--seconds", "1", "--output", str(tmp_path), *peers]
            assert module.QUESTION.main(arguments) == 0
        finally:
            torch.set_num_threads(threads)
        record = json.loads((tmp_path / f"{question}-cpu.json").read_text())
        case = record["cases"][0]
        problems = {
            name: result
            for name, result in case["results"].items()
            if "refused" in result or "failed" in result
        }
        assert not problems
        kinds = {result["kind"] for result in case["results"].values() if "seconds" in result}
        assert {"stock", "limit"} <= kinds
        assert ("ours" in kinds) == (question != "planning")
        assert record["sources"]["files"]
        assert record["quick"] is True
        assert case["ranking"][0] in capsys.readouterr().out

    @pytest.mark.parametrize("question", QUESTIONS)
    def test_help(self, question, capsys):
        with pytest.raises(SystemExit) as leaving:
            self.main_of(question)(["--help"])
        assert leaving.value.code == 0
        printed = capsys.readouterr().out
        assert "--quick" in printed
        assert "--device" in printed

    @staticmethod
    def main_of(question):
        import importlib

        return importlib.import_module(f"benchmarks.{question}").QUESTION.main

    @staticmethod
    def refused(main, arguments, message, capsys):
        """One line, and exit status 2."""
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = leaving.code
        assert code == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1

    @pytest.mark.parametrize("question", QUESTIONS)
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "cuda:63"], "--device"),
            (["--peers", "Ligre"], "Ligre"),
            # Before anything of that size is made.
            (["--device", "cpu", "--lengths", "4000000000"], "GiB of memory on cpu"),
        ],
    )
    def test_every_script_fails_clearly(self, question, arguments, message, capsys):
        self.refused(self.main_of(question), arguments, message, capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "cuda:63"], "torch sees"),
            (["--device", "abacus"], "no 'abacus'; there are cpu, cuda"),
            (["--peers", "Ligre"], "no 'Ligre'; there are torch.compile, Liger"),
            (["--models", "LLaMA-9"], "no 'LLaMA-9'"),
            (["--lengths", "0"], "must be positive"),
            (["--device", "cpu", "--lengths", "4000000000"], "GiB of memory on cpu"),
            (["--seconds", "-1"], "must be positive"),
            (["--lengths", "many"], "invalid int value"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_2(self, arguments, message, capsys):
        self.refused(self.main_of("rotary"), arguments, message, capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--seconds", "0"], "must be positive"),
            (["--device", "cuda"], "torch sees no GPU"),
            (["--only", "model_decode"], "no 'model_decode' on cpu; there are rotary, decode, planning"),
            (["rotary"], "no 'rotary': name benchmarks after --only"),
        ],
    )
    def test_the_suite_fails_clearly(self, arguments, message, capsys, monkeypatch):
        from benchmarks import __main__ as suite

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(suite, "_run", None)
        self.refused(suite.main, arguments, message, capsys)

    def test_the_suite_asks_every_question_and_names_who_did_not_finish(self, capsys, monkeypatch):
        from benchmarks import __main__ as suite

        ran = {}

        def run(name, arguments, limit):
            ran[name] = float(arguments[arguments.index("--seconds") + 1])
            return "exit status 3" if name == "decode" else None

        monkeypatch.setattr(suite, "_run", run)
        assert suite.main(["--seconds", "540"]) == 1
        assert "not finished: decode (exit status 3)" in capsys.readouterr().err
        assert set(ran) == set(QUESTIONS) - {"model_decode"}
        assert min(ran.values()) > 10
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        ran.clear()
        suite.main(["--device", "cuda"])
        assert set(ran) == set(QUESTIONS) - {"planning"}

    def test_the_suite_asks_only_what_it_was_told_to(self, monkeypatch, tmp_path):
        from benchmarks import __main__ as suite

        ran = []
        monkeypatch.setattr(suite, "_run", lambda name, arguments, limit: ran.append((name, arguments)))
        arguments = ["--seconds", "100", "--output", str(tmp_path), "--only", "decode", "rotary"]
        assert suite.main([*arguments, "--", "--peers", "torch.compile"]) == 0
        # In the usual order; both together have the whole time but for what their processes take to begin.
        assert [name for name, _ in ran] == ["rotary", "decode"]
        assert all(asked[-2:] == ["--peers", "torch.compile"] for _, asked in ran)
        seconds = [int(asked[asked.index("--seconds") + 1]) for _, asked in ran]
        assert seconds == pytest.approx([(100 - 14) * 32 / 36, 100 - 7], abs=3)


class TestShort:
    def test_table_and_sentence(self, capsys):
        from rope_dist.cli import main

        assert (
            main(["bench", "--device", "cpu", "--tokens", "64", "--dtype", "float32", "--seconds", "0.2"])
            == 0
        )
        printed = capsys.readouterr().out
        assert re.search(
            r"On this CPU the rotary step is [\d.]+x as fast as Hugging Face's at 64 tokens", printed
        )
        assert "copy of the same bytes" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "abacus"], "unknown device 'abacus'"),
            (["--tokens", "0"], "at least 1"),
            (["--seconds", "0"], "must be above 0"),
            (["--tokens", "4000000000", "--device", "cpu"], "GiB of memory"),
        ],
    )
    def test_bad_input(self, arguments, message, capsys):
        from rope_dist.cli import main

        assert main(["bench", *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1

    def test_a_wrong_rotation_is_not_timed(self, monkeypatch):
        from rope_dist import bench, ops

        monkeypatch.setattr(ops, "rotary", lambda q, k, cos, sin, inplace=False: (q, k))
        with pytest.raises(RuntimeError, match="rope_dist is wrong here"):
            bench.bench(tokens=[64], device="cpu", seconds=0.1)
