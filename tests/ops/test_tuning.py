"""Choosing by measurement: fastest wins, kept on disk, never where it may not measure."""

from __future__ import annotations

import json
from contextlib import nullcontext
from random import Random

import pytest
import torch
from helpers.tensors import frequencies

from rope_dist import ops
from rope_dist.ops import dispatch_projection, tuning

PROBLEM = tuning.Problem("a GPU", "bfloat16", 8192, 4096, (4096, 1024, 1024), 128, 128)


def ways(calls: list[str]):
    return {name: lambda name=name: calls.append(name) or name for name in ("separate", "descriptors")}


def test_the_fastest_is_chosen_and_kept():
    times = {"separate": 2.0, "descriptors": 1.0}
    calls = []
    timer = lambda way: times[way()]  # noqa: E731
    assert tuning.choose(PROBLEM, ways(calls), timer) == "descriptors"
    assert len(calls) == 2 * (tuning.LEAST_ROUNDS + 1)
    calls.clear()
    assert tuning.choose(PROBLEM, ways(calls), timer) == "descriptors"
    assert calls == []
    # Another process, another problem.
    assert tuning.Choices().get(PROBLEM) == "descriptors"
    other = tuning.Problem(**{**PROBLEM.__dict__, "rows": 16})
    assert tuning.choices().get(other) is None
    (row,) = tuning.Choices().rows()
    assert row["choice"] == "descriptors"
    assert row["milliseconds"] == {name: 1e3 * seconds for name, seconds in times.items()}


@pytest.mark.parametrize(
    ("gain", "noise", "chosen"),
    [
        (0.0, 0.02, "separate"),
        (0.002, 0.02, "separate"),
        (0.05, 0.02, "descriptors"),
        (0.01, 0.001, "descriptors"),
    ],
)
def test_another_way_must_win_by_more_than_is_uncertain(gain, noise, chosen):
    """Whatever the noise turns out to be: two runs agree."""
    for seed in range(30):
        random = Random(seed)
        cost = {"separate": 1.0, "pointers": 1.01, "descriptors": 1.0 - gain}
        timer = lambda way: cost[way()] * (1 + random.gauss(0, noise))  # noqa: B023, E731
        named = {name: lambda name=name: name for name in cost}
        assert tuning.fastest(tuning.measure(named, timer)) == chosen


def test_order_is_forwards_and_backwards():
    calls = []
    tuning.measure(ways(calls), lambda way: way() and 1.0)
    assert calls[2:6] == ["separate", "descriptors", "descriptors", "separate"]


def test_versions_are_in_the_key(tmp_path, monkeypatch):
    tuning.Choices(tmp_path).put(PROBLEM, {"separate": 1.0})
    changed = {**tuning.versions(), "triton": "another"}
    monkeypatch.setattr(tuning, "versions", lambda: changed)
    assert tuning.Choices(tmp_path).get(PROBLEM) is None


def test_processes_keep_each_others_choices(tmp_path):
    first, second = tuning.Choices(tmp_path), tuning.Choices(tmp_path)
    other = tuning.Problem(**{**PROBLEM.__dict__, "rows": 16})
    first.put(PROBLEM, {"separate": 1.0})
    second.put(other, {"separate": 1.0})
    assert len(tuning.Choices(tmp_path).rows()) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


GOOD = {"choice": "descriptors", "milliseconds": {"separate": 2.0, "descriptors": 1.0}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        {"x": 1},
        {PROBLEM.key(): {**GOOD, "choice": ["x"]}},
        {PROBLEM.key(): {**GOOD, "choice": None}},
        {PROBLEM.key(): {**GOOD, "milliseconds": None}},
        {PROBLEM.key(): {**GOOD, "milliseconds": {"separate": "fast"}}},
        {PROBLEM.key(): {"choice": "descriptors"}},
        {PROBLEM.key(): ["descriptors"]},
        {"no JSON": GOOD, "[]": GOOD, "{}": GOOD},
    ],
)
def test_a_broken_file_is_no_choice(content):
    kept = tuning.choices()
    kept.folder.mkdir()
    kept.path.write_text(content if isinstance(content, str) else json.dumps(content))
    kept = tuning.Choices()
    assert kept.get(PROBLEM) is None
    assert kept.rows() == []
    # And one that is whole is read.
    kept.path.write_text(json.dumps({PROBLEM.key(): GOOD}))
    assert tuning.Choices().get(PROBLEM) == "descriptors"


def test_a_folder_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert tuning.Choices(tmp_path / "file").put(PROBLEM, {"separate": 1.0}) == "separate"


def test_a_way_that_fails_is_left_out():
    def fail():
        raise RuntimeError("out of shared memory")

    with pytest.warns(UserWarning, match="out of shared memory"):
        times = tuning.measure({"separate": lambda: 1, "descriptors": fail}, lambda way: 1.0)
    assert list(times) == ["separate"]
    assert tuning.fastest(times) == "separate"
    with pytest.raises(RuntimeError):
        tuning.measure({"separate": fail}, lambda way: 1.0)


