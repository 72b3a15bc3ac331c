"""Positions with several axes (M-RoPE) in the fused projections, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, frequencies

from rope_dist import ops

from .test_mrope import exact, positions
from .test_norm_projection import exact_heads
from .test_projection import SHARE, SLACK, exact_projection, possible_paths, problem

PATHS = ("separate", "triton", "triton_tma", "decode")


def of_axes(device, batches, length):
    """Frequencies ``[3, R/2]``, positions ``[3, B or 1, S]``, and the exact cosines and sines."""
    inv_freq = ops.mrope_frequencies(frequencies(64), [8, 12, 12])
    at = positions(batches, length, 100_000)
    angle = exact(inv_freq, at).to(device)
    return inv_freq.to(device), at.to(device), (angle.cos(), angle.sin())


@pytest.mark.parametrize("batches", [1, 2], ids=["shared", "each"])
@pytest.mark.parametrize("path", PATHS)
def test_values(triton_backend, device, path, batches):
    if path not in ("separate", "decode", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(30)
    length = 3 if path == "decode" else 70
    x, weights, biases = problem(device, torch.float16, batch=2, length=length, heads=(3, 2, 1), bias=True)
    inv_freq, at, tables = of_axes(device, batches, length)
    arguments = {"head_dim": 64, "inv_freq": inv_freq, "position_ids": at, "path": path}
    out = ops.qkv_rotary(x, *weights, *biases, **arguments)
    want = exact_projection(x, weights, biases, *tables, 64)
    for actual, expected in zip(out, want, strict=True):
        if path == "separate":  # rounds twice
            torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=4e-3)
        else:
            assert_rounded(actual, expected, few=4, share=SHARE[torch.float16], slack=SLACK)
    if path != "decode":
        norms = [torch.rand(64, device=device).half() for _ in range(2)]
        out = ops.qkv_norm_rotary(x, *weights, *norms, *biases, **arguments)
        want = exact_heads(x, weights, biases, norms, *tables, 64)
        for actual, expected in zip(out, want, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=4e-3, atol=4e-3)


def test_packed_gradients_and_the_cache(backend, device):
    torch.manual_seed(31)
    x, weights, _ = problem(device, torch.float32, length=6, depth=16, heads=(2, 1, 1))
    inv_freq, at, tables = of_axes(device, 1, 6)
    x.requires_grad_()
    out = ops.qkv_rotary(x[0], *weights, head_dim=64, inv_freq=inv_freq, position_ids=at[:, 0])
    double = x.detach().double().requires_grad_()
    want = exact_projection(double, weights, [None] * 3, *tables, 64)
    for actual, expected in zip(out, want, strict=True):
        torch.testing.assert_close(actual.double(), expected[0], rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(y) for y in out]
    (got,) = torch.autograd.grad(out, x, grads)
    (expected,) = torch.autograd.grad(want, double, [g[None].double() for g in grads])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)

    caches = [torch.zeros(9, 1, 64, device=device) for _ in range(2)]
    slots = torch.tensor([3, 1, 4, -1, 5, 8], device=device)
    q = ops.decode_rotary(
        x[0].detach(), *weights, k_cache=caches[0], v_cache=caches[1], slots=slots, inv_freq=inv_freq,
        position_ids=at[:, 0],
    )  # fmt: skip
    torch.testing.assert_close(q.double(), want[0][0].detach(), rtol=1e-5, atol=1e-5)
    written = slots >= 0
    for cache, expected in zip(caches, want[1:], strict=True):
        torch.testing.assert_close(
            cache[slots[written]].double(), expected[0, written].detach(), rtol=1e-5, atol=1e-5
        )


def test_axes_need_positions(device):
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1))
    inv_freq, at, _ = of_axes(device, 1, 5)
    for ids in (None, at[0], at[:2]):
        for call in (ops.qkv_rotary, lambda *t, **o: ops.qkv_norm_rotary(*t, None, None, **o)):
            with pytest.raises(ValueError, match="position_ids"):
                call(x, *weights, head_dim=64, inv_freq=inv_freq, position_ids=ids)
