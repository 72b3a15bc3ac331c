"""vLLM's and FlashInfer's functions, against their kernels written out in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded

from rope_dist import ops
from rope_dist.ops import drop_in_engines, launch_cache

HEADS, DIM, ROWS = (4, 2), 24, 40


def rotated(x, cos, sin, interleaved, first=0, inverse=False):
    """A token's heads ``[T, H, D]`` by a row of angles each, index by index as vLLM's kernel has them."""
    x, sin = x.double().clone(), -sin if inverse else sin
    pairs = cos.shape[1]
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        u, v = x[..., first + a].clone(), x[..., first + b].clone()
        c, s = cos[:, i, None].double(), sin[:, i, None].double()
        x[..., first + a], x[..., first + b] = u * c - v * s, v * c + u * s
    return x


def cache(device, rotary_dim=16, dtype=torch.float32):
    """``[ROWS, R]`` as vLLM's rotary embedding makes it."""
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim)
    freqs = torch.einsum("i,j -> ij", torch.arange(ROWS, dtype=torch.float), inv_freq)
    return torch.cat((freqs.cos(), freqs.sin()), dim=-1).to(device, dtype)


def heads(device, tokens=(7,), dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(*tokens, h, DIM, device=device).to(dtype) for h in HEADS]


def positions_of(device, tokens=(7,), dtype=torch.int64):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, ROWS, tokens, generator=generator, dtype=dtype).to(device)


def by_cache(x, positions, table, is_neox, **options):
    cos, sin = table[positions.flatten().long()].chunk(2, -1)
    return rotated(x.reshape(-1, *x.shape[-2:]), cos, sin, not is_neox, **options).view(x.shape)


# Shapes in which vLLM's kernel takes queries: what is made of [*tokens, H, D] so that it lies in memory like that.
LAYOUTS = {
    "flat": lambda x: x.flatten(-2),
    "heads": lambda x: x,
    "flat part of a row": lambda x: torch.cat((x, x), -2).flatten(-2)[..., : x.shape[-2] * DIM],
    "heads first": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [(7,), (2, 3), (0,)])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("form", ["vllm", "flashinfer in place", "flashinfer"])
