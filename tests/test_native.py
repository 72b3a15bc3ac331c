"""The native library: bits of the reference, any layout, any number of threads; and life without it."""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_dist import ops
from rope_dist.ops import dispatch, fixed_point, native, reference
from rope_dist.ops.arguments import Angles

ROTATE = native.Native().rotate

ROOT = Path(__file__).resolve().parent.parent
needs_library = pytest.mark.skipif(
    isinstance(native.load("cpu"), str), reason=f"no native CPU library: {native.load('cpu')}"
)
SIXTEEN = (torch.bfloat16, torch.float16)
ORDERS = ({}, {"interleaved": True}, {"deinterleave": True})
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    """Equal to the last bit, signs of zero included; NaN equals any NaN."""
    nan = a.isnan()
    bits = BITS[a.element_size()]
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])


def tables(rows, half, dtype=torch.float32, entries=1, seed=0):
    angle = (
        torch.randn(entries, rows, half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * 9
    )
    return angle.cos().to(dtype), angle.sin().to(dtype)


def heads(layout, batch, length, count, dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "BHSD":
        return random(batch, count, length, dim).transpose(1, 2)
    if layout == "slice":  # of a wider projection, at an odd element
        return random(batch, length, count * dim + 3)[..., 3:].unflatten(-1, (count, dim))
    if layout == "strided":
        return random(batch, length, count, dim, 2)[..., 1]
    return random(batch, length, count, dim)


def complex_rotation(x, cos, sin, interleaved):
    """Each pair is a complex number, multiplied by exp(i angle), in float64."""
    half = cos.shape[-1]
    x = x.double()
    axis = -1 if interleaved else -2
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    turned = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1))
    turned = turned * torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.cat((torch.stack((turned.real, turned.imag), axis).flatten(-2), x[..., 2 * half :]), -1)


@needs_library
@given(
    dtype=st.sampled_from((torch.float32, torch.float64, *SIXTEEN)),
    layout=st.sampled_from(("BSHD", "BHSD", "slice", "strided")),
    batch=st.integers(1, 3),
    length=st.integers(0, 20),
    counts=st.sampled_from(((1, 1), (4, 2), (3, 5))),
    dim=st.sampled_from((2, 6, 34, 64, 80, 128, 130)),
    partial=st.sampled_from((0, 1, 2)),
    order=st.sampled_from(ORDERS),
    conjugate=st.booleans(),
    inplace=st.booleans(),
    own_tables=st.booleans(),
    seed=st.integers(0, 99),
)
def test_has_the_bits_of_the_reference(
    dtype, layout, batch, length, counts, dim, partial, order, conjugate, inplace, own_tables, seed
):
    q, k = (heads(layout, batch, length, count, dim, dtype, seed + count) for count in counts)
    half = max(1, dim // 2 - 7 * partial)
    cos, sin = tables(length, half, entries=batch if own_tables else 1, seed=seed)
    angles = Angles(cos, sin, **order, conjugate=conjugate)
    expected = reference.rotate_tokens(q, k, angles)
    inplace = inplace and not angles.deinterleave
    outs = (q, k) if inplace else (torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype))
    ROTATE(q, k, *outs, angles)
    for out, right in zip(outs, expected, strict=True):
        assert same_bits(out, right)


@needs_library
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [64, 48])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_equals_complex_multiplication(dtype, rotated, interleaved):
    q, k = (heads("BSHD", 2, 9, count, 64, dtype) for count in (4, 2))
    cos, sin = tables(9, rotated // 2)
    with ops.use_backend("native"):
        for x, out in zip((q, k), ops.rotary(q, k, cos, sin, interleaved=interleaved), strict=True):
            exact = complex_rotation(x, cos, sin, interleaved)
            if dtype == torch.float32:
                torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)
            else:  # a float32 result may lie on the other side of a tie
                assert (out != exact.to(dtype)).sum() <= max(2, 2e-4 * out.numel())


