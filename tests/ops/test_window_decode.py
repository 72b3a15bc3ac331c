"""Decoding with a window in one kernel, against a sum over all pairs in float64 by the angles of docs/window.md."""

from unittest import mock

import pytest
import torch
from helpers.tensors import frequencies

from rope_dist import ops
from rope_dist.ops import window_decode as module
from rope_dist.ops.window_angles import WindowAngles
from rope_dist.ops.window_decode import has_window_decode, window_decode

triton_window = pytest.importorskip("rope_dist.ops.triton_window", reason="Triton is not installed")

FACTOR = 4.0
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(device, heads=(4, 2), tokens=(1, 70), dim=16, rotary_dim=None, dtype=torch.float32, rows=1):
    """q, k, v, the trained frequencies and those beyond the window."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads[0], tokens[0]), (heads[1], tokens[1]), (heads[1], tokens[1])]
    q, k, v = (torch.randn(rows, *size, dim, generator=generator).to(device, dtype) for size in sizes)
    inv_freq = frequencies(rotary_dim or dim).float().to(device)
    return q, k, v, inv_freq, inv_freq / FACTOR ** torch.linspace(0, 1, len(inv_freq), device=device)


def angles_of(inv_freq, far, positions, key_positions, window, group=0, **options):
    change = ops.to_fixed_point(inv_freq if group else far.double() - inv_freq.double())
    return WindowAngles(positions, key_positions, inv_freq, change, window, group, **options)


def as_complex(x, rotary_dim, first, interleaved):
    x = x[..., first : first + rotary_dim]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.complex(a.contiguous(), b.contiguous())


def reference(q, k, v, inv_freq, far, angles, seen, scale):
    """Each pair of a query and a key is rotated by its own angle, from what both were before any rotation."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    theta, beyond, rotary_dim = inv_freq.double().cpu(), far.double().cpu(), 2 * len(inv_freq)
    rotated, model_angles, rest = [], [], [x.clone() for x in (q, k)]
    for x, positions, other in zip((q, k), (angles.positions, angles.key_positions), rest, strict=True):
        other[..., angles.first : angles.first + rotary_dim] = 0
        model = (positions[..., None].float() * inv_freq).double().cpu()[:, None]  # the model's own product
        model_angles.append(model[:, 0])
        pairs = as_complex(x, rotary_dim, angles.first, angles.interleaved)
        rotated.append(pairs * torch.polar(torch.ones_like(model), -model))
    i, j = (x.cpu().long() for x in (angles.positions[:, :, None], angles.key_positions[:, None, :]))
    distance = (i - j)[..., None]
    if angles.group:
        size, group = angles.window, angles.group
        turns = ((i // group + size - size // group) - j // group)[..., None] * theta
    else:
        turns = angles.window * theta + (distance - angles.window) * beyond
    is_far = distance >= angles.window
    turns = torch.where(is_far, turns, model_angles[0][:, :, None] - model_angles[1][:, None])
    products = torch.einsum(
        "bhsr,bhtr,bstr->bhst", rotated[0], rotated[1].conj(), torch.polar(torch.ones_like(turns), turns)
    ).real
    factor = torch.where(is_far[..., 0], angles.far_scaling, angles.near_scaling)[:, None]
    logits = (products * factor + rest[0] @ rest[1].mT) * scale
    weights = torch.softmax(logits.masked_fill(~seen.cpu(), float("-inf")), -1)
    return torch.nan_to_num(weights) @ v


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def check(problem_, window, key_positions=None, seen=None, first=0, **options):
    q, k, v, inv_freq, far = problem_
    queries, keys = q.shape[2], k.shape[2]
    if key_positions is None:
        key_positions = torch.arange(keys)[None] + 3
    key_positions = key_positions.to(q.device)
    angles = angles_of(
        inv_freq, far, key_positions[:, -queries:], key_positions, window, first=first, **options
    )
    out = window_decode(q, k, v, angles, None if seen is None else seen.to(q.device), 0.3)
    expected = reference(q, k, v, inv_freq, far, angles, causal(queries, keys) if seen is None else seen, 0.3)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=TOLERANCES[q.dtype])
    return out


@pytest.fixture(autouse=True)
def kernels(triton_backend):
    """Everything here is by the kernels."""


@pytest.mark.parametrize("window", [0, 1, 33, 999])
@pytest.mark.parametrize("group", [0, 3])
def test_windows_within_and_beyond_a_block(device, window, group):
    check(problem(device), window, group=group)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.bfloat16),
        (80, torch.float16),
        (96, torch.bfloat16),
        (128, torch.float16),
        (256, torch.bfloat16),
    ],
)
def test_head_dims_in_16_bits(device, dim, dtype):
    check(problem(device, dim=dim, dtype=dtype), 20)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary_dim", "first"), [(48, 0), (32, 32), (64, 0)])
def test_layouts_of_a_head(device, interleaved, rotary_dim, first):
    given = problem(device, dim=64, rotary_dim=rotary_dim)
    check(given, 20, first=first, interleaved=interleaved, near_scaling=1.2, far_scaling=1.5)


