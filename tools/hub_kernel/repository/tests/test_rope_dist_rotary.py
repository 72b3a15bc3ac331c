"""Run with ``kernel-builder testshell``, or after ``pip install kernels`` in the folder of the repository."""

from pathlib import Path

import pytest
import torch

try:
    import rope_dist_rotary as kernel
except ImportError:
    import kernels

    kernel = kernels.get_local_kernel(Path(__file__).resolve().parent.parent)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def stock(q, k, cos, sin, unsqueeze_dim=1):
    def rotate_half(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def tensors(dtype):
    torch.manual_seed(1)
    q, k = (torch.randn(2, 7, heads, 16, device=DEVICE, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.rand(1, 7, 8, device=DEVICE).repeat(1, 1, 2) * 100
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(dtype):
    q, k, cos, sin = tensors(dtype)
    wide = [x.double().requires_grad_() for x in (q, k)]
    expected = stock(*wide, cos.double(), sin.double())
    weights = [torch.randn_like(x) for x in expected]
    torch.autograd.backward(expected, weights)

    heads = [x.detach().requires_grad_() for x in (q, k)]
    found = kernel.apply_rotary_pos_emb(*heads, cos, sin)
    torch.autograd.backward(found, [w.to(dtype) for w in weights])
    options = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    torch.testing.assert_close(found, expected, **options)
    torch.testing.assert_close([x.grad for x in heads], [x.grad for x in wide], **options)


@pytest.mark.kernels_ci
def test_compiled():
    q, k, cos, sin = tensors(torch.float32)
    compiled = torch.compile(kernel.apply_rotary_pos_emb, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, cos, sin), stock(q, k, cos, sin), rtol=1e-5, atol=1e-5)


@pytest.mark.kernels_ci
def test_layer():
    q, k, cos, sin = tensors(torch.float32)
    layer = kernel.layers.apply_rotary_transformers()
    torch.testing.assert_close(layer(q, k, cos, sin), stock(q, k, cos, sin), rtol=1e-5, atol=1e-5)
