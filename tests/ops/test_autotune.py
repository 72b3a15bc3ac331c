"""Choosing by measurement: fastest wins, kept on disk, never where it may not measure."""

from __future__ import annotations

import json
from contextlib import nullcontext
from random import Random

import pytest
import torch
from helpers.tensors import frequencies

from rope_dist import ops
from rope_dist.ops import autotune, dispatch, dispatch_projection
from rope_dist.ops.arguments import Angles, Projections

KEY = autotune.AutotuneKey("a GPU", "bfloat16", 8192, 4096, (4096, 1024, 1024), 128, 128)


def candidate_calls(calls: list[str]):
    return {name: lambda name=name: calls.append(name) or name for name in ("separate", "triton_tma")}


def test_the_fastest_is_chosen_and_kept():
    times = {"separate": 2.0, "triton_tma": 1.0}
    calls = []
    timer = lambda call: times[call()]  # noqa: E731
    assert autotune.choose(KEY, candidate_calls(calls), timer) == "triton_tma"
    assert len(calls) == 2 * (autotune.LEAST_ROUNDS + 1)
    calls.clear()
    assert autotune.choose(KEY, candidate_calls(calls), timer) == "triton_tma"
    assert calls == []
    # Another process, another problem.
    assert autotune.AutotuneCache().get(KEY) == "triton_tma"
    other = autotune.AutotuneKey(**{**KEY.__dict__, "rows": 16})
    assert autotune.cache().get(other) is None
    (row,) = autotune.AutotuneCache().rows()
    assert row["choice"] == "triton_tma"
    assert row["milliseconds"] == {name: 1e3 * seconds for name, seconds in times.items()}


@pytest.mark.parametrize(
    ("gain", "noise", "chosen"),
    [
        (0.0, 0.02, "separate"),
        (0.002, 0.02, "separate"),
        (0.05, 0.02, "triton_tma"),
        (0.01, 0.001, "triton_tma"),
    ],
)
def test_another_path_must_win_by_more_than_is_uncertain(gain, noise, chosen):
    """Whatever the noise turns out to be: two runs agree."""
    for seed in range(30):
        random = Random(seed)
        cost = {"separate": 1.0, "triton": 1.01, "triton_tma": 1.0 - gain}
        timer = lambda call: cost[call()] * (1 + random.gauss(0, noise))  # noqa: B023, E731
        named = {name: lambda name=name: name for name in cost}
        assert autotune.fastest(autotune.measure(named, timer)) == chosen


def test_order_is_forwards_and_backwards():
    calls = []
    autotune.measure(candidate_calls(calls), lambda call: call() and 1.0)
    assert calls[2:6] == ["separate", "triton_tma", "triton_tma", "separate"]


def test_versions_are_in_the_key(tmp_path, monkeypatch):
    autotune.AutotuneCache(tmp_path).put(KEY, {"separate": 1.0})
    changed = {**autotune.versions(), "triton": "another"}
    monkeypatch.setattr(autotune, "versions", lambda: changed)
    assert autotune.AutotuneCache(tmp_path).get(KEY) is None


def test_processes_keep_each_others_choices(tmp_path):
    first, second = autotune.AutotuneCache(tmp_path), autotune.AutotuneCache(tmp_path)
    other = autotune.AutotuneKey(**{**KEY.__dict__, "rows": 16})
    first.put(KEY, {"separate": 1.0})
    second.put(other, {"separate": 1.0})
    assert len(autotune.AutotuneCache(tmp_path).rows()) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


GOOD = {"choice": "triton_tma", "milliseconds": {"separate": 2.0, "triton_tma": 1.0}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        {"x": 1},
        {KEY.line(): {**GOOD, "choice": ["x"]}},
        {KEY.line(): {**GOOD, "choice": None}},
        {KEY.line(): {**GOOD, "milliseconds": None}},
        {KEY.line(): {**GOOD, "milliseconds": {"separate": "fast"}}},
        {KEY.line(): {"choice": "triton_tma"}},
        {KEY.line(): ["triton_tma"]},
        {"no JSON": GOOD, "[]": GOOD, "{}": GOOD},
    ],
)
def test_a_broken_file_is_no_choice(content):
    kept = autotune.cache()
    kept.folder.mkdir()
    kept.path.write_text(content if isinstance(content, str) else json.dumps(content))
    kept = autotune.AutotuneCache()
    assert kept.get(KEY) is None
    assert kept.rows() == []
    # And one that is whole is read.
    kept.path.write_text(json.dumps({KEY.line(): GOOD}))
    assert autotune.AutotuneCache().get(KEY) == "triton_tma"


def test_a_folder_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert autotune.AutotuneCache(tmp_path / "file").put(KEY, {"separate": 1.0}) == "separate"


