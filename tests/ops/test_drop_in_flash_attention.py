"""flash-attention's packed functions and module, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact_tables, frequencies

from rope_dist import ops

ROWS = 12


def formula(x, cos, sin, interleaved, offsets):
    """``apply_rotary_emb_torch`` of flash-attention in float64: token ``s`` of ``x`` has row ``s + offsets[b]``."""
    at = torch.arange(x.shape[1], device=x.device) + torch.as_tensor(offsets, device=x.device).reshape(-1, 1)
    known = (at < cos.shape[0])[..., None]
    cos, sin = (t.double()[at.clamp_max(t.shape[0] - 1)] for t in (cos, sin))
    cos, sin = torch.where(known, cos, 1.0), torch.where(known, sin, 0.0)

    def spread(t):
        return (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[:, :, None]

    rotated, rest = x.double().split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    if interleaved:
        half = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        half = torch.cat((-second, first), -1)
    return torch.cat((rotated * spread(cos) + half * spread(sin), rest), -1)


def packed(x, heads, rotate_q, rotate_k):
    """``x`` with its first ``heads[0]`` heads, or the first of its third axis, rotated by one function each."""
    parts = x.unbind(2) if x.ndim == 5 else x.split(heads, 2)
    parts = (rotate_q(parts[0]), rotate_k(parts[1]), parts[2].double())
    return torch.stack(parts, 2) if x.ndim == 5 else torch.cat(parts, 2)


def tables(device, scale=1.0):
    return [
        t.float()[0]
        for t in exact_tables(frequencies(16).to(device) * scale, torch.arange(ROWS, device=device)[None])
    ]


FORMS = {
    "three": ((3, 5, 3, 2, 24), None),
    "three, heads outside": ((3, 5, 3, 2, 24), None),
    "grouped": ((3, 5, 8, 24), 4),
    "grouped, part of a tensor": ((3, 5, 8, 24), 4),
}


def source(form, device, dtype=torch.float32):
    """A leaf, what makes the packed tensor of it, and ``num_heads_q``."""
    torch.manual_seed(3)
    shape, num_heads_q = FORMS[form]
    if form == "three, heads outside":  # the axis of three and that of the heads are no one axis
        leaf = torch.randn(3, 5, 2, 3, 24, device=device, dtype=dtype, requires_grad=True)
        return leaf, lambda x: (x * 1).transpose(2, 3), num_heads_q
    if form == "grouped, part of a tensor":
        leaf = torch.randn(3, 5, 10, 24, device=device, dtype=dtype, requires_grad=True)
        return leaf, lambda x: (x * 1)[:, :, 1:9], num_heads_q
    leaf = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    return leaf, lambda x: x * 1, num_heads_q


OFFSETS = {"none": 0, "integer": 4, "tensor": [2, 0, 9]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_tables", [False, True])
def test_packed_queries_keys_values(backend, device, form, offsets, interleaved, own_tables):
    leaf, make, num_heads_q = source(form, device)
    starts = OFFSETS[offsets]
    given = torch.tensor(starts, device=device) if offsets == "tensor" else starts
    of_q, of_k = tables(device), tables(device, 0.5 if own_tables else 1.0)
    keys = dict(zip(("cos_k", "sin_k"), of_k, strict=True)) if own_tables else {}
    options = {"interleaved": interleaved, "seqlen_offsets": given, "num_heads_q": num_heads_q}

    def expected(x):
        return packed(
            x,
            (4, 2, 2),
            lambda q: formula(q, *of_q, interleaved, starts),
            lambda k: formula(k, *of_k, interleaved, starts),
        )

    qkv = make(leaf)
    out = ops.apply_rotary_emb_qkv_(qkv, *of_q, **keys, **options)
    assert out is qkv
    want = expected(make(leaf))
    assert_rounded(out.detach(), want.detach())
    weight = torch.randn_like(want)
    (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
    (want_grad,) = torch.autograd.grad((want * weight).sum(), leaf)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for _ in range(2):  # the second from the launch cache
            qkv = make(leaf)
            ops.apply_rotary_emb_qkv_(qkv, *of_q, **keys, **options)
            assert torch.equal(qkv, out)


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_keys_values(backend, device, offsets, interleaved, dtype):
    torch.manual_seed(4)
    leaf = torch.randn(3, 5, 2, 2, 24, device=device).to(dtype).requires_grad_()
    starts = OFFSETS[offsets]
    given = torch.tensor(starts, device=device, dtype=torch.int32) if offsets == "tensor" else starts
    cos, sin = tables(device)
    kv = leaf * 1
    out = ops.apply_rotary_emb_kv_(kv, cos, sin, interleaved=interleaved, seqlen_offsets=given)
    assert out is kv
    want = torch.stack((formula(leaf[:, :, 0], cos, sin, interleaved, starts), leaf[:, :, 1].double()), 2)
    assert_rounded(out.detach(), want.detach())
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    # The rotation is linear: its gradient is that of the formula at any point.
    (want_grad,) = torch.autograd.grad(want, leaf, weight.double())
    torch.testing.assert_close(grad, want_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def of_base(device, dim=16, base=10000.0):
    """Tables in float64 of the frequencies of a module, for more rows than any test needs."""
    inv_freq = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return exact_tables(inv_freq, torch.arange(100_020, device=device))


@pytest.mark.parametrize("form", [*FORMS, "with kv", "longer kv"])
@pytest.mark.parametrize("offset", [0, 7, "tensor"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_module(backend, device, form, offset, interleaved):
    rotary = ops.RotaryEmbedding(16, base=500.0, interleaved=interleaved, device=device)
    cos, sin = of_base(device, base=500.0)
    starts = [2, 100_000, 9] if offset == "tensor" else offset
    given = torch.tensor(starts, device=device) if offset == "tensor" else offset

    def expected(x):
        return formula(x, cos, sin, interleaved, starts)

    if form in FORMS:
        leaf, make, num_heads_q = source(form, device)
        leaves, inputs = [leaf], [make(leaf)]
        got = [rotary(*inputs, seqlen_offset=given, num_heads_q=num_heads_q, max_seqlen=100_005)]
        want = [packed(make(leaf), (4, 2, 2), expected, expected)]
    else:
        torch.manual_seed(5)
        length = 6 if form == "longer kv" else 5
        leaves = [
            torch.randn(shape, device=device, requires_grad=True)
            for shape in ((3, 5, 4, 24), (3, length, 2, 2, 24))
        ]
        inputs = [x * 1 for x in leaves]
        got = rotary(*inputs, seqlen_offset=given)
        want = [
            expected(leaves[0]),
            torch.stack((expected(leaves[1][:, :, 0]), leaves[1][:, :, 1].double()), 2),
        ]
    weights = [torch.randn_like(x) for x in want]
    assert all(a is b for a, b in zip(got, inputs, strict=True))
    for actual, expected_ in zip(got, want, strict=True):
        assert_rounded(actual.detach(), expected_.detach())
    grads, want_grads = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(some, weights, strict=True)), leaves)
        for some in (got, want)
    )
    torch.testing.assert_close(grads, want_grads, rtol=1e-6, atol=1e-6)


def test_module_keeps_its_frequencies_in_every_dtype(device):
    """``half`` of a model would round frequencies of 16 bits to 1e-3."""
    rotary = ops.RotaryEmbedding(16, device=device).to(torch.bfloat16)
    assert not rotary.state_dict()
    leaf, make, _ = source("three", device)
    qkv = make(leaf.detach())
    rotary(qkv, seqlen_offset=100_000)
    cos, sin = of_base(device)
    want = packed(leaf.detach(), (4, 2, 2), *[lambda x: formula(x, cos, sin, False, 100_000)] * 2)
    assert_rounded(qkv, want)


def test_module_made_on_meta_and_with_other_frequencies(device):
    rotary = ops.RotaryEmbedding(16, device="meta").to_empty(device=device)
    rotary.reset_parameters()
    assert torch.equal(rotary.inv_freq_q64, ops.RotaryEmbedding(16, device=device).inv_freq_q64)
    rotary.inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device) / 4)
    leaf, make, _ = source("three", device)
    qkv = make(leaf.detach())
    rotary(qkv, seqlen_offset=40)
    tables = exact_tables(frequencies(16).to(device) / 4, torch.arange(50, device=device))
    want = packed(leaf.detach(), (4, 2, 2), *[lambda x: formula(x, *tables, False, 40)] * 2)
    assert_rounded(qkv, want)


def calls(device):
    cos, sin = (t.double() for t in tables(device))
    rotary = ops.RotaryEmbedding(16, device=device)
    return {
        "qkv": lambda x: ops.apply_rotary_emb_qkv_(x * 1, cos, sin),
        "qkv, own tables": lambda x: ops.apply_rotary_emb_qkv_(x * 1, cos, sin, sin, cos),
        "kv": lambda x: ops.apply_rotary_emb_kv_(x[:, :, :2] * 1, cos, sin, interleaved=True),
        "module": lambda x: rotary(x * 1, seqlen_offset=2),
        "module with kv": lambda x: rotary(x[:, :, 0] * 1, x[:, :, 1:] * 1),
    }


@pytest.mark.parametrize("call", calls("cpu"))
def test_compiles_whole_with_gradients(device, call):
    torch.compiler.reset()
    rotate = calls(device)[call]
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 3, 2, 24, device=device, requires_grad=True)
    got, want = compiled(x), rotate(x)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grads = [
        torch.autograd.grad(sum(t.sin().sum() for t in (y if isinstance(y, tuple) else (y,))), x)
        for y in (got, want)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("call", calls("cpu"))
def test_gradients(call):
    x = torch.randn(1, 2, 3, 1, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(calls("cpu")[call], (x,))


TABLE = torch.zeros(5, 8)
QKV, GROUPED = torch.zeros(2, 5, 3, 4, 16), torch.zeros(2, 5, 8, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.apply_rotary_emb_qkv_(GROUPED, TABLE, TABLE), "needs num_heads_q"),
        (lambda: ops.apply_rotary_emb_qkv_(GROUPED, TABLE, TABLE, num_heads_q=3), "num_heads_q=3"),
        (lambda: ops.apply_rotary_emb_qkv_(GROUPED, TABLE, TABLE, num_heads_q=8), "num_heads_q=8"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE, TABLE, num_heads_q=2), "has 4 heads"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV[:, :, :2], TABLE, TABLE), "qkv must be"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE, TABLE, TABLE), "cos_k and sin_k"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE, TABLE, TABLE[:4], TABLE[:4]), "needs 5 rows"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE, TABLE, seqlen_offsets=1), "needs 6 rows"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE, TABLE, seqlen_offsets=-1), "not be negative"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV, TABLE[None], TABLE[None]), r"\[rows, R/2\]"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV[:1].expand(2, 5, 3, 4, 16), TABLE, TABLE), "expanded"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV.int(), TABLE, TABLE), "floating"),
        (lambda: ops.apply_rotary_emb_qkv_(QKV.clone().requires_grad_(), TABLE, TABLE), "leaf"),
        (lambda: ops.apply_rotary_emb_kv_(QKV, TABLE, TABLE), r"\[B, S, 2, H, D\]"),
        (
            lambda: ops.apply_rotary_emb_kv_(QKV[:, :, :2], TABLE, TABLE, seqlen_offsets=torch.zeros(3)),
            r"must be \[2\]",
        ),
        (
            lambda: ops.apply_rotary_emb_kv_(QKV[:, :, :2], TABLE, TABLE, seqlen_offsets=torch.zeros(2)),
            "int32 or int64",
        ),
        (lambda: ops.RotaryEmbedding(16, scale_base=512), "xPos"),
        (lambda: ops.RotaryEmbedding(15), "even"),
        (lambda: ops.RotaryEmbedding(16, base=0), "above 0"),
        (lambda: ops.RotaryEmbedding(18)(QKV), "18 dimensions"),
        (lambda: ops.RotaryEmbedding(16)(QKV, seqlen_offset=2**31), "within int32"),
        (lambda: ops.RotaryEmbedding(16)(QKV, QKV[:, :, :2]), "the queries"),
        (lambda: ops.RotaryEmbedding(16)(QKV[:, :, 0], QKV[:, :, 0]), r"kv must be"),
        (lambda: ops.RotaryEmbedding(16, device="meta")(QKV), "inv_freq must be on"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert not QKV.any()
    assert not GROUPED.any()


def test_the_old_name():
    assert ops.apply_rotary_emb_func is ops.apply_rotary_emb


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_flash_attention(interleaved):
    """Where it is installed, on a GPU: the module and the packed functions beside its own."""
    flash = pytest.importorskip("flash_attn.layers.rotary")
    if not torch.cuda.is_available():
        pytest.skip("flash-attention needs a GPU")
    qkv = torch.randn(2, 50, 3, 4, 64, device="cuda")
    modules = [m.RotaryEmbedding(32, interleaved=interleaved, device="cuda") for m in (flash, ops)]
    for offset, length in ((0, None), (5, None), (torch.tensor([1, 9], device="cuda"), 60)):
        got, want = (m(qkv.clone(), seqlen_offset=offset, max_seqlen=length) for m in modules)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    cos, sin = modules[0]._cos_cached, modules[0]._sin_cached
    got, want = (
        m.apply_rotary_emb_kv_(qkv[:, :, 1:].clone(), cos, sin, interleaved, 3) for m in (flash, ops)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
