"""A call like an earlier one skips checks and choices, and nothing that they would have found."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers.tensors import assert_rounded, exact, exact_tables, frequencies
from torch.utils._python_dispatch import TorchDispatchMode

from rope_dist import ops
from rope_dist.ops import launch_cache, validation

ROOT = Path(__file__).parents[2]


def tables(device, length=5, num_pairs=8):
    positions = torch.arange(length, device=device)[None]
    return [t.float() for t in exact_tables(frequencies(2 * num_pairs).to(device), positions)]


def heads(device, count, length=5, dtype=torch.float32):
    return torch.randn(2, length, count, 16, device=device).to(dtype)


@pytest.fixture
def found(monkeypatch):
    """Whether each call of ``launch_cache.find`` found a launch, and whether it had a key."""
    results = []

    def find(*arguments, _find=launch_cache.find):
        launch, key = _find(*arguments)
        results.append((launch is not None, key is not None))
        return launch, key

    monkeypatch.setattr(launch_cache, "find", find)
    return results


def test_calls_of_many_kinds_in_any_order_keep_their_results(backend, device):
    kinds = list(
        itertools.product(
            (torch.float32, torch.bfloat16), ("BSHD", "BHSD", "slice"), (False, True), (False, True), (5, 1)
        )
    )
    generator = random.Random(0)
    for dtype, layout, interleaved, inplace, length in generator.choices(kinds, k=3 * len(kinds)):
        q, k = (heads(device, count, length, dtype) for count in (4, 2))
        if layout == "BHSD":
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        elif layout == "slice":
            q, k = (torch.cat((x, x), -1)[..., generator.choice((0, 1, 8)) :][..., :16] for x in (q, k))
        cos, sin = tables(device, length)
        want = [exact(x, cos, sin, interleaved=interleaved) for x in (q, k)]
        for x, y in zip(
            ops.rotary(q, k, cos, sin, interleaved=interleaved, inplace=inplace), want, strict=True
        ):
            assert_rounded(x, y, few=4)


def test_a_call_like_an_earlier_one_is_not_checked_again(device, found, monkeypatch):
    cos, sin = tables(device)
    with ops.use_backend("native"):
        if ops.backend_for(cos) != "native":
            pytest.skip("no native library: nothing is kept of the reference")
        for inplace in (False, True):
            ops.rotary(heads(device, 4), heads(device, 2), cos, sin, inplace=inplace)
        monkeypatch.setattr(validation, "heads", None)
        for inplace in (False, True):
            q, k = heads(device, 4), heads(device, 2)
            want = exact(q, cos, sin)
            assert_rounded(ops.rotary(q, k, cos, sin, inplace=inplace)[0], want)
    assert found == [(False, True)] * 2 + [(True, True)] * 2
    # Another backend, another key.
    monkeypatch.undo()
    with ops.use_backend("reference"):
        assert_rounded(ops.rotary(q, k, cos, sin)[0], exact(q, cos, sin))


def bad_calls(device):
    """Calls that differ from good ones in what no key holds, or in a detail that the key must hold."""
    cos, sin = tables(device)
    q, k = heads(device, 4), heads(device, 4)
    ids = torch.arange(5, device=device)[None]
    inv_freq = frequencies(16).to(device)
    yield lambda: ops.rotary(q, k, cos, sin), lambda: ops.rotary(q, k, cos.requires_grad_(), sin), "constants"
    yield (
        lambda: ops.rotary(q, k, sin, sin),
        lambda: ops.rotary(q, k, sin[:, :4], sin[:, :4]),
        "B or 1, S, R/2",
    )
    yield (
        lambda: ops.rotary(q, k, sin, sin, inplace=True),
        lambda: ops.rotary(q, q, sin, sin, inplace=True),
        "share memory",
    )
    yield (
        lambda: ops.rotary_at(q, k, inv_freq, ids),
        lambda: ops.rotary_at(q, k, inv_freq, ids + 2**31),
        "within int32",
    )
    packed = q[0], k[0]
    yield (
        lambda: ops.rotary_at(*packed, inv_freq, cu_seqlens=torch.tensor([0, 2, 5])),
        lambda: ops.rotary_at(*packed, inv_freq, cu_seqlens=torch.tensor([0, 7, 5])),
        "must not decrease",
    )
    # A table of more rows than tokens: good for one function, not for the other.
    rows = [t[0].repeat(2, 1) for t in tables(device)]
    yield (
        lambda: ops.apply_rotary_emb(q, *rows),
        lambda: ops.rotary(q, None, *rows),
        "B or 1, S, R/2",
    )


@pytest.mark.parametrize("index", range(6))
def test_bad_input_is_refused_after_good_input(backend, device, index):
    good, bad, message = list(bad_calls(device))[index]
    for _ in range(2):
        good()
    with pytest.raises(ValueError, match=message):
        bad()


def test_a_gradient_is_followed_after_a_call_without(backend, device):
    cos, sin = tables(device)
    q, k = heads(device, 4), heads(device, 2)
    for _ in range(2):
        ops.rotary(q, k, cos, sin)
    leaf = q.clone().requires_grad_()
    out, _ = ops.rotary(leaf, k, cos, sin)
    weight = torch.randn_like(q)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    assert_rounded(grad, exact(weight, cos, sin, conjugate=True))
    with torch.no_grad():
        assert not ops.rotary(leaf, k, cos, sin)[0].requires_grad


def test_a_negated_view_is_no_memory(backend, device):
    """The imaginary part of a conjugate has a flag instead of other bits."""
    cos, sin = tables(device)
    negated = torch.complex(heads(device, 4), heads(device, 4)).conj().imag
    assert negated.is_neg()
    plain = torch.empty_strided(negated.shape, negated.stride(), device=device).copy_(negated)
    for x in (plain, negated, plain, negated):
        assert_rounded(ops.rotary(x, None, cos, sin)[0], exact(plain, cos, sin))


def test_autograd_sees_that_a_tensor_was_changed_in_place(backend, device):
    cos, sin = tables(device)
    weight = torch.ones(2, 5, 4, 16, device=device, requires_grad=True)
    for _ in range(2):
        q = heads(device, 4)
        product = weight * q  # keeps q for the gradient of weight
        ops.rotary(q, None, cos, sin, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whatever_looks_on_sees_the_operator(device):
    cos, sin = tables(device)
    call = lambda q: ops.rotary(q, None, cos, sin)[0]  # noqa: E731
    q = heads(device, 4)
    for _ in range(2):
        call(q)
    with Operators() as seen:
        call(q)
    assert "rope_dist.rotate.default" in seen.names
    with torch.profiler.profile() as profile:
        call(q)
    assert "rope_dist::rotate" in {event.key for event in profile.key_averages()}


def test_launches_are_forgotten_when_there_are_many(device, monkeypatch):
    monkeypatch.setattr(launch_cache, "MOST", 3)
    for length in range(1, 9):
        cos, sin = tables(device, length)
        q = heads(device, 4, length)
        assert_rounded(ops.rotary(q, None, cos, sin)[0], exact(q, cos, sin))
        assert len(launch_cache._LAUNCHES) <= 3


def test_a_cached_launch_has_the_arguments_that_triton_would_have_made():
    """Every operator and path, compiled for a GPU and not launched: the same but for the addresses, which are new."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    script = ROOT / "tests/helpers/launches.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 23
    for line in lines:
        assert line["compiled"] == [1, 0], line
        assert line["same grid"], line
        assert line["same arguments"], line
        assert line["kept"] == 0, line
        assert line["new addresses"] >= line["addresses"] - 2, (
            line
        )  # frequencies and bounds are the same tensors


