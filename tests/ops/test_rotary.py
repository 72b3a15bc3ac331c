"""Rotary alone: values against float64 on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies, heads_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rope_dist import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_equals_float64_rounded(backend, device, data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    dim = draw(st.sampled_from((2, 18, 64, 72, 80, 96, 128, 256)))
    half = draw(st.sampled_from((dim // 2, max(1, dim // 4), max(1, dim // 2 - 1))))
    q_heads, k_heads = draw(st.sampled_from(((1, 1), (3, 1), (9, 3), (8, 2), (40, 8), (5, 5))))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layout = draw(st.sampled_from(("BSHD", "BHSD", "packed", "strided")))
    interleaved, inplace = draw(st.booleans()), draw(st.booleans())
    scaling = draw(st.sampled_from((1.0, 1.25)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q = heads_of(layout, batch, length, q_heads, dim, dtype, device)
    k = heads_of(layout, batch, length, k_heads, dim, dtype, device)
    rows = draw(st.sampled_from((1, batch)))
    positions = torch.randint(0, 1_000_001, (rows, length), device=device)
    inv_freq = frequencies(2 * half).to(device)
    cos, sin = exact_tables(inv_freq, positions, scaling)
    if draw(st.booleans()):
        options = {"interleaved": interleaved, "inplace": inplace}
        cos, sin = cos.float(), sin.float()
        expected = [exact(x, cos, sin, interleaved=interleaved) for x in (q, k)]
        out = ops.rotary(q, k, cos, sin, **options)
    else:
        options = {"interleaved": interleaved, "inplace": inplace, "attention_scaling": scaling}
        expected = [exact(x, cos, sin, interleaved=interleaved) for x in (q, k)]
        out = ops.rotary_at(q, k, inv_freq, positions, **options)
    for x, rotated, want in zip((q, k), out, expected, strict=True):
        assert (rotated.data_ptr() == x.data_ptr()) == inplace
        assert inplace or rotated.is_contiguous()
        assert_rounded(rotated, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [True, False])
def test_rounding_differs_in_few_elements(triton_backend, device, dtype, table):
    torch.manual_seed(0)
    q = torch.randn(2, 20, 32, 128, device=device).to(dtype)
    k = torch.randn(2, 20, 8, 128, device=device).to(dtype)
    positions = torch.randint(0, 1_000_001, (2, 20), device=device)
    inv_freq = frequencies(128, 500000.0).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    if table:
        cos, sin = cos.float(), sin.float()
        out = ops.rotary(q, k, cos, sin)
    else:
        out = ops.rotary_at(q, k, ops.to_fixed_point(inv_freq), positions)
    assert_rounded(torch.cat(out, 2), torch.cat([exact(x, cos, sin) for x in (q, k)], 2), few=0)


def test_angles_are_right_at_every_position(backend, device):
    """One at the first member of each pair: the output is the cosine and sine themselves."""
    inv_freq = frequencies(128, 10000.0)
    positions = torch.tensor([[0, 1, 2, 4095, 131071, 999_999, 1_000_000, 2**31 - 1, -1, -77, -(2**31)]])
    x = torch.zeros(1, positions.shape[1], 1, 128, device=device)
    x[..., :64] = 1.0
    out, _ = ops.rotary_at(x, x, inv_freq.to(device), positions.to(device))
    cos, sin = exact_tables(inv_freq, positions)
    # Beyond a million the float64 product of this test is the coarser of the two.
    for column in range(positions.shape[1]):
        wrong = torch.cat((cos[0, column], sin[0, column])) - out[0, column, 0].cpu().double()
        assert wrong.abs().max() < (2e-7 if positions[0, column].abs() <= 1_000_000 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_either_integer_type(backend, device, dtype):
    q = torch.randn(2, 3, 2, 64, device=device)
    positions = torch.tensor([[5, 6, 7]], device=device)
    inv_freq = frequencies(64).to(device)
    first = ops.rotary_at(q, q, inv_freq, positions.to(dtype))[0]
    assert_rounded(first, exact(q, *exact_tables(inv_freq, positions)))


def test_positions_default_to_the_index(backend, device):
    q = torch.randn(2, 5, 2, 64, device=device)
    inv_freq = frequencies(64).to(device)
    out, _ = ops.rotary_at(q, q, inv_freq)
    assert_rounded(out, exact(q, *exact_tables(inv_freq, torch.arange(5, device=device)[None])))


@pytest.mark.parametrize("lengths", [[3, 0, 4, 1], [1] * 140, [7]])
def test_packed_sequences_count_from_their_own_start(backend, device, lengths):
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    q = torch.randn(tokens, 4, 64, device=device)
    k = torch.randn(tokens, 2, 64, device=device)
    inv_freq = frequencies(64).to(device)
    tables = exact_tables(inv_freq, positions[None])
    for out in (
        ops.rotary_at(q, k, inv_freq, cu_seqlens=bounds),
        ops.rotary_at(q, k, inv_freq, positions),
    ):
        assert_rounded(out[0], exact(q[None], *tables)[0])
        assert_rounded(out[1], exact(k[None], *tables)[0])


OUTSIDE = [([2, 5, 10], None), ([0, 4, 4, 9], None), ([3, 3, 7], [5, 2]), ([0, 12], None), ([12, 12], None)]


@pytest.mark.parametrize(("bounds", "offsets"), OUTSIDE)
@pytest.mark.parametrize("form", ["positions", "table", "positions and bias"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_tokens_of_no_sequence_pass_through(backend, device, bounds, offsets, form, interleaved, inplace):
    """Also those that are infinite: turned by nothing, they would make their partners NaN."""
    torch.manual_seed(4)
    x = torch.randn(12, 3, 20, device=device).bfloat16()
    within = torch.zeros(12, dtype=torch.bool, device=device)
    positions = torch.zeros(1, 12, dtype=torch.long, device=device)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        within[start:end] = True
        first = offsets[index] if offsets and form == "table" else 0
        positions[0, start:end] = torch.arange(end - start, device=device) + first
    x[~within, 0, 5] = float("inf")
    cos, sin = exact_tables(frequencies(16).to(device), positions)
    cu_seqlens = torch.tensor(bounds, device=device, dtype=torch.int32)
    bias = torch.randn(60, device=device).bfloat16() if "bias" in form else None
    biased = x.double() + (bias.double().view(3, 20) if bias is not None else 0)
    want = exact(biased[None], cos, sin, interleaved=interleaved)[0]
    want[~within] = biased[~within]
    options = {"cu_seqlens": cu_seqlens, "interleaved": interleaved, "inplace": inplace}
    if form == "table":
        tables = [
            t.float()[0]
            for t in exact_tables(frequencies(16).to(device), torch.arange(12, device=device)[None])
        ]
        starts = torch.tensor(offsets, device=device) if offsets else 0
        out = ops.apply_rotary_emb(x, *tables, seqlen_offsets=starts, **options)
    else:
        out, _ = ops.rotary_at(x, None, frequencies(16).to(device), q_bias=bias, **options)
    finite = want.isfinite()
    assert torch.equal(out[~finite], want[~finite].bfloat16())
    assert_rounded(out[finite], want[finite])


@pytest.mark.parametrize("bounds", [[0, 7, 4, 10], [-1, 10], [0, 11], [5, 0]])
def test_bounds_that_are_no_bounds(backend, bounds):
    x, bounds = torch.zeros(10, 2, 8), torch.tensor(bounds)
    for call in (
        lambda: ops.rotary_at(x, x, torch.ones(4), cu_seqlens=bounds),
        lambda: ops.apply_rotary_emb(x, torch.ones(10, 4), torch.ones(10, 4), cu_seqlens=bounds),
    ):
        with pytest.raises(ValueError, match="must not decrease and be within 0 and 10 tokens, got"):
            call()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_past_the_table_or_the_rotated_columns_passes_through(
    backend, device, dtype, interleaved, inplace
):
    x = torch.randn(2, 7, 3, 24, device=device).to(dtype)
    x[0, 1, 0, 20] = x[1, 6, 1, 3] = x[1, 5, 2, 22] = float("inf")
    cos, sin = (
        t.float()[0] for t in exact_tables(frequencies(16).to(device), torch.arange(4, device=device)[None])
    )
    want = x.clone()
    want[:, :4] = exact(x[:, :4], cos[None], sin[None], interleaved=interleaved)
    given = x.clone()
    out = ops.apply_rotary_emb(
        given,
        cos,
        sin,
        interleaved=interleaved,
        inplace=inplace,
        seqlen_offsets=torch.zeros(2, dtype=torch.int32, device=device),
    )
    assert torch.equal(out[:, 4:], x[:, 4:])
    assert torch.equal(out[..., 16:], x[..., 16:])
    assert_rounded(out[:, :4, :, :16], exact(x[:, :4, :, :16], cos[None], sin[None], interleaved=interleaved))


@pytest.mark.parametrize("inplace", [False, True])
def test_tables_of_two_axes(backend, device, inplace):
    q, k = (torch.randn(2, 5, h, 16, device=device) for h in (3, 1))
    cos, sin = (
        t.float() for t in exact_tables(frequencies(16).to(device), torch.arange(5, device=device)[None])
    )
    want = [exact(x, cos, sin) for x in (q, k)]
    for x, y in zip(ops.rotary(q, k, cos[0], sin[0], inplace=inplace), want, strict=True):
        assert_rounded(x, y)
    x, w = torch.randn(5, 8, device=device), torch.randn(32, 8, device=device)
    for a, b in zip(
        ops.qkv_rotary(x, w, w, w, head_dim=16, cos=cos[0], sin=sin[0]),
        ops.qkv_rotary(x, w, w, w, head_dim=16, cos=cos, sin=sin),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="give the first half"):
        ops.rotary(q, k, *(torch.cat((t, t), -1)[0] for t in (cos, sin)))


def test_float64_keeps_its_precision(backend):
    q = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    inv_freq = frequencies(8)
    positions = torch.tensor([[0, 9, 1_000_000]])
    out, _ = ops.rotary_at(q, q, inv_freq, positions)
    torch.testing.assert_close(out, exact(q, *exact_tables(inv_freq, positions)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(0, 3, 2, 64), (2, 0, 2, 64), (2, 3, 0, 64)])
def test_nothing_in_nothing_out(backend, device, shape):
    q = torch.randn(shape, device=device)
    table = torch.zeros(1, shape[1], 32, device=device)
    for inplace in (False, True):
        assert ops.rotary(q, q.clone(), table, table, inplace=inplace)[0].shape == shape
        out = ops.rotary_at(q, q.clone(), torch.ones(32, device=device), inplace=inplace)
        assert out[1].shape == shape
    assert ops.apply_rotary_emb(q, table[0], table[0]).shape == shape


def test_no_pairs_to_rotate(backend, device):
    q = torch.randn(1, 2, 3, 8, device=device)
    assert torch.equal(ops.rotary_at(q, q, torch.ones(0, device=device))[0], q)


def test_elements_past_two_to_the_31(triton_backend, device):
    """Heads so far apart that a 32-bit offset would land elsewhere; only the touched pages exist."""
    apart = 2**31 + 64
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 7 * 2**30:
        pytest.skip("needs 7 GiB")
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    for axis in range(3):
        shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
        shape[axis], strides[axis] = 2, apart
        q = memory.as_strided(shape, strides)
        values = torch.randn(shape, device=device).half()
        q.copy_(values)
        inv_freq = frequencies(64).to(device)
        positions = torch.full(shape[:2], 123, device=device)
        want = exact(values, *exact_tables(inv_freq, positions))
        assert_rounded(ops.rotary_at(q, values.clone(), inv_freq, positions)[0], want)
        halves = exact(values.unflatten(-1, (32, 2)).mT.flatten(-2), *exact_tables(inv_freq, positions))
        assert_rounded(ops.rotary_at(q, None, inv_freq, positions, deinterleave=True)[0], halves)
        ops.rotary_at(q, values.clone(), inv_freq, positions, inplace=True)
        assert_rounded(q.clone(), want)
    # Dimensions outermost: no stride, but three of them, are past it. Pairs, and what passes through.
    q = memory.as_strided((1, 1, 2, 4), (64, 64, 1, 2**30))
    for rotary_dim, interleaved in itertools.product((4, 2), (False, True)):
        values = torch.randn(q.shape, device=device).half()
        q.copy_(values)
        inv_freq = frequencies(rotary_dim).to(device)
        positions = torch.full((1, 1), 123, device=device)
        want = exact(values, *exact_tables(inv_freq, positions), interleaved=interleaved)
        options = {"interleaved": interleaved}
        assert_rounded(ops.rotary_at(q, values.clone(), inv_freq, positions, **options)[0], want)
        ops.rotary_at(
            q, None, inv_freq, positions, inplace=True, q_bias=torch.zeros(8, device=device).half(), **options
        )
        assert_rounded(q.clone(), want)
