"""Decoding: up to 16 tokens, with and without the cache."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact_tables, frequencies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rope_dist import ops

from .test_projection import SHARE, SLACK, exact_projection, problem


@settings(
    max_examples=24,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_equals_float64_rounded(triton_backend, device, data):
    draw = data.draw
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16)))
    dim = draw(st.sampled_from((16, 64, 80, 96, 128)))
    rotary_dim = draw(st.sampled_from((dim, dim // 2, dim - 2)))
    heads = draw(st.sampled_from(((1, 1, 1), (4, 1, 1), (5, 3, 2))))
    heads = heads[: draw(st.sampled_from((2, 3)))]
    depth = draw(st.sampled_from((8, 256, 300)))
    batch, length = draw(st.sampled_from(((1, 1), (16, 1), (3, 2), (1, 7))))
    interleaved, bias, table = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    rows = draw(st.sampled_from((1, batch)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x, weights, biases = problem(
        device, dtype, batch=batch, length=length, depth=depth, heads=heads, dim=dim, bias=bias
    )
    positions = torch.randint(0, 1_000_001, (rows, length), device=device)
    inv_freq = frequencies(rotary_dim).to(device)
    cos, sin = exact_tables(inv_freq, positions, 1.25)
    if table:
        cos, sin = cos.float(), sin.float()
        angles = {"cos": cos, "sin": sin}
    else:
        angles = {"inv_freq": inv_freq, "position_ids": positions, "attention_scaling": 1.25}
    padding = [None] * (3 - len(heads))
    out = ops.qkv_rotary(
        x,
        *weights,
        *padding,
        *biases,
        *padding,
        head_dim=dim,
        interleaved=interleaved,
        path="decode",
        **angles,
    )
    want = exact_projection(x, weights, biases, cos, sin, dim, interleaved)
    for actual, expected in zip(out, want, strict=False):
        assert_rounded(actual, expected, few=4, share=SHARE[dtype], slack=SLACK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_writes_the_cache_by_slot(backend, device, dtype, tokens):
    torch.manual_seed(8)
    x, weights, biases = problem(device, dtype, batch=tokens, length=1, heads=(4, 2, 2), bias=True)
    positions = torch.randint(0, 1_000_001, (tokens, 1), device=device)
    inv_freq = frequencies(64).to(device)
    slots = torch.randperm(30, device=device)[:tokens]
    slots[0] = -1
    # Entries, heads and dimensions in the order of a cache that keeps heads outermost.
    caches = [torch.randn(2, 30, 64, device=device).to(dtype).transpose(0, 1) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    q = ops.decode_rotary(
        x, *weights, *biases, k_cache=caches[0], v_cache=caches[1], slots=slots, inv_freq=inv_freq,
        position_ids=positions,
    )  # fmt: skip
    want = exact_projection(x, weights, biases, *exact_tables(inv_freq, positions), 64)
    # The reference and the long form may round twice.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(q.double(), want[0], rtol=tolerance, atol=tolerance)
    for cache, old, expected in zip(caches, before, want[1:], strict=True):
        written = slots[1:]
        torch.testing.assert_close(cache[written].double(), expected[1:, 0], rtol=tolerance, atol=tolerance)
        untouched = torch.ones(30, dtype=torch.bool, device=device)
        untouched[written] = False
        assert torch.equal(cache[untouched], old[untouched])


def test_rows_past_two_to_the_31(triton_backend, device):
    """The last token of each of several long prompts, as a view: only the touched pages exist."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    torch.manual_seed(9)
    x, weights, biases = problem(device, torch.float16, batch=9, length=1, depth=64, heads=(2, 1, 1))
    memory = torch.empty(8 * 2**28 + 64, dtype=torch.float16, device=device)
    far = memory.as_strided((9, 1, 64), (2**28, 64, 1))
    far.copy_(x)
    inv_freq, positions = frequencies(64).to(device), torch.full((9, 1), 77, device=device)
    want = exact_projection(x, weights, biases, *exact_tables(inv_freq, positions), 64)
    for path in ("decode", "triton"):
        out = ops.qkv_rotary(far, *weights, head_dim=64, inv_freq=inv_freq, position_ids=positions, path=path)
        for actual, expected in zip(out, want, strict=True):
            assert_rounded(actual, expected, few=4, share=SHARE[torch.float16], slack=SLACK)


def test_compiles_whole_and_keeps_its_contract(device):
    x, weights, _ = problem(device, torch.float32, batch=2, length=1, depth=16, heads=(2, 1, 1), dim=16)
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))
    positions = torch.tensor([[3], [9]], device=device)
    slots = torch.tensor([4, 2], device=device)
    caches = [torch.zeros(6, 1, 16, device=device) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.rope_dist.decode_cached,
        (x, *caches, slots, *weights, None, None, None, 16, None, None, inv_freq_q64, positions),
    )

    def call(x, k_cache, v_cache):
        return ops.decode_rotary(
            x,
            *weights,
            k_cache=k_cache,
            v_cache=v_cache,
            slots=slots,
            inv_freq=inv_freq_q64,
            position_ids=positions,
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got_caches, want_caches = ([c.clone() for c in caches] for _ in range(2))
    torch.testing.assert_close(compiled(x, *got_caches), call(x, *want_caches))
    torch.testing.assert_close(got_caches, want_caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([0])}, "slots must be"),
        ({"slots": torch.tensor([0, 6])}, "slot 6 is past"),
        ({"slots": torch.tensor([0.0, 1.0])}, "slots must be int32"),
        ({"k_cache": torch.zeros(6, 2, 16), "v_cache": torch.zeros(6, 2, 16)}, "k_cache has 2 heads"),
        ({"k_cache": torch.zeros(6, 1, 16).half()}, "k_cache must be"),
        ({"v_cache": torch.zeros(5, 1, 16)}, "one shape"),
        ({"k_cache": torch.zeros(1, 1, 16).expand(6, 1, 16)}, "expanded"),
        (
            {"k_cache": torch.tensor(0.0), "v_cache": torch.tensor(0.0)},
            r"caches must be .* got \[\] and \[\]",
        ),
        ({"v_cache": torch.tensor(0.0)}, "caches must be"),
    ],
)
def test_mistakes(change, message):
    arguments = {
        "x": torch.zeros(2, 1, 8),
        "w_q": torch.zeros(32, 8),
        "w_k": torch.zeros(16, 8),
        "w_v": torch.zeros(16, 8),
        "k_cache": torch.zeros(6, 1, 16),
        "v_cache": torch.zeros(6, 1, 16),
        "slots": torch.tensor([0, 1]),
        "inv_freq": torch.ones(8),
        "position_ids": torch.zeros(2, 1, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        ops.decode_rotary(**{**arguments, **change})
