"""RMS norm and rotation in one: values and gradients against plain formulas in float64, on every backend."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies, heads_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacrev, vmap

from rope_dist import ops
from rope_dist.ops import launch_cache, native
from rope_dist.ops.backend import Backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A rotation of float32 is rounded a few times, a norm before it as often again.
SLACK = {torch.float16: 4.0, torch.bfloat16: 2.0, torch.float32: 1.0}


def normed(x, weight, eps=1e-6, offset=0.0):
    """``x`` ``[B, S, H, D]`` over its root mean square: of each head, or of all where there are weights for all."""
    rows = x.flatten(2) if weight is not None and weight.numel() != x.shape[3] else x
    rows = rows / torch.sqrt(rows.pow(2).sum(-1, keepdim=True) / rows.shape[-1] + eps)
    if weight is not None:
        rows = rows * (weight.double() + offset)
    return rows.view(x.shape)


def plain(
    x, weight, cos, sin, *, bias=None, eps=1e-6, offset=0.0, after=False, interleaved=False, known=None
):
    """Norm and rotation in float64; ``known`` ``[B, S]``: tokens that are rotated."""
    x = x.double() + (bias.double().view(x.shape[2:]) if bias is not None else 0)

    def turned(x):
        out = exact(x, cos, sin, interleaved=interleaved)
        return out if known is None else torch.where(known[..., None, None], out, x)

    return normed(turned(x), weight, eps, offset) if after else turned(normed(x, weight, eps, offset))


def weight_of(kind: str | None, heads: int, dim: int, device, dtype=torch.float32) -> torch.Tensor | None:
    """``kind``: "head", "joint" or None."""
    if kind is None:
        return None
    return (0.5 + torch.rand(dim if kind == "head" else heads * dim, device=device)).to(dtype)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_equals_float64_rounded(backend, device, data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    dim = draw(st.sampled_from((64, 80, 96, 128, 256, 2, 18)))
    half = draw(st.sampled_from((dim // 2, max(1, dim // 4), max(1, dim // 2 - 1))))
    q_heads, k_heads = draw(st.sampled_from(((1, 1), (3, 1), (9, 3), (8, 2), (40, 8), (5, 5))))
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layout = draw(st.sampled_from(("BSHD", "BHSD", "packed", "strided")))
    kinds = draw(st.sampled_from((("head", "head"), ("joint", "joint"), (None, "joint"), ("head", None))))
    order = {"after": draw(st.booleans()), "interleaved": draw(st.booleans())}
    eps, offset = draw(st.sampled_from((1e-6, 1e-2))), draw(st.sampled_from((0.0, 1.0)))
    inplace, scaling = draw(st.booleans()), draw(st.sampled_from((1.0, 1.25)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, k = (heads_of(layout, batch, length, n, dim, dtype, device) for n in (q_heads, k_heads))
    weight_dtype = draw(st.sampled_from((dtype, torch.float32, torch.float64)))
    weights = [
        weight_of(kind, n, dim, device, weight_dtype)
        for kind, n in zip(kinds, (q_heads, k_heads), strict=True)
    ]
    biases = [None, None]
    if draw(st.booleans()):
        biases = [torch.randn(n * dim, device=device).to(dtype) for n in (q_heads, k_heads)]
    positions = torch.randint(0, 1_000_001, (draw(st.sampled_from((1, batch))), length), device=device)
    inv_freq = frequencies(2 * half).to(device)
    cos, sin = exact_tables(inv_freq, positions, scaling)
    table = draw(st.booleans())
    if table:
        cos, sin = cos.float(), sin.float()
    want = [
        plain(x, w, cos, sin, bias=b, eps=eps, offset=offset, **order)
        for x, w, b in zip((q, k), weights, biases, strict=True)
    ]
    options = {
        "eps": eps, "weight_offset": offset, "norm_after": order["after"], "interleaved": order["interleaved"],
        "inplace": inplace, "q_bias": biases[0], "k_bias": biases[1],
    }  # fmt: skip
    if table:
        out = ops.norm_rotary(q, k, *weights, cos, sin, **options)
    else:
        out = ops.norm_rotary_at(q, k, *weights, inv_freq, positions, attention_scaling=scaling, **options)
    for x, y, expected in zip((q, k), out, want, strict=True):
        assert (y.data_ptr() == x.data_ptr()) == inplace
        assert inplace or y.is_contiguous()
        assert_rounded(y, expected, few=3, slack=SLACK[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["head", "joint"])
def test_rounding_differs_in_few_elements(triton_backend, device, dtype, kind):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 16, n, 128, device=device).to(dtype) for n in (32, 8))
    weights = [weight_of(kind, n, 128, device) for n in (32, 8)]
    positions = torch.randint(0, 1_000_001, (1, 16), device=device)
    inv_freq = frequencies(128, 500000.0).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    out = ops.norm_rotary_at(q, k, *weights, inv_freq, positions)
    want = [plain(x, w, cos, sin) for x, w in zip((q, k), weights, strict=True)]
    assert_rounded(torch.cat(out, 2), torch.cat(want, 2), few=0, slack=SLACK[dtype])


# Head size, heads, kinds of norm, rotated dimensions, and what else is not the default.
GRADIENTS = [
    (64, (4, 1), ("head", "head"), 64, {}),
    (80, (3, 3), ("joint", "joint"), 80, {}),
    (96, (5, 1), ("head", "head"), 48, {"norm_after": True}),
    (128, (8, 2), ("joint", "head"), 128, {"weight_offset": 1.0}),
    (256, (2, 1), (None, "joint"), 64, {"interleaved": True}),
    (18, (20, 5), ("head", None), 16, {"interleaved": True, "norm_after": True, "eps": 0.1}),
    (80, (40, 8), ("joint", "joint"), 32, {"norm_after": True, "weight_offset": 1.0}),
    (2, (1, 1), ("head", "joint"), 2, {}),
]


FORMS = ("table", "positions and bias", "packed", "transposed")


@pytest.mark.parametrize(
    ("case", "form"), [(case, FORMS[(i + j) % 4]) for i, case in enumerate(GRADIENTS) for j in (0, 1)]
)
def test_gradients(backend, device, case, form):
    dim, heads, kinds, rotary_dim, options = case
    torch.manual_seed(1)
    layout = "BHSD" if form == "transposed" else "BSHD"
    q, k = (heads_of(layout, 1, 5, n, dim, torch.float32, device) for n in heads)
    weights = [weight_of(kind, n, dim, device) for kind, n in zip(kinds, heads, strict=True)]
    biases = [torch.randn(n * dim, device=device) if "bias" in form else None for n in heads]
    leaves = [x.requires_grad_() for x in (q, k, *weights, *biases) if x is not None]
    inv_freq, positions = frequencies(rotary_dim).to(device), torch.tensor([[7, 8, 900, 0, 3]], device=device)
    known = None
    if form == "packed":
        positions = torch.tensor([[0, 0, 1, 0, 0]], device=device)
        known = torch.tensor([[False, True, True, True, False]], device=device)
    cos, sin = exact_tables(inv_freq, positions)
    order = {"after": options.get("norm_after", False), "offset": options.get("weight_offset", 0.0)}
    order |= {name: options[name] for name in ("eps", "interleaved") if name in options}
    want = [
        plain(x, w, cos, sin, bias=b, known=known, **order)
        for x, w, b in zip((q, k), weights, biases, strict=True)
    ]
    if form == "packed":
        bounds = torch.tensor([1, 3, 4], device=device)
        out = ops.norm_rotary_at(q[0], k[0], *weights, inv_freq, cu_seqlens=bounds, **options)
        out = [x[None] for x in out]
    elif form == "positions and bias":
        options = {**options, "q_bias": biases[0], "k_bias": biases[1]}
        out = ops.norm_rotary_at(q, k, *weights, inv_freq, positions, **options)
    else:
        out = ops.norm_rotary(q, k, *weights, cos.float(), sin.float(), **options)
    grads = [heads_of(layout, 1, 5, n, dim, torch.float32, device) for n in heads]
    got = torch.autograd.grad(out, leaves, grads)
    expected = torch.autograd.grad(want, leaves, [g.double() for g in grads])
    for x, actual, right in zip(leaves, got, expected, strict=True):
        assert actual.shape == x.shape
        assert actual.dtype == x.dtype
        torch.testing.assert_close(actual, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["head", "joint"])
def test_gradients_of_16_bit_heads_are_rounded_once(backend, device, kind):
    torch.manual_seed(2)
    q, k = (torch.randn(2, 7, n, 64, device=device).bfloat16().requires_grad_() for n in (6, 2))
    weights = [weight_of(kind, n, 64, device).requires_grad_() for n in (6, 2)]
    cos, sin = (
        t.float() for t in exact_tables(frequencies(64).to(device), torch.arange(7, device=device)[None])
    )
    wide = [x.detach().double().requires_grad_() for x in (q, k, *weights)]
    want = [plain(x, w, cos, sin) for x, w in zip(wide[:2], wide[2:], strict=True)]
    out = ops.norm_rotary(q, k, *weights, cos, sin)
    grads = [torch.randn_like(y) for y in out]
    got = torch.autograd.grad(out, (q, k, *weights), grads)
    expected = torch.autograd.grad(want, wide, [g.double() for g in grads])
    for actual, right in zip(got[:2], expected[:2], strict=True):
        assert_rounded(actual, right, few=3, slack=4.0)
    for actual, right in zip(got[2:], expected[2:], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [("head", "joint"), ("joint", "head")])
def test_gradients_of_any_number_of_programs(triton_backend, device, kinds):
    """Each takes tokens of its own and sums what the weights get of them; the same number gives the same bits."""
    from rope_dist.ops import triton_norm_backward
    from rope_dist.ops.arguments import Angles, Norms

    torch.manual_seed(6)
    q, k = (torch.randn(2, 2, n, 80, device=device) for n in (20, 4))
    weights = [weight_of(kind, n, 80, device) for kind, n in zip(kinds, (20, 4), strict=True)]
    cos, sin = exact_tables(frequencies(80).to(device), torch.arange(2, device=device)[None])
    norms, angles = Norms(*weights), Angles(cos.float(), sin.float())
    wide = [x.double().requires_grad_() for x in (q, k, *weights)]
    want = [plain(x, w, cos, sin) for x, w in zip(wide[:2], wide[2:], strict=True)]
    grads = tuple(torch.randn_like(x) for x in (q, k))
    expected = torch.autograd.grad(want, wide, [g.double() for g in grads])
    rstds = torch.ops.rope_dist.norm_rotate(q, k, None, None, *norms, *angles)[2:]
    found = [
        triton_norm_backward.launch(grads, (q, k), rstds, norms, angles, num_programs=programs)
        for programs in (1, 5, 5, 100)
    ]
    for gradients in found:
        for actual, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual.double(), right, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(first, again) for first, again in zip(*found[1:3], strict=True))


@pytest.mark.parametrize("axis", range(4))
def test_elements_past_two_to_the_31(triton_backend, device, axis):
    """Elements so far apart that a 32-bit offset would land elsewhere; only the touched pages exist."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 7 * 2**30:
        pytest.skip("needs 7 GiB")
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    shape, strides = [1, 1, 1, 4], [64, 64, 64, 2**30 if axis == 3 else 1]
    if axis < 3:
        shape[axis], strides[axis] = 2, 2**31 + 64
    q = memory.as_strided(shape, strides)
    values = torch.randn(shape, device=device).half()
    q.copy_(values)
    weight = weight_of("joint", shape[2], 4, device).requires_grad_()
    inv_freq = frequencies(4).to(device)
    positions = torch.full(shape[:2], 123, device=device)
    wide, wide_weight = values.double().requires_grad_(), weight.detach().double().requires_grad_()
    want = plain(wide, wide_weight, *exact_tables(inv_freq, positions))
    out, _ = ops.norm_rotary_at(q, None, weight, None, inv_freq, positions)
    assert_rounded(out.detach(), want.detach())
    leaf = q.detach().requires_grad_()
    out, _ = ops.norm_rotary_at(leaf, None, weight, None, inv_freq, positions)
    got = torch.autograd.grad(out, (leaf, weight), torch.ones_like(out))
    expected = torch.autograd.grad(want.sum(), (wide, wide_weight))
    for actual, right in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        ops.norm_rotary_at(q, None, weight, None, inv_freq, positions, inplace=True)
    assert_rounded(q.clone(), want.detach())


