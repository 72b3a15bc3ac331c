"""The kernel for the hub by its Triton kernel."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import hub_kernel as hub

from rope_dist import ops

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (16, {}),
        (8, {"table_layout": "cat"}),
        (8, {"table_layout": "half"}),
        (16, {"table_layout": "cat", "interleaved": True}),
        (8, {"table_layout": "half", "interleaved": True}),
    ],
)
@pytest.mark.parametrize("has_k", [True, False])
def test_values_and_gradients(dtype, width, options, has_k, device, monkeypatch):
    monkeypatch.setenv("ROPE_DIST_ROTARY_BACKEND", "triton")
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, h, 5, 16, generator=generator).to(device, dtype).requires_grad_() for h in (4, 2))
    angles = (
        torch.rand(1, 5, width if options.get("table_layout") == "half" else width // 2, generator=generator)
        * 9
    )
    if options.get("table_layout") != "half":
        angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    kernel = hub.kernel()
    assert sys.modules[f"{kernel.__name__}.backend"].is_triton(q)

    def run(function, q, k, *tables):
        out = [x for x in function(q, k if has_k else None, *tables, **options) if x is not None]
        heads = [q, k][: len(out)]
        return out, torch.autograd.grad(out, heads, [torch.ones_like(x) for x in out])

    found = run(kernel.apply_rotary_pos_emb, q, k, cos, sin)
    with ops.use_backend("reference"):
        expected = run(ops.apply_rotary_pos_emb, q.double(), k.double(), cos.double(), sin.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    with torch.no_grad():  # the launch of an earlier call
        again = kernel.apply_rotary_pos_emb(q, k if has_k else None, cos, sin, **options)[0]
    assert torch.equal(again, found[0][0])
