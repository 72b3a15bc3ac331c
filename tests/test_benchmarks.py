"""The benchmarks: wrong is not timed, slow is last, a killed run leaves its rows, and bad input is one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import __main__ as suite
from benchmarks import harness, host_driver, host_time, results
from benchmarks.benchmark import Options, Size, find, names
from benchmarks.harness import BenchmarkError, Case, Implementation, Skipped, measure, ranking
from benchmarks.shapes import SHAPES
from rope_dist import machine, timing

ROOT = results.ROOT
CPU = torch.device("cpu")
GPU_ONLY = {"model_decode", "cache_write"}


def times(number):
    return lambda x: lambda: [x * number]


def doubling(*implementations, **changes):
    """A case whose right result is twice its input."""
    values = {
        "name": "twice",
        "inputs": lambda: torch.randn(64, 32, generator=torch.Generator().manual_seed(0)),
        "implementations": lambda _: implementations,
        "exact": lambda x: [x.double() * 2],
        "tolerance": 1e-2,
        "labels": {"model": "m", "tokens": 64, "dtype": "fp32"},
    }
    return Case(**{**values, **changes})


def slow(x):
    def call():
        time.sleep(0.02)
        return [x + x]

    return call


STOCK = Implementation("stock", times(2), kind="reference")


def by_name(rows):
    return {row["implementation"]: row for row in rows}


class TestHarness:
    def test_the_slow_is_last_and_the_wrong_is_not_timed(self):
        def fails(x):
            raise RuntimeError("no kernel for this\nmachine")

        def wrong_at_the_end(x):
            def call():
                y = x * 2
                y[-1] = x[-1]
                return [y]

            return call

        case = doubling(
            Implementation("slow", slow),
            STOCK,
            Implementation("wrong", times(2.1)),
            Implementation("wrong at one token", wrong_at_the_end),
            Implementation("not a number", times(float("nan"))),
            Implementation("fails", fails),
            Implementation("large", times(2), need=1 << 60),
            Implementation("copy", lambda x: lambda: x.clone(), kind="roofline"),
            Skipped("missing", "not installed"),
        )
        rows = measure(case, CPU, seconds=1.0)
        assert [row["implementation"] for row in ranking(rows)] == ["stock", "slow", "copy"]
        found = by_name(rows)
        assert found["slow"]["seconds"] > 0.02
        assert found["slow"]["ratio"] > 2  # of a doubling, which a busy machine makes slow
        assert found["stock"]["roofline"] > 0
        assert found["stock"] | {"case": "twice", "model": "m", "tokens": 64, "ratio": 1.0} == found["stock"]
        for name in ("wrong", "wrong at one token", "not a number"):
            assert "seconds" not in found[name]
            assert found[name]["note"].startswith("wrong: ")
        assert found["wrong"]["error"] == pytest.approx(0.05, rel=1e-3)
        assert found["fails"]["note"] == "failed: RuntimeError: no kernel for this"
        assert found["large"]["note"].startswith("skipped: needs 1073741824.0 GiB of memory")
        assert found["missing"]["note"] == "skipped: not installed"

    def test_a_call_that_repeats_its_work_is_divided(self):
        (row,) = measure(doubling(Implementation("slow", slow, "reference"), repeat=10), CPU, seconds=0.1)
        assert 0.002 < row["seconds"] < 0.02

    def test_inputs_changed_in_place_are_fresh_for_the_next_check(self):
        class Inputs:
            def __init__(self):
                self.before = torch.ones(8, 4)
                self.x = self.before.clone()

            def reset(self):
                self.x.copy_(self.before)

        calls = [Implementation(name, lambda y: lambda: [y.x.mul_(2)]) for name in ("first", "second")]
        case = doubling(*calls, inputs=Inputs, exact=lambda y: [y.before.double() * 2])
        assert len(ranking(measure(case, CPU, seconds=0.1))) == 2

    def test_too_little_memory_is_one_line_before_anything_is_made(self):
        with pytest.raises(BenchmarkError, match=r"needs .* GiB of memory on cpu, .* are free"):
            measure(doubling(need=1 << 60, inputs=None), CPU, seconds=1.0)

        def too_much():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

        with pytest.raises(
            BenchmarkError, match=r"^twice ran out of memory on cpu: choose smaller --lengths"
        ):
            measure(doubling(inputs=too_much), CPU, seconds=1.0)

    def test_late_ones_are_prepared_after_the_others_were_saved(self, monkeypatch):
        monkeypatch.setattr(harness, "_PREPARED", {})
        events = []

        def noted(name):
            return lambda x: events.append(name) or (lambda: [x * 2])

        def save(rows):
            events.append({row["implementation"] for row in rows if "seconds" in row})

        case = doubling(
            Implementation("compiled", noted("compiled"), late=True),
            Implementation("stock", noted("stock"), "reference"),
            Implementation("compiled too", noted("compiled too"), "ours", late=True),
        )
        rows = measure(case, CPU, seconds=0.2, save=save)
        expected = ["stock", {"stock"}, "compiled", {"stock", "compiled"}, "compiled too"]
        order = [events.index(event) for event in expected]
        assert order == sorted(order)
        assert events[-1] == {"stock", "compiled", "compiled too"}
        # The times are those of rounds that all shared.
        assert len({row["rounds"] for row in rows}) == 1
        assert set(harness._PREPARED) == {"compiled", "compiled too"}

    def test_what_took_longer_to_prepare_than_there_is_time_is_left_out(self, monkeypatch):
        monkeypatch.setattr(harness, "_PREPARED", {})
        monkeypatch.setattr(timing, "MOST_ROUNDS", 3)

        def slowly(x):
            time.sleep(0.2)
            return lambda: [x * 2]

        case = doubling(STOCK, Implementation("compiled", slowly, late=True))
        assert "seconds" in by_name(measure(case, CPU, seconds=0.1))["compiled"]
        second = by_name(measure(case, CPU, seconds=0.1))
        assert second["compiled"]["note"].startswith("skipped: no time left, it took ")
        assert "seconds" in second["stock"]
        assert "seconds" in by_name(measure(case, CPU, seconds=30.0))["compiled"]


class TestOnAGpu:
    """The calls of the GPU's path, with a GPU's functions played by what this machine has."""

    @pytest.fixture
    def log(self, monkeypatch):
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")
                self.at = time.perf_counter()

            def synchronize(self):
                log.append("wait for event")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(machine, "free_bytes", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"), raising=False)
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: log.append(name))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
        empty = torch.empty

        def on_the_cpu(*sizes, device=None, **more):
            if device is not None and device.type == "cuda":
                log.append(sizes[0])
            return empty(*sizes, **more)

        monkeypatch.setattr(torch, "empty", on_the_cpu)
        return log

    def test_graphs_are_captured_and_timed_cold_and_warm(self, monkeypatch, log):
        graph = lambda call: types.SimpleNamespace(replay=lambda: log.append("replay") or call())  # noqa: E731
        monkeypatch.setattr(harness, "captured", graph)
        (row,) = measure(doubling(STOCK), torch.device("cuda"), seconds=0.1)
        assert row["peak_bytes"] == 250
        assert row["rounds"] >= 3
        assert row["warm_seconds"] > 0
        # A buffer of twice the cache is overwritten for the first, none for the second.
        assert [entry for entry in log if isinstance(entry, int)] == [2 << 20, 0]
        # The GPU waits until what is timed is enqueued, and so is not timed with its launch.
        calls = [entry for entry in log[log.index("sleep") :] if not isinstance(entry, int)][:-1]
        timed = ["sleep", "record", "replay", "record", "wait for event"]
        assert calls == timed * (len(calls) // len(timed))

    def test_a_call_that_no_graph_holds_is_named(self, monkeypatch, log):
        def refuse(call):
            raise RuntimeError("operation not permitted when stream is capturing\n...")

        monkeypatch.setattr(harness, "captured", refuse)
        (row,) = measure(doubling(STOCK), torch.device("cuda"), seconds=0.1)
        assert "seconds" not in row
        expected = "failed: not captured in a CUDA graph: operation not permitted when stream is capturing"
        assert row["note"] == expected

    def test_a_whole_model_is_timed_to_the_end_of_its_last_kernel(self, monkeypatch, log):
        """Two events around a model that the CPU launches in 5 ms would leave out what its user waits for."""
        monkeypatch.setattr(timing, "timer", None)
        model = Implementation("stock", lambda x: lambda: log.append("call") or [x * 2], "reference")
        (row,) = measure(doubling(model, kernel=False), torch.device("cuda"), seconds=0.0)
        assert row["rounds"] == 3
        assert "warm_seconds" not in row
        assert log[-10:] == ["synchronize", "call", "synchronize"] * 3 + ["empty_cache"]


SCRIPT = """
import sys, time, torch
from benchmarks.benchmark import Benchmark
from benchmarks.harness import Case, Implementation