def test_an_offset_that_grows_is_one_launch(backend, device):
    """As generation by flash-attention's function has it: one token after the other."""
    cos, sin = (t[0] for t in tables(device, 20))
    for offset in (0, 1, 7, 16):
        x = heads(device, 4, 2)
        want = exact(x, cos[None, offset : offset + 2], sin[None, offset : offset + 2])
        assert_rounded(ops.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset), want)
    assert len(launch_cache._LAUNCHES) <= 1


def test_what_is_kept_holds_no_tensor(backend, device):
    """A launch that kept a weight or a table would keep a model alive that was deleted."""
    cos, sin = tables(device)
    q, k, bias = heads(device, 4), heads(device, 2), torch.zeros(64, device=device)
    for options in ({}, {"inplace": True}, {"q_bias": bias}):
        ops.rotary(q, k, cos, sin, **options)
    x, weight = torch.randn(1, 5, 64, device=device).half(), torch.randn(64, 64, device=device).half()
    ops.qkv_rotary(x, weight, weight, weight, head_dim=16, cos=cos, sin=sin)
    references = [weakref.ref(t) for t in (cos, sin, q, k, bias, x, weight)]
    del cos, sin, q, k, bias, x, weight, options
    gc.collect()
    assert [reference() for reference in references] == [None] * 7