@needs_library
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype, order):
    """All 65536 patterns, subnormal, infinite and not a number; and factors that make any float32 of them."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 64, 8, 128)
    one, zero = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
    out = torch.empty_like(x)
    ROTATE(x, None, out, None, Angles(one, zero, **order))
    assert same_bits(out, reference.rotate(x, one, zero, **order))
    wild = torch.randint(-(2**31), 2**31, (2, 1, 64, 64), generator=torch.Generator().manual_seed(0))
    cos, sin = wild.to(torch.int32).view(torch.float32)  # any float32, NaN with every payload
    cos[0, 0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45])
    cos.view(torch.int32)[0, 1, 0] = -1
    for conjugate in (False, True):
        options = {**order, "conjugate": conjugate}
        ROTATE(x, None, out, None, Angles(cos, sin, **options))
        assert same_bits(out, reference.rotate(x, cos, sin, **options))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_1_to_64_threads_give_the_same_bits(dtype):
    # 32 MiB: from 512 KiB a thread on, as many run as are asked for.
    length = 2050 if dtype == torch.float32 else 4099
    q = torch.randn(1, length, 32, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    k = q[:, :, :3].clone()
    cos, sin = tables(q.shape[1], 64)
    angles = Angles(cos, sin)
    expected = reference.rotate_tokens(q, k, angles)
    outs = (torch.empty_like(q), torch.empty_like(k))
    for threads in (1, 2, 3, 5, 8, 13, 32, 63, 64):
        for out in outs:
            out.zero_()
        ROTATE(q, k, *outs, angles, threads=threads)
        for out, right in zip(outs, expected, strict=True):
            assert torch.equal(out.view(BITS[out.element_size()]), right.view(BITS[out.element_size()]))


@needs_library
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 6])
def test_gradients(interleaved, rotated):
    q, k = (heads("BSHD", 1, 3, n, 8, torch.float64).requires_grad_() for n in (2, 1))
    cos, sin = tables(3, rotated // 2, torch.float64)

    def function(q, k):
        return ops.rotary(q, k, 1.1 * cos, 1.1 * sin, interleaved=interleaved)

    with ops.use_backend("native"):
        assert ops.backend_for(q) == "native"
        assert torch.autograd.gradcheck(function, (q, k))
        assert torch.autograd.gradgradcheck(function, (q, k))


@needs_library
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_positions_and_packed_sequences(dtype, packed, inplace):
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(32) / 32))
    q, k = (heads("BSHD", 1 if packed else 3, 11, n, 64, dtype) for n in (4, 1))
    options = {"cu_seqlens": torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)} if packed else {
        "positions": torch.randint(-5, 10**6, (3, 11), generator=torch.Generator().manual_seed(1))
    }  # fmt: skip
    for source in (
        Angles(inv_freq_q64=inv_freq_q64, scaling=1.25, **options),
        Angles(*tables(9, 32), **options),
    ):
        expected = reference.rotate_tokens(q, k, source)
        outs = (q.clone(), k.clone())
        ROTATE(*(outs if inplace else (q, k)), *outs, source)
        for out, right in zip(outs, expected, strict=True):
            assert same_bits(out, right)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN])
def test_a_bias_is_added_before_without_rounding(dtype):
    q, k = (heads("BSHD", 2, 5, n, 20, dtype) for n in (3, 1))
    bias = heads("BSHD", 1, 1, 3, 20, dtype, seed=9).flatten()
    cos, sin = tables(5, 8)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide = q.to(compute) + bias.to(compute).unflatten(0, (3, 20))
    expected = reference.rotate(wide, cos, sin).to(dtype), reference.rotate(k, cos, sin)
    ROTATE(q, k, q, k, Angles(cos, sin), q_bias=bias)
    assert same_bits(q, expected[0])
    assert same_bits(k, expected[1])


@needs_library
def test_compiles_whole_and_survives_a_fork():
    q, k = (heads("BSHD", 1, 600, n, 64, torch.float32) for n in (8, 2))
    cos, sin = tables(600, 32)
    expected = ops.rotary(q, k, cos, sin)
    compiled = torch.compile(lambda *tensors: ops.rotary(*tensors), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, cos, sin), expected, strict=True):
        assert torch.equal(a, b)
    right, out = expected[0].numpy().tobytes(), torch.empty_like(q)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        # Of torch nothing may run in parallel here: its own threads did not survive the fork.
        ROTATE(q, None, out, None, Angles(cos, sin), threads=2)
        os._exit(0 if out.numpy().tobytes() == right else 1)
    assert os.waitpid(child, 0)[1] == 0


THREADS_SCRIPT = """
import os, sys, torch
from rope_dist.ops import native
from rope_dist.ops.arguments import Angles