@pytest.mark.parametrize("reason", ["environment", "capture"])
def test_nothing_is_measured_where_it_may_not(monkeypatch, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: reason == "capture")
    if reason == "environment":
        monkeypatch.setenv("ROPE_DIST_TUNE", "0")
    calls = []
    assert tuning.choose(PROBLEM, ways(calls)) == "separate"
    assert calls == []
    assert tuning.choices().get(PROBLEM) is None


def test_rows_are_classes():
    assert [tuning.rows_class(n) for n in (1, 2, 3, 16, 17, 8192, 8193)] == [1, 2, 4, 16, 32, 8192, 16384]


def test_the_environment_fixes_the_path(triton_backend, device, monkeypatch):
    x = torch.randn(1, 2, 64, device=device).half()
    weight = torch.randn(64, 64, device=device).half()
    angles = {"head_dim": 64, "inv_freq": frequencies(64).to(device)}
    monkeypatch.setenv("ROPE_DIST_PATH", "pointers")
    got = ops.qkv_rotary(x, weight, weight, **angles)[0]
    want = ops.qkv_rotary(x, weight, weight, path="pointers", **angles)[0]
    assert torch.equal(got, want)
    monkeypatch.setenv("ROPE_DIST_PATH", "fast")
    with pytest.raises(ValueError, match="is no path"):
        ops.qkv_rotary(x, weight, weight, **angles)


@pytest.fixture
def as_on_a_gpu(device, monkeypatch):
    """Where there is none, tensors say that they are on one; what is run is what would be."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def projection_call(device, at=0):
    """Arguments of a choice; ``x`` begins at that element of its memory."""
    x = torch.randn(1 + 20 * 64, device=device).half()[at:][: 20 * 64].view(1, 20, 64)
    weight = (torch.randn(64, 64, device=device) / 8).half()
    words = ops.turns(frequencies(64).to(device))
    return x, weight, weight, None, None, None, None, 64, None, None, words, None, 1.0, False


def test_a_call_is_looked_up_once_it_was_measured(triton_backend, device, as_on_a_gpu, monkeypatch):
    call = projection_call(device)
    possible = dispatch_projection.candidates(*call[:4], 64, 64)
    monkeypatch.setattr(tuning, "may_measure", lambda: False)
    assert dispatch_projection.choose(*call) == "separate"
    assert dispatch_projection._CHOSEN == {}

    outputs = {}

    def timer(device, *, cold, queued):
        assert cold
        assert queued

        def time(way):
            outputs[len(outputs)] = way()[0].float()
            return 1.0 / len(outputs)

        return time

    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setattr(tuning.timing, "timer", timer)

    chosen = dispatch_projection.choose(*call)
    assert chosen in possible
    assert len(outputs) % len(possible) == 0
    assert len(outputs) >= len(possible) * tuning.timing.FEWEST_ROUNDS
    for out in outputs.values():
        torch.testing.assert_close(out, outputs[0], rtol=0, atol=4e-3)
    (row,) = tuning.choices().rows()
    assert (row["choice"], row["rows"], row["widths"], row["form"]) == (chosen, 32, [64, 64], "")
    monkeypatch.setattr(tuning, "choose", None)
    assert dispatch_projection.choose(*call) == chosen


def test_what_descriptors_cannot_read_has_a_choice_of_its_own(
    triton_backend, device, as_on_a_gpu, monkeypatch
):
    fastest = {"descriptors": 3, "pointers": 2, "separate": 1}
    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setattr(
        tuning, "measure", lambda ways, timer: {name: [1 / fastest[name]] * 9 for name in ways}
    )
    monkeypatch.setattr(tuning.timing, "timer", lambda *device, **options: None)
    aligned, odd = (projection_call(device, at) for at in (0, 1))
    if "descriptors" not in dispatch_projection.candidates(*aligned[:4], 64, 64):
        pytest.skip("this GPU has no descriptors")
    for _ in range(2):
        assert dispatch_projection.choose(*aligned) == "descriptors"
        assert dispatch_projection.choose(*odd) == "pointers"
        dispatch_projection._CHOSEN.clear()
        monkeypatch.setattr(tuning, "measure", None)
    assert sorted(row["form"] for row in tuning.choices().rows()) == ["", "unaligned"]


def test_deterministic_algorithms_are_not_chosen_by_the_clock(
    triton_backend, device, as_on_a_gpu, monkeypatch
):
    call = projection_call(device)
    monkeypatch.setitem(dispatch_projection._CHOSEN, "anything", "pointers")
    monkeypatch.setattr(tuning, "choose", None)
    monkeypatch.setattr(dispatch_projection, "candidates", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch_projection.choose(*call) == "separate"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    monkeypatch.setenv("ROPE_DIST_PATH", "pointers")
    torch.use_deterministic_algorithms(True)
    try:
        assert dispatch_projection.choose(*call) == "pointers"
    finally:
        torch.use_deterministic_algorithms(False)
