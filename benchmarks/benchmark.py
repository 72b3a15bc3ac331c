"""A benchmark, its command line and its rows of results: what each file of this folder with a ``BENCHMARK`` has."""

import argparse
import importlib
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import torch
from tabulate import tabulate

from rope_dist import bench, machine, timing
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
    """What cases are made of: a model's sizes, tokens, and the dtype's name; ``labels`` are columns of its rows."""

    shape: Shape
    tokens: int
    dtype: str

    def __str__(self) -> str:
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{self.shape.name}, {length}, {self.dtype}"

    @property
    def labels(self) -> dict[str, Any]:
        return {"model": self.shape.name, "tokens": self.tokens, "dtype": self.dtype}


@dataclass(frozen=True)
class Options:
    """What the command line asks for: names of the baselines that run (None: all that can), layers of each model."""

    device: torch.device
    baselines: Sequence[str] | None = None
    layers: int | None = None

    def wants(self, baseline: str) -> bool:
        return self.baselines is None or baseline in self.baselines


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as its description; an error is one line and exit status 2."""

    def __init__(self, prog: str, doc: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message}\n")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """The type of an option that must be above zero."""

    def parse(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


@dataclass(frozen=True)
class Benchmark:
    """One file of this folder: ``BENCHMARK = Benchmark(__file__, __doc__, ...)`` at its end. Nothing else names it.

    Attributes:
        file, doc: the benchmark's name is that of its file; the description of its ``--help``.
        title: of its table and plot.
        cases: those of one size.
        sizes: by device type, and for ``"quick"``, what is measured: ``"models: tokens: dtypes"`` each, the most
            important first.
        share: of the suite's time in percent, by device type; the suite leaves it out on the others.
        baselines: names that ``--baselines`` knows.
        unit: of the table: ``"ms"``, ``"us"`` or ``"tokens/s"``.
        wide: whether its table has a row a case and a column an implementation, or the other way round where that
            is too wide; else a row an implementation of each case.
        layers: whether it has the option ``--layers``.
        products: whether its cases multiply matrices: they are in float32, where no dtype is named, on a processor
            that has no products in bfloat16.
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
    layers: bool = False
    products: bool = False
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
        """Measure, print tables, write the rows; leaves with status 2 where that cannot be."""
        parser = self.parser()
        try:
            self._run(parser.parse_args(arguments), list(arguments))
        except BenchmarkError as error:
            parser.error(str(error))
        return 0

    def parser(self) -> Parser:
        parser = Parser(f"python -m benchmarks {self.name}", self.doc)
        add = parser.add_argument
        add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
        for option, known, nargs, note in (
            ("--models", self.shapes, "+", ""),
            ("--dtypes", DTYPES, "+", ""),
            ("--baselines", self.baselines, "*", " (default: all that are installed)"),
        ):
            text = f"only these of {', '.join(known) or 'none'}{note}"
            add(option, nargs=nargs, choices=known, metavar="NAME", help=text)
        add("--lengths", nargs="+", type=positive(int), metavar="TOKENS", help="tokens of each case")
        if self.layers:
            add("--layers", type=positive(int), metavar="N", help="layers of each model")
        text = "for all cases; those not begun by then are left out (default: its share)"
        add("--seconds", type=positive(float), help=text)
        add("--quick", action="store_true", help="small cases, to see that it works: no results file")
        add("--output", type=Path, metavar="FOLDER", help="for DEVICE.jsonl (default: benchmarks/results)")
        return parser

    def _run(self, parsed: argparse.Namespace, arguments: list[str]) -> None:
        began = time.perf_counter()
        device = self._device(parsed.device)
        share = self.share.get(device.type, 10.0) / (5 if parsed.quick else 1)
        seconds = parsed.seconds or SUITE_SECONDS * share / 100
        options = Options(device, parsed.baselines, getattr(parsed, "layers", None))
        if self.threads:
            torch.set_num_threads(self.threads)
        cases = [case for size in self._sizes(parsed, device) for case in self.cases(size, options)]
        if parsed.models or parsed.lengths:
            for case in cases:
                require_memory(case, device)
        folder = parsed.output or (None if parsed.quick else results.RESULTS)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        if "--output" in arguments:  # no part of what was measured
            at = arguments.index("--output")
            del arguments[at : at + 2]
        run = {
            "benchmark": self.name,
            "device": device.type,
            "command": shlex.join(["python", "-m", "benchmarks", self.name, *arguments]),
            "version": __version__,
            "commit": commit(),
            "code": self.code,
            "quick": parsed.quick,
            **machine.describe(),
            "native": "; ".join(f"{key}: {value}" for key, value in info()["native libraries"].items()),
        }
        print(machine_of(run), flush=True)
        done: Rows = []

        def save(rows: Rows) -> None:
            """Also of a case that is under way: a run that is cut short leaves what it measured."""
            if folder:
                state = {"unit": self.unit, "load": machine.load(), "gpu_state": gpu_state(device)}
                rows = _once(done + rows + [{"case": case.name, "note": CUT_SHORT} for case in cases])
                results.replace(self.name, device.type, [run | state | row for row in rows], folder)

        while cases:
            # A case holds its model: let go of the one before.
            case = cases.pop(0)
            left = seconds - (time.perf_counter() - began)
            try:
                if left <= 0 and done:
                    raise BenchmarkError(f"not begun within {seconds:g} s")
                share = max(left, 0) / (1 + len(cases))
                rows = measure(case, device, seconds=share, save=save)
            except BenchmarkError as error:
                if not cases and not any("seconds" in row for row in done):
                    raise
                rows = [{"case": case.name, "note": f"skipped: {error}"}]
            done += rows
            print(f"\n{case.name}\n{table(rows, self.unit)}", flush=True)
            save([])

    def _device(self, name: str | None) -> torch.device:
        try:
            device = bench.device_of(name if name or "cuda" in self.sizes else "cpu")
        except ValueError as error:
            raise BenchmarkError(f"--device: {error}") from None
        if device.type not in self.sizes:
            raise BenchmarkError(f"--device: no {name!r} in this benchmark; there is cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        return device

    def _sizes(self, parsed: argparse.Namespace, device: torch.device) -> list[Size]:
        sizes: dict[Size, None] = {}
        slow = self.products and device.type == "cpu" and not machine.has_bfloat16_products()
        default = "fp32" if slow else "bf16"
        for line in self.sizes["quick" if parsed.quick else device.type]:
            models, lengths, dtypes = (part.split() for part in f"{line}:{default}".split(":")[:3])
            lengths = [int(n.removesuffix("k")) * (1024 if n.endswith("k") else 1) for n in lengths]
            asked = parsed.models or models, parsed.dtypes or dtypes, parsed.lengths or lengths
            sizes |= dict.fromkeys(Size(self.shapes[m], n, dtype) for m, dtype, n in product(*asked))
            if parsed.models and parsed.lengths:
                break
        return list(sizes)


def _once(rows: Rows) -> Rows:
    """What is skipped in every case for the same reason is one row."""
    first = {(row.get("implementation", row["case"]), row.get("note")): row for row in reversed(rows)}
    return [row for row in rows if "note" not in row or row in first.values()]


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
    """The cases' remarks, and what was not timed, by reason: ``skipped: Liger, quack (needs a GPU)``."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "note" in row:
            found.setdefault(row["note"], {})[row.get("implementation", row["case"])] = None
    parts = [(", ".join(names), *note.split(": ", 1)) for note, names in found.items()]
    return [*remarks(rows), *(f"{status}: {names} ({reason})" for names, status, reason in parts)]


def remarks(rows: Rows) -> list[str]:
    """Those of the cases, each once."""
    return list(dict.fromkeys(row["remark"] for row in rows if "remark" in row))


def commit() -> str | None:
    """The commit of the working tree, ``+`` where it was changed since; None where it is no clone."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    return _printed("git", "-C", str(results.ROOT), *describe)


def gpu_state(device: torch.device) -> str | None:
    """Clocks, temperature and power of a GPU."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,driver_version"
    options = f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"
    values = _printed("nvidia-smi", *options) if device.type == "cuda" else None
    return values and ", ".join(map(" ".join, zip(query.split(","), values.split(", "), strict=False)))


def _printed(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
