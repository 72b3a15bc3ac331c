"""What the benchmarks time on a GPU computes the right thing: every implementation passes the harness' own check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def only_the_check(monkeypatch, tmp_path):
    """The interpreter's times mean nothing: each implementation is called to be compared, and not again."""
    monkeypatch.syspath_prepend(str(ROOT))
    # On a GPU the choice of a path is measured: by the invented times, which must not outlive the test.
    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path))
    from benchmarks import harness

    monkeypatch.setattr(harness, "peak_memory", lambda call: 0)
    monkeypatch.setattr(harness.timing, "sample", lambda calls, timer, **_: {name: [1.0] for name in calls})


def admitted(name: str, tokens: int, device: torch.device) -> list[set[str]]:
    """The implementations of every case of that benchmark at a small size, each measured once."""
    from benchmarks.benchmark import Options, Size, find
    from benchmarks.harness import measure
    from benchmarks.shapes import Shape

    shape, options = Shape("small", 2, 1, 64, 64, 64, 1, 64, 1e4), Options(device, ())
    found = [
        measure(case, device, seconds=0.0) for case in find(name).cases(Size(shape, tokens, "bf16"), options)
    ]
    assert not [row for rows in found for row in rows if "seconds" not in row]
    return [{row["implementation"] for row in rows} for rows in found]


@pytest.mark.parametrize("tokens", [3, 20])
def test_projections(triton_backend, device, tokens):
    forward, backward = admitted("projection", tokens, device)
    assert {"rope_dist", "rope_dist, separate", "rope_dist, triton"} <= set(forward)
    assert ("rope_dist, decode" in forward) == (tokens <= 16)
    assert "rope_dist, triton" in backward


def test_decoding(triton_backend, device):
    (case,) = admitted("decode", 3, device)
    assert {"rope_dist, decode", "rope_dist, with the cache write"} <= set(case)


def test_rotary(triton_backend, device):
    (case,) = admitted("rotary", 5, device)
    assert {"rope_dist, in place, no table", "huggingface", "copy"} <= set(case)