def test_by_a_cache(backend, device, layout, tokens, is_neox, form):
    table = cache(device)
    for repeat in range(2):  # the second from the launch cache
        q, k = heads(device, tokens)
        positions = positions_of(device, tokens, torch.int32 if form == "flashinfer" else torch.int64)
        positions = (positions + repeat) % ROWS
        want = [by_cache(x, positions, table, is_neox) for x in (q, k)]
        query, key = LAYOUTS[layout](q), LAYOUTS[layout](k)
        before = query.clone()
        if form == "vllm":
            assert ops.rotary_embedding(positions, query, key, DIM, table, is_neox) is None
        elif form == "flashinfer in place":
            ops.apply_rope_with_cos_sin_cache_inplace(positions, query, key, DIM, table, is_neox)
        else:
            out = ops.apply_rope_with_cos_sin_cache(positions, query, key, DIM, table, is_neox)
            assert torch.equal(query, before)
            query, key = out
        for actual, expected in zip((query, key), want, strict=True):
            assert_rounded(actual.reshape(expected.shape), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_sixteen_bits_are_rounded_once(backend, device, dtype, cache_dtype):
    (q, _), table, positions = (
        heads(device, dtype=dtype),
        cache(device, dtype=cache_dtype),
        positions_of(device),
    )
    want = by_cache(q, positions, table, True)
    ops.rotary_embedding(positions, q, None, DIM, table, True)
    assert_rounded(q, want)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_part_of_a_head_and_back(backend, device, is_neox, inverse):
    """vLLM's ``rope_dim_offset`` (DeepSeek) and ``inverse``."""
    (q, k), table, positions = heads(device), cache(device), positions_of(device)
    want = [by_cache(x, positions, table, is_neox, first=6, inverse=inverse) for x in (q, k)]
    ops.rotary_embedding(positions, q, k, DIM, table, is_neox, rope_dim_offset=6, inverse=inverse)
    assert_rounded(q, want[0])
    assert_rounded(k, want[1])


def frequencies(rotary_dim, scale, theta):
    """FlashInfer's, a power of the base by the scale, with the rounding of float32 that a model's buffer has."""
    return torch.tensor(
        [
            1.0 / torch.tensor(theta) ** (torch.tensor(2.0 * i) / rotary_dim) / scale
            for i in range(rotary_dim // 2)
        ]
    ).double()


def by_base(x, positions, rotary_dim, interleaved, scale, theta):
    angles = positions.cpu().double()[:, None] * frequencies(rotary_dim, scale, theta)
    return rotated(x.cpu(), angles.cos(), angles.sin(), interleaved)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("rotary_dim", "scale", "theta"), [(None, 1, 1e4), (16, 4, 5e5)])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_by_a_base(backend, device, inplace, interleave, rotary_dim, scale, theta, integers):
    options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_scale": scale, "rope_theta": theta}
    indptr = torch.tensor([0, 3, 3, 7], device=device, dtype=integers)
    for start in (0, 100_000):  # the second from the launch cache
        offsets = torch.tensor([start, 9, 2], device=device, dtype=integers)
        positions = torch.tensor([start, start + 1, start + 2, 2, 3, 4, 5], device=device, dtype=integers)
        for at, packed, ids in (
            (ops.apply_rope_inplace if inplace else ops.apply_rope, (indptr, offsets), positions),
            (ops.apply_rope_pos_ids_inplace if inplace else ops.apply_rope_pos_ids, (positions,), positions),
        ):
            q, k = heads(device)
            want = [by_base(x, ids, rotary_dim or DIM, interleave, scale, theta) for x in (q, k)]
            before = q.clone()
            out = at(q, k, *packed, **options)
            assert (out is None) == inplace
            assert inplace or torch.equal(q, before)
            for actual, expected in zip((q, k) if inplace else out, want, strict=True):
                assert_rounded(actual, expected)
            if not inplace:
                only, none = at(q, None, *packed, **options)
                assert none is None
                assert torch.equal(only, out[0])


def test_tokens_outside_the_sequences_pass(backend, device):
    q, k = heads(device)
    bounds, offsets = torch.tensor([1, 3], device=device), torch.tensor([4], device=device)
    out = ops.apply_rope(q, k, bounds, offsets)
    for actual, x in zip(out, (q, k), strict=True):
        positions = torch.tensor([0, 4, 5, 0, 0, 0, 0])
        assert_rounded(actual, by_base(x, positions, DIM, False, 1, 1e4))


def test_frequencies_are_made_once_although_in_inference_mode(device):
    drop_in_engines._FREQUENCIES.clear()
    q, _ = heads(device)
    positions = positions_of(device)
    with torch.inference_mode():
        ops.apply_rope_pos_ids(q.clone(), None, positions, rope_theta=77.0)
    (kept,) = drop_in_engines._FREQUENCIES.values()
    q.requires_grad_()
    out, _ = ops.apply_rope_pos_ids(
        q, None, positions, rope_theta=77.0
    )  # an inference tensor cannot be saved
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    torch.testing.assert_close(grad, 2 * q.detach(), rtol=1e-5, atol=1e-5)  # a rotation keeps lengths
    assert next(iter(drop_in_engines._FREQUENCIES.values())) is kept
    for theta in range(1, 400):
        ops.apply_rope_pos_ids(q.detach(), None, positions, rope_theta=float(theta))
    assert len(drop_in_engines._FREQUENCIES) <= drop_in_engines.MOST_FREQUENCIES


def calls(device, dtype):
    table, positions = cache(device, dtype=dtype), positions_of(device)
    indptr, offsets = torch.tensor([0, 3, 7], device=device), torch.tensor([9, 2], device=device)

    def in_place(function, *before):
        def call(q, k, *after, **options):
            q, k = q * 1, k * 1
            function(*before, q, k, *after, **options)
            return q, k

        return call

    inv = {"inverse": True, "rope_dim_offset": 2}
    return {
        "vllm": lambda q, k: in_place(ops.rotary_embedding, positions)(q, k, DIM, table, False, **inv),
        "flashinfer": lambda q, k: ops.apply_rope_with_cos_sin_cache(positions, q, k, DIM, table),
        "flashinfer, flat": lambda q, k: ops.apply_rope_with_cos_sin_cache(
            positions, q.flatten(1), k.flatten(1), DIM, table
        ),
        "flashinfer in place": lambda q, k: in_place(ops.apply_rope_with_cos_sin_cache_inplace, positions)(
            q, k, DIM, table
        ),
        "base": lambda q, k: ops.apply_rope(q, k, indptr, offsets, 16, rope_theta=3e4),
        "base in place": lambda q, k: in_place(ops.apply_rope_inplace)(q, k, indptr, offsets),
        "positions": lambda q, k: ops.apply_rope_pos_ids(q, k, positions, interleave=True),
        "positions in place": lambda q, k: in_place(ops.apply_rope_pos_ids_inplace)(q, k, positions),
    }


@pytest.mark.parametrize("call", calls("cpu", torch.float32))
def test_compiles_whole_with_gradients(device, call):
    torch.compiler.reset()
    rotate = calls(device, torch.float32)[call]
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in heads(device)]
    got, want = compiled(*inputs), rotate(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in out), inputs) for out in (got, want)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), rotate(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("call", calls("cpu", torch.float64))
def test_gradients(call):
    inputs = [x.double().requires_grad_() for x in heads("cpu")]
    assert torch.autograd.gradcheck(calls("cpu", torch.float64)[call], inputs)


Q, K, TABLE = torch.zeros(7, 4, DIM), torch.zeros(7, 2, DIM), torch.zeros(ROWS, 16)
AT, BOUNDS, STARTS = torch.zeros(7, dtype=torch.long), torch.tensor([0, 7]), torch.tensor([0])

VLLM = {"positions": AT, "query": Q, "key": K, "head_size": DIM, "cos_sin_cache": TABLE, "is_neox": True}
BASE = {"q": Q, "k": K}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": AT[:6]}, r"query must be \[6, heads \* 24\] or \[6, heads, 24\]"),
        ({"positions": AT[None, None]}, r"positions must be"),
        ({"positions": AT.float()}, "positions must be int32 or int64"),
        ({"positions": AT.to("meta")}, "positions must be on cpu"),
        ({"positions": AT + ROWS}, "positions must be rows of the table of 40, got values from 40 to 40"),
        ({"positions": AT - 1}, "from -1 to -1"),
        ({"head_size": 16}, "query must be"),
        ({"head_size": 0}, "query must be"),
        ({"query": Q.flatten(1)[:, :-1]}, "query must be"),
        ({"key": K[:6]}, "key must be"),
        ({"key": K.half()}, "one floating dtype"),
        ({"key": Q}, "share memory"),
        ({"query": Q[:1].expand(7, 4, DIM)}, "expanded"),
        ({"cos_sin_cache": TABLE[:, :15]}, "R even"),
        ({"cos_sin_cache": TABLE[:, :0]}, "above 0"),
        ({"cos_sin_cache": TABLE[None]}, r"\[max_position, R\]"),
        ({"cos_sin_cache": torch.zeros(ROWS, 26)}, "rope_dim_offset 0 and the 26 dimensions"),
        ({"cos_sin_cache": TABLE.long()}, "floating"),
        ({"rope_dim_offset": 9}, "rope_dim_offset 9 and the 16 dimensions"),
        ({"rope_dim_offset": -1}, "rope_dim_offset -1"),
        ({"query": Q.clone().requires_grad_()}, "leaf"),
    ],
)
def test_mistakes_by_a_cache(change, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_embedding(**{**VLLM, **change})
    if not {"rope_dim_offset"} & change.keys() and message not in ("share memory", "expanded", "leaf"):
        with pytest.raises(ValueError, match=message.replace("rope_dim_offset 0 and the", "rotate")):
            ops.apply_rope_with_cos_sin_cache(**{**VLLM, **change})


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (ops.apply_rope, {"q": Q[None]}, r"\[tokens, heads, D\]"),
        (ops.apply_rope, {"k": K.flatten(1)}, r"\[tokens, heads, D\]"),
        (ops.apply_rope, {"k": K[:6]}, "one B, S and D"),
        (ops.apply_rope, {"rotary_dim": 15}, "even and at most 24, got 15"),
        (ops.apply_rope, {"rotary_dim": 26}, "even and at most 24, got 26"),
        (ops.apply_rope, {"rope_scale": 0}, "above 0"),
        (ops.apply_rope, {"rope_theta": -1.0}, "above 0"),
        (ops.apply_rope, {"indptr": BOUNDS.float()}, "indptr must be int32 or int64"),
        (ops.apply_rope, {"indptr": BOUNDS[:1]}, r"indptr must be \[sequences \+ 1\]"),
        (ops.apply_rope, {"indptr": BOUNDS + 1}, "indptr must not decrease"),
        (ops.apply_rope, {"offsets": STARTS.expand(2)}, r"offsets must be \[1\]"),
        (ops.apply_rope, {"offsets": STARTS.float()}, "offsets must be int32 or int64"),
        (ops.apply_rope, {"offsets": STARTS + 2**31}, "offsets must be within int32"),
        (ops.apply_rope_inplace, {"k": Q}, "share memory"),
        (ops.apply_rope_pos_ids, {"pos_ids": AT[:6]}, r"pos_ids must be \[7\]"),
        (ops.apply_rope_pos_ids, {"pos_ids": AT.float()}, "pos_ids must be int32 or int64"),
        (ops.apply_rope_pos_ids, {"pos_ids": AT + 2**31}, "pos_ids must be within int32"),
        (ops.apply_rope_pos_ids_inplace, {"q": Q.clone().requires_grad_()}, "leaf"),
    ],
)
def test_mistakes_by_a_base(call, change, message):
    where = {"pos_ids": AT} if "pos_ids" in call.__name__ else {"indptr": BOUNDS, "offsets": STARTS}
    with pytest.raises(ValueError, match=message):
        call(**{**BASE, **where, **change})


