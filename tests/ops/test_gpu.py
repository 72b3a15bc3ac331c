"""What only a GPU can show: capture in CUDA graphs, no waiting for the device, the measured choice."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import frequencies

from rope_dist import ops
from rope_dist.ops import autotune, native

from .test_projection import problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def calls(device) -> dict:
    """One call of every operator, by name, on its own tensors."""
    x, weights, _ = problem(device, torch.bfloat16, length=200, depth=256, heads=(8, 2, 2), dim=128)
    inv_freq_q64 = ops.to_fixed_point(frequencies(128).to(device))
    positions = torch.arange(200, device=device)[None]
    q, k = (torch.randn(1, 200, h, 128, device=device).bfloat16() for h in (8, 2))
    caches = [torch.zeros(32, 2, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    slots = torch.arange(4, device=device)
    cos, sin = (t.contiguous() for t in ops.cos_sin(frequencies(128).to(device), positions))
    return {
        "rotary": lambda: ops.rotary(q, k, cos, sin),
        "rotary_at": lambda: ops.rotary_at(q, k, inv_freq_q64, positions),
        "qkv_rotary": lambda: ops.qkv_rotary(
            x, *weights, head_dim=128, inv_freq=inv_freq_q64, position_ids=positions
        ),
        "decode": lambda: (
            ops.decode_rotary(
                x[:, :4],
                *weights,
                k_cache=caches[0],
                v_cache=caches[1],
                slots=slots,
                inv_freq=inv_freq_q64,
                position_ids=positions[:, :4],
            ),
        ),
    }


@pytest.mark.parametrize("name", ["rotary", "rotary_at", "qkv_rotary", "decode"])
def test_captured_in_a_graph(device, name):
    call = calls(device)[name]
    want = [y.clone() for y in call()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for y in out:
        y.zero_()
    graph.replay()
    for actual, expected in zip(out, want, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["rotary", "rotary_at", "qkv_rotary", "decode"])
def test_does_not_wait_for_the_device(device, name):
    call = calls(device)[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_first_call_measures_and_the_next_does_not(device, monkeypatch):
    call = calls(device)["qkv_rotary"]
    call()
    (row,) = autotune.cache().rows()
    assert set(row["milliseconds"]) >= {"separate", row["choice"]}
    monkeypatch.setattr(autotune, "measure", None)
    call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_native_kernel_agrees_with_tritons(device, dtype, interleaved):
    inv_freq_q64 = ops.to_fixed_point(frequencies(128).to(device))
    positions = torch.randint(0, 1_000_000, (2, 300), device=device)
    q, k = (torch.randn(2, 300, h, 128, device=device).to(dtype) for h in (8, 2))
    reason = native.Native().supports(q)
    if reason is not None:
        pytest.skip(reason)
    results = {}
    for backend in ("triton", "native"):
        with ops.use_backend(backend):
            results[backend] = ops.rotary_at(q, k, inv_freq_q64, positions, interleaved=interleaved)
    # One unit in the last place: the multiply-adds of one are products and sums of the other.
    unit = torch.finfo(dtype).eps
    for a, b in zip(results["triton"], results["native"], strict=True):
        torch.testing.assert_close(a, b, rtol=unit, atol=8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_native_gradient_of_norm_and_rotary_agrees_with_the_reference(device, dtype, joint):
    angle = torch.rand(1, 300, 64, device=device) * 6
    xs = [torch.randn(2, 300, h, 128, device=device).to(dtype).requires_grad_() for h in (8, 2)]
    weights = [
        torch.rand(128 * (h if joint else 1), device=device).to(dtype).requires_grad_() for h in (8, 2)
    ]
    reason = native.Native().supports(xs[0])
    if reason is not None:
        pytest.skip(reason)
    grads = [torch.randn_like(x) for x in xs]
    results = {}
    for backend in ("reference", "native", "native again"):
        with ops.use_backend(backend.split()[0]):
            out = ops.norm_rotary(*xs, *weights, angle.cos(), angle.sin())
            results[backend] = torch.autograd.grad(out, (*xs, *weights), grads)
    unit = torch.finfo(dtype).eps
    for right, a, b in zip(*results.values(), strict=True):
        assert torch.equal(a, b)
        assert (a.double() - right.double()).abs().max() <= 2 * unit * right.double().abs().max() + 1e-5
