"""Attention by two rotations against a softmax over all pairs in float64: values, gradients, masks, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rope_dist.ops import window_engines
from rope_dist.ops import windowed_attention as module
from rope_dist.ops.window_blocks import WindowBlocks
from rope_dist.ops.window_engines import flash_windowed, flex_windowed, has_flash
from rope_dist.ops.windowed_attention import merge, windowed_attention

HEAD_DIM, BLOCK = 16, 16


def tensors(rows, heads, kv_heads, queries, keys, dtype=torch.float32, grad=False):
    """q, k, far_q, far_k, v of independent random numbers: a pair by the wrong rotation shows."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, queries), (rows, kv_heads, keys)] * 2 + [(rows, kv_heads, keys)]
    made = (torch.randn(*shape, HEAD_DIM, generator=generator).to(dtype) for shape in shapes)
    return [one.requires_grad_(grad) for one in made]


def reference(q, k, far_q, far_k, v, positions, key_positions, window, seen, scale):
    """The softmax over all keys in float64."""
    q, k, far_q, far_k, v = (x.double() for x in (q, k, far_q, far_k, v))
    k, far_k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, far_k, v))
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    logits = torch.where(distance < window, q @ k.mT, far_q @ far_k.mT) * scale
    weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
    return torch.nan_to_num(weights) @ v


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def padded(queries, keys, padding):
    """Positions of queries and keys, and the mask, of rows with so many tokens of padding before them."""
    padding = torch.tensor(padding)[:, None]
    key_positions = (torch.arange(keys)[None] - padding).clamp(min=0)
    seen = causal(queries, keys) & (torch.arange(keys)[None] >= padding)[:, None, None]
    return key_positions[:, -queries:], key_positions, seen


CASES = {
    "prefill": (1, 6, 2, 70, 70, 7, None),
    "window of blocks": (1, 4, 2, 70, 70, 40, None),
    "window of 1": (1, 4, 4, 40, 40, 1, None),
    "all far": (1, 4, 2, 40, 40, 0, None),
    "all near": (1, 4, 1, 40, 40, 99, None),
    "one new token": (2, 4, 2, 1, 50, 7, None),
    "a piece": (2, 4, 2, 21, 50, 7, None),
    "padded": (3, 4, 2, 45, 45, 9, (0, 5, 40)),
    "padded, new token": (2, 4, 2, 1, 45, 9, (0, 5)),
    "padded, a piece": (2, 4, 2, 20, 45, 9, (0, 5)),
}


def layout(case):
    rows, heads, kv_heads, queries, keys, window, padding = CASES[case]
    if padding is None:
        key_positions = torch.arange(keys)[None] + 3
        return (
            (rows, heads, kv_heads, queries, keys),
            window,
            key_positions[:, -queries:],
            key_positions,
            None,
        )
    return (rows, heads, kv_heads, queries, keys), window, *padded(queries, keys, padding)