def compiles_for_ever(x):
    def call():
        print("compiling", flush=True)
        time.sleep(600)
    return call

def cases(size, options):
    def times(number):
        return lambda x: lambda: [x * number]
    return [Case(
        name=f"{size.tokens} tokens",
        inputs=lambda: torch.ones(size.tokens, 4),
        implementations=lambda _: [
            Implementation("compiled", compiles_for_ever, late=True),
            Implementation("stock", times(2), "reference"),
            Implementation("rope_dist", times(2), "ours"),
            Implementation("copy", lambda x: lambda: x.clone(), "roofline"),
        ],
        exact=lambda x: [x.double() * 2],
        tolerance=1e-2,
        labels=size.labels,
    )]

sizes = {"cpu": ["SmolLM2-135M: 8 16: fp32"]}
sys.exit(Benchmark("stand_in.py", "", "A stand-in", cases, sizes, share={"cpu": 5.0}).main(sys.argv[1:]))
"""


def test_what_was_timed_is_there_after_a_kill_while_something_compiles(tmp_path):
    other = {"benchmark": "another", "case": "its own", "seconds": 1.0}
    results.replace("another", "cpu", [other], tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "--output", str(tmp_path)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("compiling"):
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    # Nothing half-written beside it, and the rows of other benchmarks as they were.
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.jsonl"]
    assert results.of("another", "cpu", tmp_path) == [other]
    rows = results.of("stand_in", "cpu", tmp_path)
    found = by_name(rows[:-1])
    assert {name for name, row in found.items() if "seconds" in row} == {"stock", "rope_dist", "copy"}
    assert found["compiled"]["note"] == "skipped: the run was cut short"
    assert found["rope_dist"]["ratio"] > 0
    assert (rows[-1]["case"], rows[-1]["note"]) == ("16 tokens", "skipped: the run was cut short")


NEW_FILE = """
from .benchmark import Benchmark
from .harness import Case, Implementation

