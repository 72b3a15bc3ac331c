"""Choosing by measurement: fastest wins, kept on disk, never where it may not measure."""

from __future__ import annotations

import json

import pytest
import torch

from rope_dist import ops
from rope_dist.ops import tuning

from .helpers import frequencies

PROBLEM = tuning.Problem("a GPU", "bfloat16", 8192, 4096, (4096, 1024, 1024), 128, 128)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path))
    monkeypatch.delenv("ROPE_DIST_PATH", raising=False)
    monkeypatch.delenv("ROPE_DIST_TUNE", raising=False)


def ways(calls: list[str]):
    return {name: lambda name=name: calls.append(name) or name for name in ("separate", "descriptors")}


def test_the_fastest_is_chosen_and_kept(tmp_path):
    times = {"separate": 2.0, "descriptors": 1.0}
    calls = []
    timer = lambda way: times[way()]  # noqa: E731
    assert tuning.choose(PROBLEM, ways(calls), timer) == "descriptors"
    assert len(calls) == 2 * (tuning.ROUNDS + 1)
    calls.clear()
    assert tuning.choose(PROBLEM, ways(calls), timer) == "descriptors"
    assert calls == []
    # Another process, another problem.
    assert tuning.Choices(tmp_path).get(PROBLEM) == "descriptors"
    other = tuning.Problem(**{**PROBLEM.__dict__, "rows": 16})
    assert tuning.choices().get(other) is None
    (row,) = tuning.Choices(tmp_path).rows()
    assert row["choice"] == "descriptors"
    assert row["milliseconds"] == {name: 1e3 * seconds for name, seconds in times.items()}


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


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"x": 1})])
def test_a_broken_file_is_no_choice(tmp_path, content):
    tuning.Choices(tmp_path).path.write_text(content)
    assert tuning.Choices(tmp_path).get(PROBLEM) is None


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


def test_a_call_is_looked_up_once_it_was_measured(triton_backend, monkeypatch):
    """The tensors say that they are on a GPU, and the timer is a count: what is run is what would be."""
    from contextlib import nullcontext

    from rope_dist.ops import dispatch_projection

    x, weight = torch.randn(1, 20, 64).half(), (torch.randn(64, 64) / 8).half()
    words = ops.turns(frequencies(64))
    call = (x, weight, weight, None, None, None, None, 64, None, None, words, None, 1.0, False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(tuning, "may_measure", lambda: False)
    monkeypatch.setattr(dispatch_projection, "_CHOSEN", {})
    assert dispatch_projection.choose(*call) == "separate"
    assert dispatch_projection._CHOSEN == {}

    outputs = {}

    def timer(device, *, cold):
        def time(way):
            outputs[len(outputs)] = way()[0].float()
            return 1.0 / len(outputs)

        return time

    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setattr(tuning.timing, "timer", timer)

    chosen = dispatch_projection.choose(*call)
    assert chosen in ("separate", "pointers", "descriptors")
    assert len(outputs) == 3 * tuning.ROUNDS
    for out in outputs.values():
        torch.testing.assert_close(out, outputs[0], rtol=0, atol=4e-3)
    (row,) = tuning.choices().rows()
    assert (row["choice"], row["rows"], row["widths"]) == (chosen, 32, [64, 64])
    monkeypatch.setattr(tuning, "choose", None)
    assert dispatch_projection.choose(*call) == chosen