@pytest.mark.parametrize("kind", ["head", "joint"])
def test_weights_and_biases_that_are_not_contiguous(backend, device, kind):
    q = torch.randn(1, 3, 2, 16, device=device)
    weight = weight_of(kind, 4, 16, device)[::2] if kind == "joint" else torch.rand(32, device=device)[1::2]
    bias = torch.randn(32, 2, device=device)[:, 1]
    leaves = [x.detach().requires_grad_() for x in (q, weight, bias)]
    inv_freq = frequencies(16).to(device)
    positions = torch.arange(3, device=device)[None]
    tables = exact_tables(inv_freq, positions)
    out, _ = ops.norm_rotary_at(leaves[0], None, leaves[1], None, inv_freq, positions, q_bias=leaves[2])
    want = plain(leaves[0], leaves[1], *tables, bias=leaves[2])
    assert_rounded(out.detach(), want.detach())
    grad = torch.randn_like(out)
    got, right = (torch.autograd.grad(y, leaves, grad.to(y.dtype)) for y in (out, want))
    torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        for _ in range(2):
            again, _ = ops.norm_rotary_at(q, None, weight, None, inv_freq, positions, q_bias=bias)
            assert_rounded(again, want.detach())


def test_what_needs_no_gradient_gets_none(backend, device):
    """Only weights are trained, of one of the two, in their own dtype; the other output needs no gradient."""
    q, k = (torch.randn(1, 4, n, 16, device=device) for n in (4, 2))
    weight = weight_of("head", 4, 16, device, torch.bfloat16).requires_grad_()
    cos, sin = (
        t.float() for t in exact_tables(frequencies(16).to(device), torch.arange(4, device=device)[None])
    )
    q_out, k_out = ops.norm_rotary(q, k, weight, None, cos, sin)
    wide = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain(q, wide, cos, sin).square().sum(), wide)
    q_out.square().sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-2, atol=1e-2)
    assert q.grad is None
    assert_rounded(k_out.detach(), plain(k, None, cos, sin))
    # A gradient that is one number for all elements, as a sum's is, has strides of zero.
    leaf = q.clone().requires_grad_()
    (got,) = torch.autograd.grad(ops.norm_rotary(leaf, k, weight, None, cos, sin)[0].sum(), leaf)
    wide = q.double().requires_grad_()
    (want,) = torch.autograd.grad(plain(wide, weight.detach(), cos, sin).sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 0, 4, 1], [1] * 9])
