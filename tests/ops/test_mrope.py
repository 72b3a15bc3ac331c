"""Positions with several axes (M-RoPE): against float64 and against stock Qwen2-VL and Qwen3-VL."""

from __future__ import annotations

import math

import pytest
import torch

from rope_dist import ops
from rope_dist.ops.arguments import Angles

SECTIONS = [2, 3, 3]
PAIRS = sum(SECTIONS)


def positions(batch: int, length: int, most: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-most, most, (3, batch, length), generator=generator)


def frequencies(pairs: int = PAIRS) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(pairs) / pairs)


def rotated(x: torch.Tensor, angle: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """float64, of pairs as complex numbers: ``x [B, S, H, D]``, ``angle [B, S, R/2]``."""
    pairs = angle.shape[-1]
    wide, turn = x.double(), torch.polar(torch.ones_like(angle), angle)[:, :, None]
    out = wide.clone()
    if interleaved:
        turned = torch.complex(wide[..., 0 : 2 * pairs : 2], wide[..., 1 : 2 * pairs : 2]) * turn
        out[..., 0 : 2 * pairs : 2], out[..., 1 : 2 * pairs : 2] = turned.real, turned.imag
    else:
        turned = torch.complex(wide[..., :pairs], wide[..., pairs : 2 * pairs]) * turn
        out[..., :pairs], out[..., pairs : 2 * pairs] = turned.real, turned.imag
    return out


def exact(inv_freq: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The angle of every token and pair, float64."""
    return torch.einsum("abs,ap->bsp", position_ids.double(), inv_freq.double()) % (2 * math.pi)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batches", [1, 2], ids=["shared", "each"])
def test_values_and_gradients(backend, device, interleaved, batches):
    q = torch.randn(2, 7, 4, 2 * PAIRS + 4, device=device, requires_grad=True)
    k = torch.randn(2, 7, 1, 2 * PAIRS + 4, device=device, requires_grad=True)
    inv_freq = ops.mrope_frequencies(frequencies(), SECTIONS)
    at = positions(batches, 7, 1_000_000)
    angle = exact(inv_freq, at)
    out = ops.rotary_at(
        q, k, inv_freq.to(device), at.to(device), interleaved=interleaved, attention_scaling=1.25
    )
    grads = [torch.randn_like(x) for x in out]
    torch.autograd.backward(out, grads)
    for x, y, grad in zip((q, k), out, grads, strict=True):
        for found, given, turn in ((y, x, angle), (x.grad, grad, -angle)):
            expected = rotated(given.detach().cpu(), turn, interleaved)
            expected[..., : 2 * PAIRS] *= 1.25
            torch.testing.assert_close(found.detach().cpu().double(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_and_in_place(backend, device, dtype):
    q, k = (torch.randn(9, heads, 2 * PAIRS, device=device, dtype=dtype) for heads in (3, 2))
    words = ops.to_fixed_point(ops.mrope_frequencies(frequencies(), SECTIONS, interleaved=True).to(device))
    at = positions(1, 9).int().to(device)
    expected = ops.rotary_at(q[None], k[None], words, at)
    for _ in range(2):  # the second one is a launch that is kept
        a, b = q.clone(), k.clone()
        out = ops.rotary_at(a, b, words, at[:, 0], inplace=True)
        assert out[0].data_ptr() == a.data_ptr()
        assert a.equal(expected[0][0])
        assert b.equal(expected[1][0])


def test_one_axis_is_the_plain_rotation(backend, device):
    q = torch.randn(2, 5, 3, 2 * PAIRS, device=device)
    at = positions(2, 5)[:1].to(device)
    inv_freq = frequencies().to(device)
    one, _ = ops.rotary_at(q, None, inv_freq[None], at)
    assert one.equal(ops.rotary_at(q, None, inv_freq, at[0])[0])


def test_normalised_heads(backend, device):
    q = torch.randn(2, 5, 3, 2 * PAIRS, device=device)
    weight = torch.rand(2 * PAIRS, device=device)
    inv_freq = ops.mrope_frequencies(frequencies(), SECTIONS)
    at = positions(2, 5)
    out, _ = ops.norm_rotary_at(q, None, weight, None, inv_freq.to(device), at.to(device), eps=0.01)
    wide = q.cpu().double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight.cpu().double()
    torch.testing.assert_close(out.cpu().double(), rotated(normed, exact(inv_freq, at)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["Qwen2-VL", "Qwen3-VL"])
def test_sections_as_stock(interleaved):
    """The tables of stock's rotary embedding, as its attention puts them together."""
    if interleaved:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Rotary
    else:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig as Config
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding as Rotary
    sections = [24, 20, 20] if interleaved else [16, 24, 24]
    scheme = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Config(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=128, rope_parameters=scheme
    )
    stock = Rotary(config)
    q, k = (torch.randn(2, 11, heads, 128) for heads in (2, 1))
    at = positions(2, 11).abs()
    cos, sin = stock(q, at)
    if cos.ndim == 4:  # transformers' attention puts the axes together, up to 5.20 or so
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(t.split(2 * sections, -1))], -1)
            for t in (cos, sin)
        )
    expected = ops.rotary(q, k, cos[..., :64], sin[..., :64])
    inv_freq = ops.mrope_frequencies(stock.inv_freq, sections, interleaved=interleaved)
    for found, wanted in zip(ops.rotary_at(q, k, inv_freq, at), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=5e-4, rtol=0)  # stock's angle is a float32 product


def test_compiles_whole():
    q = torch.randn(1, 5, 2, 2 * PAIRS)
    inv_freq, at = ops.mrope_frequencies(frequencies(), SECTIONS), positions(1, 5)
    compiled = torch.compile(
        lambda q: ops.rotary_at(q, None, inv_freq, at)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q), ops.rotary_at(q, None, inv_freq, at)[0])


def test_operator(backend, device):
    q = torch.randn(1, 5, 2, 2 * PAIRS, device=device)
    words = ops.to_fixed_point(ops.mrope_frequencies(frequencies(), SECTIONS).to(device))
    angles = Angles(inv_freq_q64=words, positions=positions(1, 5).to(device))
    torch.library.opcheck(torch.ops.rope_dist.rotate.default, (q, None, None, None, *angles))


@pytest.mark.parametrize(
    ("position_ids", "says"),
    [
        (None, "need position_ids"),
        (torch.zeros(1, 5).long(), r"must be \[3, 2 or 1, 5\]"),
        (torch.zeros(2, 1, 5).long(), "must be"),
    ],
)
def test_positions_that_do_not_fit(position_ids, says):
    q = torch.randn(2, 5, 2, 2 * PAIRS)
    with pytest.raises(ValueError, match=says):
        ops.rotary_at(q, None, ops.mrope_frequencies(frequencies(), SECTIONS), position_ids)


@pytest.mark.parametrize("sections", [[], [0, 8], [4, 3], [-1, 9]])
def test_sections_that_do_not_fit(sections):
    with pytest.raises(ValueError, match="mrope_section must be positive and sum up"):
        ops.mrope_frequencies(frequencies(), sections)