class TestAgainstAllPairs:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, fused, monkeypatch):
        shape, window, positions, key_positions, mask = layout(case)
        if not fused:
            monkeypatch.setattr(module, "_is_fused", lambda q, v: False)
        given = tensors(*shape, grad=True)
        blocks = WindowBlocks(positions, key_positions, window, mask, block=BLOCK)
        out = windowed_attention(*given, blocks, 0.3)
        seen = causal(*shape[3:]) if mask is None else mask
        expected = reference(*given, positions, key_positions, window, seen, 0.3)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(out, given, grad)
        wanted = torch.autograd.grad(
            expected, given, grad.double(), materialize_grads=True, allow_unused=True
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=5e-6)

    def test_float64_to_the_last_digits(self):
        _, window, positions, key_positions, _ = layout("prefill")
        given = tensors(1, 6, 2, 70, 70, torch.float64)
        blocks = WindowBlocks(positions, key_positions, window, block=BLOCK)
        expected = reference(*given, positions, key_positions, window, causal(70, 70), 0.25)
        torch.testing.assert_close(windowed_attention(*given, blocks), expected, rtol=0, atol=1e-14)

    def test_bfloat16_is_as_exact_as_plain_attention(self):
        q, k, _, _, v = given = tensors(1, 4, 2, 90, 90, torch.bfloat16)
        positions = torch.arange(90)[None]
        expected = reference(q, k, q, k, v, positions, positions, 20, causal(90, 90), 0.25)
        given[2], given[3] = q, k  # one rotation: what plain attention computes
        blocks = WindowBlocks(positions, positions, 20, block=BLOCK)
        error = (windowed_attention(*given, blocks).double() - expected).abs().max()
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert error <= 2 * (plain.double() - expected).abs().max()

    def test_packed_texts(self):
        positions = torch.cat([torch.arange(30), torch.arange(25)])[None]
        text = (torch.arange(55) >= 30)[None]
        mask = causal(55, 55) & (text[:, None, :, None] == text[:, None, None])
        given = tensors(1, 4, 2, 55, 55)
        blocks = WindowBlocks(positions, positions, 8, mask, block=BLOCK)
        expected = reference(*given, positions, positions, 8, mask, 0.25)
        torch.testing.assert_close(windowed_attention(*given, blocks).double(), expected, rtol=0, atol=2e-6)

    def test_positions_with_gaps_are_distances_too(self):
        positions = torch.arange(0, 120, 3)[None]
        given = tensors(1, 4, 2, 40, 40)
        blocks = WindowBlocks(positions, positions, 31, block=BLOCK)
        assert not blocks.contiguous
        expected = reference(*given, positions, positions, 31, causal(40, 40), 0.25)
        torch.testing.assert_close(windowed_attention(*given, blocks).double(), expected, rtol=0, atol=2e-6)


class TestMasks:
    def test_an_additive_mask_is_read_as_a_choice_of_keys(self):
        shape, window, positions, key_positions, mask = layout("padded")
        given = tensors(*shape)
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        a, b = (
            windowed_attention(*given, WindowBlocks(positions, key_positions, window, m, block=BLOCK))
            for m in (mask, additive)
        )
        assert torch.equal(a, b)

    def test_a_mask_of_the_order_alone_is_none(self):
        positions = torch.arange(40)[None]
        assert WindowBlocks(positions[:, -9:], positions, 5, causal(9, 40)).contiguous

    def test_a_bias_is_refused(self):
        positions = torch.arange(8)[None]
        with pytest.raises(ValueError, match=r"adds a bias to the logits"):
            WindowBlocks(positions, positions, 3, torch.full((1, 1, 8, 8), 0.5))

    def test_a_mask_by_heads_is_refused(self):
        positions = torch.arange(8)[None]
        with pytest.raises(ValueError, match=r"the same for all heads, got \[1, 4, 8, 8\]"):
            WindowBlocks(positions, positions, 3, torch.ones(1, 4, 8, 8, dtype=torch.bool))

    def test_what_sees_nothing_is_zero_with_zero_gradients(self):
        shape, window, positions, key_positions, mask = layout("padded")
        given = tensors(*shape, grad=True)
        out = windowed_attention(*given, WindowBlocks(positions, key_positions, window, mask, block=BLOCK))
        assert not out[2, :, :40].any()
        for grad in torch.autograd.grad(out.sum(), given):
            assert grad.isfinite().all()


class TestArguments:
    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (2, (1, 4, 9, HEAD_DIM), r"far_q and far_k must have the shapes"),
            (4, (1, 2, 9, HEAD_DIM), r"v \[B, Hkv, T, Dv\]"),
        ],
    )
    def test_shapes(self, index, shape, message):
        given = tensors(1, 4, 2, 10, 10)
        given[index] = torch.zeros(shape)
        with pytest.raises(ValueError, match=message):
            windowed_attention(*given, WindowBlocks(torch.arange(10)[None], torch.arange(10)[None], 3))

    def test_blocks_of_another_call(self):
        blocks = WindowBlocks(torch.arange(9)[None], torch.arange(9)[None], 3)
        with pytest.raises(ValueError, match=r"blocks are of 9 queries and 9 keys, got 10 and 10"):
            windowed_attention(*tensors(1, 4, 2, 10, 10), blocks)

    def test_more_queries_than_keys(self):
        with pytest.raises(ValueError, match=r"9 queries and only 8 keys"):
            WindowBlocks(torch.arange(9)[None], torch.arange(8)[None], 3)


