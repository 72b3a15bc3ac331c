"""Projection, RMS norm and rotation in one launch: values and gradients against float64, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rope_dist import ops
from rope_dist.ops import autotune, configurations, dispatch, dispatch_projection, launch_cache
from rope_dist.ops.arguments import Angles, Norms, Projections

from .test_projection import SHARE, SLACK, possible_paths, problem

# The reciprocal root and two products more than a rotation: each a float32 rounding.
NORM_SHARE = {dtype: 2 * share for dtype, share in SHARE.items()}


def norm_weights(device, head_dim, dtype=torch.bfloat16, offset=0.0):
    return [(1 - offset + 0.3 * torch.randn(head_dim, device=device)).to(dtype) for _ in range(2)]


def exact_norm(y, weight, eps, offset):
    """float64, ``y`` ``[B, S, H, D]``; of all heads together where the weight is as long as they are."""
    width = y.shape[-1] if weight is None else weight.shape[0]
    flat = y.flatten(2).unflatten(2, (-1, width))
    flat = flat / (flat.pow(2).sum(-1, keepdim=True) / width + eps).sqrt()
    if weight is not None:
        flat = flat * (weight.double() + offset)
    return flat.flatten(2).unflatten(2, y.shape[2:])


def exact_heads(
    x, weights, biases, norms, cos, sin, dim, *, eps=1e-6, offset=0.0, after=False, interleaved=False
):
    out = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = x.double() @ weight.double().t() + (bias.double() if bias is not None else 0.0)
        y = y.unflatten(-1, (-1, dim))
        if index < 2:
            if not after:
                y = exact_norm(y, norms[index], eps, offset)
            y = exact(y, cos, sin, interleaved=interleaved)
            if after:
                y = exact_norm(y, norms[index], eps, offset)
        out.append(y)
    return out


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
    rotary_dim = draw(st.sampled_from((dim, dim // 2)))
    heads = draw(st.sampled_from(((4, 1, 1), (5, 3, 2), (8, 8, 8))))
    heads = heads[: draw(st.sampled_from((2, 3)))]
    # A depth that no block divides, and rows that no block divides.
    depth = draw(st.sampled_from((8, 72, 160)))
    batch, length = draw(st.sampled_from(((1, 1), (2, 3), (1, 130), (3, 50))))
    interleaved, bias, table, after = (draw(st.booleans()) for _ in range(4))
    rows = draw(st.sampled_from((1, batch)))
    scaling = draw(st.sampled_from((1.0, 1.25)))
    eps, offset = draw(st.sampled_from((1e-6, 1e-2))), draw(st.sampled_from((0.0, 1.0)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    of = {"device": device, "batch": batch, "length": length, "depth": depth, "heads": heads, "dim": dim}
    x, weights, biases = problem(dtype=dtype, bias=bias, **of)
    kind = draw(st.sampled_from((torch.float32, dtype, None)))
    norms = norm_weights(device, dim, kind, offset) if kind is not None else [None, None]
    positions = torch.randint(0, 1_000_001, (rows, length), device=device)
    inv_freq = frequencies(rotary_dim).to(device)
    cos, sin = exact_tables(inv_freq, positions, scaling)
    if table:
        cos, sin = cos.float(), sin.float()
        angles = {"cos": cos, "sin": sin}
    else:
        angles = {"inv_freq": inv_freq, "position_ids": positions, "attention_scaling": scaling}
    none = [None] * (3 - len(heads))
    out = ops.qkv_norm_rotary(
        x, *weights, *none, *norms, *biases, *none, head_dim=dim, eps=eps, weight_offset=offset, norm_after=after,
        interleaved=interleaved, path=path, **angles,
    )  # fmt: skip
    want = exact_heads(
        x, weights, biases, norms, cos, sin, dim, eps=eps, offset=offset, after=after, interleaved=interleaved
    )
    assert (out[2] is None) == (len(heads) == 2)
    for actual, expected in zip(out, want, strict=False):
        assert_rounded(actual, expected, few=4, share=NORM_SHARE[dtype], slack=SLACK)


@pytest.mark.parametrize(
    ("path", "dim"),
    [
        (f"{path}:{configuration.name}", dim)
        for dim in (64, 256)
        for path in ("triton", "triton_tma")
        for configuration in configurations.every(path, "sm_90", dim, norm=True)
    ],
)
def test_each_configuration_equals_float64_rounded(triton_backend, device, path, dim):
    if path.partition(":")[0] not in possible_paths(device):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(20)
    x, weights, biases = problem(device, torch.bfloat16, length=140, depth=72, heads=(5, 3, 2), dim=dim)
    norms, inv_freq = norm_weights(device, dim), frequencies(dim).to(device)
    out = ops.qkv_norm_rotary(x, *weights, *norms, head_dim=dim, inv_freq=inv_freq, path=path)
    tables = exact_tables(inv_freq, torch.arange(140, device=device)[None])
    want = exact_heads(x, weights, biases, norms, *tables, dim)
    for actual, expected in zip(out, want, strict=True):
        assert_rounded(actual, expected, few=4, share=NORM_SHARE[torch.bfloat16], slack=SLACK)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_one_pass_equal_float64(backend, device, dtype, joint, after):
    """What is left to the library rounds twice; norms over all heads together are always."""
    torch.manual_seed(21)
    x, weights, biases = problem(device, dtype, batch=2, depth=48, heads=(3, 2, 2), dim=16, bias=True)
    norms = norm_weights(device, 16, torch.float32)
    if joint:
        norms = [torch.cat([weight] * count) for weight, count in zip(norms, (3, 2), strict=True)]
    inv_freq = frequencies(16).to(device)
    arguments = {"head_dim": 16, "inv_freq": inv_freq, "norm_after": after, "path": "separate"}
    want = exact_heads(
        x,
        weights,
        biases,
        norms,
        *exact_tables(inv_freq, torch.arange(5, device=device)[None]),
        16,
        after=after,
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    # The second time from the launch cache, where the backend has a launch.
    for _ in range(2):
        out = ops.qkv_norm_rotary(x, *weights, *norms, *biases, **arguments)
        for actual, expected in zip(out, want, strict=True):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
        x = x.clone()


def gradient_problem(device, dtype=torch.bfloat16):
    torch.manual_seed(22)
    x, weights, biases = problem(device, dtype, batch=2, depth=32, heads=(2, 1, 1), bias=True)
    norms = norm_weights(device, 64, dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 99, 999, 9_999, 999_999]], device=device)
    inv_freq = frequencies(64).to(device)
    leaves = [t.requires_grad_() for t in (x, *weights, *norms, *biases)]
    grads = [torch.randn(2, h, 5, 64, device=device).to(dtype).transpose(1, 2) for h in (2, 1, 1)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want_out = exact_heads(
        doubles[0], doubles[1:4], doubles[6:], doubles[4:6], *exact_tables(inv_freq, positions), 64
    )
    want = torch.autograd.grad(want_out, doubles, [g.double() for g in grads])
    return leaves, grads, want, inv_freq, positions


@pytest.mark.parametrize("path", ["separate", "triton", "triton_tma"])
def test_gradients(triton_backend, device, path):
    if path not in ("separate", *possible_paths(device)):
        pytest.skip("this GPU has no descriptors")
    leaves, grads, want, inv_freq, positions = gradient_problem(device)
    out = ops.qkv_norm_rotary(*leaves, head_dim=64, inv_freq=inv_freq, position_ids=positions, path=path)
    got = torch.autograd.grad(out, leaves, grads)
    for actual, expected in zip(got, want, strict=True):
        # Queries and keys are rounded to bfloat16 before the norm, and their gradients before the products.
        assert (actual.double() - expected).norm() < 1.2e-2 * expected.norm()
    with torch.no_grad():
        assert not ops.qkv_norm_rotary(
            *leaves, head_dim=64, inv_freq=inv_freq, position_ids=positions, path=path
        )[0].requires_grad


def test_gradients_of_the_operator(device):
    """Called by itself it makes the products again in the backward pass."""
    leaves, grads, want, inv_freq, positions = gradient_problem(device, torch.float64)
    x, w_q, w_k, w_v, q_norm, k_norm, *biases = leaves
    out = torch.ops.rope_dist.qkv_norm_rotary(
        x, w_q, w_k, w_v, *biases, 64, q_norm, k_norm, 1e-6, 0.0, False, None, None, ops.to_fixed_point(inv_freq),
        positions,
    )  # fmt: skip
    got = torch.autograd.grad(out, leaves, grads)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradcheck(device):
    torch.manual_seed(23)
    x, weights, biases = problem(device, torch.float64, depth=6, length=3, heads=(2, 1, 1), dim=4, bias=True)
    norms = norm_weights(device, 4, torch.float64)
    inv_freq = frequencies(4).to(device)
    leaves = [t.requires_grad_() for t in (x, *weights, *norms, *biases)]
    assert torch.autograd.gradcheck(lambda *t: ops.qkv_norm_rotary(*t, head_dim=4, inv_freq=inv_freq), leaves)


def test_without_values_and_packed(backend, device):
    torch.manual_seed(24)
    x, weights, _ = problem(device, torch.float32, length=6, depth=16, heads=(2, 1, 1), dim=16)
    norms, inv_freq = norm_weights(device, 16, torch.float32), frequencies(16).to(device)
    positions = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    arguments = {"head_dim": 16, "inv_freq": inv_freq}
    want = ops.qkv_norm_rotary(x, *weights, *norms, position_ids=positions[None], **arguments)
    got = ops.qkv_norm_rotary(x[0], *weights, *norms, position_ids=positions, **arguments)
    for actual, expected in zip(got, want, strict=True):
        assert torch.equal(actual, expected[0])
    q, k, v = ops.qkv_norm_rotary(x, *weights[:2], None, *norms, position_ids=positions[None], **arguments)
    assert v is None
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(device, grad):
    torch.manual_seed(25)
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1), dim=16)
    norms = norm_weights(device, 16, torch.float32)
    norms[1].requires_grad_(grad)
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))

    def call(x):
        return ops.qkv_norm_rotary(x, *weights, *norms, head_dim=16, inv_freq=inv_freq_q64)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, want in zip(compiled(x), call(x), strict=True):
        torch.testing.assert_close(actual, want)
    if grad:
        got, want = (torch.autograd.grad(f(x)[1].square().sin().sum(), norms[1]) for f in (compiled, call))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("joint", [False, True])
def test_the_operator_keeps_its_contract(device, joint):
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1), dim=16)
    norms = norm_weights(device, 16, torch.float32)
    if joint:
        norms[0] = torch.cat([norms[0]] * 2)
    for tensor in (x, *weights, *norms):
        tensor.requires_grad_()
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))
    torch.library.opcheck(
        torch.ops.rope_dist.qkv_norm_rotary,
        (x, *weights, None, None, None, 16, *norms, 1e-6, 1.0, False, None, None, inv_freq_q64),
    )


def test_autocast_changes_neither_type_nor_values(backend, device):
    torch.manual_seed(26)
    x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1), dim=16)
    norms, arguments = (
        norm_weights(device, 16, torch.float32),
        {"head_dim": 16, "inv_freq": frequencies(16).to(device)},
    )
    want = ops.qkv_norm_rotary(x, *weights, *norms, **arguments)
    for grad in (False, True):
        x.requires_grad_(grad)
        with torch.autocast(device.type, torch.bfloat16):
            got = ops.qkv_norm_rotary(x, *weights, *norms, **arguments)
        for actual, expected in zip(got, want, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected)


def test_one_launch_takes_whole_heads_with_weights_of_one_dtype(triton_backend, device):
    x, weights, _ = problem(device, torch.bfloat16, heads=(4, 2, 2))
    projections = Projections(*weights, None, None, None, 64)
    backend = dispatch.projecting(x)

    def paths(q_weight, k_weight):
        return dispatch_projection.candidates(backend, x, projections, 32, Norms(q_weight, k_weight))

    both = ["separate", *possible_paths(device)[::-1]]
    ones = torch.ones(64, device=device)
    assert paths(ones, ones) == paths(None, None) == both
    for q_weight, k_weight in (
        (ones, ones.bfloat16()),
        (ones, None),
        (torch.ones(256, device=device), torch.ones(128, device=device)),
        (torch.ones(128, device=device)[::2], ones),
    ):
        assert paths(q_weight, k_weight) == ["separate"]


def test_norms_have_a_choice_of_their_own(triton_backend, device, monkeypatch):
    """Of a call that was measured without a norm nothing is taken over, and what is measured has the norm."""
    keys, measured = [], {}

    def chosen(key, calls):
        keys.append(key.form)
        measured.update({(key.form, path): call for path, call in calls.items()})
        return "separate"

    monkeypatch.setattr(autotune, "choose", chosen)
    x, weights, _ = problem(device, torch.bfloat16, length=80, depth=16, heads=(1, 1, 1), dim=256)
    norms, projections = Norms(*norm_weights(device, 256)), Projections(*weights, None, None, None, 256)
    angles = Angles(inv_freq_q64=ops.to_fixed_point(frequencies(256).to(device)))
    with monkeypatch.context() as patch:
        if device.type == "cpu":
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
            patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        backend = dispatch.projecting(x)
        for given_norms in (None, norms):
            dispatch_projection.choose(backend, x, projections, angles, given_norms)
    assert keys == ["", "norm"]
    want = exact_heads(
        x,
        weights,
        [None] * 3,
        norms,
        *exact_tables(frequencies(256), torch.arange(80, device=device)[None]),
        256,
    )
    for (form, _), call in measured.items():
        found = (call()[0][0].double() - want[0]).norm() < 1e-2 * want[0].norm()
        assert found == (form == "norm")
    if "triton_tma" in possible_paths(device):
        # The norm of a head of 256 in two halves spills on Triton 3.6: it is no candidate.
        assert ("", "triton_tma:128x256x64/4") in measured
        assert ("norm", "triton_tma:128x256x64/4") not in measured


def test_the_launch_is_kept(device):
    with ops.use_backend("native"):
        x, weights, _ = problem(device, torch.float32, depth=16, heads=(2, 1, 1), dim=16)
        if ops.backend_for(x) != "native":
            pytest.skip("no native library: nothing is kept of the reference")
        norms, inv_freq = norm_weights(device, 16, torch.float32), frequencies(16).to(device)
        ops.qkv_norm_rotary(x, *weights, *norms, head_dim=16, inv_freq=inv_freq)
        kept = [key for key in launch_cache._LAUNCHES if key[0] == "qkv_norm_rotary"]
        if not kept:
            pytest.skip("the native backend has no launch of a norm to keep")
        want = ops.qkv_norm_rotary(2 * x, *weights, *norms, head_dim=16, inv_freq=inv_freq)
        launch_cache.clear()
        got = ops.qkv_norm_rotary(2 * x, *weights, *norms, head_dim=16, inv_freq=inv_freq)
        for actual, expected in zip(got, want, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_norm_weight": torch.ones(16)}, r"q_norm_weight must be \[32\]"),
        ({"k_norm_weight": torch.ones(2, 32)}, "k_norm_weight must be"),
        ({"k_norm_weight": torch.ones(32, dtype=torch.int32)}, "k_norm_weight must be floating"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_offset": float("nan")}, "weight_offset must be"),
        ({"w_k": torch.zeros(64, 15)}, "w_k must be"),
        ({"inv_freq": None}, "give inv_freq, or cos and sin"),
        ({"path": "decode"}, "cannot serve"),
        ({"path": "fast"}, "no such path"),
    ],
)
def test_mistakes(change, message):
    arguments = {
        "x": torch.zeros(2, 3, 16),
        **{name: torch.zeros(64, 16) for name in ("w_q", "w_k", "w_v")},
        "q_norm_weight": torch.ones(32),
        "k_norm_weight": torch.ones(64),
        "head_dim": 32,
        "inv_freq": torch.ones(16),
    }
    ops.qkv_norm_rotary(**arguments)
    with pytest.raises(ValueError, match=message):
        ops.qkv_norm_rotary(**{**arguments, **change})
