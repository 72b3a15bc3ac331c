"""A bias added before the rotation: the end of a projection whose product was made without it."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies

from rope_dist import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def inputs(dtype, device, dim=96, heads=(6, 2), tokens=(2, 3)):
    torch.manual_seed(3)
    q, k = (torch.randn(*tokens, n, dim, device=device).to(dtype) for n in heads)
    biases = [torch.randn(n * dim, device=device).to(dtype) for n in heads]
    return q, k, *biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [96, 40])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("inplace", "which"), [(False, "both"), (True, "q"), (False, "k"), (True, "both")])
def test_equals_float64_rounded_once(backend, device, dtype, rotated, interleaved, inplace, which):
    q, k, q_bias, k_bias = inputs(dtype, device)
    biases = {"q_bias": q_bias, "k_bias": k_bias}
    if which != "both":
        biases = {f"{which}_bias": biases[f"{which}_bias"]}
    positions = torch.randint(0, 100_000, (2, 3), device=device)
    inv_freq = frequencies(rotated).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    expected = []
    for name, x in (("q_bias", q), ("k_bias", k)):
        biased = x.double() + (biases[name].double().unflatten(0, x.shape[2:]) if name in biases else 0)
        expected.append(exact(biased, cos.float(), sin.float(), interleaved=interleaved))
    options = {"interleaved": interleaved, "inplace": inplace, **biases}
    if which == "both":
        out = ops.rotary(q, k, cos.float(), sin.float(), **options)
    else:
        out = ops.rotary_at(q, k, inv_freq, positions, **options)
    for x, rotated_heads, want in zip((q, k), out, expected, strict=True):
        assert (rotated_heads.data_ptr() == x.data_ptr()) == inplace
        assert_rounded(rotated_heads, want, few=3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(backend, inplace, interleaved):
    q, k, q_bias, k_bias = (x.requires_grad_() for x in inputs(torch.float64, "cpu", 6, (2, 1), (2, 3)))
    cos, sin = (torch.randn(2, 3, 2, dtype=torch.float64) for _ in range(2))

    def rotated(q, k, q_bias, k_bias):
        # In place on a result of something, as on a projection's; a leaf may not be changed.
        return ops.rotary(
            q * 1, k * 1, cos, sin, interleaved=interleaved, inplace=inplace, q_bias=q_bias, k_bias=k_bias
        )

    torch.autograd.gradcheck(rotated, (q, k, q_bias, k_bias))


def test_only_the_bias_is_trained(backend, device):
    q, k, _, k_bias = inputs(torch.float32, device)
    cos, sin = (torch.randn(1, 3, 48, device=device) for _ in range(2))
    k_bias.requires_grad_()
    _, rotated = ops.rotary(q, k, cos, sin, k_bias=k_bias, inplace=True)
    rotated.square().sum().backward()
    assert k_bias.grad.shape == k_bias.shape
    assert k_bias.grad.abs().sum() > 0


def test_operators_keep_their_contracts(backend, device):
    q, k, q_bias, k_bias = inputs(torch.float32, device, 16, (2, 1), (1, 3))
    cos, sin = (torch.randn(1, 3, 8, device=device) for _ in range(2))
    for x in (q, k, q_bias, k_bias):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.rope_dist.rotate, (q, k, q_bias, k_bias, cos, sin))
    detached = [x.detach() for x in (q, k, q_bias, k_bias)]
    torch.library.opcheck(torch.ops.rope_dist.rotate_, (*detached, cos, sin))


def test_equals_a_linear_layer_with_its_bias(backend, device):
    """The product without the bias, then bias and rotation: what the whole layer gives, with one rounding less."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 4 * 16, device=device)
    x = torch.randn(1, 7, 32, device=device)
    cos, sin = ops.cos_sin(frequencies(16).to(device), torch.arange(7, device=device)[None])
    whole = layer(x).unflatten(-1, (4, 16))
    product = torch.nn.functional.linear(x, layer.weight).unflatten(-1, (4, 16))
    expected, _ = ops.rotary(whole, whole[:, :, :1], cos, sin)
    rotated, _ = ops.rotary(product, product[:, :, :1], cos, sin, q_bias=layer.bias)
    torch.testing.assert_close(rotated, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(5),
        torch.zeros(2, 16),
        torch.zeros(32, dtype=torch.float64),
        torch.zeros(32, device="meta"),
    ],
    ids=["size", "shape", "dtype", "device"],
)
def test_a_bias_that_does_not_fit(bias):
    q, k, *_ = inputs(torch.float32, "cpu", 16, (2, 1), (1, 3))
    table = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match=r"q_bias must be \[32\] torch.float32 on cpu, got"):
        ops.rotary(q, k, table, table, q_bias=bias)