def test_a_candidate_that_fails_is_left_out():
    def fail():
        raise RuntimeError("out of shared memory")

    with pytest.warns(UserWarning, match="out of shared memory"):
        times = autotune.measure({"separate": lambda: 1, "triton_tma": fail}, lambda call: 1.0)
    assert list(times) == ["separate"]
    assert autotune.fastest(times) == "separate"
    with pytest.raises(RuntimeError):
        autotune.measure({"separate": fail}, lambda call: 1.0)


@pytest.mark.parametrize("reason", ["environment", "capture"])
def test_nothing_is_measured_where_it_may_not(monkeypatch, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: reason == "capture")
    if reason == "environment":
        monkeypatch.setenv("ROPE_DIST_TUNE", "0")
    calls = []
    assert autotune.choose(KEY, candidate_calls(calls)) == "separate"
    assert calls == []
    assert autotune.cache().get(KEY) is None


def test_rows_are_classes():
    assert [autotune.rows_class(n) for n in (1, 2, 3, 16, 17, 8192, 8193)] == [1, 2, 4, 16, 32, 8192, 16384]


def test_the_environment_fixes_the_path(triton_backend, device, monkeypatch):
    x = torch.randn(1, 2, 64, device=device).half()
    weight = torch.randn(64, 64, device=device).half()
    angles = {"head_dim": 64, "inv_freq": frequencies(64).to(device)}
    monkeypatch.setenv("ROPE_DIST_PATH", "triton")
    got = ops.qkv_rotary(x, weight, weight, **angles)[0]
    want = ops.qkv_rotary(x, weight, weight, path="triton", **angles)[0]
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
    angles = Angles(inv_freq_q64=ops.to_fixed_point(frequencies(64).to(device)))
    return x, Projections(weight, weight, None, None, None, None, 64), angles


def choose(call) -> str:
    return dispatch_projection.choose(dispatch.projecting(call[0]), *call)[0]


def candidates(call) -> list[str]:
    """Paths and configurations that are measured."""
    backend = dispatch.projecting(call[0])
    paths = dispatch_projection.candidates(backend, *call[:2], 32)
    return dispatch_projection.configured(backend, paths, *call[:2])


def test_a_call_is_measured_once(triton_backend, device, as_on_a_gpu, monkeypatch):
    call = projection_call(device)
    possible = candidates(call)
    monkeypatch.setattr(autotune, "may_measure", lambda: False)
    assert dispatch_projection.choose(dispatch.projecting(call[0]), *call) == ("separate", False)

    outputs = {}

    def timer(device, *, cold, queued):
        assert cold
        assert queued

        def time(call):
            outputs[len(outputs)] = call()[0][0].float()
            return 1.0 / len(outputs)

        return time

    monkeypatch.setattr(autotune, "may_measure", lambda: True)
    monkeypatch.setattr(autotune.timing, "timer", timer)

    chosen = choose(call)
    assert chosen in possible
    assert len(outputs) % len(possible) == 0
    assert len(outputs) >= len(possible) * autotune.timing.FEWEST_ROUNDS
    for out in outputs.values():
        torch.testing.assert_close(out, outputs[0], rtol=0, atol=4e-3)
    (row,) = autotune.cache().rows()
    assert (row["choice"], row["rows"], row["widths"], row["form"]) == (chosen, 32, [64, 64], "")
    monkeypatch.setattr(autotune, "measure", None)
    assert dispatch_projection.choose(dispatch.projecting(call[0]), *call) == (chosen, True)


def test_what_descriptors_cannot_read_has_a_choice_of_its_own(
    triton_backend, device, as_on_a_gpu, monkeypatch
):
    fastest = {"triton_tma": 3, "triton": 2, "separate": 1}
    monkeypatch.setattr(autotune, "may_measure", lambda: True)
    monkeypatch.setattr(
        autotune, "measure", lambda calls, timer: {name: [1 / fastest.get(name, 0.5)] * 9 for name in calls}
    )
    monkeypatch.setattr(autotune.timing, "timer", lambda *device, **options: None)
    aligned, odd = (projection_call(device, at) for at in (0, 1))
    if "triton_tma" not in candidates(aligned):
        pytest.skip("this GPU has no descriptors")
    for _ in range(2):
        assert choose(aligned) == "triton_tma"
        assert choose(odd) == "triton"
        monkeypatch.setattr(autotune, "measure", None)
    assert sorted(row["form"] for row in autotune.cache().rows()) == ["", "no TMA"]


def test_deterministic_algorithms_are_not_chosen_by_the_clock(
    triton_backend, device, as_on_a_gpu, monkeypatch
):
    call = projection_call(device)
    monkeypatch.setattr(autotune, "choose", None)
    monkeypatch.setattr(dispatch_projection, "candidates", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(call) == "separate"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    monkeypatch.setenv("ROPE_DIST_PATH", "triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(call) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
