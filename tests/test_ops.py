"""The rotary operator against float64, stock Hugging Face and complex multiplication."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_dist import ops
from rope_dist.ops.arguments import Angles
from rope_dist.ops.reference import rotate
from rope_dist.strategies import default_inv_freq


def case(batch=2, tokens=5, q_heads=4, k_heads=2, dim=16, dtype=torch.float32, rotary=None, start=0):
    generator = torch.Generator().manual_seed(batch + 31 * tokens + dim)
    q = torch.randn(batch, tokens, q_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, tokens, k_heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    position_ids = torch.arange(start, start + tokens)[None]
    return q, k, *ops.cos_sin(default_inv_freq(10000.0, rotary or dim), position_ids)


def complex_rotation(x, cos, sin, interleaved):
    """Each pair is a complex number, multiplied by exp(i angle): an independent formula, in float64."""
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = (
        torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos.double(), sin.double())[:, :, None]
    )
    real = torch.view_as_real(turned)
    flat = real.flatten(-2) if interleaved else real.transpose(-1, -2).flatten(-2)
    return torch.cat((flat, rest), -1)


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 9),
    q_heads=st.integers(1, 5),
    k_heads=st.integers(1, 3),
    half=st.integers(1, 20),
    passed=st.integers(0, 6),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_complex_multiplication(batch, tokens, q_heads, k_heads, half, passed, interleaved, dtype):
    q, k, cos, sin = case(batch, tokens, q_heads, k_heads, 2 * half + passed, dtype, rotary=2 * half)
    for x, out in zip((q, k), ops.rotary(q, k, cos, sin, interleaved=interleaved), strict=True):
        exact = complex_rotation(x, cos, sin, interleaved)
        assert out.dtype == dtype
        assert out.is_contiguous()
        if dtype in (torch.float16, torch.bfloat16):
            # Rounded once: the float32 result can sit on the other side of a tie, no farther.
            wrong = (out != exact.to(dtype)).sum()
            assert wrong <= max(1, 2e-4 * out.numel())
        else:
            torch.testing.assert_close(
                out.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14
            )


@pytest.mark.parametrize("start", [0, 16383])
def test_float32_equals_stock_bit_for_bit(start):
    q, k, cos, sin = case(tokens=7, start=start)
    stock = apply_rotary_pos_emb(
        q.transpose(1, 2), k.transpose(1, 2), torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    )
    ours = ops.rotary(q, k, cos, sin)
    for a, b in zip(stock, ours, strict=True):
        assert torch.equal(a.transpose(1, 2), b)


def test_bfloat16_is_nearer_to_float64_than_stock():
    q, k, cos, sin = case(tokens=64, dim=64, dtype=torch.bfloat16)
    exact = complex_rotation(q, cos, sin, False)
    tables = [torch.cat((t, t), -1).bfloat16() for t in (cos, sin)]
    stock = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *tables)[0].transpose(1, 2)
    ours = ops.rotary(q, k, cos, sin)[0]
    assert (ours.double() - exact).square().mean() < 0.5 * (stock.double() - exact).square().mean()


def test_strided_input_is_left_alone():
    _, k, cos, sin = case(dim=16)
    wide = torch.randn(2, 4, 5, 40)
    view = wide.transpose(1, 2)[..., 3:19]
    before = wide.clone()
    assert torch.equal(ops.rotary(view, k, cos, sin)[0], ops.rotary(view.contiguous(), k, cos, sin)[0])
    assert torch.equal(wide, before)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 6])
def test_gradients(interleaved, rotary):
    q, k, cos, sin = case(1, 3, 2, 1, 8, torch.float64, rotary=rotary)
    scaled = (cos.double() * 1.1, sin.double() * 1.1)
    q.requires_grad_()
    k.requires_grad_()

    def function(q, k):
        return ops.rotary(q, k, *scaled, interleaved=interleaved)

    assert torch.autograd.gradcheck(function, (q, k))
    assert torch.autograd.gradgradcheck(function, (q, k))


def test_gradient_of_one_of_two():
    q, k, cos, sin = case(dtype=torch.float64)
    k.requires_grad_()
    grad = torch.randn_like(k)
    (ops.rotary(q, k, cos, sin)[1] * grad).sum().backward()
    torch.testing.assert_close(k.grad, rotate(grad, cos, sin, conjugate=True))
    assert q.grad is None


def test_the_conjugate_undoes_the_rotation():
    q, k, cos, _ = case(dtype=torch.float64)
    angle = cos.double().acos()  # tables whose squares sum to 1 in float64
    angles = Angles(angle.cos(), angle.sin())
    there = torch.ops.rope_dist.rotate(q, k, None, None, *angles)
    back = torch.ops.rope_dist.rotate(*there, None, None, *angles.conjugated())
    torch.testing.assert_close(back, (q, k), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    """Schema, fake kernel, autograd and compilation agree with the implementation."""
    q, k, cos, sin = case(dtype=dtype)
    torch.library.opcheck(
        torch.ops.rope_dist.rotate.default, (q.requires_grad_(), k.requires_grad_(), None, None, cos, sin)
    )


def test_compiles_whole():
    q, k, cos, sin = case()
    compiled = torch.compile(lambda *tensors: ops.rotary(*tensors), fullgraph=True)
    for a, b in zip(compiled(q, k, cos, sin), ops.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, c, s: (q[0], k, c, s), r"must be \[B, S, heads, D\]"),
        (lambda q, k, c, s: (q, k[:, :4], c, s), "one B, S and D"),
        (lambda q, k, c, s: (q, k[..., :8], c, s), "one B, S and D"),
        (lambda q, k, c, s: (q, k, c[:, :4], s[:, :4]), "B or 1, S, R/2"),
        (lambda q, k, c, s: (q, k, c[0, :4], s[0, :4]), "B or 1, S, R/2"),
        (lambda q, k, c, s: (q, k, c.repeat(3, 1, 1), s.repeat(3, 1, 1)), "B or 1, S, R/2"),
        (lambda q, k, c, s: (q, k, c, s[..., :4]), "B or 1, S, R/2"),
        (lambda q, k, c, s: (q[..., :8], k[..., :8], c, s), "rotate 16 dimensions, the heads have 8"),
        (lambda q, k, c, s: (q, k.double(), c, s), "one floating dtype"),
        (lambda q, k, c, s: (q.long(), k.long(), c, s), "one floating dtype"),
        (lambda q, k, c, s: (q, k, c, s.double()), "cos and sin must have one floating dtype"),
        (lambda q, k, c, s: (q, k, c.to("meta"), s), "one device"),
        (lambda q, k, c, s: (q, k, c.requires_grad_(), s), "constants of the rotation"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary(*change(*case()))
