"""Interleaved pairs rotated into halves, the form of multi-head latent attention: values, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

from rope_dist import ops
from rope_dist.ops import launch_cache

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def order(rotated: int, dim: int) -> torch.Tensor:
    """The interleaved dimension that each dimension of the result comes from."""
    return torch.cat((torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim)))


def want(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated in float64 as interleaved pairs, then put in order."""
    return exact(x, cos, sin, interleaved=True)[..., order(2 * cos.shape[-1], x.shape[-1]).to(x.device)]


def want_gradient(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Put in the order of interleaved pairs, then rotated back."""
    interleaved = torch.empty_like(grad)
    interleaved[..., order(2 * cos.shape[-1], grad.shape[-1]).to(grad.device)] = grad
    return exact(interleaved, cos, sin, interleaved=True, conjugate=True)


def problem(device, dtype=torch.float32, dim=64, rotated=64, counts=(5, 1)):
    torch.manual_seed(1)
    q, k = (torch.randn(2, 4, n, dim, device=device, dtype=torch.float64).to(dtype) for n in counts)
    inv_freq = frequencies(rotated).to(device)
    positions = torch.tensor([[0, 1, 2, 3], [9, 999, 9_999, 999_999]], device=device)
    cos, sin = exact_tables(inv_freq, positions)
    if dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return q, k, inv_freq, positions, cos, sin


@pytest.mark.parametrize("form", ["tables", "positions"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "rotated"), [(64, 64), (80, 48), (40, 40), (72, 72), (6, 6), (4, 2), (18, 10), (256, 256)]
)
@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "slice"])
def test_equals_float64_rounded(backend, device, form, dtype, dim, rotated, layout):
    q, k, inv_freq, positions, cos, sin = problem(device, dtype, dim, rotated)
    expected = [want(x, cos, sin) for x in (q, k)]
    if layout == "BHSD":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif layout == "slice":  # as the part with a position of a head, at an odd element
        q, k = (torch.cat((x[..., :3], x), -1)[..., 3:] for x in (q, k))
    if form == "tables":
        out = ops.rotary(q, k, cos, sin, deinterleave=True)
    else:
        out = ops.rotary_at(q, k, inv_freq, positions, deinterleave=True)
    for rotated_heads, right in zip(out, expected, strict=True):
        assert rotated_heads.is_contiguous()
        assert_rounded(rotated_heads, right)


@pytest.mark.parametrize("which", ["reference", "native"])
def test_float32_equals_deepseek_bit_for_bit(which):
    stock = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    q, k, _, _, cos, sin = problem("cpu", counts=(16, 1))
    both = [torch.cat((t, t), -1) for t in (cos, sin)]
    expected = stock.apply_rotary_pos_emb_interleave(q, k, *both, unsqueeze_dim=2)
    with ops.use_backend(which):
        if ops.backend_for(q) != which:
            pytest.skip(f"no {which} library")
        for actual, right in zip(ops.rotary(q, k, cos, sin, deinterleave=True), expected, strict=True):
            assert torch.equal(actual, right)


def test_interleaved_is_implied(backend, device):
    q, k, _, _, cos, sin = problem(device)
    expected = ops.rotary(q, k, cos, sin, deinterleave=True)
    for a, b in zip(ops.rotary(q, k, cos, sin, deinterleave=True, interleaved=True), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [48, 20])
def test_a_bias_is_in_the_order_of_the_input(backend, device, dtype, rotated):
    q, k, _, _, cos, sin = problem(device, dtype, 48, rotated)
    bias = torch.randn(q.shape[2] * 48, device=device).to(dtype)
    out, _ = ops.rotary(q, k, cos, sin, deinterleave=True, q_bias=bias)
    assert_rounded(out, want(q.double() + bias.double().unflatten(0, q.shape[2:]), cos, sin), few=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 48), (72, 72), (6, 6), (4, 2)])
def test_the_gradient_arrives_in_halves_and_leaves_interleaved(backend, device, dtype, dim, rotated):
    q, k, _, _, cos, sin = problem(device, dtype, dim, rotated)
    # No contiguous tensors, as attention returns them.
    grads = [torch.randn_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k)]
    leaves = [x.requires_grad_() for x in (q, k)]
    got = torch.autograd.grad(ops.rotary(*leaves, cos, sin, deinterleave=True), leaves, grads)
    for actual, upstream in zip(got, grads, strict=True):
        assert_rounded(actual, want_gradient(upstream.double(), cos, sin))


@pytest.mark.parametrize("which", ["reference", "native"])
def test_first_and_second_derivatives(which):
    q, k, _, _, cos, sin = problem("cpu", torch.float64, 8, 6, (2, 1))
    bias = torch.randn(16, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q[:1, :2].clone(), k[:1, :2].clone(), bias)]
    cos, sin = 1.1 * cos[:1, :2], 1.1 * sin[:1, :2]

    def rotated(q, k, bias):
        return ops.rotary(q, k, cos, sin, deinterleave=True, q_bias=bias)

    with ops.use_backend(which):
        if ops.backend_for(q) != which:
            pytest.skip(f"no {which} library")
        assert torch.autograd.gradcheck(rotated, inputs)
        assert torch.autograd.gradgradcheck(rotated, inputs)


def test_transforms(backend, device):
    q, k, _, _, cos, sin = problem(device, torch.float64, 8, 6, (2, 1))
    tangent = torch.randn_like(q)

    def ours(q):
        return ops.rotary(q, k, cos, sin, deinterleave=True)[0]

    close = {"rtol": 1e-6, "atol": 1e-6}
    out, forward = jvp(ours, (q,), (tangent,))
    torch.testing.assert_close((out, forward), (want(q, cos, sin), want(tangent, cos, sin)), **close)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(q, tangent))).tangent
    torch.testing.assert_close(dual, want(tangent, cos, sin), **close)
    loss = lambda q, f=ours: f(q).sin().sum()  # noqa: E731
    plain = lambda q: loss(q, lambda q: want(q, cos, sin))  # noqa: E731
    torch.testing.assert_close(grad(loss)(q), grad(plain)(q), **close)
    samples = torch.stack((q, -2 * q))
    torch.testing.assert_close(vmap(grad(loss))(samples), vmap(grad(plain))(samples), **close)
    torch.testing.assert_close(jacfwd(grad(loss))(q), hessian(plain)(q), **close)


def test_compiles_whole(device):
    q, k, inv_freq, positions, _, _ = problem(device)
    inv_freq_q64 = ops.to_fixed_point(inv_freq)

    def rotated(q, k):
        return ops.rotary_at(q * 2, k * 2, inv_freq_q64, positions, deinterleave=True)

    compiled = torch.compile(rotated, fullgraph=True, backend="aot_eager")
    q.requires_grad_()
    got, expected = compiled(q, k), rotated(q, k)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(got[0].sin().sum(), q),
        torch.autograd.grad(expected[0].sin().sum(), q),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("conjugate", [False, True])
def test_operators_keep_their_contracts(backend, device, conjugate):
    q, k, _, _, cos, sin = problem(device)
    options = {"cos": cos, "sin": sin, "deinterleave": True, "conjugate": conjugate}
    torch.library.opcheck(torch.ops.rope_dist.rotate, (q.requires_grad_(), k), options)


def test_the_launch_cache_tells_the_orders_apart(backend, device):
    q, k, _, _, cos, sin = problem(device)
    forms = {
        "halves": ({}, exact(q, cos, sin)),
        "interleaved": ({"interleaved": True}, exact(q, cos, sin, interleaved=True)),
        "deinterleave": ({"deinterleave": True}, want(q, cos, sin)),
    }
    for name in ["halves", "interleaved", "deinterleave"] * 2 + ["deinterleave", "halves"]:
        options, expected = forms[name]
        assert_rounded(ops.rotary(q, k, cos, sin, **options)[0], expected)
        # The gradient of deinterleave has the opposite order: another launch.
        leaf = q.clone().requires_grad_()
        out, _ = ops.rotary(leaf, k, cos, sin, **options)
        (gradient,) = torch.autograd.grad(out, leaf, expected.float())
        assert_rounded(gradient, q.double())
    if backend == "native":
        assert len(launch_cache._LAUNCHES) == 3 + 3 + 3  # functions, operators, their gradients


@pytest.mark.parametrize("form", ["table", "positions", "positions and bias"])
@pytest.mark.parametrize("conjugate", [False, True])
def test_tokens_of_no_sequence_are_copied_as_they_are(backend, device, form, conjugate):
    """Also those that are infinite, and not in another order."""
    torch.manual_seed(4)
    x = torch.randn(1, 12, 3, 20, device=device).bfloat16()
    bounds = torch.tensor([3, 5, 10], device=device, dtype=torch.int32)
    positions = torch.tensor([[0, 0, 0, 0, 1, 0, 1, 2, 3, 4, 0, 0]], device=device)
    within = torch.zeros(12, dtype=torch.bool, device=device)
    within[3:10] = True
    x[:, ~within, 0, 5] = float("inf")
    inv_freq = frequencies(16).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    bias = torch.randn(60, device=device).bfloat16() if "bias" in form else None
    biased = x.double() + (bias.double().view(3, 20) if bias is not None else 0)
    expected = want_gradient(biased, cos, sin) if conjugate else want(biased, cos, sin)
    expected[:, ~within] = biased[:, ~within]
    angles = {"inv_freq_q64": ops.to_fixed_point(inv_freq)}
    if form == "table":
        rows = exact_tables(inv_freq, torch.arange(12, device=device)[None])
        angles = dict(zip(("cos", "sin"), (t.float() for t in rows), strict=True))
    out, _ = torch.ops.rope_dist.rotate(
        x, None, bias, None, **angles, cu_seqlens=bounds, deinterleave=True, conjugate=conjugate
    )
    finite = expected.isfinite()
    assert torch.equal(out[~finite], expected[~finite].bfloat16())
    assert_rounded(out[finite], expected[finite])


def test_in_place_is_refused(backend, device):
    q, k, inv_freq, positions, cos, sin = problem(device)
    before = q.clone()
    for call in (
        lambda: ops.rotary(q, k, cos, sin, deinterleave=True, inplace=True),
        lambda: ops.rotary_at(q, k, inv_freq, positions, deinterleave=True, inplace=True),
        lambda: torch.ops.rope_dist.rotate_(q, k, cos=cos, sin=sin, deinterleave=True),
    ):
        with pytest.raises(ValueError, match=r"deinterleave writes a pair elsewhere .* give inplace=False"):
            call()
    assert torch.equal(q, before)


def test_a_projection_refuses_it():
    x, w = torch.randn(1, 3, 8), torch.randn(16, 8)
    cos, sin = (t.float() for t in exact_tables(frequencies(8), torch.arange(3)[None]))
    projections = (w, w, w, None, None, None, 8)
    with pytest.raises(ValueError, match="deinterleave is for heads that are there"):
        torch.ops.rope_dist.qkv_rotary(x, *projections, cos=cos, sin=sin, deinterleave=True)
    caches, slots = torch.zeros(2, 4, 2, 8), torch.arange(3)
    with pytest.raises(ValueError, match="deinterleave is for heads that are there"):
        torch.ops.rope_dist.decode_cached(
            x, *caches, slots, *projections, cos=cos, sin=sin, deinterleave=True
        )
    with pytest.raises(TypeError, match="deinterleave"):
        ops.qkv_rotary(x, w, w, w, head_dim=8, cos=cos, sin=sin, deinterleave=True)


def test_packed_gradients(backend, device):
    """What the gradient of a projection would be made of: rotated heads side by side."""
    q, k, _, _, cos, sin = problem(device)
    v = torch.randn_like(k)
    packed = torch.ops.rope_dist.pack_gradients(q, k, v, cos=cos, sin=sin, deinterleave=True, conjugate=True)
    expected = [want_gradient(x.double(), cos, sin) for x in (q, k)]
    assert_rounded(packed, torch.cat([x.flatten(2) for x in (*expected, v.double())], -1))
