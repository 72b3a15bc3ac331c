"""A benchmark, its command line and its rows of results: what each file of this folder with a ``BENCHMARK`` has."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from tabulate import tabulate

from rope_dist import machine, timing
from rope_dist.info import info
from rope_dist.version import __version__

from . import results
from .harness import CUT_SHORT, BenchmarkError, Case, Rows, measure, ranking, require_memory
from .shapes import DTYPES, SHAPES, Shape

SUITE_SECONDS = 540.0
OPERATORS = ("rope_dist/ops/**/*.py", "csrc/*.h", "csrc/*.cpp", "csrc/*.cu")
MODELS = (*OPERATORS, "rope_dist/hf/**/*.py", "benchmarks/models.py")
FACTORS = {"ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Size:
    """What cases are made of: a model's sizes, tokens, and the dtype's name."""

    shape: Shape
    tokens: int
    dtype: str

    def __str__(self) -> str:
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{self.shape.name}, {length}, {self.dtype}"

    @property
    def labels(self) -> dict[str, Any]:
        """Columns of a case of that size."""
        return {"model": self.shape.name, "tokens": self.tokens, "dtype": self.dtype}


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        baselines: names of those that run; None: all that can.
        layers: of each model; None: the benchmark's own number.
    """

    device: torch.device
    baselines: tuple[str, ...] | None = None
    layers: int | None = None

    def wants(self, baseline: str) -> bool:
        """Whether that baseline runs."""
        return self.baselines is None or baseline in self.baselines


