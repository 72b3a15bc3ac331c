"""Builds the native libraries of ``csrc``; metadata is in pyproject.toml.

No torch is imported: the libraries are bound by ctypes, so one build serves every torch and every Python. Both
are optional. What cannot be built is said in one line, kept in ``rope_dist/_native/build.json`` for
``rope-dist info``, and left out.

Environment: CXX, CUDA_HOME, ROPE_DIST_CUDA_ARCHS (such as "80 90"; empty: no CUDA library; default: those of
80, 90, 100 and 120 that nvcc knows). The last is there as PTX too, for every later GPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    # An older one stumbles over pyproject.toml, and says so in twenty lines.
    sys.exit(f"rope_dist is built with setuptools 77 or later, here is {setuptools.__version__}")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HEADERS = ["csrc/rotary.h", "csrc/launch.h"]
CPU = Extension("rope_dist._native.librope_dist_cpu", ["csrc/rotary_cpu.cpp"], depends=HEADERS, optional=True)
CUDA = Extension(
    "rope_dist._native.librope_dist_cuda",
    ["csrc/rotary_cuda.cu"],
    depends=[*HEADERS, "csrc/rotary_threads.h"],
    optional=True,
)
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# GCC 12 fuses the products of an interleaved pair into vfmaddsub whatever -ffp-contract says, unless straight-line
# code is left unvectorized; the loops are what counts here.
CPU_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-tree-slp-vectorize", "-fvisibility=hidden"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]
ARCHITECTURES = (80, 90, 100, 120)


class NotBuilt(Exception):
    """Why a library is not built, in one line."""


def cpu_command() -> list[str]:
    """The C++ compiler and its flags, without target and source."""
    compiler = _given_compiler()
    if compiler and not shutil.which(compiler[0]):
        raise NotBuilt(f"CXX={compiler[0]} is not found")
    if not compiler:
        found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if found is None:
            raise NotBuilt("no C++ compiler (c++, g++ or clang++; CXX names another)")
        compiler = [found]
    position = [] if sys.platform == "win32" else ["-fPIC", "-pthread"]
    return [*compiler, *CPU_FLAGS, *position, "-shared"]


def cuda_command() -> list[str]:
    """nvcc and its flags, without target and source."""
    wanted = os.environ.get("ROPE_DIST_CUDA_ARCHS")
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
    host = ["-ccbin", given[0]] if given and all(word.startswith("-") for word in given[1:]) else []
    position = [] if sys.platform == "win32" else ["-Xcompiler", "-fPIC"]
    return [nvcc, *CUDA_FLAGS, *position, *host, "--threads", "0", *codes, "-shared"]


def _given_compiler() -> list[str]:
    """The words of CXX; none where it is not set."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise NotBuilt(f"CXX={text}: {error}") from None


def _numbers(text: str) -> list[int]:
    """Compute capabilities as nvcc counts them, of ``"8.0 90"``."""
    words = [word for word in re.split(r"[\s,;]+", text.strip()) if word]
    if not words:
        raise NotBuilt("ROPE_DIST_CUDA_ARCHS is empty")
    if not all(re.fullmatch(r"\d+(\.\d)?", word) for word in words):
        raise NotBuilt(f"ROPE_DIST_CUDA_ARCHS={text} is not numbers such as 80 90")
    return sorted({int(word.replace(".", "")) for word in words})


def _known(nvcc: str, numbers: list[int]) -> list[int]:
    """Those that this nvcc compiles for; all where it does not say, so that its own error is told."""
    try:
        said = subprocess.run(
            [nvcc, "--list-gpu-arch"], capture_output=True, text=True, errors="replace"
        ).stdout
    except OSError:
        said = ""
    known = {int(number) for number in re.findall(r"compute_(\d+)", said)}
    return [number for number in numbers if number in known] or numbers


