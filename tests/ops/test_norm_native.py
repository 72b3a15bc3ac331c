"""RMS norm and rotation in the native library: float64's values, any layout, number of threads and weights."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rope_dist import ops
from rope_dist.ops import fixed_point, native, reference_norm
from rope_dist.ops.arguments import Angles, Norms

ROOT = Path(__file__).resolve().parents[2]
NATIVE = native.Native()
pytestmark = pytest.mark.skipif(
    isinstance(native.load("cpu"), str), reason=f"no native CPU library: {native.load('cpu')}"
)
SIXTEEN = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN)
# Head size, rotated pairs, heads of queries and keys.
SIZES = (
    (64, 32, (4, 2)),
    (80, 40, (3, 1)),
    (96, 24, (2, 2)),
    (128, 64, (16, 8)),
    (256, 64, (9, 1)),
    (34, 17, (2, 1)),
)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
EPS = 1e-6


def same_bits(a, b):
    """Equal to the last bit; NaN equals any NaN."""
    nan = a.isnan()
    bits = BITS[a.element_size()]
    return torch.equal(nan, b.isnan()) and torch.equal(
        a.contiguous().view(bits)[~nan], b.contiguous().view(bits)[~nan]
    )


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(layout, batch, length, count, dim, dtype, seed=0):
    if layout == "BHSD":
        return random(batch, count, length, dim, dtype=dtype, seed=seed).transpose(1, 2)
    if layout == "slice":  # of a wider projection, at an odd element
        wide = random(batch, length, count * dim + 3, dtype=dtype, seed=seed)
        return wide[..., 3:].unflatten(-1, (count, dim))
    if layout == "strided":
        return random(batch, length, count, dim, 2, dtype=dtype, seed=seed)[..., 1]
    return random(batch, length, count, dim, dtype=dtype, seed=seed)


def tables(rows, half, dtype=torch.float32):
    angle = random(1, rows, half, dtype=torch.float64, seed=7) * 9
    return angle.cos().to(dtype), angle.sin().to(dtype)


def weights(kind, counts, dim, dtype):
    if kind is None:
        return None, None
    sizes = [dim if kind == "head" else count * dim for count in counts]
    return tuple(random(size, dtype=dtype, seed=20 + i) for i, size in enumerate(sizes))


def exact(x, weight, norms, angles, bias=None):
    """Norm and rotation in float64: torch's own norm, and pairs as complex numbers."""
    x = x.double()
    if bias is not None:
        x = x + bias.double().unflatten(0, x.shape[2:])

    def norm(y):
        joint = weight is not None and weight.shape[0] != y.shape[-1]
        flat = y.flatten(2) if joint else y
        factor = None if weight is None else weight.double() + norms.weight_offset
        return torch.nn.functional.rms_norm(flat, flat.shape[-1:], factor, norms.eps).reshape(y.shape)

    def rotate(y):
        cos, sin = (t.double()[:, : y.shape[1], None] for t in (angles.cos, angles.sin))
        half = cos.shape[-1]
        axis = -1 if angles.interleaved else -2
        pairs = y[..., : 2 * half].unflatten(-1, (half, 2) if angles.interleaved else (2, half))
        turned = torch.complex(*pairs.unbind(axis)) * torch.complex(cos, sin.expand(cos.shape))
        turned = torch.stack((turned.real, turned.imag), axis).flatten(-2)
        return torch.cat((turned, y[..., 2 * half :]), -1)

    return norm(rotate(x)) if norms.norm_after else rotate(norm(x))