def test_packed_sequences_count_from_their_own_start(backend, device, lengths):
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    offsets = torch.arange(len(lengths), device=device) * 5
    positions = torch.cat([torch.arange(n) + 5 * i for i, n in enumerate(lengths)]).to(device)
    q, k = (torch.randn(tokens, n, 64, device=device) for n in (4, 2))
    weights = [weight_of("head", n, 64, device) for n in (4, 2)]
    inv_freq = frequencies(64).to(device)
    cos, sin = exact_tables(inv_freq, positions[None])
    for out in (
        ops.norm_rotary_at(q, k, *weights, inv_freq, cu_seqlens=bounds, seqlen_offsets=offsets),
        ops.norm_rotary_at(q, k, *weights, inv_freq, positions),
    ):
        for x, w, y in zip((q, k), weights, out, strict=True):
            assert_rounded(y, plain(x[None], w, cos, sin)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_tokens_of_no_sequence_are_normalised_only(backend, device, after, kind, interleaved, inplace):
    """Not even an infinity reaches its partner: over an infinite norm it is no number, and all others are zero."""
    torch.manual_seed(4)
    x = torch.randn(6, 3, 20, device=device).bfloat16()
    known = torch.tensor([[False, False, True, True, True, False]], device=device)
    positions = torch.tensor([[0, 0, 0, 1, 0, 0]], device=device)
    bounds = torch.tensor([2, 4, 5], device=device, dtype=torch.int32)
    x[0, 1, 5] = float("inf")
    weight = weight_of(kind, 3, 20, device)
    cos, sin = exact_tables(frequencies(16).to(device), positions)
    want = plain(x[None], weight, cos, sin, known=known, after=after, interleaved=interleaved)[0]
    assert want[0].isnan().sum() == 1
    options = {"norm_after": after, "interleaved": interleaved, "inplace": inplace}
    inv_freq = frequencies(16).to(device)
    out, _ = ops.norm_rotary_at(x, None, weight, None, inv_freq, cu_seqlens=bounds, **options)
    assert torch.equal(out.isnan(), want.isnan())
    assert_rounded(out[~want.isnan()], want[~want.isnan()])


def test_tables_of_two_axes_and_queries_alone(backend, device):
    q = torch.randn(2, 5, 3, 16, device=device)
    weight = weight_of("head", 3, 16, device)
    cos, sin = (
        t.float() for t in exact_tables(frequencies(16).to(device), torch.arange(5, device=device)[None])
    )
    want = plain(q, weight, cos, sin)
    leaf = q.clone().requires_grad_()
    out, none = ops.norm_rotary(leaf, None, weight, None, cos[0], sin[0])
    assert none is None
    assert_rounded(out.detach(), want)
    (got,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    wide = q.double().requires_grad_()
    (right,) = torch.autograd.grad(plain(wide, weight, cos, sin).sum(), wide)
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)
    _, none = ops.norm_rotary(q, None, weight, None, cos[0], sin[0], inplace=True)
    assert none is None
    assert_rounded(q, want)


def test_parts_of_one_projection_in_place(backend, device):
    """Queries and keys of a packed projection, whose values stay what they were."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 8 * 16, device=device).unflatten(-1, (8, 16))
    before = qkv.clone()
    weights = [weight_of("joint", n, 16, device) for n in (4, 2)]
    cos, sin = (
        t.float() for t in exact_tables(frequencies(16).to(device), torch.arange(3, device=device)[None])
    )
    ops.norm_rotary(qkv[:, :, :4], qkv[:, :, 4:6], *weights, cos, sin, inplace=True)
    assert_rounded(qkv[:, :, :4].clone(), plain(before[:, :, :4], weights[0], cos, sin))
    assert_rounded(qkv[:, :, 4:6].clone(), plain(before[:, :, 4:6], weights[1], cos, sin))
    assert torch.equal(qkv[:, :, 6:], before[:, :, 6:])


@pytest.mark.parametrize("shape", [(0, 3, 2, 64), (2, 0, 2, 64), (2, 3, 0, 64)])
def test_nothing_in_nothing_out(backend, device, shape):
    q, k = torch.randn(shape, device=device), torch.randn(shape, device=device)
    weight = weight_of("head", 1, 64, device)
    table = torch.zeros(1, shape[1], 32, device=device)
    assert ops.norm_rotary(q, k, weight, None, table, table, inplace=True)[0].shape == shape
    weight.requires_grad_()
    out = ops.norm_rotary(q.requires_grad_(), k, weight, weight, table, table)
    assert [y.shape for y in out] == [shape, shape]
    (out[0].sum() + out[1].sum()).backward()
    assert q.grad.shape == shape
    assert weight.grad.eq(0).all()


def test_no_pairs_to_rotate(backend, device):
    q = torch.randn(1, 2, 3, 8, device=device)
    out, _ = ops.norm_rotary_at(q, q, None, None, torch.ones(0, device=device))
    assert_rounded(out, normed(q.double(), None))


def test_a_head_of_odd_size(backend, device):
    q = torch.randn(1, 2, 3, 7, device=device, requires_grad=True)
    weight = weight_of("head", 3, 7, device)
    cos, sin = (
        t.float() for t in exact_tables(frequencies(6).to(device), torch.arange(2, device=device)[None])
    )
    out, _ = ops.norm_rotary(q, None, weight, None, cos, sin)
    want = plain(q, weight, cos, sin)
    assert_rounded(out.detach(), want.detach())
    (got,), (right,) = (torch.autograd.grad(y.square().sum(), q) for y in (out, want))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [("head", "head"), ("joint", "head"), (None, "joint")])
@pytest.mark.parametrize("after", [False, True])
def test_first_and_second_derivatives_in_float64(kinds, after):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, n, 6, dtype=torch.float64) for n in (2, 1))
    weights = [
        w.double() if (w := weight_of(kind, n, 6, "cpu")) is not None else None
        for kind, n in zip(kinds, (2, 1), strict=True)
    ]
    bias = torch.randn(12, dtype=torch.float64)
    cos, sin = exact_tables(frequencies(4), torch.arange(2)[None])
    present = [x.requires_grad_() for x in (q, k, *weights, bias) if x is not None]

    def call(q, k, *rest):
        rest = iter(rest)
        ws = [next(rest) if w is not None else None for w in weights]
        return ops.norm_rotary(q, k, *ws, cos, sin, norm_after=after, weight_offset=0.5, q_bias=next(rest))

    torch.autograd.gradcheck(call, present)
    torch.autograd.gradgradcheck(call, present, atol=1e-4)


def test_operators_keep_their_contracts(backend, device):
    q, k = (torch.randn(1, 3, n, 8, device=device) for n in (2, 1))
    weights = [weight_of(kind, n, 8, device) for kind, n in (("joint", 2), ("head", 1))]
    biases = [torch.randn(n * 8, device=device) for n in (2, 1)]
    tables = [torch.randn(1, 3, 4, device=device) for _ in range(2)]
    norms = (*weights, 1e-6, 0.0, False)
    plain_arguments = (q, k, *biases, *norms, *tables)
    _, _, *rstds = torch.ops.rope_dist.norm_rotate(*plain_arguments)
    grads = (torch.randn_like(q), torch.randn_like(k))
    torch.library.opcheck(
        torch.ops.rope_dist.norm_rotate_backward, (*grads, q, k, *rstds, *biases, *norms, *tables)
    )
    torch.library.opcheck(torch.ops.rope_dist.norm_rotate_, plain_arguments)
    leaves = [x.clone().requires_grad_() for x in (q, k, *biases, *weights)]
    torch.library.opcheck(torch.ops.rope_dist.norm_rotate, (*leaves, 1e-6, 0.0, False, *tables))


@pytest.mark.parametrize("form", ["table", "packed", "in place"])
def test_compiled_in_one_graph(device, form):
    torch.compiler.reset()
    q, k = (torch.randn(1, 5, n, 16, device=device) for n in (4, 2))
    weights = [weight_of("head", n, 16, device).requires_grad_() for n in (4, 2)]
    inv_freq = frequencies(16).to(device)
    bounds = torch.tensor([0, 2, 5], device=device)
    cos, sin = ops.cos_sin(inv_freq, torch.arange(5, device=device)[None])

    def call(q, k, *weights):
        if form == "packed":
            return ops.norm_rotary_at(q[0], k[0], *weights, inv_freq, cu_seqlens=bounds)
        return ops.norm_rotary(q * 1, k * 1, *weights, cos, sin, inplace=form == "in place")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(form != "in place"):
        want, got = call(q, k, *weights), compiled(q, k, *weights)
    torch.testing.assert_close(got, want)
    if form != "in place":
        grads = [torch.randn_like(y) for y in want]
        torch.testing.assert_close(*(torch.autograd.grad(y, weights, grads) for y in (got, want)))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_transforms(backend, device, inplace):
    torch.manual_seed(3)
    q, k = (torch.randn(1, 2, n, 6, device=device, dtype=torch.float64) for n in (2, 1))
    weight = weight_of("joint", 2, 6, device).double()
    cos, sin = exact_tables(frequencies(4).to(device), torch.arange(2, device=device)[None])

    def ours(q, weight):
        keys = None if inplace else k
        return ops.norm_rotary(q * 1, keys, weight, None, cos, sin, inplace=inplace)[0]

    def formulas(q, weight):
        return plain(q, weight, cos, sin)

    samples = torch.stack((q, 2 * q + 1))
    if not inplace:
        for transform in (
            lambda f: jacrev(f, (0, 1))(q, weight),
            lambda f: grad(lambda q: f(q, weight).sin().sum())(q),
            lambda f: hessian(lambda w: f(q, w).pow(3).sum())(weight),
            lambda f: vmap(grad(lambda q: f(q, weight).sin().sum()))(samples),
        ):
            torch.testing.assert_close(transform(ours), transform(formulas), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        vmap(lambda q: ours(q, weight))(samples), formulas(samples[:, 0], weight)[:, None]
    )


@pytest.mark.parametrize("needs", ["q", "weight", "bias"])
def test_in_place_has_no_gradient(backend, device, needs):
    q, weight, bias = (torch.randn(n, device=device) for n in ((1, 3, 2, 8), (8,), (16,)))
    table = torch.zeros(1, 3, 4, device=device)
    {"q": q, "weight": weight, "bias": bias}[needs].requires_grad_()
    before = q.detach().clone()
    with pytest.raises(ValueError, match="gone when it is changed in place"):
        ops.norm_rotary(q, None, weight, None, table, table, q_bias=bias, inplace=True)
    assert torch.equal(q, before)
    with torch.no_grad():
        ops.norm_rotary(q, None, weight, None, table, table, q_bias=bias, inplace=True)
    with pytest.raises(ValueError, match="share memory"):
        ops.norm_rotary(before, before, None, None, table, table, inplace=True)


BAD = [
    ({"q_weight": torch.ones(5)}, r"q_weight must be \[8\] .*or \[24\] .*got \[5\]"),
    ({"q_weight": torch.ones(3, 8)}, r"q_weight must be \[8\] .*got \[3, 8\]"),
    ({"k_weight": torch.ones(24)}, r"k_weight must be \[8\] .*or \[16\] .*got \[24\]"),
    ({"q_weight": torch.ones(8, dtype=torch.int32)}, "q_weight must be floating on cpu, got torch.int32"),
    (
        {"q_weight": torch.ones(8, device="meta")},
        "q_weight must be floating on cpu, got torch.float32 on meta",
    ),
    ({"k": None, "k_weight": torch.ones(8)}, "k_weight without k"),
    ({"k": None, "k_bias": torch.ones(8)}, "k_bias without k"),
    ({"q_bias": torch.ones(8)}, r"q_bias must be \[24\]"),
    ({"eps": -1e-6}, "eps must be a number from 0 on, got -1e-06"),
    ({"eps": float("nan")}, "eps must be a number from 0 on, got nan"),
    ({"weight_offset": float("inf")}, "weight_offset must be a finite number, got inf"),
    ({"q": torch.ones(2, 3, 8)}, "q and k must be"),
    ({"q": torch.ones(1, 4, 3, 8, dtype=torch.int64)}, "one floating dtype"),
    ({"k": torch.ones(1, 4, 2, 6)}, "with one B, S and D"),
    ({"cos": torch.ones(1, 4, 5)}, "cos and sin must be .*got"),
    ({"cos": torch.ones(1, 5, 4), "sin": torch.ones(1, 5, 4)}, "cos and sin must be .*S, R/2"),
    ({"cos": torch.ones(1, 4, 4, requires_grad=True)}, "cos and sin are constants"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_what_does_not_belong_together_is_named(wrong, message):
    good = {
        "q": torch.ones(1, 4, 3, 8), "k": torch.ones(1, 4, 2, 8), "q_weight": torch.ones(8), "k_weight": None,
        "cos": torch.ones(1, 4, 4), "sin": torch.ones(1, 4, 4),
    }  # fmt: skip
    ops.norm_rotary(**good)
    with pytest.raises(ValueError, match=message):
        ops.norm_rotary(**{**good, **wrong})


def test_a_call_like_an_earlier_one_is_found(monkeypatch):
    """And one with another eps, weight offset, order or weight's shape is not."""
    launches = []

    def launch(*arguments):
        launches.append(arguments)
        Backend.norm_rotate(None, *arguments)

    def norm_rotate(self, *arguments):
        Backend.norm_rotate(self, *arguments)
        return launch

    monkeypatch.setattr(native.Native, "norm_rotate", norm_rotate)
    monkeypatch.setattr(native.Native, "supports", lambda *arguments, **options: None)
    q, k, weight = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 2, 8), torch.rand(8)
    positions = torch.arange(4)[None]
    inv_freq = frequencies(8)
    cos, sin = (t.float() for t in exact_tables(inv_freq, positions))
    kinds = [
        ({}, {}),
        ({"eps": 0.1}, {"eps": 0.1}),
        ({"weight_offset": 1.0}, {"offset": 1.0}),
        ({"norm_after": True}, {"after": True}),
        ({"interleaved": True}, {"interleaved": True}),
    ]
    with ops.use_backend("native"):
        launch_cache.clear()
        try:
            for weights in (
                (weight, weight),
                (torch.rand(24), weight),
                (None, weight),
                (weight.double(), None),
            ):
                for options, named in kinds:
                    for count in range(2):
                        for call in (
                            lambda w, o: ops.norm_rotary(q, k, *w, cos, sin, **o),
                            lambda w, o: ops.norm_rotary_at(q, k, *w, inv_freq, positions, **o),
                        ):
                            launches.clear()
                            out = call(weights, options)
                            assert len(launches) == count, (options, count)
                            for x, w, y in zip((q, k), weights, out, strict=True):
                                assert_rounded(y, plain(x, w, cos, sin, **named))
            assert len(launch_cache._LAUNCHES) == 2 * 4 * len(kinds)
            # A weight that is trained goes through the operator.
            leaf = weight.clone().requires_grad_()
            assert ops.norm_rotary(q, k, leaf, weight, cos, sin)[0].requires_grad
        finally:
            launch_cache.clear()