def cases(size, options):
    twice = [Implementation(name, lambda x: lambda: [x + x], kind) for name, kind in NAMES.items()]
    inputs = lambda: size.shape.inv_freq(options.device)
    return [Case(str(size), inputs, lambda _: twice, lambda x: [2.0 * x.double()], labels=size.labels)]

NAMES = {"huggingface": "reference", "rope_dist": "ours"}
SIZES = {"cpu": ["tiny-256: 16 32"], "quick": ["tiny-256: 8"]}
BENCHMARK = Benchmark(__file__, "Adds.", "Addition", cases, SIZES, share={"cpu": 1})
"""


def test_a_new_benchmark_is_one_file(tmp_path):
    shutil.copytree(
        ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "plots")
    )
    (tmp_path / "benchmarks" / "addition.py").write_text(NEW_FILE)

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "== addition" in run("-m", "benchmarks", "--only", "addition", "--seconds", "9")
    filled = run(
        "-c", "from benchmarks.report import fill; print(fill('<!-- table: addition-cpu --><!-- end -->'))"
    )
    assert "| tiny-256, 16, bf16 |" in filled
    assert "(speedup over huggingface)" in filled


def status_of(main, arguments):
    try:
        return main(arguments)
    except SystemExit as leaving:
        return leaving.code


def refused(main, arguments, message, capsys):
    """One line, and exit status 2."""
    assert status_of(main, arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


class TestScripts:
    @pytest.mark.parametrize("name", names())
    def test_quick(self, name, tmp_path, request, capsys):
        if name.startswith(("attention", "model", "host")):
            request.getfixturevalue("bfloat16_attention")
        # Compiling is torch's own; without it a benchmark takes a second.
        arguments = ["--device", "cpu", "--quick", "--seconds", "1", "--output", str(tmp_path), "--baselines"]
        if name == "host_time":
            # A process without the interpreter, in which Triton's other tests run.
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "benchmarks", name, *arguments]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            threads = torch.get_num_threads()
            # Two wait for each other on a busy machine: a minute and more for a thousand small steps.
            torch.set_num_threads(1)
            try:
                assert suite.main([name, *arguments]) == 0
            finally:
                torch.set_num_threads(threads)
            printed = capsys.readouterr().out
        rows = results.read("cpu", tmp_path)
        assert not [row for row in rows if row.get("note", "").startswith(("wrong", "failed"))]
        kinds = {row["kind"] for row in rows if "seconds" in row}
        assert {"reference"} | ({"ours"} if name != "planning" else set()) <= kinds
        assert "roofline" in kinds or name == "host_time"
        first = rows[0]
        assert first["quick"] is True
        assert first["code"] == find(name).code
        assert all(row["benchmark"] == name and row["threads"] == "1" for row in rows)
        assert ranking([row for row in rows if row["case"] == first["case"]])[0]["implementation"] in printed

    def test_results_are_a_table_for_pandas(self):
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        table = pandas.read_json(results.RESULTS / "cpu.jsonl", lines=True)
        assert len(table) == len(results.read("cpu"))
        medians = table.pivot_table("seconds", ["benchmark", "case"], "implementation")
        assert medians.loc[("rotary", "Llama-3-8B, 8k, bf16"), "huggingface"] > 0

    @pytest.mark.parametrize("name", names())
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "cuda:63"], "--device"),
            (["--baselines", "Ligre"], "Ligre"),
            # Before anything of that size is made.
            (["--device", "cpu", "--lengths", "4000000000"], "GiB of memory on cpu"),
        ],
    )
    def test_every_benchmark_fails_clearly(self, name, arguments, message, capsys):
        refused(find(name).main, arguments, message, capsys)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--device", "cuda:63"], "torch sees"),
            (["--device", "abacus"], "no device 'abacus'; there are cpu, cuda"),
            (["--baselines", "Ligre"], "invalid choice: 'Ligre' (choose from "),
            (["--models", "LLaMA-9"], "invalid choice: 'LLaMA-9'"),
            (["--lengths", "0"], "must be positive"),
            (["--seconds", "-1"], "must be positive"),
            (["--lengths", "many"], "invalid int value"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_2(self, arguments, message, capsys):
        refused(find("rotary").main, arguments, message, capsys)

    def test_sizes(self):
        parse = lambda *arguments: find("rotary")._sizes(find("rotary").parser().parse_args(arguments), CPU)  # noqa: E731
        assert [str(size) for size in parse("--quick")] == [
            "SmolLM2-135M, 1k, bf16",
            "SmolLM2-135M, 1k, fp32",
        ]
        assert str(parse()[0]) == "Llama-3-8B, 8k, bf16"
        chosen = parse("--models", "tiny-256", "--lengths", "5", "2048", "--dtypes", "fp16")
        assert [str(size) for size in chosen] == ["tiny-256, 5, fp16", "tiny-256, 2k, fp16"]

    @pytest.mark.parametrize(
        ("name", "bfloat16", "device", "dtype"),
        [
            ("projection", True, "cpu", "bf16"),
            ("projection", False, "cpu", "fp32"),
            ("projection", False, "cuda", "bf16"),
            ("rotary", False, "cpu", "bf16"),
        ],
    )
    def test_products_are_in_a_dtype_that_the_processor_has(self, monkeypatch, name, bfloat16, device, dtype):
        monkeypatch.setattr(machine, "has_bfloat16_products", lambda: bfloat16)
        sizes = find(name)._sizes(find(name).parser().parse_args([]), torch.device(device))
        assert sizes[0].dtype == dtype
        asked = find(name).parser().parse_args(["--dtypes", "bf16"])
        assert {size.dtype for size in find(name)._sizes(asked, torch.device(device))} == {"bf16"}

    @pytest.mark.parametrize("name", ["rotary", "projection", "decode", "model_prefill", "model_train_step"])
    def test_whatever_torch_compiles_is_late(self, name):
        """Of a model of 32 layers it takes minutes: first the times that need none of it."""
        device = torch.device("cuda" if name.startswith("model_") else "cpu")
        options = Options(device, ("torch.compile",), layers=1)
        for case in find(name).cases(Size(SHAPES["SmolLM2-135M"], 8, "bf16"), options):
            models = types.SimpleNamespace(model=torch.nn.Identity(), enabled=torch.nn.Identity())
            inputs = models if name.startswith("model_") else case.inputs()
            found = [p for p in case.implementations(inputs) if isinstance(p, Implementation)]
            compiled = [p for p in found if p.name.startswith("torch.compile")]
            assert compiled
            assert all(p.late == (p in compiled) for p in found)


HOST_SCRIPT = """
import torch
from benchmarks import host_driver, host_time, models
from benchmarks.benchmark import Size
from benchmarks.shapes import SHAPES