@dataclass(frozen=True)
class Benchmark:
    """One file of this folder: ``BENCHMARK = Benchmark(__file__, __doc__, ...)`` at its end. Nothing else names it.

    Attributes:
        file: its name is the benchmark's.
        doc: the description of its ``--help``.
        title: of its table.
        cases: those of one size.
        sizes: by device type, what is measured by default: ``(models, tokens, dtypes)`` each, the most
            important first.
        quick: the same for ``--quick``, on every device.
        share: of the suite's time in percent, by device type; the suite leaves it out on the others.
        baselines: names that ``--baselines`` knows.
        unit: of the table: ``"ms"``, ``"us"`` or ``"tokens/s"``.
        wide: whether its table has a column an implementation, else a row.
        plot: whether time against length is drawn, of models with three lengths or more.
        layers: whether it has the option ``--layers``.
        threads: of torch; None: as it is.
        shapes: what ``--models`` knows.
        sources: patterns of the files whose code is measured, besides its own.
    """

    file: str
    doc: str
    title: str
    cases: Callable[[Size, Options], Sequence[Case]]
    sizes: dict[str, list[str]]
    share: dict[str, float]
    baselines: tuple[str, ...] = ()
    unit: str = "ms"
    wide: bool = True
    plot: bool = False
    layers: bool = False
    threads: int | None = None
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    sources: tuple[str, ...] = OPERATORS

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def code(self) -> str:
        """A hash of the code that it measures as it is now."""
        return results.code((*self.sources, f"benchmarks/{self.name}.py"))

    def main(self, arguments: Sequence[str]) -> int:
        """Measure, print tables, write the rows; the exit status (2: asked for what cannot be)."""
        parsed = self.parser().parse_args(arguments)
        try:
            self._run(parsed, list(arguments))
        except BenchmarkError as error:
            print(f"benchmarks {self.name}: error: {error}", file=sys.stderr)
            return 2
        return 0

    def parser(self) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        parser = Parser(prog=f"python -m benchmarks {self.name}", description=self.doc, formatter_class=raw)
        add = parser.add_argument
        add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
        add("--models", nargs="+", metavar="NAME", help=f"of {', '.join(self.shapes)}")
        add("--lengths", nargs="+", type=int, metavar="TOKENS", help="tokens of each case")
        add("--dtypes", nargs="+", metavar="NAME", help=f"of {', '.join(DTYPES)}")
        known = ", ".join(self.baselines) or "none"
        add(
            "--baselines",
            nargs="*",
            metavar="NAME",
            help=f"only these of {known} (default: all that are installed)",
        )
        if self.layers:
            add("--layers", type=_positive, metavar="N", help="layers of each model")
        add(
            "--seconds",
            type=float,
            help="for all cases; those not begun by then are left out (default: its share)",
        )
        add("--quick", action="store_true", help="small cases, to see that it works: no results file")
        add("--output", type=Path, metavar="FOLDER", help="for DEVICE.jsonl (default: benchmarks/results)")
        return parser

    def _run(self, parsed: argparse.Namespace, arguments: list[str]) -> None:
        began = time.perf_counter()
        device = self._device(parsed.device)
        share = self.share.get(device.type, 10.0) / (5 if parsed.quick else 1)
        seconds = SUITE_SECONDS * share / 100 if parsed.seconds is None else parsed.seconds
        if not seconds > 0:
            raise BenchmarkError(f"--seconds must be positive, got {seconds:g}")
        baselines = None if parsed.baselines is None else tuple(parsed.baselines)
        _check("--baselines", baselines, self.baselines)
        options = Options(device, baselines, getattr(parsed, "layers", None))
        if self.threads:
            torch.set_num_threads(self.threads)
        cases = [case for size in self._sizes(parsed, device) for case in self.cases(size, options)]
        if parsed.models or parsed.lengths:
            for case in cases:
                require_memory(case, device)
        folder = parsed.output or (None if parsed.quick else results.RESULTS)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        run = {
            "benchmark": self.name,
            "device": device.type,
            "command": shlex.join(["python", "-m", "benchmarks", self.name, *_without_output(arguments)]),
            "version": __version__,
            "commit": commit(),
            "code": self.code,
            "quick": parsed.quick,
            **machine.describe(),
            "native": "; ".join(f"{key}: {value}" for key, value in info()["native libraries"].items()),
        }
        print(machine_of(run), flush=True)
        done: Rows = []
        names = [case.name for case in cases]

        def save(rows: Rows, at: int) -> None:
            """Also of a case that is under way: a run that is cut short leaves what it measured."""
            if folder:
                state = {"unit": self.unit, "load": machine.load(), "gpu_state": gpu_state(device)}
                rest = [{"case": name, "note": CUT_SHORT} for name in names[at + 1 :]]
                rows = [run | state | row for row in _once(done + rows + rest)]
                results.replace(self.name, device.type, rows, folder)

        for index, name in enumerate(names):
            # A case holds its model: let go of the one before.
            case, cases[index] = cases[index], None
            left = seconds - (time.perf_counter() - began)
            try:
                if left <= 0 and done:
                    raise BenchmarkError(f"not begun within {seconds:g} s")
                share = max(left, 0) / (len(cases) - index)
                rows = measure(case, device, seconds=share, save=lambda rows, at=index: save(rows, at))
            except BenchmarkError as error:
                if index == len(cases) - 1 and not any("seconds" in row for row in done):
                    raise
                rows = [{"case": name, "note": f"skipped: {error}"}]
            done += rows
            print(f"\n{name}\n{table(rows, self.unit)}", flush=True)
            save([], index)

    def _device(self, name: str | None) -> torch.device:
        if name is None:
            on_gpu = "cuda" in self.sizes and torch.cuda.is_available()
            return torch.device("cuda" if on_gpu else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in self.sizes:
            known = ", ".join(key for key in self.sizes if key != "quick")
            raise BenchmarkError(f"--device: no {name!r}; there are {known}")
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if (device.index or 0) >= count:
                raise BenchmarkError(
                    f"--device {name}: torch sees {count or 'no'} GPU{'s' if count > 1 else ''}"
                )
            torch.cuda.set_device(device.index or 0)
        return device

    def _sizes(self, parsed: argparse.Namespace, device: torch.device) -> list[Size]:
        _check("--models", parsed.models, self.shapes)
        _check("--dtypes", parsed.dtypes, DTYPES)
        for tokens in parsed.lengths or ():
            if tokens < 1:
                raise BenchmarkError(f"--lengths must be positive, got {tokens}")
        sizes: dict[Size, None] = {}
        for line in self.sizes["quick" if parsed.quick else device.type]:
            models, lengths, *dtypes = (part.split() for part in line.split(":"))
            for model in parsed.models or models:
                for dtype in parsed.dtypes or (dtypes or [["bf16"]])[0]:
                    for tokens in parsed.lengths or map(_tokens, lengths):
                        sizes[Size(self.shapes[model], tokens, dtype)] = None
            if parsed.models and parsed.lengths:
                break
        return list(sizes)


def _tokens(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def _once(rows: Rows) -> Rows:
    """What is skipped in every case for the same reason is one row."""
    first = {(row.get("implementation", row["case"]), row.get("note")): row for row in reversed(rows)}
    return [row for row in rows if "note" not in row or row in first.values()]


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message} (see --help)\n")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text}")
    return int(text)