torch.set_num_threads(1)
q, angle = torch.randn(1, 4096, 8, 64), torch.randn(1, 4096, 32)
angles = Angles(angle.cos(), angle.sin())
one, some = torch.empty_like(q), torch.empty_like(q)
native.Native().rotate(q, None, one, None, angles, threads=1)
before = len(os.listdir("/proc/self/task"))
native.Native().rotate(q, None, some, None, angles, threads=3)
print(len(os.listdir("/proc/self/task")) - before, torch.equal(one, some))
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
@pytest.mark.parametrize(("limit", "stay"), [("8", 2), ("1", 0)])
def test_threads_are_those_of_openmp(limit, stay):
    """They stay for the next call, and there may be fewer than asked for; new ones would share cores with torch's."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS_SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_THREAD_LIMIT": limit},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"{stay} True\n", done.stderr


def test_a_missing_library_is_one_warning_and_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    (tmp_path / "build.json").write_text(json.dumps({"cpu": "no C++ compiler"}))
    native.load.cache_clear()
    dispatch.forget()
    try:
        q, k = (heads("BSHD", 1, 4, n, 16, torch.float32) for n in (2, 1))
        cos, sin = tables(4, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = ops.rotary(q, k, cos, sin)
            ops.rotary(q, k, cos, sin)
        assert ["not built: no C++ compiler" in str(warning.message) for warning in caught] == [True]
        assert same_bits(out[0], reference.rotate(q, cos, sin))
        broken = tmp_path / "librope_dist_cpu.so"
        broken.write_bytes(b"no library")
        native.load.cache_clear()
        dispatch.forget()
        assert "librope_dist_cpu.so does not load" in native.load("cpu")
        with ops.use_backend("reference"), warnings.catch_warnings():
            warnings.simplefilter("error")  # whoever asks for the reference misses nothing
            ops.rotary(q, k, cos, sin)
    finally:
        native.load.cache_clear()
        dispatch.forget()


@pytest.mark.skipif(isinstance(native.load("cuda"), str), reason="no native CUDA library")
def test_the_cuda_library_loads_where_cuda_is_absent():
    built = native.load("cuda")
    assert built.architectures
    assert built.library.rope_dist_cuda_error(-1) == b"unsupported arguments"
    empty = packed(*(torch.empty(1, 0, 2, 8),) * 4, Angles(*(torch.empty(1, 0, 4),) * 2))
    assert built.library.rope_dist_cuda_rotary(empty, 0) == 0
    if torch.cuda.is_available():
        return
    # A launch is refused before anything is read: the pointers here are the host's.
    q, table = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 4)
    call = packed(*(q,) * 4, Angles(table, table))
    status = built.library.rope_dist_cuda_rotary(call, 0)
    assert status > 0
    assert re.search("driver|device", built.library.rope_dist_cuda_error(status).decode())
    assert q.eq(1).all()


def packed(q, k, q_out, k_out, angles, q_bias=None) -> bytes:
    """The struct that a launch takes."""
    return native.packing((q, k, q_out, k_out), angles)(q, k, q_out, k_out, angles, q_bias)


@pytest.fixture(scope="module")
def threads_on_host(tmp_path_factory):
    """The GPU kernel's threads, run one after another on the CPU."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the GPU kernel's threads cannot be compiled for the host")
    target = tmp_path_factory.mktemp("host") / "libhost.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-fmad=false",
        "-Xcompiler",
        "-fPIC,-ffp-contract=off",
        "-shared",
        "-arch=sm_90",
    ]
    source = ROOT / "tests/helpers/threads_on_host.cu"
    subprocess.run([nvcc, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    run = ctypes.CDLL(str(target)).rope_dist_cpu_rotary
    run.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    return run


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_the_gpu_kernels_threads_do_what_the_reference_does(threads_on_host, dtype, layout, order):
    bounds = torch.tensor([0, 2, 2, 7])
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(256) / 256))
    for dim, half, counts in (
        (128, 64, (32, 8)),
        (80, 20, (3, 1)),
        (34, 17, (2, 2)),
        (600, 256, (2, 1)),
        (8, 0, (1, 1)),
    ):
        q, k = (heads(layout, 1, 7, n, dim, dtype, seed=n) for n in counts)
        wide = tables(7, half + 3)
        for cos, sin in ((t[..., :half] for t in wide), tables(5, half)):
            angles = Angles(cos, sin, cu_seqlens=bounds, offset=1, **order, conjugate=True)
            expected = reference.rotate_tokens(q, k, angles)
            for inplace in (False,) if angles.deinterleave else (False, True):
                sources = (q.clone(), k.clone()) if inplace else (q, k)
                outs = (
                    sources
                    if inplace
                    else (torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype))
                )
                assert threads_on_host(packed(*sources, *outs, angles), 0) == 0
                for out, right in zip(outs, expected, strict=True):
                    assert same_bits(out, right)
        own = inv_freq_q64[:, :half].contiguous()
        positions = torch.tensor([[0, 1, 5, 16383, 131071, 1048575, -3]])
        bias = heads("BSHD", 1, 1, counts[0], dim, dtype, seed=3).flatten()
        biased = q.float() + bias.float().unflatten(0, (counts[0], dim))
        angles = Angles(inv_freq_q64=own, positions=positions, scaling=1.25, **order)
        expected = reference.rotate_tokens(biased, k.float(), angles)
        outs = torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype)
        assert threads_on_host(packed(q, k, *outs, angles, bias), 0) == 0
        for out, right in zip(outs, expected, strict=True):
            tolerance = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            torch.testing.assert_close(out.float(), right, rtol=tolerance, atol=2e-6)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("bounds", [[1, 4, 6], [3, 3, 7], [7, 7], [0, 2]])
def test_the_gpu_kernels_threads_leave_tokens_of_no_sequence(threads_on_host, bounds, order):
    q, k = (heads("BSHD", 1, 7, n, 16, torch.float32, seed=n) for n in (3, 1))
    cu_seqlens = torch.tensor(bounds)
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(8) / 8))
    outside = torch.ones(7, dtype=torch.bool)
    outside[bounds[0] : bounds[-1]] = False
    for source in (Angles(inv_freq_q64=inv_freq_q64, scaling=1.25), Angles(*tables(9, 8))):
        angles = source._replace(cu_seqlens=cu_seqlens, **order)
        outs = torch.empty_like(q), torch.empty_like(k)
        assert threads_on_host(packed(q, k, *outs, angles), 0) == 0
        expected = reference.rotate_tokens(q, k, angles)
        for out, x, right in zip(outs, (q, k), expected, strict=True):
            assert torch.equal(out[:, outside], x[:, outside])
            torch.testing.assert_close(out, right, rtol=0, atol=2e-6)