def close(out, right):
    """Rounded once from a result that is right to a few units of the type that is computed in."""
    half_unit = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    largest = right.abs().amax(-1, keepdim=True)
    computed = 2**-50 if out.dtype == torch.float64 else 2**-21
    error = (out.double() - right).abs()
    return bool((error <= 1.01 * half_unit[out.dtype] * right.abs() + computed * largest + 3e-8).all())


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_values_of_float64_in_every_layout_in_place_or_not(dtype, kind, norm_after):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for dim, half, counts in SIZES:
        angles = Angles(*tables(17, half, compute), interleaved=(dim // 16 % 2 == 1) != norm_after)
        norms = Norms(*weights(kind, counts, dim, dtype), EPS, 0.5, norm_after)
        bias = random(counts[0] * dim, dtype=dtype, seed=9) if dim in (80, 34) else None
        given = [heads("BSHD", 2, 17, n, dim, dtype, seed=n) for n in counts]
        expected = [
            exact(x, weight, norms, angles, b)
            for x, weight, b in zip(given, norms.weights(), (bias, None), strict=True)
        ]
        right_rstds = reference_norm.norm_rotate_tokens(*given, norms, angles, bias)[2:]
        first = None
        for layout in ("BSHD", "BHSD", "slice", "strided"):
            q, k = (heads(layout, 2, 17, n, dim, dtype).copy_(x) for n, x in zip(counts, given, strict=True))
            outs = torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype)
            rstds = [torch.empty_like(rstd) for rstd in right_rstds]
            NATIVE.norm_rotate(q, k, *outs, norms, angles, bias, rstds=rstds)
            again = NATIVE.norm_rotate(q, k, q, k, norms, angles, bias)
            assert (again is None) == (layout == "strided")
            assert same_bits(q, outs[0])
            assert same_bits(k, outs[1])
            if first is None:
                first = *outs, *rstds
                for out, right in zip(outs, expected, strict=True):
                    assert close(out, right), dim
                for rstd, right in zip(rstds, right_rstds, strict=True):
                    torch.testing.assert_close(rstd, right, rtol=2 * torch.finfo(compute).eps, atol=0)
            for one, other in zip(first, (*outs, *rstds), strict=True):
                assert same_bits(one, other), (dim, layout)


@pytest.mark.parametrize("kind", ["head", "joint"])
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (80, 40), (128, 64), (256, 128)])
def test_is_as_near_to_float64_as_the_reference(dim, half, kind):
    q, k = (random(2, 33, n, dim, seed=n) for n in (4, 2))
    angles, norms = Angles(*tables(33, half)), Norms(*weights(kind, (4, 2), dim, torch.float32), EPS)
    outs = torch.empty_like(q), torch.empty_like(k)
    NATIVE.norm_rotate(q, k, *outs, norms, angles)
    reference = reference_norm.norm_rotate_tokens(q, k, norms, angles)
    for x, weight, out, right in zip((q, k), norms.weights(), outs, reference, strict=False):
        # In units of the pair's length: a sum that cancels has the error of what it is made of. Two units of the
        # reciprocal norm, whose sum is in another order, are up to four of the product, and rounding adds its own.
        length = right.double().unflatten(-1, (2, half)).norm(dim=-2).repeat(1, 1, 1, 2)
        unit = 2.0 ** (length.log2().floor() - 23)
        assert ((out.double() - right).abs() <= 6 * unit).all()
        exactly = exact(x, weight, norms, angles)
        mine, its = (((y.double() - exactly).abs() / unit).mean() for y in (out, right))
        assert mine <= 1.1 * its


