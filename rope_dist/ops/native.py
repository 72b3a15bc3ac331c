"""The libraries of ``csrc``, by ctypes: the CPU's rotation, and CUDA's where Triton is not.

They know no torch: a call packs pointers, sizes and strides into the struct of ``csrc/launch.h``. Nothing
here raises because a library is missing: :meth:`Native.supports` gives the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import fixed_point, reference
from .arguments import Angles, Norms, is_joint, present
from .backend import Backend, Launch, NotBuilt

ABI = 5
FOLDER = Path(os.environ.get("ROPE_DIST_NATIVE_DIR") or Path(__file__).resolve().parent.parent / "_native")
"""Where the libraries are; the variable names another folder, such as one of a build with sanitizers."""
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# One format for rope::Call: eight sizes, ten numbers each for q and k, the tables, the fixed-point
# frequencies with their factor, the positions. Packing takes a tenth of filling a ctypes.Structure.
_CALL = struct.Struct("=8q 10q 10q 7q q d 7q")
# rope::Norms: four numbers each for q and k, eps, weight_offset and the order.
_NORMS = struct.Struct("=4q 4q 2d q")
_GRADIENTS = struct.Struct("=6q 6q")
# Blocks of the backward pass that a multiprocessor has registers for.
_BLOCKS = 4


@dataclass(frozen=True)
class Built:
    """A library that loaded.

    Args:
        library: its functions.
        build: compiler and instruction sets or architectures, as the library itself says.
        architectures: compute capabilities it was compiled for (empty for the CPU).
    """

    library: ctypes.CDLL
    build: str
    architectures: tuple[int, ...] = ()


@functools.cache
def load(name: str) -> Built | str:
    """The library ``"cpu"`` or ``"cuda"``, or in one line why it is not there."""
    path = next((p for p in sorted(FOLDER.glob(f"librope_dist_{name}.*")) if p.suffix != ".json"), None)
    if path is None:
        return _not_built(name)
    try:
        library = ctypes.CDLL(str(path))
        abi = getattr(library, f"rope_dist_{name}_abi")()
        describe = getattr(library, f"rope_dist_{name}_build")
        rotary = getattr(library, f"rope_dist_{name}_rotary")
        norm_rotary = getattr(library, f"rope_dist_{name}_norm_rotary")
        norm_rotary_backward = getattr(library, f"rope_dist_{name}_norm_rotary_backward")
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load: {' '.join(str(error).split())}"
    if abi != ABI:
        return f"{path.name} was built from other sources (interface {abi}, needed {ABI}): build it again"
    describe.restype = ctypes.c_char_p
    # The stream of CUDA is a pointer, the CPU's number of threads an integer: both are 64 bits wide.
    rotary.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    norm_rotary.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
    norm_rotary_backward.argtypes = (*(ctypes.c_char_p,) * 3, ctypes.c_int64)
    architectures: tuple[int, ...] = ()
    if name == "cuda":
        library.rope_dist_cuda_error.restype = ctypes.c_char_p
        library.rope_dist_cuda_architectures.restype = ctypes.c_char_p
        text = library.rope_dist_cuda_architectures().decode()
        architectures = tuple(sorted(int(number) // 10 for number in text.split(",")))
    return Built(library, describe().decode(), architectures)


def _built(name: str) -> Built:
    built = load(name)
    if isinstance(built, str):
        raise RuntimeError(built)
    return built


def _not_built(name: str) -> str:
    try:
        status = json.loads((FOLDER / "build.json").read_text(encoding="utf-8"))[name]
        return f"not built: {status}"
    except (OSError, ValueError, KeyError):
        return "not built"


@functools.cache
def missing_architecture(device: int) -> str | None:
    """Why the CUDA library has no code for that GPU, or None."""
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    built = load("cuda")
    if isinstance(built, str):
        return built
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    # Machine code serves the later minor versions of its major one; PTX of the newest serves all later GPUs.
    if (
        any(a // 10 == major and a <= number for a in built.architectures)
        or number >= built.architectures[-1]
    ):
        return None
    numbers = " ".join(str(a) for a in built.architectures)
    return (
        f"compute capability {major}.{minor} is not among those built ({numbers}): set ROPE_DIST_CUDA_ARCHS"
    )


class Native(Backend):
    """Rotates CPU tensors, and CUDA tensors where there is no Triton, with norms or not; it does not project."""

    name = "native"

    def supports(self, x: torch.Tensor, requested: bool = False) -> str | None:
        if x.dtype not in {"cpu": DTYPES, "cuda": CUDA_DTYPES}.get(x.device.type, ()):
            return f"it has no kernel for {x.dtype} on {x.device.type}"
        built = load(x.device.type)
        if isinstance(built, str):
            return NotBuilt(f"the native library is missing: {built}")
        lacking = None if x.is_cpu else missing_architecture(x.device.index)
        return None if lacking is None else NotBuilt(f"the native library is missing: {lacking}")

    def rotate(self, q, k, q_out, k_out, angles, q_bias=None, k_bias=None, threads: int | None = None):
        """As :meth:`Backend.rotate`; ``threads`` of the CPU, None: as many as torch uses.

        Raises:
            RuntimeError: the launch failed.
        """
        return _launch(q, k, q_out, k_out, None, angles, q_bias, k_bias, None, threads)

    def norm_rotate(  # noqa: PLR0913
        self,
        q,
        k,
        q_out,
        k_out,
        norms,
        angles,
        q_bias=None,
        k_bias=None,
        rstds=None,
        threads: int | None = None,
    ):
        """As :meth:`Backend.norm_rotate`; ``threads`` as in :meth:`rotate`."""
        return _launch(q, k, q_out, k_out, norms, angles, q_bias, k_bias, rstds, threads)

    def norm_rotate_backward(
        self, grads, heads, rstds, norms, angles, q_bias=None, k_bias=None, threads: int | None = None
    ):
        """As :meth:`Backend.norm_rotate_backward`, in one pass; ``threads`` as in :meth:`rotate`."""
        q, k = heads
        grads = [
            grad if x is None or grad is not None else torch.zeros_like(x)
            for grad, x in zip(grads, heads, strict=True)
        ]
        if any(x is not None and grad.dtype != x.dtype for grad, x in zip(grads, heads, strict=True)):
            return super().norm_rotate_backward(grads, heads, rstds, norms, angles, q_bias, k_bias)
        found = [x.new_empty(x.shape) if x is not None else None for x in heads]
        blocks = _blocks(heads)
        # Of a GPU a row for each block, which writes all of it.
        sums = [
            None if weight is None or x is None
            else x.new_empty((own, *weight.shape), dtype=torch.float32) if own
            else x.new_zeros((1, *weight.shape), dtype=torch.float64)
            for weight, x, own in zip(norms.weights(), heads, blocks, strict=True)
        ]  # fmt: skip
        if q.numel() or (k is not None and k.numel()):
            sources = [_inner(x) if x is not None else None for x in heads]
            grads = [_inner(grad) if x is not None else None for grad, x in zip(grads, heads, strict=True)]
            biases = [bias.contiguous() if bias is not None else None for bias in (q_bias, k_bias)]
            rstds = [
                rstd.to(reference.compute_dtype(q)).contiguous() if x is not None else None
                for rstd, x in zip(rstds, heads, strict=True)
            ]
            ready, whole = _ready(q, angles), _ready_norms(q, norms)
            tensors = (*sources, *found)
            structs = (
                packing(tensors, ready)(*tensors, ready, *biases),
                norm_packing(tensors, whole)(whole, rstds),
                packed_gradients(grads, sums, blocks),
            )
            _launcher("norm_rotary_backward", q.device, threads)(*structs)
        of_weights = [
            own.sum(0).to(weight.dtype) if own is not None else None
            for own, weight in zip(sums, norms.weights(), strict=True)
        ]
        return (*found, *of_weights)


def _launch(  # noqa: PLR0913
    q, k, q_out, k_out, norms: Norms | None, angles: Angles, q_bias, k_bias, rstds, threads: int | None
) -> Launch | None:
    """Launch the library, with norms or without; returns what :meth:`Backend.rotate` does."""
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return None
    ready = _ready(q, angles)
    sources = [_inner(q), _inner(k) if k is not None else None]
    # A target that has no unit inner stride is written by way of one that has.
    targets = [
        source if out is x and source is not x else (_inner(out) if out is not None else None)
        for x, source, out in zip((q, k), sources, (q_out, k_out), strict=True)
    ]
    biases = [bias.contiguous() if bias is not None else None for bias in (q_bias, k_bias)]
    given = (q, k, q_out, k_out, *angles.tensors(), q_bias, k_bias)
    used = (*sources, *targets, *ready.tensors(), *biases)
    heads = (*sources, *targets)
    if norms is None:
        again: Launch = packed_launch(heads, ready, threads)
        again(*heads, ready, *biases)
    else:
        whole = _ready_norms(q, norms)
        again = packed_norm_launch(heads, whole, ready, threads)
        again(*heads, whole, ready, *biases, rstds)
        given, used = (*given, *norms.weights()), (*used, *whole.weights())
    for out, target in zip((q_out, k_out), targets, strict=True):
        if target is not None and target is not out:
            out.copy_(target)
    return again if all(a is b for a, b in zip(given, used, strict=True)) else None


def _ready_norms(q: torch.Tensor, norms: Norms) -> Norms:
    """``norms`` whose weights are contiguous and, for CUDA, float32 or of the type of the heads."""
    weights = [
        weight
        if weight is None
        else (weight if q.is_cpu or weight.dtype in (q.dtype, torch.float32) else weight.float()).contiguous()
        for weight in norms.weights()
    ]
    return norms._replace(q_weight=weights[0], k_weight=weights[1])


def _ready(q: torch.Tensor, angles: Angles) -> Angles:
    """``angles`` as the libraries take them: float32 tables (float64 for such heads), int64 positions and bounds.

    The libraries make cosines and sines from ``inv_freq_q64`` themselves, but for float64 heads, whose tables are made
    here as the reference makes them.
    """
    angles = reference.with_tables(angles, q)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin, inv_freq_q64, positions, cu_seqlens, seqlen_offsets = angles.tensors()
    if inv_freq_q64 is not None and q.dtype == torch.float64:
        at = reference.token_positions(angles, q.shape[0], q.shape[1], q.device)
        cos, sin = fixed_point.tables(inv_freq_q64, at, angles.scaling, dtype)
        positions = None
        if cu_seqlens is not None:
            # A token's row is its place; one that is in no sequence has none.
            positions = torch.where(at == reference.NOWHERE, -1, torch.arange(q.shape[1]))
        return angles._replace(
            cos=cos, sin=sin, inv_freq_q64=None, positions=positions, cu_seqlens=None, seqlen_offsets=None,
            offset=0,
        )  # fmt: skip
    if cos is not None:
        cos, sin = (present(t).to(dtype) for t in (cos, sin))
        cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    else:
        inv_freq_q64 = present(inv_freq_q64).contiguous()
    positions = positions.to(torch.int64) if positions is not None else None
    cu_seqlens, seqlen_offsets = (
        t.to(torch.int64).contiguous() if t is not None else None for t in (cu_seqlens, seqlen_offsets)
    )
    return angles._replace(
        cos=cos, sin=sin, inv_freq_q64=inv_freq_q64, positions=positions, cu_seqlens=cu_seqlens,
        seqlen_offsets=seqlen_offsets,
    )  # fmt: skip


def packed_launch(heads: tuple[torch.Tensor | None, ...], angles: Angles, threads: int | None) -> Launch:
    """What launches the library for ``q``, ``k``, ``q_out`` and ``k_out`` as it wants them.

    All but their pointers is packed beforehand.
    """
    pack, q = packing(heads, angles), present(heads[0])
    launch = _launcher("rotary", q.device, threads)

    def again(q, k, q_out, k_out, angles, q_bias=None, k_bias=None) -> None:
        launch(pack(q, k, q_out, k_out, angles, q_bias, k_bias))

    return again


def packed_norm_launch(
    heads: tuple[torch.Tensor | None, ...], norms: Norms, angles: Angles, threads: int | None
) -> Launch:
    """As :func:`packed_launch` with norms; what it returns takes tensors for the reciprocal norms last."""
    pack, pack_norms, q = packing(heads, angles), norm_packing(heads, norms), present(heads[0])
    launch = _launcher("norm_rotary", q.device, threads)

    def again(q, k, q_out, k_out, norms, angles, q_bias=None, k_bias=None, rstds=(None, None)) -> None:
        launch(pack(q, k, q_out, k_out, angles, q_bias, k_bias), pack_norms(norms, rstds or (None, None)))

    return again


def _launcher(name: str, device: torch.device, threads: int | None) -> Callable[..., None]:
    """The library's function of that name for the device, which takes packed structs and raises if it fails."""
    library = _built(device.type).library
    function, index = getattr(library, f"rope_dist_{device.type}_{name}"), device.index
    if device.type == "cpu":

        def on_cpu(*structs: bytes) -> None:
            status = function(*structs, threads or torch.get_num_threads())
            if status:
                _fail({-1: "unsupported arguments", -2: "out of memory"}.get(status, ""))

        return on_cpu

    def on_gpu(*structs: bytes) -> None:
        # A launch goes to the current device.
        current = torch.cuda.current_device() == index
        with contextlib.nullcontext() if current else torch.cuda.device(index):
            status = function(*structs, torch._C._cuda_getCurrentRawStream(index))
        if status:
            _fail(library.rope_dist_cuda_error(status).decode())

    return on_gpu


