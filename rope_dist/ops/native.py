"""The libraries of ``csrc``, by ctypes: the CPU's rotation, and CUDA's where Triton is not.

They know no torch: a call packs pointers, sizes and strides into the struct of ``csrc/launch.h``. Nothing
here raises because a library is missing; :func:`unavailable` says why, and ``dispatch.py`` takes the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

ABI = 2
FOLDER = Path(os.environ.get("ROPE_DIST_NATIVE_DIR") or Path(__file__).resolve().parent.parent / "_native")
"""Where the libraries are; the variable names another folder, such as one of a build with sanitizers."""
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# One format for rope::Call: seven sizes, ten numbers each for q and k, the tables, the fixed-point
# frequencies with their factor, the positions. Packing takes a tenth of filling a ctypes.Structure.
_CALL = struct.Struct("=7q 10q 10q 7q q d 7q")


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
    except (OSError, AttributeError) as error:
        return f"{path.name} does not load: {' '.join(str(error).split())}"
    if abi != ABI:
        return f"{path.name} was built from other sources (interface {abi}, needed {ABI}): build it again"
    describe.restype = ctypes.c_char_p
    # The stream of CUDA is a pointer, the CPU's number of threads an integer: both are 64 bits wide.
    rotary.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    architectures: tuple[int, ...] = ()
    if name == "cuda":
        library.rope_dist_cuda_error.restype = ctypes.c_char_p
        library.rope_dist_cuda_architectures.restype = ctypes.c_char_p
        text = library.rope_dist_cuda_architectures().decode()
        architectures = tuple(sorted(int(number) // 10 for number in text.split(",")))
    return Built(library, describe().decode(), architectures)


def _not_built(name: str) -> str:
    try:
        said = json.loads((FOLDER / "build.json").read_text(encoding="utf-8"))[name]
        return f"not built: {said}"
    except (OSError, ValueError, KeyError):
        return "not built"


def dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    """What the library for that type of device rotates, if it is there; nothing for other devices."""
    return {"cpu": tuple(DTYPES), "cuda": CUDA_DTYPES}.get(device, ())


def unavailable(x: torch.Tensor) -> str | None:
    """Why the library for ``x``, of one of :func:`dtypes_on`, cannot be used, or None: it can."""
    built = load(x.device.type)
    if isinstance(built, str):
        return built
    return None if x.is_cpu else missing_architecture(x.device.index)


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


def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    offset: int = 0,
    scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
    q_bias: torch.Tensor | None = None,
    k_bias: torch.Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Rotate ``q`` into ``q_out`` and ``k`` into ``k_out`` where :func:`unavailable` is None. Checks nothing.

    Args:
        q, k: ``[B, S, heads, D]`` of one dtype, any strides; ``q_out`` may be ``q`` itself.
        cos, sin, words, positions, cu_seqlens, offsets, offset, scaling: as in
            :func:`rope_dist.ops.reference.rotate_tokens`. The CUDA kernel makes tables from ``words`` itself.
        q_bias, k_bias: ``[heads * D]``, added before the rotation with no rounding between.
        threads: of the CPU; None: as many as torch uses.

    Raises:
        RuntimeError: the launch failed.
    """
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    if words is not None and q.is_cpu:
        from . import angles, reference

        # In float64, as the reference: the tables are small beside the heads.
        at = reference.token_positions(*q.shape[:2], positions, cu_seqlens, offsets, offset, q.device)
        cos, sin = angles.tables(words, at, scaling, _table_dtype(q))
        positions = None
        if cu_seqlens is not None:
            # A token's row is its place; one that is in no sequence has none.
            positions = torch.where(at == reference.NOWHERE, -1, torch.arange(q.shape[1]))
        words = cu_seqlens = offsets = None
        offset = 0
    sources = [_inner(q), _inner(k) if k is not None else None]
    # A target that has no unit inner stride is written by way of one that has.
    targets = [
        source if out is x and source is not x else (_inner(out) if out is not None else None)
        for x, source, out in zip((q, k), sources, (q_out, k_out), strict=True)
    ]
    if cos is not None:
        cos, sin = (_rows(t.to(_table_dtype(q))) for t in (cos, sin))
    words, q_bias, k_bias = (t.contiguous() if t is not None else None for t in (words, q_bias, k_bias))
    positions, cu_seqlens, offsets = (
        t.to(torch.int64) if t is not None else None for t in (positions, cu_seqlens, offsets)
    )
    cu_seqlens, offsets = (t.contiguous() if t is not None else None for t in (cu_seqlens, offsets))
    packed = pack(
        *sources, *targets, cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved,
        inverse, q_bias, k_bias,
    )  # fmt: skip
    _launch(q, packed, threads)
    for out, target in zip((q_out, k_out), targets, strict=True):
        if target is not None and target is not out:
            out.copy_(target)


def pack(
    q, k, q_out, k_out, cos, sin, words, positions, cu_seqlens, offsets, offset, scaling, interleaved, inverse,
    q_bias=None, k_bias=None,
) -> bytes:  # fmt: skip
    """``rope::Call`` of ``csrc/launch.h`` for tensors as it wants them; they must outlive the launch."""
    return _CALL.pack(
        DTYPES[q.dtype], *q.shape[:2], q.shape[3], (cos if words is None else words).shape[-1],
        interleaved, inverse,
        *_heads(q, q_out, q_bias), *_heads(k, k_out, k_bias),
        *_table(cos), *_table(sin), cos.shape[1] if cos is not None else 0,
        _pointer(words), scaling,
        _pointer(positions), *(_strides(positions, 2) if positions is not None else (0, 0)),
        _pointer(cu_seqlens), cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0,
        _pointer(offsets), offset,
    )  # fmt: skip


def _launch(q: torch.Tensor, packed: bytes, threads: int | None) -> None:
    library = load(q.device.type).library
    if q.is_cpu:
        status = library.rope_dist_cpu_rotary(packed, threads or torch.get_num_threads())
        message = {-1: "unsupported arguments", -2: "out of memory"}.get(status, "")
    else:
        # A launch goes to the current device.
        current = torch.cuda.current_device() == q.device.index
        with contextlib.nullcontext() if current else torch.cuda.device(q.device):
            stream = torch._C._cuda_getCurrentRawStream(q.device.index)
            status = library.rope_dist_cuda_rotary(packed, stream)
        message = library.rope_dist_cuda_error(status).decode() if status else ""
    if status:
        raise RuntimeError(f"the native rotation failed: {message}")


def _table_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _rows(table: torch.Tensor) -> torch.Tensor:
    """``table`` with a contiguous last axis; rows may lie anywhere."""
    return table if table.stride(-1) == 1 else table.contiguous()


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _pointer(x: torch.Tensor | None) -> int:
    return x.data_ptr() if x is not None else 0


def _strides(x: torch.Tensor, axes: int) -> list[int]:
    """Strides of the first axes; 0 where one entry serves all, and is never stepped over."""
    sizes, strides = x.shape, x.stride()
    return [strides[axis] if sizes[axis] > 1 else 0 for axis in range(axes)]


def _heads(x: torch.Tensor | None, out: torch.Tensor | None, bias: torch.Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0,) * 10
    return (x.data_ptr(), out.data_ptr(), _pointer(bias), x.shape[2], *_strides(x, 3), *_strides(out, 3))


def _table(table: torch.Tensor | None) -> tuple[int, ...]:
    return (table.data_ptr(), *_strides(table, 2)) if table is not None else (0, 0, 0)
