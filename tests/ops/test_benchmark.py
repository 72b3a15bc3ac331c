"""What the benchmarks time on a GPU computes the right thing: every way is admitted by the harness' own check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def only_the_check(monkeypatch, tmp_path):
    """The interpreter's times mean nothing: each way is called to be compared, and not again."""
    monkeypatch.syspath_prepend(str(ROOT))
    # On a GPU the choice of a path is measured: by the invented times, which must not outlive the test.
    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path))
    from benchmarks import harness

    monkeypatch.setattr(harness, "peak_memory", lambda call, device: 0)
    monkeypatch.setattr(harness.timing, "sample", lambda calls, timer, **_: {name: [1.0] for name in calls})


def admitted(question: str, tokens: int, device: torch.device) -> list[dict]:
    """Every case of that script at a small size, measured once."""
    import importlib

    from benchmarks.harness import measure
    from benchmarks.question import Options, Size
    from benchmarks.shapes import Shape

    shape = Shape("small", 2, 1, 64, 64, 64, 1, 64, 1e4)
    module = importlib.import_module(f"benchmarks.{question}")
    options = Options(device, (), True, None)
    found = [
        measure(case, device, seconds=0.0) for case in module.cases(Size(shape, tokens, "bf16"), options)
    ]
    for case in found:
        for name, result in case["results"].items():
            assert "seconds" in result, (case["name"], name, result)
    return found


@pytest.mark.parametrize("tokens", [3, 20])
def test_projections(triton_backend, device, tokens):
    forward, backward = admitted("projection", tokens, device)
    assert {"rope_dist", "rope_dist, separate", "rope_dist, pointers"} <= set(forward["results"])
    assert ("rope_dist, decode" in forward["results"]) == (tokens <= 16)
    assert "rope_dist, pointers" in backward["results"]


def test_decoding(triton_backend, device):
    (case,) = admitted("decode", 3, device)
    assert {"rope_dist, decode", "rope_dist, with the cache write"} <= set(case["results"])


def test_rotary(triton_backend, device):
    (case,) = admitted("rotary", 5, device)
    assert {"rope_dist, in place, no table", "Hugging Face", "copy"} <= set(case["results"])