def _fail(message: str) -> None:
    raise RuntimeError(f"the native rotation failed: {message}")


def packing(heads: tuple[torch.Tensor | None, ...], angles: Angles) -> Callable[..., bytes]:
    """A function of the tensors that packs ``rope::Call`` of ``csrc/launch.h``; they must outlive the launch."""
    q, k, q_out, k_out = heads
    cos, sin, positions, cu_seqlens = angles.cos, angles.sin, angles.positions, angles.cu_seqlens
    q = present(q)
    sizes = (
        DTYPES[q.dtype], *q.shape[:2], q.shape[3], angles.num_pairs, angles.interleaved_in,
        angles.interleaved_out, angles.conjugate,
    )  # fmt: skip
    q_sizes, k_sizes = _sizes(q, q_out), _sizes(k, k_out)
    cos_strides, sin_strides = _strides(cos, 2), _strides(sin, 2)
    rows = cos.shape[1] if cos is not None else 0
    position_strides = _strides(positions, 2)
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0
    scaling = angles.scaling

    def pack(q, k, q_out, k_out, angles, q_bias=None, k_bias=None) -> bytes:
        cos, sin, inv_freq_q64, positions, cu_seqlens, seqlen_offsets = [
            0 if x is None else x.data_ptr() for x in angles[:6]
        ]
        return _CALL.pack(
            *sizes,
            q.data_ptr(), q_out.data_ptr(), 0 if q_bias is None else q_bias.data_ptr(), *q_sizes,
            *(0 if x is None else x.data_ptr() for x in (k, k_out, k_bias)), *k_sizes,
            cos, *cos_strides, sin, *sin_strides, rows, inv_freq_q64, scaling, positions, *position_strides,
            cu_seqlens, sequences, seqlen_offsets, angles.offset,
        )  # fmt: skip

    return pack