@pytest.mark.parametrize(
    ("call", "bad"),
    [
        (lambda ids: ops.rotary_embedding(ids, Q.clone(), None, DIM, TABLE, True), AT + ROWS),
        (lambda ids: ops.apply_rope_pos_ids(Q, None, ids), AT + 2**31),
        (lambda bounds: ops.apply_rope(Q, None, bounds, STARTS), BOUNDS + 1),
        (lambda offsets: ops.apply_rope(Q, None, BOUNDS, offsets), STARTS + 2**31),
    ],
)
def test_values_are_looked_at_although_a_launch_is_kept(monkeypatch, call, bad):
    """The keys of the launch cache know shapes only."""
    monkeypatch.setattr(launch_cache, "find", lambda *_: (lambda q, k, angles: (q, k), None))
    call(bad * 0)
    with pytest.raises(ValueError, match="must"):
        call(bad)


@pytest.mark.parametrize("call", calls("meta", torch.float32))
def test_nothing_waits_for_a_device(call):
    """Tensors without values: what looked at one would raise."""
    q, k = calls("meta", torch.float32)[call](*heads("meta"))
    assert (q.numel(), k.numel()) == (Q.numel(), K.numel())


@pytest.mark.parametrize("is_neox", [True, False])
def test_equals_flashinfer(is_neox):
    """Where it is installed, on a GPU: beside its own functions."""
    flashinfer = pytest.importorskip("flashinfer")
    if not torch.cuda.is_available():
        pytest.skip("FlashInfer needs a GPU")
    q, k = (torch.randn(7, h, 64, device="cuda", dtype=torch.float16) for h in HEADS)
    table, positions = cache("cuda", 64), positions_of("cuda", dtype=torch.int32)
    indptr, offsets = (torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, 3, 7], [9, 2]))
    flat = (positions, q.flatten(1), k.flatten(1), 64, table, is_neox)
    for got, want in (
        (ops.apply_rope_with_cos_sin_cache(*flat), flashinfer.apply_rope_with_cos_sin_cache(*flat)),
        (
            ops.apply_rope(q, k, indptr, offsets, interleave=not is_neox),
            flashinfer.apply_rope(q, k, indptr, offsets, interleave=not is_neox),
        ),
        (
            ops.apply_rope_pos_ids(q, k, positions, 32, not is_neox, 4, 5e5),
            flashinfer.apply_rope_pos_ids(q, k, positions, 32, not is_neox, 4, 5e5),
        ),
    ):
        torch.testing.assert_close(got, tuple(want), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("is_neox", [True, False])
def test_equals_vllm(is_neox):
    """Where it is installed, on a GPU: beside its own function."""
    vllm = pytest.importorskip("vllm._custom_ops")
    if not torch.cuda.is_available():
        pytest.skip("vLLM's kernel needs a GPU")
    table, positions = cache("cuda", 64), positions_of("cuda")
    results = []
    for module in (ops, vllm):
        torch.manual_seed(1)
        q, k = (torch.randn(7, h * 64, device="cuda") for h in HEADS)
        module.rotary_embedding(positions, q, k, 64, table, is_neox)
        results.append((q, k))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