pair = models.Pair(Size(SHAPES["tiny-256"], 1, "bf16"), 1, torch.device("cpu"))
x, model = torch.zeros(1, 1, 256, dtype=torch.bfloat16), pair.enabled.model
tables = model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.int64))
for path in host_time.PATHS:
    with torch.inference_mode(), host_time.backend("triton", path), host_driver.host_only() as launcher:
        before = launcher.launches
        model.layers[0].self_attn(x, position_embeddings=tables, attention_mask=None)
        print(path, launcher.launches - before)
"""


@pytest.mark.skipif(not host_time.INSTALLED, reason="triton is not installed")
class TestHostTime:
    def test_each_path_is_one_launch(self):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", HOST_SCRIPT]
        environment |= {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.stdout.split("\n")[:-1] == [f"{path} 1" for path in host_time.PATHS], done.stderr

    def test_it_refuses_the_interpreter(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), host_driver.host_only():
            pass


class TestSuite:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--seconds", "0"], "must be positive"),
            (["--device", "cuda"], "torch sees no GPU"),
            (
                ["--only", "model_decode"],
                "no 'model_decode' on cpu; there are decode, host_time, attention_rest",
            ),
            (["rotory"], "no benchmark 'rotory'; there are attention_block"),
            (["--quick", "rotary"], "no 'rotary': name benchmarks after --only"),
        ],
    )
    def test_it_fails_clearly(self, arguments, message, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(suite, "_run", None)
        refused(suite.main, arguments, message, capsys)

    def test_it_runs_every_benchmark_and_names_what_did_not_finish(self, capsys, monkeypatch):
        ran = {}

        def run(name, arguments, limit):
            ran[name] = float(arguments[arguments.index("--seconds") + 1])
            return "exit status 3" if name == "decode" else None

        monkeypatch.setattr(suite, "_run", run)
        assert suite.main(["--seconds", "540"]) == 1
        assert "not finished: decode (exit status 3)" in capsys.readouterr().err
        assert set(ran) == set(names()) - GPU_ONLY
        assert min(ran.values()) > 10
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        ran.clear()
        suite.main(["--device", "cuda"])
        assert set(ran) == set(names()) - {"planning", "host_time"}

    def test_some_of_it_with_options_of_each(self, monkeypatch, tmp_path):
        ran = []
        monkeypatch.setattr(suite, "_run", lambda name, arguments, limit: ran.append((name, arguments)))
        arguments = ["--seconds", "100", "--output", str(tmp_path), "--only", "rotary", "decode"]
        assert suite.main([*arguments, "--", "--baselines", "torch.compile"]) == 0
        # In the usual order; both together have the whole time but for what their processes take to begin.
        assert [name for name, _ in ran] == ["decode", "rotary"]
        assert all(asked[-2:] == ["--baselines", "torch.compile"] for _, asked in ran)
        seconds = [int(asked[asked.index("--seconds") + 1]) for _, asked in ran]
        assert seconds == pytest.approx([(100 - 14) * 4 / 36, 100 - 7], abs=3)

    @pytest.mark.parametrize("arguments", [[], *([name] for name in names())])
    def test_help(self, arguments, capsys):
        assert status_of(suite.main, [*arguments, "--help"]) == 0
        printed = capsys.readouterr().out
        assert "--quick" in printed
        assert "--device" in printed


class TestShort:
    """``rope-dist bench``."""

    def test_table_and_sentence(self, capsys):
        from rope_dist.cli import main

        arguments = ["bench", "--device", "cpu", "--tokens", "64", "--dtype", "float32", "--seconds", "0.2"]
        assert main(arguments) == 0
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

        refused(main, ["bench", *arguments], message, capsys)

    def test_partial_and_scaled_rotations_are_checked_too(self):
        from rope_dist.bench import rotary_step

        inv_freq = 1e4 ** (-torch.arange(0, 16, 2) / 16)
        found = rotary_step((2, 1), 16, inv_freq, 40, dtype=torch.float32, attention_scaling=1.2, seconds=0.1)
        assert json.dumps(found)
        assert found["speedup"]["huggingface"] == 1.0

    def test_a_wrong_rotation_is_not_timed(self, monkeypatch):
        from rope_dist import bench, ops

        monkeypatch.setattr(ops, "rotary", lambda q, k, cos, sin, inplace=False: (q, k))
        with pytest.raises(RuntimeError, match="rope_dist is wrong here"):
            bench.bench(tokens=[64], device="cpu", seconds=0.1)
