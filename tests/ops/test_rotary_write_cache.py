"""Rotary with the key/value cache write: against float64 and the entries that a loop over tokens finds."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rope_dist import ops
from rope_dist.ops import reference_cache

FP8 = torch.float8_e4m3fn
SCALING = 1.25
BLOCK = 4
BLOCKS = 7


def normalised(x, weight, eps, offset):
    """RMS norm in float64, of each head or, with a weight of all heads, of all together."""
    x = x.double()
    if weight is None:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    weight = weight.double() + offset
    if weight.shape[0] == x.shape[-1]:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    flat = x.flatten(-2)
    return (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * weight).view(x.shape)


def expected(x, cos, sin, norm, interleaved):
    """``x`` ``[T, H, D]`` normalised and rotated in float64, by the tables of its tokens."""
    weight, eps, offset, after = norm or (None, None, None, False)
    if norm and not after:
        x = normalised(x, weight, eps, offset)
    x = exact(x[None], cos[None], sin[None], interleaved=interleaved)[0]
    return normalised(x, weight, eps, offset) if after else x


def assert_stored(cache, old, want, places, layout, scale):
    """Entry by entry: ``want[t]`` is at ``places[t]`` (block, offset) or nowhere (None), and all else is as it was."""
    touched = torch.zeros(BLOCKS, BLOCK, dtype=torch.bool)
    found, wanted = [], []
    for token, place in enumerate(places):
        if place is None:
            continue
        block, offset = place
        entry = {
            "flat": lambda b, o: cache[b * BLOCK + o],
            "NHD": lambda b, o: cache[b, o],
            "HND": lambda b, o: cache[b, :, o],
        }[layout](block, offset)
        touched[block, offset] = True
        found.append(entry)
        wanted.append(want[token])
    if found:
        found, wanted = torch.stack(found).cpu(), torch.stack(wanted).cpu()
        if scale is None:
            assert_rounded(found, wanted, few=3)
        else:
            divided = wanted / torch.as_tensor(scale).double().cpu().view(-1, 1)
            assert_rounded_to_fp8(found, divided)
    rows = {
        "flat": lambda c: c.unflatten(0, (BLOCKS, BLOCK)),
        "NHD": lambda c: c,
        "HND": lambda c: c.transpose(1, 2),
    }
    left = [rows[layout](c.float()).cpu()[~touched] for c in (cache, old)]
    assert torch.equal(*left)


def assert_rounded_to_fp8(actual, divided):
    """torch's own conversion of float64, but for values at a tie, which float32 may see on its other side."""
    rounded = divided.clamp(-448, 448).float().to(FP8)
    differ = actual.float() != rounded.float()
    assert differ.sum() <= 3 + 2e-3 * differ.numel()
    spacing = torch.maximum(divided.abs() / 8, torch.tensor(2.0**-9, dtype=torch.float64))
    assert (actual.double() - divided.clamp(-448, 448)).abs().le(0.5001 * spacing).all()


def empty_cache(layout, heads, dim, dtype, device):
    shape = {
        "flat": (BLOCKS * BLOCK, heads, dim),
        "NHD": (BLOCKS, BLOCK, heads, dim),
        "HND": (BLOCKS, heads, BLOCK, dim),
    }
    return torch.randn(shape[layout], device=device).to(dtype)


