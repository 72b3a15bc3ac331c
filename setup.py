"""Builds the native libraries of ``csrc``; metadata is in pyproject.toml.

No torch is imported: the libraries are bound by ctypes, so one build serves every torch and every Python. Both
are optional: for each that cannot be built one line with the reason is printed, and kept in
``rope_dist/_native/build.json`` for ``rope-dist info``. The CPU library is built by default, the CUDA library, which
serves GPUs without Triton, on request.

Environment:
    CXX, CUDA_HOME: where the compilers are; ARCHFLAGS on macOS.
    ROPE_DIST_PURE: 1 builds no library, and a wheel for every platform; the default on Windows.
    ROPE_DIST_CUDA: 1 builds the CUDA library.
    ROPE_DIST_CUDA_ARCHS: builds it for these, such as "80 90"; otherwise those of 80, 90, 100 and 120 that nvcc knows.
        The last is there as PTX too, for every later GPU. Empty: no CUDA library.
    ROPE_DIST_URL: the repository's page: the metadata's links, and the README's links made absolute.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    # An older one fails on pyproject.toml, with a message of twenty lines.
    sys.exit(f"rope_dist is built with setuptools 77 or later, here is {setuptools.__version__}")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HEADERS = ["csrc/rotary.h", "csrc/launch.h"]
CPU = Extension(
    "rope_dist._native.librope_dist_cpu",
    [f"csrc/{name}_cpu.cpp" for name in ("rotary", "norm_rotary", "norm_backward", "angles")],
    depends=[
        *HEADERS,
        *(f"csrc/cpu_{name}.h" for name in ("types", "angles", "clones", "threads", "tokens")),
        "csrc/norm_cpu.h",
    ],
    optional=True,
)
CUDA = Extension(
    "rope_dist._native.librope_dist_cuda",
    ["csrc/rotary_cuda.cu", "csrc/norm_rotary_cuda.cu", "csrc/norm_backward_cuda.cu"],
    depends=[
        *HEADERS,
        *(
            f"csrc/{name}.h"
            for name in ("rotary_threads", "norm_rotary_threads", "norm_backward_threads", "row_sum")
        ),
    ],
    optional=True,
)
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# GCC 12 fuses the products of an interleaved pair into vfmaddsub whatever -ffp-contract says, unless straight-line
# code is left unvectorized; the loops are what counts here.
# Without errno a loop of square roots is made vectors of.
CPU_FLAGS = [
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-tree-slp-vectorize", "-fvisibility=hidden",
]  # fmt: skip
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]
ARCHITECTURES = (80, 90, 100, 120)


class NotBuilt(Exception):
    """Why a library is not built, in one line."""


class NotRequested(NotBuilt):
    """A library that nobody asked for."""


def switch(name: str) -> bool | None:
    """The environment variable ``name``: 1 or 0, or None where it is not set or empty."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        sys.exit(f"{name}={value} is neither 0 nor 1")
    return None if value == "" else value == "1"


def is_pure() -> bool:
    """Whether no library is built. With the compilers of Windows none has been tried."""
    pure = switch("ROPE_DIST_PURE")
    return sys.platform == "win32" if pure is None else pure


def cpu_command() -> list[str]:
    """The C++ compiler and its flags for every processor of a kind, without target and source.

    None of them is of a processor: the sources choose by what the processor has when they run (``csrc/cpu_tokens.h``),
    so a library of one machine runs on others. None is of OpenMP either, which they find in the process
    (``csrc/cpu_threads.h``).
    """
    compiler = _given_compiler()
    if compiler and not shutil.which(compiler[0]):
        raise NotBuilt(f"CXX={compiler[0]} is not found")
    if not compiler:
        found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if found is None:
            raise NotBuilt("no C++ compiler (c++, g++ or clang++; CXX names another)")
        compiler = [found]
    pic_flags = [] if sys.platform == "win32" else ["-fPIC", "-pthread"]
    # As setuptools' own compilers do: which processors of Apple's a library is for.
    arch_flags = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
    return [*compiler, *CPU_FLAGS, *pic_flags, *arch_flags]


