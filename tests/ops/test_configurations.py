"""The configurations of the fused projection: right, few, asked for by name, and compiled for few lengths."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tensors import assert_rounded, exact_tables, frequencies

from rope_dist import ops
from rope_dist.ops import autotune, configurations, dispatch, dispatch_projection
from rope_dist.ops.arguments import Projections

from .test_autotune import KEY, candidate_calls
from .test_projection import SHARE, SLACK, exact_projection, possible_paths, problem

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
PATHS = ("triton", "triton_tma", "decode")


def named(path, head_dim):
    return [f"{path}:{c.name}" for c in configurations.every(path, "sm_90", head_dim)]


@pytest.mark.parametrize(
    ("path", "head_dim", "rotary_dim", "bias", "table"),
    [
        *((path, 64, 64, True, False) for path in (*named("triton_tma", 64), *named("triton", 64))),
        *((path, 128, 64, False, True) for path in named("triton_tma", 128)),
        *((path, 256, 256, False, False) for path in named("triton_tma", 256)),
    ],
)
def test_each_equals_float64_rounded(triton_backend, device, path, head_dim, rotary_dim, bias, table):
    if path.partition(":")[0] not in possible_paths(device):
        pytest.skip("this GPU has no descriptors")
    torch.manual_seed(14)
    # Rows, columns and a depth that no tile divides, and two sequences of tokens that share their angles.
    x, weights, biases = problem(
        device, torch.bfloat16, batch=2, length=80, depth=72, heads=(5, 3, 2), dim=head_dim, bias=bias
    )
    positions = torch.randint(0, 1_000_001, (1, 80), device=device)
    inv_freq = frequencies(rotary_dim).to(device)
    cos, sin = exact_tables(inv_freq, positions)
    angles = (
        {"cos": cos.float(), "sin": sin.float()}
        if table
        else {"inv_freq": inv_freq, "position_ids": positions}
    )
    out = ops.qkv_rotary(x, *weights, *biases, head_dim=head_dim, path=path, **angles)
    want = exact_projection(x, weights, biases, cos, sin, head_dim)
    for actual, expected in zip(out, want, strict=True):
        assert_rounded(actual, expected, few=4, share=SHARE[torch.bfloat16], slack=SLACK)


@pytest.mark.parametrize("path", named("decode", 80))
@pytest.mark.parametrize("head_dim", [80, 128])
def test_each_of_decode_equals_float64_rounded(triton_backend, device, path, head_dim):
    """With rows that are not there, whose memory is not read."""
    torch.manual_seed(15)
    x, weights, biases = problem(
        device, torch.float16, length=3, depth=300, heads=(3, 1, 1), dim=head_dim, bias=True
    )
    poisoned = torch.full((1, 16, 300), float("nan"), device=device).half()
    poisoned[:, :3] = x
    inv_freq = frequencies(head_dim - 2).to(device)
    out = ops.qkv_rotary(poisoned[:, :3], *weights, *biases, head_dim=head_dim, inv_freq=inv_freq, path=path)
    positions = torch.arange(3, device=device)[None]
    want = exact_projection(x, weights, biases, *exact_tables(inv_freq, positions), head_dim)
    for actual, expected in zip(out, want, strict=True):
        assert_rounded(actual, expected, few=4, share=SHARE[torch.float16], slack=SLACK)


def test_few_are_measured_and_each_holds_whole_heads():
    triton_projection = pytest.importorskip("rope_dist.ops.triton_projection")
    for path, arch, head_dim, rows in itertools.product(
        PATHS, ARCHITECTURES, (16, 64, 128, 256), (1, 16, 17, 64, 65, 512, 513, 4096)
    ):
        if path == "triton_tma" and not triton_projection.has_tma(arch, head_dim):
            continue
        norm = path != "decode" and rows % 2 == 0
        found = configurations.candidates(path, arch, head_dim, rows, norm)
        names = [configuration.name for configuration in found]
        assert 1 <= len(names) == len(set(names)) <= 4
        assert set(found) <= set(configurations.every(path, arch, head_dim, norm))
        if path != "decode":
            assert all(configuration.columns % head_dim == 0 for configuration in found)
        # A class of rows has one list: its limits are powers of two.
        assert found == configurations.candidates(path, arch, head_dim, autotune.rows_class(rows), norm)


@pytest.mark.parametrize(
    ("heads", "head_dim", "pairs"),
    [
        (48, 128, [16]),  # 8B: 192 programs of 16 pairs, more than there are multiprocessors
        (96, 128, [16]),
        (10, 128, [8, 16]),  # 70B on 8 GPUs: 40 programs
        (10, 256, [8, 16]),
        (17, 256, [16]),
    ],
)
def test_decode_takes_fewer_pairs_where_programs_are_few(heads, head_dim, pairs):
    found = configurations.candidates("decode", "sm_90", head_dim, 1, multiprocessors=132, heads=heads)
    assert [configuration.columns for configuration in found] == pairs
    # AMD's matrix instructions take no 8 columns: compiled for them it spills.
    found = configurations.candidates("decode", "gfx942", head_dim, 1, multiprocessors=304, heads=heads)
    assert [configuration.columns for configuration in found] == [16]


def test_the_gate_has_a_case_of_each():
    """On every architecture that it compiles for; AMD's wide heads and its decode kernel are not compiled there."""
    triton_projection = pytest.importorskip("rope_dist.ops.triton_projection")
    script = (
        "import json; from tools import static_compile as c, static_gate as g\n"
        "for case in g.CASES:\n"
        "  for target in case.targets:\n"
        "    launch = c.record(lambda: case.call(target)); k = launch.kwargs\n"
        "    if 'BLOCK_K' in k:\n"
        "      tile = [k.get('BLOCK_M', k.get('ROWS')), k.get('BLOCK_N', k.get('PAIRS'))]\n"
        "      tile += [k['BLOCK_K'], k['num_stages'], k.get('GROUP', 8)]\n"
        "      print(json.dumps([launch.kernel.__name__, target, tile]))"
    )
    checked = {json.dumps(json.loads(line)) for line in run("-c", script)}
    kernels = {"triton": "pointer_kernel", "triton_tma": "descriptor_kernel", "decode": "decode_kernel"}
    for path, arch, head_dim in itertools.product(PATHS, ("sm_80", "sm_90", "sm_100"), (64, 256)):
        if path == "triton_tma" and not triton_projection.has_tma(arch, head_dim):
            continue
        if path == "triton" and arch == "sm_100":
            continue  # as on sm_90
        for c in configurations.every(path, arch, head_dim):
            tile = [c.rows, c.columns, c.depth, c.num_stages, c.group]
            assert json.dumps([kernels[path], arch, tile]) in checked


