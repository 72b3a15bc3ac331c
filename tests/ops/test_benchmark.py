"""The benchmark's ways all compute the same thing, and it refuses a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels():
    sys.path.insert(0, str(ROOT))
    try:
        yield pytest.importorskip("benchmarks.kernels")
    finally:
        sys.path.remove(str(ROOT))


def shape(kernels, tokens: int, device):
    return kernels.Shape("small", tokens, device, (4, 2, 64, 128, 1e4))


@pytest.mark.parametrize("tokens", [3, 40])
def test_projections_agree(triton_backend, kernels, device, tokens):
    problem = shape(kernels, tokens, device)
    ways = kernels.projection_ways(problem, compiled=False)
    assert ("fused, decode" in ways) == (tokens <= 16)
    want = None
    for name, way in ways.items():
        if name.endswith("alone"):
            continue
        out = torch.cat([y.flatten() for y in way()]).float()
        want = out if want is None else want
        assert (out - want).norm() < 0.01 * want.norm(), name


def test_rotations_agree(triton_backend, kernels, device):
    problem = shape(kernels, 5, device)
    ways = kernels.rotary_ways(problem, compiled=False)
    want = ways["stock"]()
    native = [name for name in ways if name.startswith("native library")]
    for name in (*native, "new tensors, positions", "in place, table"):
        for out, expected in zip(ways[name](), want, strict=True):
            assert (out.float() - expected.float()).norm() < 0.01 * expected.float().norm(), name


def test_a_table_names_what_did_not_run(kernels):
    text = kernels.table(
        {
            "first": {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "peak_mb": 4.0},
            "second": {"error": "OutOfResources: shared memory"},
        }
    )
    assert "1.000" in text
    assert "OutOfResources" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "needs a GPU" in result.stderr
    script = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh"],
        env={"OUT": str(tmp_path), "PY": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert script.returncode == 2