def cuda_command() -> list[str]:
    """nvcc and its flags, without target and source."""
    asked, wanted = switch("ROPE_DIST_CUDA"), os.environ.get("ROPE_DIST_CUDA_ARCHS")
    if asked is False:
        raise NotRequested("ROPE_DIST_CUDA=0")
    if wanted is not None and not wanted.strip():
        raise NotRequested("ROPE_DIST_CUDA_ARCHS is empty")
    if asked is None and wanted is None:
        raise NotRequested("not asked for; a GPU without Triton needs it (ROPE_DIST_CUDA=1)")
    numbers = list(ARCHITECTURES) if wanted is None else _numbers(wanted)
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None:
        raise NotBuilt(f"no nvcc in {Path(home, 'bin')}" if home else "no nvcc (PATH, CUDA_HOME)")
    if wanted is None:
        numbers = _known(nvcc, numbers)
    codes = []
    for number in numbers:
        code = f"sm_{number}" if number != numbers[-1] else f"[sm_{number},compute_{number}]"
        codes += ["-gencode", f"arch=compute_{number},code={code}"]
    given = _given_compiler()
    # Of a launcher and its compiler (ccache g++) nvcc would take the launcher alone.
    host = ["-ccbin", given[0]] if given and all(option.startswith("-") for option in given[1:]) else []
    pic_flags = [] if sys.platform == "win32" else ["-Xcompiler", "-fPIC"]
    return [nvcc, *CUDA_FLAGS, *pic_flags, *host, "--threads", "0", *codes]


def _given_compiler() -> list[str]:
    """CXX split like a shell does; empty where it is not set."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise NotBuilt(f"CXX={text}: {error}") from None


def _numbers(text: str) -> list[int]:
    """Compute capabilities as nvcc counts them, of ``"8.0 90"``."""
    numbers = [number for number in re.split(r"[\s,;]+", text.strip()) if number]
    if not numbers or not all(re.fullmatch(r"\d+(\.\d)?", number) for number in numbers):
        raise NotBuilt(f"ROPE_DIST_CUDA_ARCHS={text} is not numbers such as 80 90")
    return sorted({int(number.replace(".", "")) for number in numbers})


def _known(nvcc: str, numbers: list[int]) -> list[int]:
    """Those that this nvcc compiles for; all where it lists none, so that its own error is reported."""
    try:
        listed = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, errors="replace"
        ).stdout
    except OSError:
        listed = ""
    known = {int(number) for number in re.findall(r"compute_(\d+)", listed)}
    return [number for number in numbers if number in known] or numbers


class BuildNative(build_ext):
    """Builds both libraries at the same time; a failure costs that library only."""

    inplace: bool

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: these are not Python modules."""
        return os.path.join(*fullname.split(".")) + SUFFIX

    def run(self) -> None:
        """Without the compiler that setuptools would set up: it is not used, and may be missing."""
        inplace = self.inplace
        self.inplace = False
        self.build_extensions()
        self.inplace = inplace
        if inplace:
            self.copy_extensions_to_source()

    def build_extensions(self) -> None:
        status: dict[str, str] = {}
        started: dict[str, Build] = {}
        requested = {"cpu", "cuda"}
        for name, extension, command in (("cpu", CPU, cpu_command), ("cuda", CUDA, cuda_command)):
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                line = command()
                if self._is_current(name, extension, line, target):
                    status[name] = "built"
                    continue
                # An older library would be of other sources than these.
                target.unlink(missing_ok=True)
                started[name] = Build(line, extension.sources, target, Path(self.build_temp, name))
            except NotBuilt as error:
                status[name] = str(error)
                if isinstance(error, NotRequested):
                    requested.remove(name)
                target.unlink(missing_ok=True)
        for name, build in started.items():
            status[name] = build.finish()
            if status[name] == "built":
                self._command_file(name).write_text(shlex.join(build.line), encoding="utf-8")
        for name, text in status.items():
            if text != "built" and name in requested:
                print(
                    f"warning: rope_dist is built without its native {name.upper()} library: {text}",
                    file=sys.stderr,
                )
        record = Path(self.get_ext_fullpath(CPU.name)).resolve().with_name("build.json")
        record.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")

    def _command_file(self, name: str) -> Path:
        return Path(self.build_temp, name, "command")

    def _is_current(self, name: str, extension: Extension, line: list[str], target: Path) -> bool:
        """Whether the library is newer than its sources and built by the same compiler for the same architectures."""
        before = self._command_file(name)
        if self.force or not target.exists() or not before.exists():
            return False
        newest = max(Path(p).stat().st_mtime for p in [*extension.sources, *extension.depends])
        return target.stat().st_mtime > newest and before.read_text(encoding="utf-8") == shlex.join(line)

    def copy_extensions_to_source(self) -> None:
        """As in setuptools, with the record of the build beside them."""
        folder = Path(__file__).resolve().parent / "rope_dist" / "_native"
        for extension in (CPU, CUDA):
            name = self.get_ext_filename(extension.name)
            built, placed = Path(self.build_lib, name), folder / Path(name).name
            # A new file: a process that has the old one loaded keeps it.
            placed.unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, placed)
        shutil.copy(Path(self.build_lib, "rope_dist", "_native", "build.json"), folder / "build.json")


