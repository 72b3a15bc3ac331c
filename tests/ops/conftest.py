"""The kernels run on the GPU where there is one, else in Triton's interpreter.

Interpretation is fixed when a kernel is decorated, so it is asked for here, before one is imported.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from helpers import triton_interpreter as interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch):
    """No choice of these tests, whose times may be invented, is kept where real ones are."""
    monkeypatch.setenv("ROPE_DIST_CACHE", str(tmp_path / "choices"))
    monkeypatch.delenv("ROPE_DIST_PATH", raising=False)
    monkeypatch.delenv("ROPE_DIST_TUNE", raising=False)
    from rope_dist.ops import launch_cache

    launch_cache.clear()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request, device):
    """Run the test on each backend that is installed."""
    from rope_dist import ops
    from rope_dist.ops import native

    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    reason = native.Native().supports(torch.empty(0, device=device)) if request.param == "native" else None
    if reason is not None:
        pytest.skip(reason)
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_backend():
    """Run the test on the kernels."""
    from rope_dist import ops

    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    with ops.use_backend("triton"):
        yield