@pytest.mark.parametrize("kind", ["head", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_1_to_5_threads_give_the_same_bits(dtype, kind):
    length = 450 if dtype == torch.float32 else 900  # 512 KiB and more for each thread
    counts, dim = (8, 4), 128
    q, k, q_grad, k_grad = (random(1, length, n, dim, dtype=dtype, seed=n) for n in (*counts, *counts))
    assert (q.nbytes + k.nbytes) / 5 > 512 * 1024
    angles, norms = Angles(*tables(length, 64)), Norms(*weights(kind, counts, dim, dtype), EPS)
    found = []
    for threads in range(1, 6):
        outs = torch.empty_like(q), torch.empty_like(k)
        rstds = [torch.empty(1, length, 1 if kind == "joint" else n) for n in counts]
        NATIVE.norm_rotate(q, k, *outs, norms, angles, rstds=rstds, threads=threads)
        back = NATIVE.norm_rotate_backward((q_grad, k_grad), (q, k), rstds, norms, angles, threads=threads)
        found.append((*outs, *rstds, *back))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_weights_of_other_types(dtype):
    q = random(1, 5, 4, 64, dtype=dtype)
    angles = Angles(*tables(5, 32))
    for kind in DTYPES:
        norms = Norms(random(64, dtype=kind), None, EPS, 1.0)
        out = torch.empty_like(q)
        NATIVE.norm_rotate(q, None, out, None, norms, angles)
        assert close(out, exact(q, norms.q_weight, norms, angles))
        stepped = Norms(torch.stack((norms.q_weight, norms.q_weight), -1)[:, 0], None, EPS, 1.0)
        again = torch.empty_like(q)
        assert NATIVE.norm_rotate(q, None, again, None, stepped, angles) is None
        assert same_bits(out, again)


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_infinite_huge_tiny_and_nan(dtype, norm_after):
    clean = random(1, 8, 2, 64, dtype=dtype)
    q = clean.clone()
    largest = torch.finfo(dtype).max
    q[0, 0, 0, 3], q[0, 1, 0, 5], q[0, 2, 0, 60] = float("nan"), float("inf"), -float("inf")
    q[0, 3, 0], q[0, 4, 0], q[0, 5, 0] = largest, torch.finfo(dtype).smallest_normal / 4, 0
    angles, norms = Angles(*tables(8, 32)), Norms(random(64, dtype=dtype), None, EPS, 0.0, norm_after)
    outs = torch.empty_like(q), torch.empty_like(q)
    NATIVE.norm_rotate(q, None, outs[0], None, norms, angles)
    NATIVE.norm_rotate(clean, None, outs[1], None, norms, angles)
    expected = reference_norm.norm_rotate_tokens(q, None, norms, angles)[0]
    assert torch.equal(outs[0].isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(
        outs[0][finite], expected[finite], rtol=1e-2 if dtype in SIXTEEN else 1e-6, atol=1e-6
    )
    assert outs[0][0, 0, 0].isnan().all()
    if dtype != torch.float16 and not norm_after:
        # The squares' sum is beyond float32: nothing is left of the head, as in stock's norm.
        assert outs[0][0, 3, 0].eq(0).all()
    assert same_bits(outs[0][0, :, 1], outs[1][0, :, 1])


def test_nan_of_a_wide_weight_stays_nan_in_bfloat16():
    # All ones: rounded as a number it would become zero.
    weight = torch.full((64,), -1, dtype=torch.int32).view(torch.float32)
    q = random(1, 3, 2, 64, dtype=torch.bfloat16)
    NATIVE.norm_rotate(q, None, q, None, Norms(weight), Angles(*tables(3, 16)))
    assert q.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_without_a_row_are_normalised_only(dtype):
    q, k = (random(1, 9, n, 32, dtype=dtype, seed=n) for n in (3, 1))
    norms = Norms(*weights("head", (3, 1), 32, dtype), EPS)
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(16) / 16))
    bounds = torch.tensor([2, 5, 7])
    for source in (
        Angles(*tables(2, 16), cu_seqlens=bounds),
        Angles(inv_freq_q64=inv_freq_q64, cu_seqlens=bounds),
    ):
        outs = torch.empty_like(q), torch.empty_like(k)
        NATIVE.norm_rotate(q, k, *outs, norms, source)
        for out, right in zip(outs, reference_norm.norm_rotate_tokens(q, k, norms, source), strict=False):
            torch.testing.assert_close(out, right, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        alone = torch.empty_like(q)
        NATIVE.norm_rotate(q, None, alone, None, norms, Angles(torch.ones(1, 9, 16), torch.zeros(1, 9, 16)))
        assert same_bits(outs[0][:, [0, 1, 7, 8]], alone[:, [0, 1, 7, 8]])


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_float64(dtype, kind, norm_after):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    unit = {torch.float32: 2**-20, torch.float64: 2**-48, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    layouts = ("BSHD", "BHSD", "slice", "strided", "BHSD", "BSHD")
    for layout, (dim, half, counts) in zip(layouts, SIZES, strict=True):
        interleaved = dim in (80, 256)
        length = 70 if dim == 64 else 17  # 70: two parts of the sums
        angles = Angles(*tables(length, half, compute), interleaved=interleaved)
        norms = Norms(*weights(kind, counts, dim, dtype), EPS, 1.0, norm_after)
        bias = random(counts[0] * dim, dtype=dtype, seed=9) if dim == 96 else None
        xs = [heads(layout, 2, length, n, dim, dtype, seed=n) for n in counts]
        grads = [heads(layout, 2, length, n, dim, dtype, seed=30 + n) for n in counts]
        rstds = reference_norm.norm_rotate_tokens(*xs, norms, angles, bias)[2:]
        found = NATIVE.norm_rotate_backward(tuple(grads), tuple(xs), rstds, norms, angles, bias)
        expected = exact_gradients(grads, xs, norms, angles, (bias, None))
        for i in range(2):
            assert found[i].is_contiguous()
            for out, right in zip(found[i::2], expected[i], strict=False):
                assert out is not None
                error = (out.double() - right).abs()
                assert error.max() <= unit * right.abs().max(), (dim, i)
            assert (found[2 + i] is None) == (kind is None)


@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("norm_after", [False, True])
def test_gradcheck(norm_after, kind):
    q, k = (random(1, 3, n, 8, dtype=torch.float64, seed=n).requires_grad_() for n in (2, 1))
    q_weight, k_weight = weights(kind, (2, 1), 8, torch.float64)
    cos, sin = tables(3, 3, torch.float64)
    leaves = [q, k, *(w.requires_grad_() for w in (q_weight, k_weight) if w is not None)]

    def function(q, k, *own):
        own = own or (None, None)
        return ops.norm_rotary(q, k, *own, cos, sin, weight_offset=1.0, norm_after=norm_after)

    with ops.use_backend("native"):
        assert torch.autograd.gradcheck(function, leaves)


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
    source = ROOT / "tests/helpers/norm_threads_on_host.cu"
    subprocess.run([nvcc, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    run = library.rope_dist_cpu_norm_rotary
    run.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
    library.rope_dist_cpu_norm_rotary_backward.argtypes = (*(ctypes.c_char_p,) * 3, ctypes.c_int64)

    def launch(q, k, q_out, k_out, norms, angles, q_bias=None, rstds=(None, None)):
        tensors = (q, k, q_out, k_out)
        call = native.packing(tensors, angles)(*tensors, angles, q_bias)
        return run(call, native.norm_packing(tensors, norms)(norms, rstds), 0)

    launch.library = library
    return launch


@pytest.fixture
def gradients_on_host(threads_on_host, monkeypatch):
    """``norm_rotate_backward`` as on a GPU with that many blocks for queries and for keys."""

    def launcher(name, device, threads):
        def run(*structs):
            status = getattr(threads_on_host.library, f"rope_dist_cpu_{name}")(*structs, 0)
            if status:
                raise RuntimeError(f"status {status}")

        return run

    def backward(blocks, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "_launcher", launcher)
            patch.setattr(native, "_blocks", lambda heads: blocks)
            return NATIVE.norm_rotate_backward(*arguments)

    return backward


def exact_gradients(grads, xs, norms, angles, biases):
    """Autograd of :func:`exact` in float64: for queries and for keys those of the heads and of the weight."""
    found = []
    for x, weight, bias, grad in zip(xs, norms.weights(), biases, grads, strict=True):
        leaves = [x.double().requires_grad_()]
        if weight is not None:
            leaves.append(weight.double().requires_grad_())
        y = exact(leaves[0], leaves[1] if weight is not None else None, norms, angles, bias)
        found.append(torch.autograd.grad(y, leaves, grad.double()))
    return found


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_the_gpu_kernels_threads_do_what_float64_does(threads_on_host, dtype, kind, norm_after):
    for dim, half, counts in (*SIZES, (600, 256, (2, 1)), (40, 4, (3, 2)), (33, 4, (2, 1)), (8, 0, (1, 1))):
        for layout, interleaved in (("BSHD", dim > 128), ("BHSD", False), ("slice", True))[
            dim in (96, 256) :
        ]:
            angles = Angles(*tables(3, half), interleaved=interleaved)
            wide_weight = torch.float32 if layout == "BHSD" else dtype
            norms = Norms(*weights(kind, counts, dim, wide_weight), EPS, 1.0, norm_after)
            q, k = (heads(layout, 1, 3, n, dim, dtype, seed=n) for n in counts)
            bias = random(counts[0] * dim, dtype=dtype, seed=3) if layout == "BSHD" else None
            outs = torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype)
            rstds = [torch.empty(1, 3, 1 if kind == "joint" and n > 1 else n) for n in counts]
            assert threads_on_host(q, k, *outs, norms, angles, bias, rstds) == 0
            right = [
                exact(x, weight, norms, angles, b)
                for x, weight, b in zip((q, k), norms.weights(), (bias, None), strict=True)
            ]
            assert close(outs[0], right[0]), (dim, layout, interleaved)
            assert close(outs[1], right[1]), (dim, layout, interleaved)
            *_, q_rstd, k_rstd = reference_norm.norm_rotate_tokens(q, k, norms, angles, bias)
            torch.testing.assert_close(rstds[0], q_rstd, rtol=1e-6, atol=0)
            torch.testing.assert_close(rstds[1], k_rstd, rtol=1e-6, atol=0)
            assert threads_on_host(q, k, q, k, norms, angles, bias) == 0
            assert same_bits(q, outs[0])
            assert same_bits(k, outs[1])


def test_the_gpu_kernels_threads_leave_tokens_of_no_sequence_unrotated(threads_on_host):
    q, k = (random(1, 9, n, 32, seed=n) for n in (3, 1))
    q[0, 0, 0, 0] = float("inf")
    norms = Norms(*weights("head", (3, 1), 32, torch.float32), EPS)
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(16) / 16))
    bounds = torch.tensor([2, 5, 7])
    for source in (
        Angles(*tables(2, 16), cu_seqlens=bounds),
        Angles(inv_freq_q64=inv_freq_q64, cu_seqlens=bounds),
    ):
        outs = torch.empty_like(q), torch.empty_like(k)
        assert threads_on_host(q, k, *outs, norms, source) == 0
        for out, right in zip(outs, reference_norm.norm_rotate_tokens(q, k, norms, source), strict=False):
            torch.testing.assert_close(out, right, rtol=1e-6, atol=2e-6, equal_nan=True)


def test_the_gpu_kernel_takes_weights_of_two_types(threads_on_host):
    q = random(1, 3, 2, 32, dtype=torch.bfloat16)
    for dtype, status in ((torch.bfloat16, 0), (torch.float32, 0), (torch.float16, -1), (torch.float64, -1)):
        assert (
            threads_on_host(q, None, q, None, Norms(random(32, dtype=dtype)), Angles(*tables(3, 16)))
            == status
        )


UNITS = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_gradients(found, expected, unit, *case):
    """Within ``unit`` of the largest number of each."""
    for i in range(2):
        assert found[i].is_contiguous()
        for out, right in zip(found[i::2], expected[i], strict=False):
            assert (out.double() - right).abs().max() <= unit * right.abs().max(), (*case, i)


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize("kind", ["head", "joint", None])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_the_gpu_kernels_threads_have_float64s_gradients(gradients_on_host, dtype, kind, norm_after):
    for dim, half, counts in (*SIZES, (40, 4, (3, 2)), (33, 4, (2, 1)), (8, 0, (1, 1))):
        for layout, interleaved, blocks in (
            ("BSHD", dim > 128, (1, 1)),
            ("BHSD", False, (3, 2)),
            ("slice", True, (4, 1)),
        )[dim in (96, 256) :]:
            angles = Angles(*tables(5, half), interleaved=interleaved)
            weight_dtype = torch.float32 if layout == "BHSD" else dtype
            norms = Norms(*weights(kind, counts, dim, weight_dtype), EPS, 1.0, norm_after)
            bias = random(counts[0] * dim, dtype=dtype, seed=3) if layout == "BSHD" else None
            xs, grads = (
                tuple(heads(layout, 2, 5, n, dim, dtype, seed=first + n) for n in counts) for first in (0, 30)
            )
            rstds = reference_norm.norm_rotate_tokens(*xs, norms, angles, bias)[2:]
            found = gradients_on_host(blocks, grads, xs, rstds, norms, angles, bias)
            expected = exact_gradients(grads, xs, norms, angles, (bias, None))
            assert_gradients(found, expected, UNITS[dtype], dim, layout)
            on_cpu = NATIVE.norm_rotate_backward(grads, xs, rstds, norms, angles, bias)
            for one, other in zip(found, on_cpu, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.dtype == other.dtype
                    error = (one.double() - other.double()).abs().max()
                    assert error <= UNITS[dtype] * other.double().abs().max(), (dim, layout)


@pytest.mark.parametrize(
    ("counts", "dim", "kind", "dtype"),
    [
        ((97, 2), 128, "joint", torch.bfloat16),  # more sums than shared memory has room for, of all heads
        ((88, 2), 128, "joint", torch.float32),  # the most that 16-byte accesses have room for
        ((2, 1), 3202, "head", torch.float32),  # and of one: a row a block
        ((2, 1), 3201, "joint", torch.float32),
        ((5, 2), 600, "joint", torch.float16),  # several units a thread
        ((40, 8), 64, "head", torch.bfloat16),  # heads in rounds, and tokens at once
        ((1, 1), 16, "head", torch.float32),  # 64 tokens at once
    ],
)
def test_the_gpu_kernels_sums_of_wide_heads_and_many(gradients_on_host, counts, dim, kind, dtype):
    half = min(dim // 2, 128)
    angles = Angles(*tables(3, half))
    norms = Norms(*weights(kind, counts, dim, torch.float32), EPS)
    xs, grads = (
        tuple(random(1, 3, n, dim, dtype=dtype, seed=first + n) for n in counts) for first in (0, 90)
    )
    rstds = reference_norm.norm_rotate_tokens(*xs, norms, angles)[2:]
    found = gradients_on_host((2, 1), grads, xs, rstds, norms, angles)
    assert_gradients(found, exact_gradients(grads, xs, norms, angles, (None, None)), UNITS[dtype])


def test_the_gpu_kernels_gradients_in_every_form_of_angles(gradients_on_host):
    q, k, q_grad, k_grad = (random(1, 9, n, 32, seed=10 * i + n) for i in (0, 3) for n in (3, 1))
    q[0, 0, 0, 0] = float("inf")  # in no sequence: it is not rotated, and no other head has NaN of it
    norms = Norms(*weights("head", (3, 1), 32, torch.float32), EPS)
    inv_freq_q64 = fixed_point.to_fixed_point(1.0 / 10000.0 ** (torch.arange(16) / 16))
    bounds = torch.tensor([2, 5, 7])
    for source in (
        Angles(*tables(2, 16), cu_seqlens=bounds),
        Angles(inv_freq_q64=inv_freq_q64, cu_seqlens=bounds, scaling=1.5),
        Angles(inv_freq_q64=inv_freq_q64, positions=torch.arange(9)[None] * 1000, conjugate=True),
    ):
        for after in (False, True):
            own = norms._replace(norm_after=after)
            rstds = reference_norm.norm_rotate_tokens(q, k, own, source)[2:]
            arguments = (q_grad, k_grad), (q, k), rstds, own, source
            found, right = gradients_on_host((2, 2), *arguments), NATIVE.norm_rotate_backward(*arguments)
            for one, other in zip(found, right, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert found[0][0, 1:].isfinite().all()


def test_the_gpu_kernels_gradients_of_queries_alone_expanded_and_of_no_tokens(gradients_on_host):
    q, angles, norms = random(1, 7, 4, 64), Angles(*tables(7, 32)), Norms(random(64, seed=1), None, EPS)
    grad = torch.ones(()).expand(q.shape)
    rstds = (reference_norm.norm_rotate_tokens(q, None, norms, angles)[2], None)
    found = gradients_on_host((3, 0), (grad, None), (q, None), rstds, norms, angles)
    right = NATIVE.norm_rotate_backward((grad, None), (q, None), rstds, norms, angles)
    for one, other in zip(found[::2], right[::2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found[1] is found[3] is None
    empty = gradients_on_host(
        (0, 0), (grad[:, :0], None), (q[:, :0], None), (rstds[0][:, :0], None), norms, angles
    )
    assert empty[0].shape == (1, 0, 4, 64)
    assert torch.equal(empty[2], torch.zeros(64))


def test_the_gpu_kernels_gradients_are_the_same_bits_every_time(gradients_on_host):
    q, k, q_grad, k_grad = (random(1, 40, n, 64, seed=10 * i + n) for i in (0, 3) for n in (4, 2))
    angles, norms = Angles(*tables(40, 32)), Norms(*weights("head", (4, 2), 64, torch.float32), EPS)
    rstds = reference_norm.norm_rotate_tokens(q, k, norms, angles)[2:]
    arguments = (q_grad, k_grad), (q, k), rstds, norms, angles
    first, again, other = (gradients_on_host(blocks, *arguments) for blocks in ((3, 2), (3, 2), (5, 1)))
    for a, b, c in zip(first, again, other, strict=True):
        assert same_bits(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
    # The heads' gradients are no sums over tokens: blocks change no bit of them.
    assert same_bits(first[0], other[0])
    assert same_bits(first[1], other[1])


def test_blocks_are_in_proportion_to_heads(monkeypatch):
    class Properties:
        multi_processor_count = 10

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    class OnGpu:
        is_cpu, device = False, "cuda"

        def __init__(self, tokens, count):
            self.shape = (1, tokens, count, 64)

    assert native._blocks((OnGpu(1000, 6), OnGpu(1000, 2))) == (30, 10)
    assert native._blocks((OnGpu(1000, 71), OnGpu(1000, 1))) == (39, 1)
    assert native._blocks((OnGpu(7, 6), OnGpu(7, 2))) == (7, 7)
    assert native._blocks((OnGpu(1000, 6), None)) == (40, 0)
    assert native._blocks((OnGpu(0, 6), OnGpu(0, 2))) == (0, 0)
    assert native._blocks((random(1, 3, 2, 64), None)) == (0, 0)


@pytest.mark.skipif(isinstance(native.load("cuda"), str), reason="no native CUDA library")
def test_the_cuda_library_refuses_where_cuda_is_absent():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    q, angles, norms = random(1, 3, 2, 32), Angles(*tables(3, 16)), Norms(random(32))
    tensors = (q, None, q, None)
    structs = (
        native.packing(tensors, angles)(*tensors, angles),
        native.norm_packing(tensors, norms)(norms, (None, None)),
    )
    library = native.load("cuda").library
    assert library.rope_dist_cuda_norm_rotary(*structs, 0) > 0
    gradients = native.packed_gradients((q, None), (random(2, 32), None), (2, 0))
    assert library.rope_dist_cuda_norm_rotary_backward(*structs, gradients, 0) > 0
    # Queries without a block would stay unwritten.
    gradients = native.packed_gradients((q, None), (None, None), (0, 0))
    assert library.rope_dist_cuda_norm_rotary_backward(*structs, gradients, 0) == -1
