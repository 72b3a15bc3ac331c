"""The operators' public face: gradients, compile, drop-ins, errors, a machine without Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies

from rope_dist import ops


def problem(device, dtype=torch.float32, dim=64, rotary_dim=64):
    torch.manual_seed(1)
    q = torch.randn(2, 5, 4, dim, device=device).to(dtype)
    k = torch.randn(2, 5, 2, dim, device=device).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 99, 999, 9_999, 999_999]], device=device)
    return q, k, frequencies(rotary_dim).to(device), positions


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["tables", "positions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_inverse_rotation(backend, device, inplace, form, dtype):
    q, k, inv_freq, positions = problem(device, dtype, dim=80, rotary_dim=48)
    cos, sin = exact_tables(inv_freq, positions, 1.5)
    # Gradients that are no contiguous tensors.
    grads = [torch.randn(2, x.shape[2], 5, 80, device=device).to(dtype).transpose(1, 2) for x in (q, k)]
    leaves = [x.requires_grad_() for x in (q, k)]
    inputs = [x * 1 for x in leaves]
    if form == "tables":
        cos, sin = cos.float(), sin.float()
        out = ops.rotary(*inputs, cos, sin, inplace=inplace, interleaved=True)
    else:
        out = ops.rotary_at(
            *inputs, inv_freq, positions, inplace=inplace, interleaved=True, attention_scaling=1.5
        )
    got = torch.autograd.grad(out, leaves, grads)
    for actual, grad in zip(got, grads, strict=True):
        assert_rounded(actual, exact(grad, cos, sin, interleaved=True, conjugate=True))


def test_a_gradient_for_one_of_the_two(backend, device):
    q, k, inv_freq, positions = problem(device)
    k.requires_grad_()
    for inplace in (False, True):
        rotated = ops.rotary_at(q.clone(), k * 1, inv_freq, positions, inplace=inplace)
        (grad,) = torch.autograd.grad(rotated[1].sum(), k)
        want = exact(torch.ones_like(k), *exact_tables(inv_freq, positions), conjugate=True)
        assert_rounded(grad, want)


def test_second_derivatives():
    inv_freq, positions = frequencies(8), torch.tensor([[3, 4]])
    q, k = (torch.randn(1, 2, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    assert torch.autograd.gradgradcheck(lambda q, k: ops.rotary_at(q, k, inv_freq, positions), (q, k))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(device, inplace):
    q, k, inv_freq, positions = problem(device)
    inv_freq_q64 = ops.to_fixed_point(inv_freq)

    def rotate(q, k):
        return ops.rotary_at(q * 2, k * 2, inv_freq_q64, positions, inplace=inplace)

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        q.requires_grad_(grad)
        got = compiled(q, k)
        for actual, want in zip(got, rotate(q, k), strict=True):
            torch.testing.assert_close(actual, want, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(got[0].square().sum(), q)
    (want,) = torch.autograd.grad(rotate(q, k)[0].square().sum(), q)
    torch.testing.assert_close(grad, want)


def test_operators_keep_their_contracts(backend, device):
    q, k, inv_freq, positions = problem(device)
    cos, sin = (x.float() for x in exact_tables(inv_freq, positions))
    q.requires_grad_()
    none = (None, None)
    torch.library.opcheck(torch.ops.rope_dist.rotate, (q, k, *none, cos, sin))
    torch.library.opcheck(torch.ops.rope_dist.rotate, (q, None, *none, cos, sin))
    inv_freq_q64 = ops.to_fixed_point(inv_freq)
    torch.library.opcheck(torch.ops.rope_dist.rotate, (q, k, *none, *none, inv_freq_q64, positions))
    torch.library.opcheck(torch.ops.rope_dist.rotate_, (q.detach(), k, *none, *none, inv_freq_q64, positions))


@pytest.mark.parametrize("packed", [False, True])
def test_offsets_are_the_positions_of_first_tokens(backend, device, packed):
    torch.manual_seed(4)
    starts, lengths = [7, 0, 100_000], [3, 3, 3]
    inv_freq = frequencies(32).to(device)
    q, k = (torch.randn(3, 3, heads, 32, device=device) for heads in (4, 1))
    positions = torch.tensor([[start + i for i in range(3)] for start in starts], device=device)
    want = ops.rotary_at(q, k, inv_freq, positions)
    offsets = torch.tensor(starts, device=device)
    for _ in range(2):  # the second time by the launch that was kept
        if packed:
            bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
            got = ops.rotary_at(
                q.flatten(0, 1), k.flatten(0, 1), inv_freq, cu_seqlens=bounds, seqlen_offsets=offsets
            )
            got = [x.unflatten(0, (3, 3)) for x in got]
        else:
            got = ops.rotary_at(q, k, inv_freq, seqlen_offsets=offsets)
        for actual, expected in zip(got, want, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"seqlen_offsets must be \[3\], got \[2\]"):
        ops.rotary_at(q, k, inv_freq, seqlen_offsets=offsets[:2])
    with pytest.raises(ValueError, match="position_ids, or cu_seqlens and seqlen_offsets, not both"):
        ops.rotary_at(q, k, inv_freq, positions, seqlen_offsets=offsets)


# Axes of q, the shape of the tables, and where those get the axis of the heads.
HUGGING_FACE = [
    ("BHSD", "BSR", 1),
    ("BSHD", "BSR", 2),
    ("BHSD", "BSR", -3),
    ("BSHD", "BSR", -2),
    ("BHSD", "SR", 0),  # Pixtral
    ("BSHD", "SR", 1),
    ("HSD", "SR", 0),
    ("SHD", "SR", 1),
    ("SHD", "SR", -2),  # the vision towers of Qwen
]


@pytest.mark.parametrize(("axes", "table", "axis"), HUGGING_FACE)
@pytest.mark.parametrize(
    "heads", [(4, 2), (5, 5)]
)  # as many as there are tokens: only the axis tells them apart
def test_hugging_face_drop_in(backend, device, axes, table, axis, heads):
    stock = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    torch.manual_seed(1)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 99, 999, 9_999, 999_999]], device=device)
    cos, sin = (torch.cat((x, x), -1).float() for x in exact_tables(frequencies(64).to(device), positions))
    q, k = (
        torch.randn(*({"B": 2, "S": 5, "H": n, "D": 64}[name] for name in axes), device=device) for n in heads
    )
    if table == "SR":
        cos, sin = cos[1], sin[1]
    for x in (q, k):
        x.requires_grad_()
    got = ops.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=axis)
    want = stock(q, k, cos, sin, unsqueeze_dim=axis)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    weights = [torch.randn_like(x) for x in got]
    for actual, expected in zip(
        torch.autograd.grad(got, (q, k), weights), torch.autograd.grad(want, (q, k), weights), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", ["none", "integer", "tensor"])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_drop_in(backend, device, inplace, interleaved, offsets, packed):
    torch.manual_seed(2)
    rows, lengths = 12, [3, 1, 5]
    starts = {"none": [0, 0, 0], "integer": [4, 4, 4], "tensor": [2, 0, 9]}[offsets]
    given = {"none": 0, "integer": 4, "tensor": torch.tensor(starts, device=device)}[offsets]
    inv_freq = frequencies(32).to(device)
    table = [x.float()[0] for x in exact_tables(inv_freq, torch.arange(rows, device=device)[None])]
    extra = {}
    if packed:
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        leaf = torch.randn(9, 2, 48, device=device)
        positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])[None]
        extra = {"cu_seqlens": bounds, "max_seqlen": 5}
    else:
        leaf = torch.randn(3, 5, 2, 48, device=device)
        positions = torch.stack([torch.arange(5) + s for s in starts])
    positions = positions.to(device)
    known = (positions < rows)[..., None]
    cos = torch.where(known, table[0][positions.clamp_max(rows - 1)], 1.0)
    sin = torch.where(known, table[1][positions.clamp_max(rows - 1)], 0.0)
    leaf.requires_grad_()
    out = ops.apply_rotary_emb(
        leaf * 1, *table, interleaved=interleaved, inplace=inplace, seqlen_offsets=given, **extra
    )
    x = leaf.detach()[None] if packed else leaf.detach()
    assert_rounded(out.detach(), exact(x, cos, sin, interleaved=interleaved).reshape(leaf.shape))
    weight = torch.randn_like(leaf)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    weight = weight[None] if packed else weight
    want = exact(weight, cos, sin, interleaved=interleaved, conjugate=True)
    assert_rounded(grad, want.reshape(leaf.shape))


GOOD = (2, 5, 4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 2, 64)}, "one B, S and D"),
        ({"k": torch.zeros(2, 5, 2, 32)}, "one B, S and D"),
        ({"k": torch.zeros(GOOD).half()}, "one floating dtype"),
        ({"q": torch.zeros(GOOD).int(), "k": torch.zeros(GOOD).int()}, "one floating dtype"),
        ({"k": torch.zeros(GOOD, device="meta")}, "one device"),
        ({"inv_freq": torch.ones(33)}, "66 dimensions"),
        ({"inv_freq": torch.ones(3, 3, 32)}, "must be"),
        ({"inv_freq": torch.ones(32, device="meta")}, "inv_freq must be on"),
        ({"inv_freq": torch.ones(32, requires_grad=True)}, "detach"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, "position_ids must be"),
        ({"position_ids": torch.zeros(1, 5)}, "int32 or int64"),
        ({"position_ids": torch.full((1, 5), 2**31)}, "within int32"),
        ({"position_ids": torch.full((1, 5), -(2**31) - 1)}, "within int32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "packed"),
    ],
)
def test_mistakes_in_positions_form(change, message):
    arguments = {"q": torch.zeros(GOOD), "k": torch.zeros(2, 5, 2, 64), "inv_freq": torch.ones(32), **change}
    with pytest.raises(ValueError, match=message):
        ops.rotary_at(**arguments)


def test_mistakes_in_the_other_forms():
    q, table = torch.zeros(GOOD), torch.zeros(1, 5, 32)
    expanded = torch.zeros(2, 5, 1, 64).expand(GOOD)
    with pytest.raises(ValueError, match="expanded"):
        ops.rotary(expanded, q, table, table, inplace=True)
    with pytest.raises(ValueError, match=r"\[B or 1, S, R/2\]"):
        ops.rotary(q, q, table[:, :4], table[:, :4])
    with pytest.raises(ValueError, match="four axes"):
        ops.apply_rotary_pos_emb(q[0], q[0], table, table)
    with pytest.raises(ValueError, match="unsqueeze_dim"):
        ops.apply_rotary_pos_emb(q, q, table, table, unsqueeze_dim=3)
    with pytest.raises(ValueError, match=r"must be 0 .* or 1 .* for cos \[5, 32\], got 2"):
        ops.apply_rotary_pos_emb(q, q, table[0], table[0], unsqueeze_dim=2)
    with pytest.raises(ValueError, match="rows"):
        ops.apply_rotary_emb(q, table[0], table[0], seqlen_offsets=1)
    with pytest.raises(ValueError, match="seqlen_offsets must be"):
        ops.apply_rotary_emb(q, table[0], table[0], seqlen_offsets=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="with cu_seqlens"):
        ops.apply_rotary_emb(q, table[0], table[0], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="no such backend"), ops.use_backend("fast"):
        pass


def test_imports_and_runs_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from rope_dist import ops
q = torch.ones(1, 2, 1, 8)
assert ops.rotary_at(q, q, torch.ones(4))[0].shape == q.shape
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
