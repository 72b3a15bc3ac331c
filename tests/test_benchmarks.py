"""The benchmarks: wrong is refused, slow is last, and bad input is one line."""

import json
import re
import subprocess
import sys
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
        from rope_dist import timing

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
                self.at = time.perf_counter()

            def synchronize(self):
                said.append("synchronize")

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(harness, "captured", Graph)
        monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(timing, "available_memory", lambda device: 1 << 34)
        monkeypatch.setattr(torch.cuda, "Event", Event)
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
        assert said.count("replay") == said.count("synchronize")

    def test_a_call_that_no_graph_holds_is_named(self, monkeypatch):
        from benchmarks import harness

        def refuse(call):
            raise RuntimeError("operation not permitted when stream is capturing\n...")

        monkeypatch.setattr(harness, "captured", refuse)
        monkeypatch.setattr(harness, "peak_memory", lambda call, device: 0)
        monkeypatch.setattr(harness, "release", lambda device: None)
        monkeypatch.setattr(harness.timing, "available_memory", lambda device: None)
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
    def test_quick(self, question, tmp_path, capsys):
        import importlib

        threads = torch.get_num_threads()
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
        [(["--seconds", "0"], "must be positive"), (["--device", "cuda"], "torch sees no GPU")],
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

    def test_the_gpu_check_needs_a_gpu(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        script = subprocess.run(
            [ROOT / "benchmarks" / "gpu_check.sh"],
            env={"OUT": str(tmp_path), "PY": sys.executable, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert script.returncode == 2
        assert "no GPU" in script.stderr


class TestGpuCheck:
    """The script's course, with a Python and a compute-sanitizer that only say what they were asked."""

    PYTHON = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
    *native.load*) exit "${BUILT:-0}" ;;
    *"-m pytest "*) echo "7 passed"; exit "${TESTS:-0}" ;;
    "-m benchmarks "*) exit "${BENCHMARKS:-0}" ;;
esac
"""

    def check(self, tmp_path, sanitizer=True, **more):
        tools = tmp_path / "tools"
        tools.mkdir()
        programs = {"python": self.PYTHON}
        if sanitizer:
            programs["compute-sanitizer"] = '#!/bin/sh\necho "$*" >>"$LOG"\n'
        for name, script in programs.items():
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        done = subprocess.run(
            [ROOT / "benchmarks" / "gpu_check.sh"],
            env={
                "OUT": str(tmp_path / "out"),
                "PY": str(tools / "python"),
                "PATH": f"{tools}:/usr/bin:/bin",
                "LOG": str(tmp_path / "log"),
                **more,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, (tmp_path / "log").read_text().splitlines()

    def test_every_part_runs_within_eight_minutes(self, tmp_path):
        done, log = self.check(tmp_path)
        assert done.returncode == 0
        assert "7 passed" in done.stdout
        asked = "\n".join(log)
        for part in (
            "tests/ops tests/test_native.py",
            "--error-exitcode 1",
            "agrees_with_tritons",
            "rope_dist.ops.static_gate",
            "-m benchmarks --device cuda",
        ):
            assert part in asked
        assert "build_ext" not in asked
        written = {file.name for file in (tmp_path / "out").iterdir()}
        assert written == {"tests.txt", "sanitizer.txt", "gate.txt", "benchmarks.txt"}
        # Each limit, and no question begun later than the last of it, even where all parts take theirs.
        script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
        limits = [int(n) for n in re.findall(r"^ *part \w+ (\d+)", script, re.MULTILINE)]
        (total,) = re.findall(r"left=\$\(\((\d+) - SECONDS", script)
        assert len(limits) == 4
        assert sum(limits) + 120 <= int(total) <= 470
        (seconds,) = re.findall(r"-m benchmarks .*--seconds (\d+)", asked)
        assert int(total) - 60 < int(seconds) < int(total)

    def test_a_part_that_fails_gives_the_status_and_the_others_run(self, tmp_path):
        done, log = self.check(tmp_path, sanitizer=False, BUILT="1", TESTS="3", BENCHMARKS="4")
        assert done.returncode == 3
        assert "tests failed with status 3" in done.stdout
        assert "benchmarks failed with status 4" in done.stdout
        assert "compute-sanitizer is not installed" in done.stdout
        assert any("build_ext --inplace" in line for line in log)

    def test_what_it_selects_by_name_is_there(self):
        """A test that is renamed must not silently leave the run under compute-sanitizer."""
        script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
        (names,) = re.findall(r'-k "(.*)"', script)
        tests = "".join(file.read_text() for file in (ROOT / "tests" / "ops").glob("test_*.py"))
        for name in names.split(" or "):
            assert re.search(rf"def test_\w*{name}", tests)


class TestPeers:
    """Adapters against functions that behave as their packages document."""

    @pytest.mark.parametrize("name", ["Liger", "flash-attn", "FlashInfer", "quack", "vLLM", "Unsloth"])
    def test_an_adapter_hands_over_what_its_package_takes(self, name):
        import types

        from benchmarks import peers, shapes
        from rope_dist import ops

        shape, tokens = shapes.SHAPES["SmolLM2-135M"], 20
        angles = shapes.Angles(shape, tokens, torch.float32, CPU)
        q, k = (torch.randn(1, tokens, n, shape.head_dim) for n in (shape.q_heads, shape.k_heads))

        def by_tables(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            assert q.shape[1:] == (shape.q_heads, tokens, shape.head_dim)
            return ops.apply_rotary_pos_emb(q, k, cos, sin)

        def by_one_tensor(x, cos, sin, interleaved=False, inplace=False):
            return ops.apply_rotary_emb(x, cos, sin, interleaved, inplace)

        def by_cache(positions, query, key, head_size, cache, is_neox):
            assert is_neox
            cos, sin = cache[positions].chunk(2, -1)
            for x in (query, key):
                x = x.view(1, tokens, -1, head_size)
                ops.rotary(x, x[:, :, :0], cos[None], sin[None], inplace=True)

        def unsloth(q, k, cos, sin):
            return ops.apply_rotary_pos_emb(q, k, cos[None], sin[None])

        module = types.SimpleNamespace(
            liger_rotary_pos_emb=by_tables,
            apply_rotary_emb=by_one_tensor,
            apply_rope_with_cos_sin_cache_inplace=by_cache,
            rotary_embedding=by_cache,
            fast_rope_embedding=unsloth,
        )
        want = peers.stock(q, k, angles)
        found = peers.PEERS[name].rotate(module, q.clone(), k.clone(), angles)()
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)

    def test_on_a_cpu_kernels_for_gpus_are_no_peers(self):
        from benchmarks import peers, question

        options = question.Options(CPU, None, True, None)
        for name in peers.PEERS:
            assert "GPU kernel" in peers.unavailable(name, options)


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
