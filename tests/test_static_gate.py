"""The static gate itself: it passes on one kernel of each kind, and it fails when a limit is not kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run(*arguments: str, code: str = "pass") -> subprocess.CompletedProcess:
    """In a process of its own: this one interprets kernels, that one compiles them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = f"import sys; from tools import static_gate as g; {code}; sys.exit(g.main({list(arguments)}))"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "only",
    [
        "rotary 32+8 in place",
        "rotary deinterleave",
        "projection table",
        "decode 7B",
        "norm + rotary 32+8",
        "norm of all heads + rotary gradient 40+8",
    ],
)
def test_passes_on_hopper(only):
    result = run("--target", "sm_90", "--only", only)
    assert result.returncode == 0, result.stdout + result.stderr
    assert only in result.stdout


def test_names_the_kernel_and_the_number_that_fell_short():
    result = run("--target", "sm_90", "--only", "rotary 32+1", code="g.static_rotary.WIDE['registers'] = 8")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FELL SHORT: rotary 32+1 on sm_90: registers" in result.stdout
    assert "at most 8" in result.stdout