def run(*arguments) -> list[str]:
    """Lines that a process prints that compiles kernels; this one interprets them."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_prompts_of_any_length_compile_few_kernels():
    """Each takes a second or more, in the middle of serving. With a constant number of programs it was thirteen."""
    lines = [json.loads(line) for line in run(ROOT / "tests/helpers/compilations.py")]
    assert len(lines) == 10
    for line in lines:
        assert len(line["kernels"]) == 1, line
        assert 1 <= line["compilations"] <= 3, line
    by_kernel = {line["name"]: line["compilations"] for line in lines}
    # One for each tile of the lengths.
    assert (by_kernel["triton, positions"], by_kernel["decode, positions"]) == (1, 1)
    assert by_kernel["triton_tma, positions"] == 3


def test_a_configuration_is_asked_for_by_name(triton_backend, device, monkeypatch):
    x, weights, _ = problem(device, torch.bfloat16, length=3, depth=32, heads=(2, 1, 1))
    arguments = {"head_dim": 64, "inv_freq": frequencies(64).to(device)}
    want = ops.qkv_rotary(x, *weights, path="triton", **arguments)
    launched = []
    backend = type(dispatch.projecting(x))
    project = backend.project

    def recorded(self, path, *rest):
        launched.append(path)
        return project(self, path, *rest)

    monkeypatch.setattr(backend, "project", recorded)
    name = "triton:64x128x64/4"
    for actual, expected in zip(ops.qkv_rotary(x, *weights, path=name, **arguments), want, strict=True):
        torch.testing.assert_close(actual, expected)
    monkeypatch.setenv("ROPE_DIST_PATH", name)
    ops.qkv_rotary(x, *weights, **arguments)
    assert launched == [name, name]
    monkeypatch.setenv("ROPE_DIST_PATH", "triton:1x1x1/1")
    ops.qkv_rotary(x, *weights, **arguments)
    assert launched == [name, name]  # as any path that cannot serve a call: separate
    with pytest.raises(ValueError, match=r"cannot serve these tensors; triton, .*triton:64x128x64/4 can"):
        ops.qkv_rotary(x, *weights, path="triton:1x1x1/1", **arguments)
    with pytest.raises(ValueError, match="no such path"):
        ops.qkv_rotary(x, *weights, path="fast:64x128x64/4", **arguments)
    assert "triton" in ops.projection_paths(x, *weights, head_dim=64, rotary_dim=64)
    assert not any(":" in path for path in ops.projection_paths(x, *weights, head_dim=64, rotary_dim=64))


def test_paths_are_measured_in_each_configuration(triton_backend, device):
    x, weights, _ = problem(device, torch.bfloat16, length=300, depth=32, heads=(2, 1, 1))
    projections = Projections(*weights, None, None, None, 64)
    backend = dispatch.projecting(x)
    found = dispatch_projection.configured(backend, ["separate", "triton"], x, projections)
    assert found == ["separate", "triton", "triton:64x128x64/4"]


def test_a_choice_that_is_no_candidate_any_more_is_measured_again():
    """As a file of another version may have it."""
    times = {"separate": 2.0, "triton_tma": 1.0}
    timer = lambda call: times[call()]  # noqa: E731
    autotune.cache().put(KEY, {"separate": 2.0, "triton_tma:1x1x1/1": 1.0})
    assert autotune.cache().get(KEY) == "triton_tma:1x1x1/1"
    assert autotune.choose(KEY, candidate_calls([]), timer) == "triton_tma"
    # And one of before there were configurations is as good as ever.
    autotune.cache().put(KEY, {"separate": 2.0, "triton_tma": 1.0})
    assert autotune.choose(KEY, candidate_calls([]), None) == "triton_tma"