@settings(
    max_examples=32,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_equals_float64_and_a_loop_over_tokens(backend, device, data):
    draw = data.draw
    one_of = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = one_of(torch.float32, torch.float16, torch.bfloat16)
    dim = one_of(16, 64, 80, 96, 128, 256)
    v_dim = one_of(dim, dim, 48)
    rotary_dim = one_of(dim, dim // 2, dim - 2)
    q_heads, k_heads = one_of((4, 4), (4, 2), (5, 1), (9, 3))
    layout, fp8, interleaved = (
        one_of("flat", "NHD", "HND"),
        one_of(None, "number", "one", "each"),
        draw(st.booleans()),
    )
    addressed = one_of("slots", "seqlens", "positions", "bounds") if layout != "flat" else "slots"
    norm_kind = one_of(None, None, "heads", "joint", "after", "bare")

    # Sequences: how many tokens each has now and how many its cache has already. Entry 0 is not left out.
    if addressed == "bounds":
        lengths, batch, outside = one_of((3, 1, 2), (5,), (1, 0, 4)), 1, 1
        length = sum(lengths) + outside
    else:
        batch, length = one_of((1, 1), (2, 3), (3, 1), (1, 5))
        lengths, outside = (length,) * batch, 0
    seen = [one_of(0, 1, 3) for _ in lengths]
    total = batch * length

    q, k = (torch.randn(batch, length, n, dim, device=device).to(dtype) for n in (q_heads, k_heads))
    v = torch.randn(batch, length, k_heads, v_dim, device=device).to(dtype)
    if one_of(True, False):  # as parts of one projection
        joined = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        q, k, v = (
            part.unflatten(-1, x.shape[2:])
            for part, x in zip(
                joined.split([x.shape[2] * x.shape[3] for x in (q, k, v)], -1), (q, k, v), strict=True
            )
        )
    kind = FP8 if fp8 else dtype
    caches = [empty_cache(layout, k_heads, d, kind, device) for d in (dim, v_dim)]
    before = [cache.clone() for cache in caches]
    scales = [None, None]
    if fp8:
        scales = [
            {"number": 0.03, "one": torch.tensor([0.02]), "each": 0.01 + torch.rand(k_heads) / 20}[fp8]
        ] * 2
        scales = [s if isinstance(s, float) else s.to(device) for s in scales]

    # Positions, and by a loop the entry of every token.
    arguments = {"kv_layout": "HND" if layout == "HND" else "NHD", "interleaved": interleaved}
    positions, places = [], []
    table = torch.randperm(BLOCKS)[: 2 * len(lengths)].view(len(lengths), 2) if addressed != "slots" else None
    if addressed == "slots":
        positions = torch.randint(0, 1_000_001, (total,)).tolist()
        slots = torch.randperm(BLOCKS * BLOCK)[:total]
        slots[torch.rand(total) < 0.3] = -1
        places = [divmod(slot, BLOCK) if slot >= 0 else None for slot in slots.tolist()]
        slots = slots.to(one_of(torch.int32, torch.int64))
        arguments["slots"] = slots.view(batch, length).to(device) if one_of(True, False) else slots.to(device)
        arguments["position_ids"] = torch.tensor(positions, device=device).view(batch, length)
    else:
        for sequence, (count, past) in enumerate(zip(lengths, seen, strict=True)):
            for index in range(count):
                place = past + index
                positions.append(place)
                places.append((int(table[sequence, place // BLOCK]), place % BLOCK))
        arguments["block_table"] = table.to(one_of(torch.int32, torch.int64)).to(device)
        if addressed == "positions":
            arguments["position_ids"] = torch.tensor(positions, device=device).view(batch, length)
        else:
            arguments["cache_seqlens"] = torch.tensor(seen, dtype=torch.int32, device=device)
        if addressed == "bounds":
            bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            arguments["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
            positions += [None] * outside
            places += [None] * outside

    inv_freq = frequencies(rotary_dim).to(device)
    cos, sin = exact_tables(inv_freq.cpu(), torch.tensor([p or 0 for p in positions]), SCALING)
    for token, position in enumerate(positions):
        if position is None:  # not rotated
            cos[token], sin[token] = 1.0, 0.0
    if addressed != "slots" and one_of(True, False):
        rows = exact_tables(inv_freq, torch.arange(12, device=device), SCALING)
        arguments |= {"cos": rows[0].float(), "sin": rows[1].float()}
    else:
        arguments |= {"inv_freq": inv_freq, "attention_scaling": SCALING}

    norms = [None, None]
    if norm_kind is not None:
        eps, offset, after = 1e-3, 1.0 if norm_kind == "heads" else 0.0, norm_kind == "after"
        weights = [None, None]
        if norm_kind != "bare":
            sizes = [n * dim if norm_kind == "joint" else dim for n in (q_heads, k_heads)]
            weights = [torch.randn(n, device=device).to(one_of(dtype, torch.float32)) for n in sizes]
            arguments |= {
                "q_weight": weights[0],
                "k_weight": weights[1],
                "weight_offset": offset,
                "norm_after": after,
            }
        arguments["eps"] = eps
        norms = [(w.cpu() if w is not None else None, eps, offset, after) for w in weights]

    if fp8:
        arguments |= {"k_scale": scales[0], "v_scale": scales[1]}
    without_q, inplace = one_of(False, False, True), draw(st.booleans())
    packed = batch == 1 and (addressed == "bounds" or draw(st.booleans()))
    want = [
        expected(x.flatten(0, 1).cpu(), cos, sin, norm, interleaved)
        for x, norm in zip((q, k), norms, strict=True)
    ]
    heads = [x[0] if packed else x for x in (q, k, v)]
    if packed and "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"][0]
    if without_q:
        arguments.pop("q_weight", None)
    v_want = v.cpu().flatten(0, 1).double()
    out = ops.rotary_write_cache(
        None if without_q else heads[0], *heads[1:], *caches, inplace=inplace, **arguments
    )

    if without_q:
        assert out is None
    else:
        assert (out.data_ptr() == heads[0].data_ptr()) == inplace
        assert out.shape == heads[0].shape
        assert_rounded(out.reshape(want[0].shape), want[0], few=3)
    for cache, old, new, scale in zip(caches, before, (want[1], v_want), scales, strict=True):
        assert_stored(cache, old, new, places, layout, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_rounded_to_fp8_as_torch_does(backend, device, dtype):
    """NaN stays NaN, what is larger than 448 is 448, also infinities; subnormals and ties as torch rounds them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(4, 64, 256)
    k = torch.zeros(4, 64, 2)
    caches = [torch.zeros(4, 64, d, device=device).to(FP8) for d in (2, 256)]
    ops.rotary_write_cache(
        None, k.to(dtype).to(device), numbers.to(device), *caches, torch.arange(4, device=device),
        inv_freq=torch.ones(1, device=device), k_scale=1.0, v_scale=1.0,
    )  # fmt: skip
    want = numbers.float().clamp(-448, 448).to(FP8)
    found = caches[1].cpu()
    assert torch.equal(found.float().isnan(), want.float().isnan())
    there = ~want.float().isnan()
    assert torch.equal(found.view(torch.uint8)[there], want.view(torch.uint8)[there])


def small(device, tokens=3, dtype=torch.float32):
    """Heads of 16 dimensions and paged caches of 3 blocks of 2."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, n, 16, device=device).to(dtype) for n in (4, 2, 2))
    return q, k, v, *(torch.zeros(3, 2, 2, 16, device=device, dtype=dtype) for _ in range(2))


def test_positions_may_differ_from_places(backend, device):
    """Positions rotate and bounds with cache_seqlens place: tokens that were dropped from the cache (StreamingLLM)."""
    q, k, v, k_cache, v_cache = small(device)
    inv_freq, positions = frequencies(16).to(device), torch.tensor([70, 71, 9], device=device)
    ops.rotary_write_cache(
        q, k, v, k_cache, v_cache, block_table=torch.tensor([[2, 1], [0, 0]], device=device),
        cu_seqlens=torch.tensor([0, 2, 3], device=device), cache_seqlens=torch.tensor([1, 0], device=device),
        inv_freq=inv_freq, position_ids=positions,
    )  # fmt: skip
    want = exact(k[None], *exact_tables(inv_freq, positions[None]))[0]
    assert_rounded(torch.stack((k_cache[2, 1], k_cache[1, 0], k_cache[0, 0])), want)
    assert torch.equal(torch.stack((v_cache[2, 1], v_cache[1, 0], v_cache[0, 0])), v)
    assert not torch.stack((k_cache[0, 1], k_cache[1, 1], k_cache[2, 0])).any()


@pytest.mark.parametrize("by_table", [False, True])
def test_positions_of_several_axes(backend, device, by_table):
    """Qwen2-VL's: a pair turns by the position of its axis."""
    q, k, v, k_cache, v_cache = small(device)
    inv_freq, axis = frequencies(16), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    positions = torch.tensor([[4, 5, 6], [7, 7, 8], [1, 2, 1]])
    if by_table:
        places = {
            "block_table": torch.tensor([[2, 1]], device=device),
            "cache_seqlens": torch.tensor([1], device=device),
        }
    else:
        places = {"slots": torch.tensor([5, 2, 3], device=device)}
    ops.rotary_write_cache(
        q, k, v, k_cache, v_cache, **places, position_ids=positions.to(device),
        inv_freq=ops.mrope_frequencies(inv_freq.to(device), (2, 3, 3)),
    )  # fmt: skip
    angles = positions.double()[axis].t() * inv_freq.double()
    want = exact(k[None].cpu(), angles.cos()[None], angles.sin()[None])[0]
    assert_rounded(torch.stack((k_cache[2, 1], k_cache[1, 0], k_cache[1, 1])), want)
    assert torch.equal(torch.stack((v_cache[2, 1], v_cache[1, 0], v_cache[1, 1])), v)


def test_a_token_past_the_tables_is_written_as_it_is(backend, device):
    """Also an infinity, which a rotation by nothing would make NaN."""
    q, k, v, k_cache, v_cache = small(device)
    q[2, 0, 0] = k[2, 0, 0] = float("inf")
    cos, sin = (t.float() for t in exact_tables(frequencies(16).to(device), torch.arange(5, device=device)))
    positions = torch.tensor([1, 4, 5], device=device)
    slots = torch.tensor([0, 5, 2], device=device)
    out = ops.rotary_write_cache(q, k, v, k_cache, v_cache, slots, cos=cos, sin=sin, position_ids=positions)
    assert torch.equal(out[2], q[2])
    assert torch.equal(k_cache[1, 0], k[2])
    assert_rounded(out[:2], exact(q[None, :2], cos[None, [1, 4]], sin[None, [1, 4]])[0])


def test_what_does_not_exist_is_not_written(backend, device):
    """The operator itself looks at no value: as on a GPU, there is no access outside the caches."""
    q, k, v, *caches = small(device)
    q, k, v = q[None], k[None], v[None]
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))
    integers = lambda *x: torch.tensor(x, device=device)  # noqa: E731
    write = torch.ops.rope_dist.rotary_write_cache
    write(q, k, v, *caches, integers(6, -7, 2**31), inv_freq_q64=inv_freq_q64)
    # Places 0, 1, 2 of a sequence: in block -1, in block 3 of 3, and past the table.
    write(q, k, v, *caches, None, integers([-1]), inv_freq_q64=inv_freq_q64)
    write(q, k, v, *caches, None, integers([3]), inv_freq_q64=inv_freq_q64)
    last = [x[:, 2:] for x in (q, k, v)]
    write(*last, *caches, None, integers([0]), seqlen_offsets=integers(2), inv_freq_q64=inv_freq_q64)
    assert not any(cache.any() for cache in caches)
    write(q, k, v, *caches, integers(5, -1, 6), inv_freq_q64=inv_freq_q64)
    assert torch.equal(caches[1][2, 1], v[0, 0])
    assert int(caches[1].any(-1).any(-1).sum()) == 1


@pytest.mark.parametrize(
    "slots", [[3, -1, 0, -1, 5], [-1, -1, -1, -1, -1], [0, 1, 2, 3, 4], [-1, 0, -1, 5, -1]]
)
def test_written_without_the_size_of_a_mask(slots):
    """How a device writes that must not be waited for: padding neither writes nor is mistaken for entry 0."""
    new, blocks, slots = torch.randn(5, 2, 4), torch.randn(3, 2, 2, 4), torch.tensor(slots)
    by_loop = blocks.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            by_loop[slot // 2, slot % 2] = new[token]
    for write in (reference_cache.write_entries, reference_cache.write_all):
        found = blocks.clone()
        write(new, found, slots)
        assert torch.equal(found, by_loop)


def test_entries_past_two_to_the_31(backend, device):
    """Blocks far apart, as a view: only the touched pages exist."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    q, k, v, *_ = small(device, dtype=torch.float16)
    memory = [torch.empty(8 * 2**28 + 256, dtype=torch.float16, device=device) for _ in range(2)]
    caches = [m.as_strided((9, 2, 2, 16), (2**28, 32, 16, 1)) for m in memory]
    inv_freq, positions = frequencies(16).to(device), torch.tensor([3, 8, 7], device=device)
    slots = torch.tensor([17, 1, -1], device=device)
    ops.rotary_write_cache(q, k, v, *caches, slots, inv_freq=inv_freq, position_ids=positions)
    want = exact(k[None], *exact_tables(inv_freq, positions[None]))[0]
    assert_rounded(torch.stack((caches[0][8, 1], caches[0][0, 1])), want[:2])
    assert torch.equal(torch.stack((caches[1][8, 1], caches[1][0, 1])), v[:2])


def test_a_number_that_changes_is_not_the_one_of_an_earlier_call(backend, device):
    q, k, v, *_ = small(device)
    slots, inv_freq = torch.arange(3, device=device), frequencies(16).to(device)
    for scale in (0.5, 0.25, 2.0):
        caches = [torch.zeros(3, 2, 16, device=device).to(FP8) for _ in range(2)]
        ops.rotary_write_cache(q, k, v, *caches, slots, inv_freq=inv_freq, k_scale=scale, v_scale=2 * scale)
        assert_rounded_to_fp8(caches[1].cpu(), v.double().cpu() / (2 * scale))


def test_nothing_to_write(backend, device):
    q, k, v, *caches = small(device)
    inv_freq, none = frequencies(16).to(device), torch.zeros(0, dtype=torch.int64, device=device)
    out = ops.rotary_write_cache(q[:0], k[:0], v[:0], *caches, none, inv_freq=inv_freq)
    assert out.shape == (0, 4, 16)
    padding = torch.full((3,), -1, device=device)
    out = ops.rotary_write_cache(q, k, v, *(c[:0] for c in caches), padding, inv_freq=inv_freq)
    assert_rounded(out, exact(q[None], *exact_tables(inv_freq, torch.arange(3, device=device)[None]))[0])


def test_compiles_whole_and_keeps_its_contract(device):
    q, k, v, k_cache, v_cache = small(device)
    inv_freq_q64 = ops.to_fixed_point(frequencies(16).to(device))
    slots, scale = torch.tensor([3, -1, 5], device=device), torch.tensor([0.5], device=device)
    weight, table = torch.randn(16, device=device), torch.tensor([[1, 2]], device=device)
    fp8 = [cache.to(FP8) for cache in (k_cache, v_cache)]
    four = [x[None] for x in (q, k, v)]
    rest = (1.0, 1.0, False, True, weight, weight, 1e-6, 0.0, False, None, None, inv_freq_q64)
    operators = torch.ops.rope_dist
    torch.library.opcheck(
        operators.rotary_write_cache, (*four, k_cache, v_cache, slots, None, None, None, *rest)
    )
    torch.library.opcheck(
        operators.rotary_write_cache, (None, *four[1:], k_cache, v_cache, slots, None, None, None, *rest)
    )
    torch.library.opcheck(
        operators.rotary_write_cache_, (*four, k_cache, v_cache, None, table, None, None, *rest)
    )

    def call(q, k_cache, v_cache, inplace=False):
        scales = {} if k_cache.dtype != FP8 else {"k_scale": scale, "v_scale": 0.25}
        return ops.rotary_write_cache(
            q,
            k,
            v,
            k_cache,
            v_cache,
            slots,
            inv_freq=inv_freq_q64,
            q_weight=weight,
            inplace=inplace,
            **scales,
        )

    for caches in ([k_cache, v_cache], fp8):
        for inplace in (False, True):
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            got_caches, want_caches = ([c.clone() for c in caches] for _ in range(2))
            got, want = (f(q.clone(), *c, inplace) for f, c in ((compiled, got_caches), (call, want_caches)))
            torch.testing.assert_close(got, want)
            for a, b in zip(got_caches, want_caches, strict=True):
                assert torch.equal(a.float(), b.float())


def test_no_gradient_and_a_version_that_changes(backend, device):
    q, k, v, *caches = small(device)
    slots, inv_freq = torch.arange(3, device=device), frequencies(16).to(device)
    leaf = q.requires_grad_()
    weight = torch.ones_like(caches[0], requires_grad=True)
    product = weight * caches[0]
    out = ops.rotary_write_cache(leaf, k, v, *caches, slots, inv_freq=inv_freq)
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with pytest.raises(ValueError, match="for inference"):
        torch.func.vmap(lambda k: ops.rotary_write_cache(None, k, v, *caches, slots, inv_freq=inv_freq))(
            k[None]
        )


def problem(**change):
    q, k, v, k_cache, v_cache = small("cpu")
    arguments = {
        "q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": torch.tensor([0, 1, 5]),
        "inv_freq": torch.ones(8),
    }  # fmt: skip
    return {**arguments, **change}


TABLE = {"slots": None, "block_table": torch.tensor([[0, 1]])}
TINY = [torch.zeros(3, 2, 2, 16).to(FP8) for _ in range(2)]
IN_FP8 = {"k_cache": TINY[0], "v_cache": TINY[1], "k_scale": 1.0, "v_scale": 1.0}
FUSED = torch.zeros(3, 2, 2, 2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cache": torch.tensor(0.0), "v_cache": torch.tensor(0.0)}, r"k_cache must be .* got \[\]"),
        ({"k_cache": torch.zeros(3, 2, 3, 16)}, r"k_cache must be \[blocks, block_size, 2, 16\]"),
        ({"v_cache": torch.zeros(6, 2, 16)}, r"v_cache must be \[blocks, block_size, 2, 16\]"),
        ({"v_cache": torch.zeros(4, 2, 2, 16)}, "room for the same tokens"),
        ({"k_cache": torch.zeros(3, 2, 2, 16).half()}, "k_cache must be torch.float32 or torch.float8_e4m3fn"),
        ({"k_cache": TINY[0], "k_scale": 1.0, "v_scale": 1.0}, "one dtype"),
        ({"v_cache": torch.zeros(3, 2, 2, 16).to(torch.float8_e5m2)}, "got torch.float8_e5m2"),
        ({"k_cache": torch.zeros(1, 2, 2, 16).expand(3, 2, 2, 16)}, "k_cache is expanded"),
        ({"k_cache": FUSED[:, 0], "v_cache": FUSED[:, 0]}, "k_cache and v_cache share memory"),
        ({"k_cache": FUSED.view(6, 2, 2, 16)[:3], "k": FUSED[1, 0, :, :, :].flatten(0, 1)[:3, None].expand(3, 2, 16)},
         "k_cache and k share memory"),
        ({"kv_layout": "HDN"}, "kv_layout must be"),
        ({"kv_layout": "HND", "k_cache": torch.zeros(6, 2, 16), "v_cache": torch.zeros(6, 2, 16)}, "paged caches"),
        ({"kv_layout": "HND", "k_cache": torch.zeros(3, 3, 2, 16)}, r"k_cache must be \[blocks, 2, block_size, 16\]"),
        ({"q": torch.zeros(2, 4, 16)}, "q must be"),
        ({"q": torch.zeros(3, 4, 8)}, "one head size"),
        ({"k": torch.zeros(())}, "must be"),
        ({"v": torch.zeros(3, 1, 16)}, "one number of heads"),
        ({"v": torch.zeros(3, 2, 16).half()}, "one floating dtype"),
        ({"slots": None}, "neither"),
        ({"block_table": torch.tensor([[0, 1]])}, "both"),
        ({"slots": torch.tensor([0, 1])}, r"slots must be \[3\]"),
        ({"slots": torch.tensor([0.0, 1.0, 2.0])}, "slots must be int32"),
        ({"slots": torch.tensor([0, 1, 6])}, "slot 6 is past"),
        ({**TABLE, "k_cache": torch.zeros(6, 2, 16), "v_cache": torch.zeros(6, 2, 16)}, "needs paged caches"),
        ({**TABLE, "block_table": torch.tensor([0, 1])}, r"block_table must be \[1, most blocks\]"),
        ({**TABLE, "block_table": torch.tensor([[0, 3]])}, "blocks of the 3 there are, got 0 to 3"),
        ({**TABLE, "block_table": torch.tensor([[0, -1]])}, "got -1 to 0"),
        ({**TABLE, "cache_seqlens": torch.tensor([2])}, "place 4 of a sequence is past the 4"),
        ({**TABLE, "cache_seqlens": torch.tensor([2, 2])}, r"cache_seqlens must be \[1\]"),
        ({**TABLE, "cu_seqlens": torch.tensor([0, 2, 1])}, "must not decrease"),
        ({**TABLE, "cu_seqlens": torch.tensor([0, 1, 3])}, r"block_table must be \[2, most blocks\]"),
        ({"position_ids": torch.arange(3), "cache_seqlens": torch.tensor([2])}, "nothing left"),
        ({"position_ids": torch.arange(2)}, "position_ids must be"),
        ({"inv_freq": torch.ones(3, 8)}, "frequencies of 3 axes need position_ids"),
        ({"inv_freq": torch.ones(3, 8), "position_ids": torch.zeros(3, 3, dtype=torch.int64), **TABLE},
         "give block_table cache_seqlens too"),
        ({"inv_freq": torch.tensor(1.0)}, "inv_freq must be"),
        ({"position_ids": torch.tensor([0, 1, 2**31])}, "within int32"),
        ({"inv_freq": None}, "give inv_freq, or cos and sin"),
        ({"cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8)}, "give inv_freq, or cos and sin"),
        ({"inv_freq": torch.ones(9)}, "rotates 18 dimensions"),
        ({"inv_freq": None, "cos": torch.zeros(4, 8), "sin": torch.zeros(4, 8)}, "cos and sin must be"),
        ({"inv_freq": None, "cos": torch.zeros(3, 8), "sin": torch.zeros(3, 8), "attention_scaling": 2.0}, "goes with"),
        ({**IN_FP8, "k_scale": None}, "need k_scale"),
        ({"v_scale": 1.0}, "v_scale is for float8 caches"),
        ({**IN_FP8, "v_scale": 0.0}, "v_scale must be a positive number"),
        ({**IN_FP8, "k_scale": float("nan")}, "k_scale must be a positive number"),
        ({**IN_FP8, "k_scale": torch.ones(3)}, r"floating \[1\] or \[2\]"),
        ({**IN_FP8, "k_scale": torch.ones(2, dtype=torch.int32)}, r"floating \[1\] or \[2\]"),
        ({"q_weight": torch.ones(15)}, "q_weight must be"),
        ({"q": None, "q_weight": torch.ones(16)}, "q_weight without q"),
        ({"eps": -1.0}, "eps must be"),
        ({"norm_after": True}, "are of a norm"),
        ({"weight_offset": 1.0}, "are of a norm"),
    ],
)  # fmt: skip
def test_mistakes(change, message):
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ops.rotary_write_cache(**problem(**change))


def test_in_place_queries_must_not_share_memory():
    joined = torch.zeros(3, 8, 16)
    arguments = problem(q=joined[:, :4], k=joined[:, 4:6], v=joined[:, 6:])
    assert ops.rotary_write_cache(**arguments, inplace=True) is not None
    arguments = problem(q=joined[:, :4], k=joined[:, 3:5], v=joined[:, 6:])
    with pytest.raises(ValueError, match="q and k share memory"):
        ops.rotary_write_cache(**arguments, inplace=True)


def test_memory_is_shared_by_elements_of_unlike_size(device):
    """Values that lie in the memory of an 8-bit cache."""
    memory = torch.zeros(6 * 2 * 16 * 2 + 192, dtype=torch.uint8, device=device)
    v = memory[:192].view(torch.float16).view(3, 2, 16)
    cache = memory[191 : 191 + 192].view(FP8).view(6, 2, 16)
    heads = {"q": None, "k": torch.zeros(3, 2, 16).half(), "v": v, "k_cache": torch.zeros(6, 2, 16).to(FP8)}
    scales = {"k_scale": 1.0, "v_scale": 1.0}
    with pytest.raises(ValueError, match="v_cache and v share memory"):
        ops.rotary_write_cache(**problem(**heads, **scales, v_cache=cache))
    cache = memory[192:384].view(FP8).view(6, 2, 16)
    assert ops.rotary_write_cache(**problem(**heads, **scales, v_cache=cache)) is None
