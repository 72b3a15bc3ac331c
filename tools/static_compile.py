"""Compile a kernel ahead of time, for a GPU that is not there, exactly as its launch would.

The launch function runs on meta tensors; instead of starting, the kernel's arguments are recorded and
typed by Triton's own rules (equal to one, divisible by 16), so that what is checked is what runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it, launches are recorded instead of run."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def record(call: Callable[[], Any]) -> Launch:
    """The one launch that ``call`` makes.

    Raises:
        RuntimeError: it made none or several.
    """
    with recorded() as launches:
        call()
    if len(launches) != 1:
        raise RuntimeError(f"expected one launch, got {len(launches)}")
    return launches[0]


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for ``launch``, and its options."""
    kernel = launch.kernel
    bound = dict(zip(kernel.arg_names, launch.args, strict=False))
    options = {key: value for key, value in launch.kwargs.items() if key in _OPTIONS}
    bound.update({key: value for key, value in launch.kwargs.items() if key not in _OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        divisible = False
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, TensorDescriptor):
            block = ",".join(str(n) for n in value.block_shape)
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible = (value.storage_offset() * value.element_size()) % 16 == 0
        else:
            signature[name] = mangle_type(value)
            divisible = specialised and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel: see :func:`report` for the counts."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    instructions: int
    counts: dict[str, int]


def compile_for(launch: Launch, target: str) -> Any:
    """The compiled kernel of ``launch`` for a key of :data:`TARGETS`."""
    ast_source, options = source(launch)
    return triton.compile(ast_source, target=TARGETS[target], options=options)


def report(name: str, compiled: Any, target: str) -> Report:
    """Read registers, stack, shared memory and instruction counts, without a driver.

    ``counts`` holds, for NVIDIA, opcode prefixes of the machine code (``LDG.E.128``, ``HGMMA``, ``LDS`` ...)
    with how often each full opcode occurs, and ``convert_layout`` from Triton's own intermediate code.
    """
    counts = {"convert_layout": compiled.asm["ttgir"].count("ttg.convert_layout")}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        for match in re.finditer(r"^\s+([a-z]\w+)", text, re.M):
            counts[match[1]] = counts.get(match[1], 0) + 1
        return Report(name, target, registers, spills, compiled.metadata.shared, sum(counts.values()), counts)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        machine_code = _output(tools / "nvdisasm", "--print-code", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", machine_code, re.M)
    body = [opcode for opcode in opcodes if opcode != "NOP"]
    for opcode in body:
        counts[opcode] = counts.get(opcode, 0) + 1
    return Report(
        name,
        target,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        compiled.metadata.shared,
        len(body),
        counts,
    )


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