def norm_packing(heads: tuple[torch.Tensor | None, ...], norms: Norms) -> Callable[..., bytes]:
    """As :func:`packing`, of ``rope::Norms``: a function of the norms and of two tensors for the reciprocal norms."""
    # A weight of keys that are not there is not read.
    kinds = [
        (DTYPES[weight.dtype], is_joint(weight, x)) if weight is not None and x is not None else None
        for weight, x in zip(norms.weights(), heads[:2], strict=True)
    ]
    numbers = norms[2:]

    def pack(norms: Norms, rstds) -> bytes:
        packed: list[int] = []
        for weight, kind, rstd in zip(norms[:2], kinds, rstds, strict=True):
            packed += (0, 0, 0) if kind is None else (present(weight).data_ptr(), *kind)
            packed.append(0 if rstd is None else rstd.data_ptr())
        return _NORMS.pack(*packed, *numbers)

    return pack


def packed_gradients(grads, sums, blocks) -> bytes:
    """``rope::Gradients`` of gradients of queries and keys, and of what sums those of the weights: see ``launch.h``."""
    numbers = [
        (0,) * 6
        if grad is None
        else (grad.data_ptr(), *_strides(grad, 3), 0 if of_weight is None else of_weight.data_ptr(), own)
        for grad, of_weight, own in zip(grads, sums, blocks, strict=True)
    ]
    return _GRADIENTS.pack(*numbers[0], *numbers[1])


def _blocks(heads) -> tuple[int, int]:
    """Blocks of a GPU for queries and for keys, in proportion to their heads: as many as run at once. 0 of a CPU."""
    q = heads[0]
    if q.is_cpu:
        return 0, 0
    counts = [0 if x is None else x.shape[2] for x in heads]
    most = _BLOCKS * torch.cuda.get_device_properties(q.device).multi_processor_count
    tokens = q.shape[0] * q.shape[1]
    of_q, of_k = (min(tokens, max(1, most * n // sum(counts))) if n else 0 for n in counts)
    return of_q, of_k


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """Strides of the first axes; 0 where one entry serves all, and is never stepped over."""
    if x is None:
        return (0,) * axes
    return tuple(
        stride if size > 1 else 0 for size, stride in zip(x.shape[:axes], x.stride()[:axes], strict=True)
    )


def _sizes(x: torch.Tensor | None, out: torch.Tensor | None) -> tuple[int, ...]:
    return (x.shape[2] if x is not None else 0, *_strides(x, 3), *_strides(out, 3))