def _check(option: str, names: Sequence[str] | None, known: Sequence[str] | Mapping[str, Any]) -> None:
    for name in names or ():
        if name not in known:
            raise BenchmarkError(f"{option}: no {name!r}; there are {', '.join(known) or 'none'}")


def _without_output(arguments: list[str]) -> list[str]:
    """Where the file was written is no part of what was measured."""
    if "--output" not in arguments:
        return arguments
    at = arguments.index("--output")
    return arguments[:at] + arguments[at + 2 :]


def names() -> list[str]:
    """The benchmarks: files of this folder that define ``BENCHMARK``."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(f.stem for f in files if re.search(r"^BENCHMARK = ", f.read_text(encoding="utf-8"), re.M))


def find(name: str) -> Benchmark:
    """The benchmark of that name, one of :func:`names`."""
    return importlib.import_module(f"benchmarks.{name}").BENCHMARK


def machine_of(row: dict[str, Any]) -> str:
    """The machine of a row, or of ``machine.describe()``, and its versions in a few words."""
    versions = f"torch {row['torch']}, transformers {row['transformers']}"
    if row.get("device") == "cuda":
        return f"{row['gpu']}, {versions}, Triton {row['triton']}"
    return f"{row['processor']}, {versions}"


def figure(seconds: float, unit: str, tokens: int | None) -> str:
    """Three digits in the unit."""
    return timing.three_digits(tokens / seconds if unit == "tokens/s" else seconds * FACTORS[unit])


def table(rows: Rows, unit: str) -> str:
    """One case for reading: implementations fastest first, then bounds, then what was not timed and why."""
    lines = []
    for row in ranking(rows):
        p20, p80 = sorted((figure(row[p], unit, row.get("tokens")) for p in ("p20", "p80")), key=float)
        line = {
            "": row["implementation"] + " (roofline)" * (row["kind"] == "roofline"),
            unit: figure(row["seconds"], unit, row.get("tokens")),
            "20 - 80 %": f"{p20} - {p80}",
            "ratio": f"{row['ratio']:.3f}" if "ratio" in row else "",
            "of roofline": f"{row['roofline']:.0%}" if "roofline" in row else "",
            "rounds": row["rounds"],
        }
        lines.append(line | ({"peak MiB": f"{row['peak_bytes'] / 2**20:.0f}"} if "peak_bytes" in row else {}))
    align = ("left", *("right",) * (max(map(len, lines), default=1) - 1))
    text = tabulate(lines, headers="keys", disable_numparse=True, colalign=align) if lines else ""
    return "\n".join([text, *notes(rows)])


def notes(rows: Rows) -> list[str]:
    """What was not timed, by reason: ``skipped: Liger, quack (needs a GPU)``."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "note" in row:
            found.setdefault(row["note"], {})[row.get("implementation", row["case"])] = None
    parts = [(", ".join(names), *note.split(": ", 1)) for note, names in found.items()]
    return [f"{status}: {names} ({reason})" for names, status, reason in parts]


def commit() -> str | None:
    """The commit of the working tree, ``+`` where it was changed since; None where it is no clone."""
    try:
        git = ["git", "-C", str(results.ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "") if head.returncode == 0 else None


def gpu_state(device: torch.device) -> str | None:
    """Clocks, temperature and power of a GPU."""
    if device.type != "cuda":
        return None
    query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        values = (
            subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ", ".join(f"{key} {value}" for key, value in zip(query.split(","), values, strict=False))