class _Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_memory_is_linear_in_the_length():
    largest = []
    for tokens in (512, 1024):
        positions = torch.arange(tokens)[None]
        given = tensors(1, 2, 1, tokens, tokens)
        with _Largest() as mode:
            windowed_attention(*given, WindowBlocks(positions, positions, 32, block=BLOCK))
        largest.append(mode.numel)
    assert largest[1] <= 2 * largest[0] <= 2 * 512 * 2 * HEAD_DIM


def test_merge_is_the_attention_over_all_keys():
    q, k, _, _, v = tensors(1, 2, 2, 5, 30, torch.float64)
    logits = q @ k.mT
    parts = [
        (torch.softmax(logits[..., part], -1) @ v[:, :, part], logits[..., part].logsumexp(-1))
        for part in (slice(0, 4), slice(4, 29), slice(29, 30))
    ]
    out, lse = merge(parts, like=torch.zeros_like(q))
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ v, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=1e-14)


def flash_attn_func(q, k, v, *, softmax_scale, causal, return_attn_probs, window_size=(-1, -1)):
    """flash-attention's interface: ``[B, S, H, D]``, masks aligned at the last query and key, lse ``[B, H, S]``."""
    assert causal
    assert return_attn_probs
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
    logits = (q @ k.mT * softmax_scale).masked_fill(~seen, float("-inf"))
    return (torch.softmax(logits, -1) @ v).transpose(1, 2), logits.logsumexp(-1), None


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(40, 40, 7), (40, 40, 1), (40, 40, 60), (1, 40, 7), (9, 40, 35)]
)
def test_by_the_interface_of_flash_attention(queries, keys, window):
    """A stand-in for the package: its interface and its masks as documented, not its kernels."""
    key_positions = torch.arange(keys)[None]
    given = tensors(2, 4, 2, queries, keys)
    out = flash_windowed(*given, window, 0.3, function=flash_attn_func)
    expected = reference(
        *given, key_positions[:, -queries:], key_positions, window, causal(queries, keys), 0.3
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


class OnCuda:
    device, requires_grad = torch.device("cuda"), False

    def __init__(self, head_dim=64, dtype=torch.bfloat16):
        self.shape, self.dtype = torch.Size((1, 4, 9, head_dim)), dtype


@pytest.fixture(autouse=True)
def _forget_devices():
    window_engines._is_ampere.cache_clear()
    yield
    window_engines._is_ampere.cache_clear()


@pytest.mark.parametrize(
    ("given", "capability", "taken"),
    [
        ([OnCuda(256)] * 3, (8, 0), True),
        ([OnCuda(80, torch.float16)] * 3, (9, 0), True),
        ([OnCuda(256)] * 3, (7, 5), False),  # flash-attention 2 begins with Ampere
        ([OnCuda(264)] * 3, (9, 0), False),
        ([OnCuda(60)] * 3, (9, 0), False),
        ([OnCuda(192), OnCuda(192), OnCuda(128)], (9, 0), False),
        ([OnCuda(), OnCuda(), OnCuda(dtype=torch.float16)], (9, 0), False),
        ([OnCuda(dtype=torch.float32)] * 3, (9, 0), False),
    ],
)
def test_what_flash_attention_does_not_take(given, capability, taken, monkeypatch):
    monkeypatch.setattr(window_engines, "_flash", lambda: flash_attn_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash(*given) == taken


@pytest.mark.parametrize("trained", [None, 0, 1, 2])
def test_flash_attention_is_not_used_where_a_gradient_is_wanted(trained, monkeypatch):
    """Also that of the keys alone, as of an adapter of the first layer's keys: the log-sum-exp has none."""

    monkeypatch.setattr(window_engines, "_flash", lambda: flash_attn_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    given = [OnCuda() for _ in range(3)]
    if trained is not None:
        given[trained].requires_grad = True
    assert has_flash(*given) == (trained is None)
    with torch.no_grad():
        assert has_flash(*given)


@pytest.mark.parametrize("queries", [40, 1])
def test_by_flex_attention(queries):
    positions, key_positions, mask = padded(queries, 40, (0, 5))
    given = tensors(2, 4, 2, queries, 40)
    out = flex_windowed(
        *given,
        positions=positions,
        key_positions=key_positions,
        window=9,
        mask_mod=lambda b, h, i, j: mask[b, 0, i, j],
        scale=0.3,
    )
    expected = reference(*given, positions, key_positions, 9, mask, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