class BuildNative(build_ext):
    """Both libraries, at once where ninja is; a failure costs that library only."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: these are not Python modules."""
        return os.path.join(*fullname.split(".")) + SUFFIX

    def run(self) -> None:
        """Without the compiler that setuptools would set up, and stumble over: none of it is used."""
        inplace, self.inplace = self.inplace, False
        self.build_extensions()
        self.inplace = inplace
        if inplace:
            self.copy_extensions_to_source()

    def build_extensions(self) -> None:
        said: dict[str, str] = {}
        commands: dict[str, tuple[Extension, list[str], Path]] = {}
        for name, extension, command in (("cpu", CPU, cpu_command), ("cuda", CUDA, cuda_command)):
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                line = [*command(), "-o", str(target), *extension.sources]
            except NotBuilt as error:
                said[name] = str(error)
                target.unlink(missing_ok=True)
                continue
            commands[name] = (extension, line, target)
        failures = self._with_ninja(commands) if shutil.which("ninja") else self._one_by_one(commands)
        for name, (_, _, target) in commands.items():
            if name in failures:
                # An older library would be of other sources than these.
                target.unlink(missing_ok=True)
            said[name] = failures.get(name, "built")
        for name, text in said.items():
            if text != "built":
                kind = "CPU" if name == "cpu" else "CUDA"
                print(
                    f"warning: rope_dist is built without its native {kind} library: {text}", file=sys.stderr
                )
        record = Path(self.get_ext_fullpath(CPU.name)).resolve().with_name("build.json")
        record.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """As always, and what is said of the build with them."""
        folder = Path(__file__).resolve().parent / "rope_dist" / "_native"
        for extension in (CPU, CUDA):
            name = self.get_ext_filename(extension.name)
            built, placed = Path(self.build_lib, name), folder / Path(name).name
            if built.exists():
                # A new file: a process that has the old one loaded keeps it.
                placed.unlink(missing_ok=True)
                shutil.copy(built, placed)
            else:
                placed.unlink(missing_ok=True)
        shutil.copy(Path(self.build_lib, "rope_dist", "_native", "build.json"), folder / "build.json")

    def _one_by_one(self, commands: dict[str, tuple[Extension, list[str], Path]]) -> dict[str, str]:
        failures = {}
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (extension, line, target) in commands.items():
            newest = max(Path(p).stat().st_mtime for p in [*extension.sources, *extension.depends])
            # Other architectures or another compiler make another library of the same sources.
            before, command = folder / f"{name}.command", shlex.join(line)
            same = before.exists() and before.read_text(encoding="utf-8") == command
            if not self.force and same and target.exists() and target.stat().st_mtime > newest:
                continue
            failure = _compile(line, target)
            if failure:
                failures[name] = failure
            before.write_text(command, encoding="utf-8")
        return failures

    def _with_ninja(self, commands: dict[str, tuple[Extension, list[str], Path]]) -> dict[str, str]:
        if not commands:
            return {}
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"builddir = {_ninja(folder)}", "rule run", "  command = $line", "  description = $name"]
        for name, (extension, line, target) in commands.items():
            sources = " ".join(_ninja(Path(p).resolve()) for p in [*extension.sources, *extension.depends])
            lines += [f"build {_ninja(target)}: run {sources}"]
            lines += [f"  line = {shlex.join(line).replace('$', '$$')}", f"  name = native {name} library"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        ninja = ["ninja", "-f", str(folder / "build.ninja"), "-k", "0"]
        if self.force:
            for _, _, target in commands.values():
                target.unlink(missing_ok=True)
        if subprocess.run(ninja, capture_output=True).returncode == 0:
            return {}
        failures = {}
        for name, (_, line, target) in commands.items():
            if subprocess.run([*ninja, str(target)], capture_output=True).returncode:
                # By itself: the compiler's own words, and no loss where it is ninja that does not work.
                failure = _compile(line, target)
                if failure:
                    failures[name] = failure
        return failures


def _ninja(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _compile(line: list[str], target: Path) -> str | None:
    """Why that command has not made the library, with the compiler's first error; or None: it has."""
    target.unlink(missing_ok=True)
    try:
        done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"{line[0]} cannot be run: {error.strerror}"
    if done.returncode == 0 and target.exists():
        return None
    said = (done.stdout + done.stderr).splitlines()
    errors = [text.strip() for text in said if re.search("error|fatal", text, re.IGNORECASE)]
    return f"{line[0]} failed" + (f" ({errors[0]})" if errors else "")


class Wheel(bdist_wheel):
    """One wheel for every Python 3 of a platform: nothing in it is bound to an interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[CPU, CUDA], cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
