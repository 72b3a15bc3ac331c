"""Rotation in place: where autograd looks on, and where tensors share memory."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from torch import nn

from rope_dist import ops


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def tables(device, length=5, half=8):
    positions = torch.arange(length, device=device)[None]
    return [t.float() for t in exact_tables(frequencies(2 * half).to(device), positions)]


def parts(leaves, source):
    """Queries and keys ``[2, 5, heads, 16]`` as models make them of a hidden state, weights and biases."""
    x, w_q, b_q, w_k, b_k = leaves
    q, k = (nn.functional.linear(x, w, b) for w, b in ((w_q, b_q), (w_k, b_k)))
    if source == "linear":
        return q.unflatten(-1, (4, 16)), k.unflatten(-1, (2, 16))
    if source == "heads first":
        return tuple(y.view(2, 5, -1, 16).transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k))
    qkv = torch.cat((q, k), -1).view(2, 5, 6, 16)
    return qkv[:, :, :4], qkv[:, :, 4:]


def projected(source, device):
    """What :func:`parts` makes, and the leaves."""
    torch.manual_seed(0)
    shapes = ((2, 5, 12), (64, 12), (64,), (32, 12), (32,))
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    return *parts(leaves, source), leaves


def call(form, q, k, cos, sin, **options):
    if form == "tables":
        return ops.rotary(q, k, cos, sin, **options)
    inv_freq = frequencies(16).to(q.device)
    if form == "positions":
        return ops.rotary_at(q, k, inv_freq, **options)
    bounds = torch.tensor([0, 5, 10], device=q.device)
    q, k = (x.flatten(0, 1) if x is not None else None for x in (q, k))
    out = ops.rotary_at(q, k, inv_freq, cu_seqlens=bounds, **options)
    return tuple(x.unflatten(0, (2, 5)) if x is not None else None for x in out)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["tables", "positions", "packed"])
@pytest.mark.parametrize("source", ["linear", "heads first", "one tensor"])
def test_gradients_of_what_projections_made(backend, device, source, form, compiled):
    if compiled and backend != "reference":
        pytest.skip("what is compiled does not depend on the backend")
    if (source, form) == ("heads first", "packed"):
        pytest.skip("has no packed view")
    cos, sin = tables(device)
    q, k, leaves = projected(source, device)
    weights = [torch.randn_like(x) for x in (q, k)]
    want = [exact(x, cos, sin) for x in (q, k)]
    want_grads = torch.autograd.grad(
        sum((y.sin() * w).sum() for y, w in zip(want, weights, strict=True)), leaves
    )

    def step(leaves):
        q, k = parts(leaves, source)
        return q, k, *call(form, q, k, cos, sin, inplace=True)

    if compiled:
        step = torch.compile(step, backend="aot_eager", fullgraph=True)
    q, k, *got = step(leaves)
    for x, y, expected in zip((q, k), got, want, strict=True):
        assert compiled or x.data_ptr() == y.data_ptr()
        assert_rounded(y.detach(), expected.detach())
        assert torch.equal(x.detach(), y.detach())
    got_grads = torch.autograd.grad(
        sum((y.sin() * w).sum() for y, w in zip(got, weights, strict=True)), leaves
    )
    for actual, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_was_a_view_of_it_has_the_gradient_too(backend, device):
    """The tensor that q and k are parts of is changed as well, and its gradient goes through the rotation."""
    cos, sin = tables(device)
    leaf = torch.randn(2, 5, 6, 16, device=device, requires_grad=True)
    weight = torch.randn_like(leaf)
    qkv = leaf * 1
    ops.rotary(qkv[:, :, :4], None, cos, sin, inplace=True)
    (grad,) = torch.autograd.grad((qkv * weight).sum(), leaf)
    want = torch.cat((exact(weight[:, :, :4], cos, sin, conjugate=True), weight[:, :, 4:].double()), 2)
    assert_rounded(grad, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x, "leaf"),
        (lambda x: x[:, :3], "leaf"),
        (lambda x: (x * 1).unbind(2)[0], "several views"),
        (lambda x: (x * 1)[:, :, 0].split(2, 2)[0], "several views"),
        (lambda x: (x * 1)[:, :, 0].chunk(2, 2)[1][None][0], "several views"),
    ],
    ids=["leaf", "view of a leaf", "unbind", "split", "view of a chunk"],
)
@pytest.mark.parametrize("form", ["tables", "packed"])
def test_what_autograd_cannot_follow_is_refused_unchanged(device, make, message, form):
    shape = (2, 5, 4, 16) if message == "leaf" else (2, 5, 3, 4, 16)
    q = make(torch.randn(shape, device=device, requires_grad=True))
    cos, sin = tables(device, q.shape[1])
    before = q.detach().clone()
    calls = {
        "tables": lambda: ops.rotary(torch.randn_like(q), q, cos, sin, inplace=True),
        "packed": lambda: ops.rotary_at(q[0], None, frequencies(16).to(device), inplace=True),
    }
    with pytest.raises(ValueError, match=message):
        calls[form]()
    assert torch.equal(q.detach(), before)
    with torch.no_grad():
        ops.rotary(q, None, cos, sin, inplace=True)
    assert_rounded(q.detach(), exact(before, cos, sin))


def windows(x):
    """Each token's heads begin within those of the token before."""
    return x.as_strided((1, 5, 2, 16), (160, 16, 16, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x), "share memory"),
        (lambda x: (x[:, :, :4], x[:, :, 3:]), "share memory"),
        (lambda x: (x[:, :, :4], x[:, :, 3:5].transpose(1, 2).contiguous().transpose(1, 2)), None),
        (lambda x: (x[:, :, :4], x[:, :, 4:]), None),
        (lambda x: (x[:, :, ::2], x[:, :, 1::2]), None),
        (lambda x: (x[:, :2], x[:, 2:4]), None),
        (lambda x: (x[:, :3], x[:, 2:5]), "share memory"),
        (lambda x: (x[..., :8], x[..., 8:]), None),
        (lambda x: (x[..., :10], x[..., 6:]), "share memory"),
        (lambda x: (x.transpose(0, 2)[:1], x.transpose(0, 2)[:1, :, 1:]), "share memory"),
        (lambda x: (windows(x), torch.zeros(1, 5, 1, 16, device=x.device)), "elements share memory"),
        (lambda x: (torch.zeros(1, 5, 1, 16, device=x.device), windows(x)), "elements share memory"),
        (lambda x: (x[:1, :, :1].expand(1, 5, 4, 16), torch.zeros(1, 5, 1, 16, device=x.device)), "expanded"),
    ],
)
def test_shared_memory_is_refused_by_backend(backend, make, message):
    torch.manual_seed(0)
    q, k = make(torch.randn(2, 5, 6, 16))
    cos, sin = tables("cpu", q.shape[1], q.shape[3] // 2)
    want = [exact(x, cos, sin) for x in (q, k)]
    if message is not None:
        with pytest.raises(ValueError, match=message):
            ops.rotary(q, k, cos, sin, inplace=True)
        return
    ops.rotary(q, k, cos, sin, inplace=True)
    for x, expected in zip((q, k), want, strict=True):
        assert_rounded(x, expected)


def test_sharing_is_found_exactly():
    """All pairs of small windows of one buffer against the sets of their elements."""
    from rope_dist.ops import validation

    generator = torch.Generator().manual_seed(0)
    buffer = torch.arange(200)
    shared = 0
    for _ in range(2000):
        sizes = torch.randint(1, 4, (2, 3), generator=generator).tolist()
        strides = torch.randint(1, 12, (2, 3), generator=generator).tolist()
        strides[1] = strides[0] if torch.rand(1, generator=generator) < 0.5 else strides[1]
        starts = torch.randint(0, 60, (2,), generator=generator).tolist()
        a, b = (buffer.as_strided(*arguments) for arguments in zip(sizes, strides, starts, strict=True))
        want = not set(a.flatten().tolist()).isdisjoint(b.flatten().tolist())
        assert validation._share_elements(a, b) == want
        shared += want
    assert 200 < shared < 1800


def test_caches_that_are_one_are_refused():
    x, w, cache = torch.zeros(1, 1, 8), torch.zeros(16, 8), torch.zeros(4, 1, 16)
    with pytest.raises(ValueError, match="k_cache and v_cache share memory"):
        ops.decode_rotary(
            x, w, w, w, k_cache=cache, v_cache=cache, slots=torch.tensor([0]), inv_freq=torch.ones(8),
            position_ids=torch.zeros(1, 1, dtype=torch.long),
        )  # fmt: skip


@pytest.mark.parametrize("form", ["tables", "positions", "packed"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_queries_alone(backend, device, form, inplace, compiled):
    if compiled and backend != "reference":
        pytest.skip("what is compiled does not depend on the backend")
    cos, sin = tables(device)
    rotated = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    leaf = torch.randn(2, 5, 4, 16, device=device, requires_grad=True)
    x = leaf.detach().clone() if inplace else leaf.detach()
    out, none = rotated(form, x, None, cos, sin, inplace=inplace)
    assert none is None
    assert_rounded(out, exact(leaf.detach(), cos, sin))
    assert (out.data_ptr() == x.data_ptr()) == inplace
    bias = torch.randn(64, device=device, requires_grad=True)
    out, none = rotated(form, leaf * 1, None, cos, sin, inplace=inplace, q_bias=bias)
    assert none is None
    weight = torch.randn_like(leaf)
    grads = torch.autograd.grad(out, (leaf, bias), weight)
    want = exact(weight, cos, sin, conjugate=True)
    assert_rounded(grads[0], want)
    torch.testing.assert_close(grads[1].double(), want.sum((0, 1)).flatten(), rtol=1e-5, atol=1e-5)


def test_queries_alone_in_hugging_faces_form(backend, device):
    cos, sin = (torch.cat((t, t), -1) for t in tables(device))
    q = torch.randn(2, 4, 5, 16, device=device)
    out, none = ops.apply_rotary_pos_emb(q, None, cos, sin)
    assert none is None
    assert_rounded(out.transpose(1, 2), exact(q.transpose(1, 2), cos[..., :8], sin[..., :8]))
    with pytest.raises(ValueError, match="k_bias without k"):
        ops.rotary(q, None, cos[:, :4, :8], sin[:, :4, :8], k_bias=torch.zeros(1, device=device))