@pytest.mark.parametrize("tokens", [(1, 600), (3, 600), (3, 3)])
def test_splits_and_several_new_tokens(device, tokens):
    """600 keys are three splits; 3 tokens of 6 heads are 18 rows, more than one of the tensor cores' tiles."""
    with mock.patch.object(triton_window, "launch_merge", wraps=triton_window.launch_merge) as merge:
        check(problem(device, heads=(6, 1), tokens=tokens), 50)
    assert merge.called == (tokens[1] == 600)


@pytest.mark.parametrize("tokens", [(1, 45), (2, 290)])
def test_left_padding(device, tokens):
    """Rows of their own positions; of one the window begins within its padding. A row of padding alone sees nothing."""
    queries, keys = tokens
    padding = torch.tensor([0, 5, keys - queries, keys])[:, None]
    key_positions = (torch.arange(keys)[None] - padding).clamp(min=0)
    seen = causal(queries, keys) & (torch.arange(keys)[None] >= padding)[:, None, None]
    out = check(problem(device, heads=(2, 1), rows=4, tokens=tokens), 9, key_positions, seen)
    assert not out[3].any()


def test_one_mask_for_all_rows_and_positions_of_each(device):
    key_positions = torch.stack((torch.arange(0, 120, 3), torch.arange(40)))
    seen = causal(1, 40).clone()
    seen[..., 7:12] = False
    check(problem(device, rows=2, tokens=(1, 40)), 31, key_positions, seen)


def test_far_positions(device):
    """Where the model's float32 product is off by hundredths, and the far angles make good for it."""
    check(problem(device), 20, torch.arange(70)[None] + 1_000_000)


def test_static_caches_and_other_strides(device):
    q, k, v, *frequencies_ = problem(device, tokens=(1, 90))
    heads_last = k.transpose(1, 2).contiguous().transpose(1, 2)
    check((q, heads_last[:, :, :70], v[:, :, :70], *frequencies_), 20)


def test_what_it_does_not_take(device):
    q, k, v, inv_freq, far = problem(device)
    assert has_window_decode(q, k, v)
    for given in (
        (q.clone().requires_grad_(), k, v),
        (q, k, v.half()),
        (q.repeat(1, 1, 40, 1), k, v),
        tuple(x.repeat(1, 1, 1, 20) for x in (q, k, v)),
        (q, k.mT.contiguous().mT, v),
    ):
        assert not has_window_decode(*given)
    assert has_window_decode(q, k, v.repeat(1, 1, 1, 2))
    positions = torch.arange(70, device=device)[None]
    angles = angles_of(inv_freq, far, positions[:, -1:], positions, 20)
    with pytest.raises(ValueError, match="no kernel for these tensors"):
        window_decode(q, k, v.half(), angles)
    with ops.use_backend("reference"):
        assert not has_window_decode(q, k, v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_positions": torch.arange(69)[None]}, r"key_positions must be \[1 or 1, 70\], got \[1, 69\]"),
        ({"positions": torch.arange(2)[None]}, r"positions must be \[1 or 1, 1\], got \[1, 2\]"),
        ({"first": 3}, r"must be the first or the last of 16, got first=3"),
        ({"inv_freq": torch.ones(7)}, r"inv_freq must be \[R/2\] and change_q64 \[2, R/2\]"),
    ],
)
def test_bad_arguments(changes, message):
    q, k, v, inv_freq, far = problem("cpu")
    positions = torch.arange(70)[None]
    angles = angles_of(inv_freq, far, positions[:, -1:], positions, 20)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        window_decode(q, k, v, angles)
    with pytest.raises(ValueError, match=r"seen must be \[1 or 1, 1, 1, 70\]"):
        window_decode(
            q, k, v, angles_of(inv_freq, far, positions[:, -1:], positions, 20), torch.ones(1, 1, 1, 69)
        )


def test_splits_cover_the_keys():
    for keys in (1, 255, 256, 257, 5000, 131_072):
        for programs in (1, 8, 500):
            of_a_split, splits = triton_window.split(keys, programs, 264, 32)
            assert (splits - 1) * of_a_split < keys <= splits * of_a_split
            assert splits <= triton_window.MAX_SPLITS


FORMS = {
    "plan": {"factor": 4},
    "grouped": {"factor": 4, "dynamic": False, "far": "grouped"},
    "far scaling": {"factor": 4, "dynamic": False, "strategy": "yarn", "far_scaling": "far"},
    "scaling": {"factor": 4, "dynamic": False, "strategy": "yarn", "far_scaling": "all"},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_model_decodes_by_it(form, device):
    """Two tokens at once and one alone, of a padded row, are those of the whole text by the other implementation."""
    pytest.importorskip("transformers")
    from helpers.growing import read, text
    from helpers.model_families import model_of

    import rope_dist

    model = model_of("Llama", initializer_range=0.15, num_hidden_layers=1).to(device)
    rope_dist.enable(model, window=20, **FORMS[form])
    ids = text(60).to(device)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with ops.use_backend("reference"), rope_dist.expect_length(100):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 57:]
        _, cache = read(model, ids[:, :57], attention_mask=mask[:, :57], position_ids=positions[:, :57])
    found = []
    with (
        rope_dist.expect_length(100),
        mock.patch.object(rope_dist.hf.window_calls, "window_decode", wraps=module.window_decode) as kernel,
    ):
        for start, end in ((57, 59), (59, 60)):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            logits, cache = read(model, ids[:, start:end], cache, **given)
            found.append(logits)
    assert kernel.call_count == 2
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=2e-4)
