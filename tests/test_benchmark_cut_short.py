"""A benchmark that is killed leaves what it had measured: what compiles comes last, and every step is saved."""

import importlib
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


SCRIPT = """
import sys, time, torch
from benchmarks.harness import Case, Provider
from benchmarks.question import Question

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
        providers=lambda _: [
            Provider("compiled", compiles_for_ever, late=True),
            Provider("stock", times(2), kind="stock"),
            Provider("ours", times(2), kind="ours"),
            Provider("copy", lambda x: lambda: x.clone(), kind="limit"),
        ],
        exact=lambda x: [x.double() * 2],
        tolerance=1e-2,
        labels={"tokens": size.tokens},
    )]

rows = {"cpu": [(("SmolLM2-135M",), (8, 16), ("fp32",))]}
sys.exit(Question("stand_in", "A stand-in.", cases, rows, rows, (), seconds=30.0).main())
"""


def test_what_was_timed_is_there_after_a_kill_while_something_compiles(tmp_path):
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
    # Nothing half-written beside it.
    assert [file.name for file in tmp_path.iterdir()] == ["stand_in-cpu.json"]
    record = json.loads((tmp_path / "stand_in-cpu.json").read_text())
    (case,) = record["cases"]
    assert {n for n, r in case["results"].items() if "seconds" in r} == {"stock", "ours", "copy"}
    assert case["results"]["compiled"]["skipped"] == "the run was cut short"
    assert set(case["ranking"]) == {"stock", "ours"}
    assert case["results"]["ours"]["to stock"] > 0
    assert record["left_out"] == [{"name": "16 tokens", "reason": "the run was cut short"}]
    # The report takes such a file as it is.
    from benchmarks import tables

    text = tables.footnote(record)
    assert "Not timed: compiled (the run was cut short)" in text
    assert "16 tokens" in text


def case_of(providers, **changes):
    from benchmarks.harness import Case

    values = {
        "name": "twice",
        "inputs": lambda: torch.ones(8, 4),
        "providers": lambda _: providers,
        "exact": lambda x: [x.double() * 2],
        "tolerance": 1e-2,
    }
    return Case(**{**values, **changes})


def test_the_late_are_prepared_after_the_others_were_saved(monkeypatch):
    from benchmarks import harness
    from benchmarks.harness import Provider, measure

    monkeypatch.setattr(harness, "_PREPARED", {})
    events = []

    def way(name):
        def bind(x):
            events.append(name)
            return lambda: [x * 2]

        return bind

    providers = [
        Provider("compiled", way("compiled"), late=True),
        Provider("stock", way("stock"), kind="stock"),
        Provider("compiled too", way("compiled too"), kind="ours", late=True),
    ]

    def save(found):
        events.append({name for name, result in found["results"].items() if "seconds" in result})

    found = measure(case_of(providers), CPU, seconds=0.2, save=save)
    first = [
        events.index(name) for name in ("stock", {"stock"}, "compiled", {"stock", "compiled"}, "compiled too")
    ]
    assert first == sorted(first)
    assert events[-1] == {"stock", "compiled", "compiled too"}
    # The figures are those of rounds that all shared.
    assert len({r["seconds"]["rounds"] for r in found["results"].values()}) == 1
    assert set(harness._PREPARED) == {"compiled", "compiled too"}


def test_what_took_longer_to_prepare_than_there_is_time_is_left_out(monkeypatch):
    from benchmarks import harness
    from benchmarks.harness import Provider, measure

    monkeypatch.setattr(harness, "_PREPARED", {})
    monkeypatch.setattr(harness.timing, "MOST_ROUNDS", 3)

    def slowly(x):
        time.sleep(0.2)
        return lambda: [x * 2]

    def providers():
        stock = Provider("stock", lambda x: lambda: [x * 2], kind="stock")
        return [stock, Provider("compiled", slowly, late=True)]

    first = measure(case_of(providers()), CPU, seconds=0.1)["results"]
    assert "seconds" in first["compiled"]
    second = measure(case_of(providers()), CPU, seconds=0.1)["results"]
    assert second["compiled"]["skipped"].startswith("no time left: it took ")
    assert "seconds" in second["stock"]
    third = measure(case_of(providers()), CPU, seconds=30.0)["results"]
    assert "seconds" in third["compiled"]


def test_whatever_torch_compiles_is_late(monkeypatch):
    """Of a model of 32 layers it takes minutes: first the figures that need none of it."""
    from benchmarks.harness import Provider
    from benchmarks.question import Options, Size
    from benchmarks.shapes import SHAPES

    size = Size(SHAPES["SmolLM2-135M"], 8, "bf16")
    for name, device in (
        ("rotary", CPU),
        ("projection", CPU),
        ("decode", CPU),
        ("model_prefill", torch.device("cuda")),
        ("model_train_step", torch.device("cuda")),
    ):
        module = importlib.import_module(f"benchmarks.{name}")
        options = Options(device, ("torch.compile",), True, types.SimpleNamespace(layers=1))
        for case in module.cases(size, options):
            model = types.SimpleNamespace(model=torch.nn.Identity(), enabled=torch.nn.Identity())
            inputs = model if name.startswith("model_") else case.inputs()
            found = [p for p in case.providers(inputs) if isinstance(p, Provider)]
            compiled = [p for p in found if p.name.startswith("torch.compile")]
            assert compiled, name
            assert all(p.late for p in compiled)
            assert not any(p.late for p in found if p not in compiled)


def test_a_whole_model_is_timed_to_the_end_of_its_last_kernel(monkeypatch):
    """Two events around a model that the CPU launches in 5 ms would leave out what its user waits for."""
    from benchmarks import harness
    from benchmarks.harness import Provider

    said = []
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: said.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(harness.machine, "free_bytes", lambda device: None)
    monkeypatch.setattr(harness.timing, "timer", None)

    def model(x):
        def call():
            said.append("call")
            return [x * 2]

        return call

    case = case_of([Provider("stock", model, kind="stock")], kernel=False)
    found = harness.measure(case, torch.device("cuda"), seconds=0.0)
    assert found["results"]["stock"]["seconds"]["rounds"] == 3
    assert "warm_seconds" not in found["results"]["stock"]
    assert said[-10:] == ["synchronize", "call", "synchronize"] * 3 + ["empty_cache"]