class Build:
    """A library on its way: every source is compiled in a process of its own, then they are linked.

    Args:
        line: the compiler and its flags.
        sources: what it compiles.
        target: the library.
        folder: for what is between.

    Raises:
        NotBuilt: the compiler cannot be run.
    """

    def __init__(self, line: list[str], sources: list[str], target: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.line, self.target = line, target
        self._objects = [str(folder / f"{Path(source).stem}.o") for source in sources]
        self._compilers = [
            _start([*line, "-c", source, "-o", output])
            for source, output in zip(sources, self._objects, strict=True)
        ]

    def finish(self) -> str:
        """``"built"``, or that the compiler failed, with its first error."""
        outputs = [process.communicate()[0] for process in self._compilers]
        failed = any(process.returncode for process in self._compilers)
        if not failed:
            linker = _start([*self.line, "-shared", *self._objects, "-o", str(self.target)])
            outputs.append(linker.communicate()[0])
            if linker.returncode == 0 and self.target.exists():
                return "built"
        self.target.unlink(missing_ok=True)
        lines = [text.strip() for output in outputs for text in output.splitlines()]
        errors = [text for text in lines if re.search("error|fatal", text, re.IGNORECASE)]
        return f"{self.line[0]} failed" + (f" ({errors[0]})" if errors else "")


def _start(line: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise NotBuilt(f"{line[0]} cannot be run: {error.strerror}") from None


class Wheel(bdist_wheel):
    """One wheel for every Python 3 of a platform: nothing in it is bound to an interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def readme(url: str) -> str:
    """The README; with absolute links where the repository's page is known, since an index has no files to link to."""
    root = Path(__file__).resolve().parent
    text = (root / "README.md").read_text(encoding="utf-8")
    if not url:
        return text
    version = runpy.run_path(str(root / "rope_dist" / "version.py"))["__version__"]

    def absolute(link: re.Match[str]) -> str:
        picture, target = link["picture"], link["target"]
        return f"{link['before']}{url}/{'raw' if picture else 'blob'}/v{version}/{target})"

    # Not those to other sites, nor to the page's own sections.
    relative = r"(?P<before>(?P<picture>!?)\[[^]]*\]\()(?P<target>(?!#|\w+:)[^)\s]+)\)"
    return re.sub(relative, absolute, text)


URL = os.environ.get("ROPE_DIST_URL", "").rstrip("/")
setup(
    ext_modules=[] if is_pure() else [CPU, CUDA],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    long_description=readme(URL),
    long_description_content_type="text/markdown",
    project_urls={"Repository": URL, "Issues": f"{URL}/issues"} if URL else {},
)
