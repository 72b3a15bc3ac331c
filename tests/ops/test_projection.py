"""Projection and rotation in one launch: values and gradients against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rope_dist import ops

PATHS = ("separate", "triton_tma", "triton")

# Sum, bias and rotation are four float32 roundings; float16 is 8 times finer than bfloat16 beside them.
SHARE, SLACK = {torch.bfloat16: 2e-4, torch.float16: 5e-4}, 1.0
# A GPU's tensor cores truncate where they align the terms of a sum, and the sine and cosine of its special function
# unit are right to 2^-20.5; the interpreter sums exactly and takes the polynomial.
SINE_ERROR = 2.0**-20.5
GPU_SHARE, GPU_SLACK = {torch.bfloat16: 4e-4, torch.float16: 1.75e-3}, 4.0
if torch.cuda.is_available():
    SHARE, SLACK = GPU_SHARE, GPU_SLACK


def problem(device, dtype, *, batch=1, length=5, depth=64, heads=(4, 2, 2), dim=64, bias=False):
    """x, weights and biases such that outputs are of order one."""
    x = torch.randn(batch, length, depth, device=device).to(dtype)
    weights = [(torch.randn(h * dim, depth, device=device) / depth**0.5).to(dtype) for h in heads]
    biases = [torch.randn(h * dim, device=device).to(dtype) if bias else None for h in heads]
    return x, weights, biases


def exact_projection(x, weights, biases, cos, sin, dim, interleaved=False):
    out = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = x.double() @ weight.double().t() + (bias.double() if bias is not None else 0.0)
        y = y.unflatten(-1, (-1, dim))
        out.append(exact(y, cos, sin, interleaved=interleaved) if index < 2 else y)
    return out


def possible_paths(device):
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return ("triton",)
    return ("triton_tma", "triton")


@settings(
    max_examples=24,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_equals_float64_rounded(triton_backend, device, data):
    draw = data.draw
    path = draw(st.sampled_from(possible_paths(device)))
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16)))
    dim = draw(st.sampled_from((64, 128, 256)))
    rotary_dim = draw(st.sampled_from((dim, dim // 2, dim // 4)))
    heads = draw(st.sampled_from(((1, 1, 1), (4, 1, 1), (5, 3, 2), (8, 8, 8))))
    heads = heads[: draw(st.sampled_from((2, 3)))]
    # A depth that no block divides, and rows that no block divides.
    depth = draw(st.sampled_from((8, 72, 160)))
    batch, length = draw(st.sampled_from(((1, 1), (2, 3), (1, 130), (3, 50))))
    interleaved, bias, table = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    rows = draw(st.sampled_from((1, batch)))
    scaling = draw(st.sampled_from((1.0, 1.25)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x, weights, biases = problem(
        device, dtype, batch=batch, length=length, depth=depth, heads=heads, dim=dim, bias=bias
    )
    positions = torch.randint(0, 1_000_001, (rows, length), device=device)
    inv_freq = frequencies(rotary_dim).to(device)
    cos, sin = exact_tables(inv_freq, positions, scaling)
    if table:
        cos, sin = cos.float(), sin.float()
        angles = {"cos": cos, "sin": sin}
    else:
        angles = {"inv_freq": inv_freq, "position_ids": positions, "attention_scaling": scaling}
    padding = [None] * (3 - len(heads))
    out = ops.qkv_rotary(
        x, *weights, *padding, *biases, *padding, head_dim=dim, interleaved=interleaved, path=path, **angles
    )
    want = exact_projection(x, weights, biases, cos, sin, dim, interleaved)
    assert (out[2] is None) == (len(heads) == 2)
    for actual, expected in zip(out, want, strict=False):
        assert_rounded(actual, expected, few=4, share=SHARE[dtype], slack=SLACK)


@pytest.mark.parametrize("path", ["triton_tma", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_differs_in_few_elements(triton_backend, device, dtype, path):
    if path not in possible_paths(device):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(0)
    x, weights, biases = problem(device, dtype, length=140, depth=64, heads=(4, 2, 2), dim=128)
    positions = torch.randint(0, 1_000_001, (1, 140), device=device)
    inv_freq = frequencies(128).to(device)
    out = ops.qkv_rotary(x, *weights, head_dim=128, inv_freq=inv_freq, position_ids=positions, path=path)
    want = exact_projection(x, weights, biases, *exact_tables(inv_freq, positions), 128)
    assert_rounded(torch.cat(out, 2), torch.cat(want, 2), few=0, share=SHARE[dtype], slack=SLACK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tolerance_on_a_gpu_is_that_of_its_instructions(dtype):
    """It takes the largest error that is documented for sine and cosine, and not four times as much."""
    torch.manual_seed(2)
    x = torch.randn(1, 600, 16, 128, dtype=torch.float64)
    positions = torch.randint(0, 1_000_001, (1, 600))
    tables = exact_tables(frequencies(128), positions)
    want = exact(x, *tables)

    def check(error):
        cos, sin = (t + error * (torch.randint(0, 2, t.shape) * 2 - 1) for t in tables)
        assert_rounded(exact(x, cos, sin).to(dtype), want, few=4, share=GPU_SHARE[dtype], slack=GPU_SLACK)

    check(SINE_ERROR)
    with pytest.raises(AssertionError):
        check(4 * SINE_ERROR)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_gradients(triton_backend, device, path, bias, table):
    if path not in ("separate", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(3)
    x, weights, biases = problem(device, torch.bfloat16, batch=2, depth=32, heads=(2, 1, 1), bias=bias)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 99, 999, 9_999, 999_999]], device=device)
    inv_freq = frequencies(64).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    angles = {"inv_freq": inv_freq, "position_ids": positions}
    if table:
        cos, sin = cos.float(), sin.float()
        angles = {"cos": cos, "sin": sin}
    leaves = [t.requires_grad_() for t in (x, *weights, *biases) if t is not None]
    out = ops.qkv_rotary(x, *weights, *biases, head_dim=64, path=path, **angles)
    # Gradients that are no contiguous tensors.
    grads = [torch.randn(2, y.shape[2], 5, 64, device=device).bfloat16().transpose(1, 2) for y in out]
    got = torch.autograd.grad(out, leaves, grads)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want_out = exact_projection(
        doubles[0], doubles[1:4], doubles[4:] if bias else [None] * 3, cos.double(), sin.double(), 64
    )
    want = torch.autograd.grad(want_out, doubles, [g.double() for g in grads])
    for actual, expected in zip(got, want, strict=True):
        # The packed gradients are rounded to bfloat16 once before the products.
        assert (actual.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("needed", [["x"], ["w_k"], ["b_v"], ["w_q", "b_q"]])
def test_gradients_of_some(device, needed):
    names = ("x", "w_q", "w_k", "w_v", "b_q", "b_k", "b_v")
    torch.manual_seed(4)
    x, weights, biases = problem(device, torch.float64, depth=8, heads=(2, 1, 1), dim=4, bias=True)
    arguments = dict(zip(names, (x, *weights, *biases), strict=True))
    for name in needed:
        arguments[name].requires_grad_()
    inv_freq = frequencies(4).to(device)

    def call(*values):
        inputs = {**arguments, **dict(zip(needed, values, strict=True))}
        return ops.qkv_rotary(**inputs, head_dim=4, inv_freq=inv_freq)

    values = [arguments[name] for name in needed]
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_twice_through_the_same_weights(triton_backend, device):
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(1, 1, 1), dim=16)
    weights[0].requires_grad_()
    angles = {"inv_freq": frequencies(16).to(device), "head_dim": 16}
    once = torch.autograd.grad(ops.qkv_rotary(x, *weights, **angles)[0].sum(), weights[0])[0]
    first, second = (ops.qkv_rotary(x, *weights, **angles)[0].sum() for _ in range(2))
    torch.testing.assert_close(torch.autograd.grad(first + second, weights[0])[0], 2 * once)


@pytest.mark.parametrize("dim", [80, 96, 6])
def test_head_sizes_that_are_no_power_of_two(triton_backend, device, dim):
    torch.manual_seed(5)
    x, weights, biases = problem(device, torch.float32, depth=32, heads=(3, 1, 1), dim=dim, bias=True)
    inv_freq = frequencies(dim).to(device)
    out = ops.qkv_rotary(x, *weights, *biases, head_dim=dim, inv_freq=inv_freq)
    positions = torch.arange(5, device=device)[None]
    want = exact_projection(x, weights, biases, *exact_tables(inv_freq, positions), dim)
    for actual, expected in zip(out, want, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot serve"):
        ops.qkv_rotary(x, *weights, *biases, head_dim=dim, inv_freq=inv_freq, path="triton")


def test_packed_and_strided_inputs(triton_backend, device):
    torch.manual_seed(6)
    wide, weights, biases = problem(device, torch.float16, length=7, depth=64, heads=(2, 1, 1))
    weights = [torch.cat((w, w), 1)[:, :32] for w in weights]
    x = wide[0, :, 16:48]
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1], device=device)
    inv_freq = frequencies(64).to(device)
    want = exact_projection(x[None], weights, biases, *exact_tables(inv_freq, positions[None]), 64)
    for path in possible_paths(device):
        out = ops.qkv_rotary(x, *weights, head_dim=64, inv_freq=inv_freq, position_ids=positions, path=path)
        for actual, expected in zip(out, want, strict=True):
            assert_rounded(actual, expected[0], share=SHARE[torch.float16], slack=SLACK)


@pytest.mark.parametrize("path", [*PATHS, "decode"])
def test_an_infinity_stays_where_nothing_rotates(triton_backend, device, path):
    """In what of a head passes through, and in the values: turned by nothing its partner would be NaN."""
    if path not in ("separate", "decode", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(11)
    x, weights, biases = problem(device, torch.float16, length=3, depth=64, heads=(2, 1, 1), bias=True)
    biases[0][40] = biases[1][63] = biases[2][5] = float("inf")
    inv_freq = frequencies(32).to(device)
    out = ops.qkv_rotary(x, *weights, *biases, head_dim=64, inv_freq=inv_freq, path=path)
    want = exact_projection(
        x, weights, biases, *exact_tables(inv_freq, torch.arange(3, device=device)[None]), 64
    )
    for actual, expected in zip(out, want, strict=True):
        finite = expected.isfinite()
        assert (~finite).sum() == 3
        assert torch.equal(actual.isfinite(), finite)
        tolerance = 4e-3
        torch.testing.assert_close(actual.double()[finite], expected[finite], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", ["auto", *PATHS, "decode"])
def test_tables_at_any_address(triton_backend, device, path):
    if path not in ("auto", "separate", "decode", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    x, weights, _ = problem(device, torch.bfloat16, length=4, depth=32, heads=(1, 1, 1))
    positions = torch.arange(4, device=device)[None]
    flat = torch.empty(2, 1 + 4 * 32, device=device)[:, 1:].unflatten(1, (1, 4, 32))
    for table, values in zip(flat, exact_tables(frequencies(64).to(device), positions), strict=True):
        assert table.data_ptr() % 16
        table.copy_(values)
    got = ops.qkv_rotary(x, *weights, head_dim=64, cos=flat[0], sin=flat[1], path=path)
    want = ops.qkv_rotary(x, *weights, head_dim=64, cos=flat[0].clone(), sin=flat[1].clone(), path=path)
    for actual, expected in zip(got, want, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("path", ["auto", *PATHS, "decode"])
def test_tables_with_rows_apart(triton_backend, device, path, batch):
    """The first half of tables that have each value twice, as enabled models hand them, and every second of pairs."""
    if path not in ("auto", "separate", "decode", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    x, weights, _ = problem(device, torch.bfloat16, length=4, depth=32, heads=(1, 1, 1))
    x = x.expand(2, -1, -1)
    positions = torch.arange(4 * batch, device=device).view(batch, 4)
    tables = exact_tables(frequencies(64).to(device), positions)
    want = ops.qkv_rotary(x, *weights, head_dim=64, cos=tables[0], sin=tables[1], path=path)
    for twice in (
        [torch.cat((t, torch.full_like(t, 7)), dim=-1)[..., :32] for t in tables],
        [torch.stack((t, torch.full_like(t, 7)), dim=-1)[..., 0] for t in tables],
    ):
        assert not twice[0].is_contiguous()
        got = ops.qkv_rotary(x, *weights, head_dim=64, cos=twice[0], sin=twice[1], path=path)
        for actual, expected in zip(got, want, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["auto", "separate"])
def test_autocast_changes_neither_type_nor_values(backend, device, dtype, inside, path):
    """Eager, compiled, gradients: an operator computes in the type of its operands."""
    torch.manual_seed(12)
    x, weights, biases = problem(device, dtype, depth=32, heads=(2, 1, 1), dim=16, bias=True)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    angles = {"head_dim": 16, "inv_freq": ops.to_fixed_point(frequencies(16).to(device)), "path": path}

    def step():
        out = ops.qkv_rotary(*leaves, **angles)
        return out, torch.autograd.grad([y.float().sin().sum() for y in out], leaves)

    want = step()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *leaves: ops.qkv_rotary(*leaves, **angles), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast(device.type, inside):
        got = step()
        traced = compiled(*leaves)
    for actual, expected in zip((*got[0], *got[1], *traced), (*want[0], *want[1], *want[0]), strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_nothing_in_nothing_out(backend, device):
    for batch, length in ((0, 3), (2, 0)):
        x, weights, _ = problem(device, torch.float16, batch=batch, length=length)
        out = ops.qkv_rotary(x, *weights, head_dim=64, inv_freq=torch.ones(32, device=device))
        assert [tuple(y.shape) for y in out] == [(batch, length, h, 64) for h in (4, 2, 2)]


def test_compiles_whole_and_keeps_its_contract(device):
    torch.manual_seed(7)
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1), dim=16)
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))
    weights[1].requires_grad_()

    def call(x):
        return ops.qkv_rotary(x, *weights, head_dim=16, inv_freq=inv_freq_q64)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, want in zip(compiled(x), call(x), strict=True):
        torch.testing.assert_close(actual, want)
    got, want = (torch.autograd.grad(f(x)[1].square().sum(), weights[1]) for f in (compiled, call))
    torch.testing.assert_close(got, want)
    positions = torch.arange(5, device=device)[None]
    torch.library.opcheck(
        torch.ops.rope_dist.qkv_rotary,
        (x, *weights, None, None, None, 16, None, None, inv_freq_q64, positions),
    )
    heads = torch.randn(1, 5, 2, 16, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.rope_dist.pack_gradients, (heads, heads, None, None, None, inv_freq_q64, positions)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_k": torch.zeros(64, 15)}, "w_k must be"),
        ({"w_v": torch.zeros(63, 16)}, "w_v must be"),
        ({"w_q": torch.zeros(64, 16).half()}, "w_q must be torch.float32"),
        ({"b_q": torch.zeros(32)}, "b_q must be"),
        ({"w_v": None, "b_v": torch.zeros(64)}, "b_v without w_v"),
        ({"head_dim": 33}, "even"),
        ({"x": torch.zeros(16)}, "x must be"),
        ({"inv_freq": None}, "give inv_freq, or cos and sin"),
        ({"cos": torch.zeros(1, 3, 16), "sin": torch.zeros(1, 3, 16)}, "give inv_freq, or cos and sin"),
        ({"inv_freq": None, "cos": torch.zeros(1, 4, 16), "sin": torch.zeros(1, 4, 16)}, "cos and sin must"),
        ({"position_ids": torch.zeros(1, 4, dtype=torch.long)}, "position_ids must be"),
        ({"path": "fast"}, "no such path"),
        ({"path": "triton_tma"}, "cannot serve"),
    ],
)
def test_mistakes(change, message):
    arguments = {
        "x": torch.zeros(2, 3, 16),
        **{name: torch.zeros(64, 16) for name in ("w_q", "w_k", "w_v")},
        "head_dim": 32,
        "inv_freq": torch.ones(16),
    }
    with pytest.raises(ValueError, match=message):
        ops.qkv_rotary(**{**arguments, **change})
