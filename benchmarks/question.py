"""The command line, the JSON and the table that every benchmark script has."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from tabulate import tabulate

from rope_dist import machine, timing
from rope_dist.files import write_text
from rope_dist.info import info
from rope_dist.version import __version__

from .harness import CUT_SHORT, BenchmarkError, Case, measure, require_memory
from .shapes import DTYPES, SHAPES, Shape
from .sources import RESULTS, ROOT, hashes


@dataclass(frozen=True)
class Size:
    """What a script makes cases of: a model's sizes, tokens, and the type's name."""

    shape: Shape
    tokens: int
    dtype: str

    def __str__(self) -> str:
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{self.shape.name}, {length}, {self.dtype}"


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        peers: names of the peers that take part; None: all that can.
        extra: of one script alone.
    """

    device: torch.device
    peers: tuple[str, ...] | None
    quick: bool
    extra: argparse.Namespace

    def wants(self, peer: str) -> bool:
        """Whether that peer takes part."""
        return self.peers is None or peer in self.peers


@dataclass(frozen=True)
class Question:
    """One script.

    Attributes:
        name: of the script and of the JSON.
        doc: its docstring.
        cases: those of one size.
        sizes: by device type, what is measured unless asked otherwise: ``(models, tokens, dtypes)`` each, the
            most important first.
        quick: the same for ``--quick``.
        sources: patterns of the files whose code is measured; their hashes go into the JSON.
        peers: names that ``--peers`` knows.
        seconds: default time of the whole script.
        unit: of the table: ``"ms"`` or ``"tokens/s"``.
        threads: of torch; None: as it is.
        shapes: what ``--models`` knows.
        add: adds the script's own options.
    """

    name: str
    doc: str
    cases: Callable[[Size, Options], Iterator[Case] | list[Case]]
    sizes: dict[str, list[tuple]]
    quick: dict[str, list[tuple]]
    sources: tuple[str, ...]
    peers: tuple[str, ...] = ()
    seconds: float = 60.0
    unit: str = "ms"
    threads: int | None = None
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    add: Callable[[argparse.ArgumentParser], None] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Measure, print tables, write the JSON; the exit status (2: asked for what cannot be)."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        parsed = self._parser().parse_args(arguments)
        try:
            self._run(parsed, arguments)
        except BenchmarkError as error:
            print(f"benchmarks.{self.name}: error: {error}", file=sys.stderr)
            return 2
        return 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = _Parser(
            prog=f"python -m benchmarks.{self.name}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)", metavar="NAME"
        )
        parser.add_argument("--models", nargs="+", metavar="NAME", help=f"of {', '.join(self.shapes)}")
        parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", help="tokens of each case")
        parser.add_argument("--dtypes", nargs="+", metavar="NAME", help=f"of {', '.join(DTYPES)}")
        known = f"only these of {', '.join(self.peers)} (default: all that are installed)"
        parser.add_argument(
            "--peers", nargs="*", metavar="NAME", help=known if self.peers else "there are none here"
        )
        parser.add_argument(
            "--seconds",
            type=float,
            help="time for all cases; what is not begun by then is left out "
            f"(default: {self.seconds:g}, {self.seconds / 5:g} with --quick)",
        )
        parser.add_argument(
            "--quick",
            action="store_true",
            help="one small case a type, to see that it works: no results file",
        )
        parser.add_argument(
            "--output",
            type=Path,
            metavar="FOLDER",
            help=f"for {self.name}-DEVICE.json (default: benchmarks/results; none with --quick)",
        )
        if self.add:
            self.add(parser)
        return parser

    def _run(self, parsed: argparse.Namespace, arguments: list[str]) -> None:
        seconds = parsed.seconds if parsed.seconds is not None else self.seconds / (5 if parsed.quick else 1)
        if not seconds > 0:
            raise BenchmarkError(f"--seconds must be positive, got {seconds:g}")
        began = time.perf_counter()
        device = self._device(parsed.device)
        peers = self._peers(parsed.peers)
        options = Options(device, peers, parsed.quick, parsed)
        if self.threads:
            torch.set_num_threads(self.threads)
        cases = [case for size in self._sizes(parsed, device) for case in self.cases(size, options)]
        if parsed.models or parsed.lengths:
            for case in cases:
                require_memory(case, device)
        folder = parsed.output or (None if parsed.quick else RESULTS)
        if folder and not folder.is_dir():
            folder.mkdir(parents=True)
        record: dict[str, Any] = {
            "question": self.name,
            "command": shlex.join(["python", "-m", f"benchmarks.{self.name}", *_without_output(arguments)]),
            "version": __version__,
            "commit": commit(),
            "sources": {"patterns": list(self.sources), "files": hashes(self.sources)},
            "device": device.type,
            "machine": machine.describe(),
            "built": info()["built"],
            "clocks": {"before": clocks(device)},
            "unit": self.unit,
            "quick": parsed.quick,
            "seconds": seconds,
            "cases": [],
            "left_out": [],
        }
        print(_line(record), flush=True)
        names = [case.name for case in cases]

        def save(found: dict) -> None:
            """Write also a case that is under way: a run that is cut short leaves what it measured."""
            record["clocks"]["after"] = clocks(device)
            record["took"] = round(time.perf_counter() - began, 1)
            rest = [{"name": name, "reason": CUT_SHORT} for name in names[index + 1 :]]
            so_far = {"cases": [*record["cases"], found], "left_out": [*record["left_out"], *rest]}
            _write(folder, self.name, device, record | so_far)

        for index in range(len(cases)):
            # A case holds its model: let go of the one before.
            case, cases[index] = cases[index], None
            left = seconds - (time.perf_counter() - began)
            if left <= 0 and record["cases"]:
                record["left_out"].append({"name": case.name, "reason": f"not begun within {seconds:g} s"})
                continue
            try:
                found = measure(case, device, seconds=max(left, 0) / (len(cases) - index), save=save)
            except BenchmarkError as error:
                if index == len(cases) - 1 and not record["cases"]:
                    raise
                record["left_out"].append({"name": case.name, "reason": str(error)})
                continue
            record["cases"].append(found)
            print(f"\n{case.name}\n{table(found, self.unit, device.type == 'cuda')}", flush=True)
        for left_out in record["left_out"]:
            print(f"left out: {left_out['name']}: {left_out['reason']}")
        _write(folder, self.name, device, record)

    def _device(self, name: str | None) -> torch.device:
        if name is None:
            on_gpu = "cuda" in self.sizes and torch.cuda.is_available()
            return torch.device("cuda" if on_gpu else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in self.sizes:
            raise BenchmarkError(f"--device: no {name!r}; there are {', '.join(self.sizes)}")
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if (device.index or 0) >= count:
                raise BenchmarkError(
                    f"--device {name}: torch sees {count or 'no'} GPU{'s' if count > 1 else ''}"
                )
            torch.cuda.set_device(device.index or 0)
        return device

    def _sizes(self, parsed: argparse.Namespace, device: torch.device) -> list[Size]:
        rows = (self.quick if parsed.quick else self.sizes)[device.type]
        known = {"--models": self.shapes, "--dtypes": DTYPES}
        for option, names in (("--models", parsed.models), ("--dtypes", parsed.dtypes)):
            for name in names or ():
                if name not in known[option]:
                    raise BenchmarkError(f"{option}: no {name!r}; there are {', '.join(known[option])}")
        for tokens in parsed.lengths or ():
            if tokens < 1:
                raise BenchmarkError(f"--lengths must be positive, got {tokens}")
        if parsed.models and parsed.lengths:
            rows = [(parsed.models, parsed.lengths, rows[0][2])]
        sizes = [
            Size(self.shapes[model], tokens, dtype)
            for models, lengths, dtypes in rows
            for model in (parsed.models or models)
            for dtype in (parsed.dtypes or dtypes)
            for tokens in (parsed.lengths or lengths)
        ]
        return list(dict.fromkeys(sizes))

    def _peers(self, names: list[str] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if name not in self.peers:
                raise BenchmarkError(f"--peers: no {name!r}; there are {', '.join(self.peers) or 'none'}")
        return None if names is None else tuple(names)


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _without_output(arguments: list[str]) -> list[str]:
    """Where the file was written is no part of what was measured."""
    if "--output" not in arguments:
        return arguments
    at = arguments.index("--output")
    return arguments[:at] + arguments[at + 2 :]


def _write(folder: Path | None, name: str, device: torch.device, record: dict) -> None:
    if folder:
        write_text(folder / f"{name}-{device.type}.json", json.dumps(record, indent=1) + "\n")


def _line(record: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in record["machine"].items())


def table(case: dict, unit: str = "ms", peak: bool = False) -> str:
    """One case for reading: providers fastest first, then limits, then who did not take part and why.

    Args:
        peak: with the peak of memory, which says something on a GPU.
    """
    results = case["results"]
    limits = [name for name, r in results.items() if r["kind"] == "limit" and "seconds" in r]
    rows = []
    for name in (*case["ranking"], *limits):
        r = results[name]
        rows.append(
            [
                name + (" (limit)" if r["kind"] == "limit" else ""),
                figure(r["seconds"]["p50"], unit, case.get("tokens")),
                " - ".join(figure(r["seconds"][p], unit, case.get("tokens")) for p in _ends(unit)),
                f"{r['to stock']:.3f}" if "to stock" in r else "",
                f"{r['limit share']:.0%}" if "limit share" in r else "",
                r["seconds"]["rounds"],
                *(
                    [f"{r['peak_bytes'] / 2**20:.0f}" if r.get("peak_bytes") is not None else ""]
                    if peak
                    else []
                ),
            ]
        )
    headers = ["", unit, "20 - 80 %", "time to stock", "of the limit", "rounds"] + ["peak, MiB"] * peak
    align = ("left", *("right",) * (len(headers) - 1))
    text = tabulate(rows, headers, disable_numparse=True, colalign=align) if rows else ""
    absent: dict[str, list[str]] = {}
    for name, r in results.items():
        for reason in ("skipped", "refused", "failed"):
            if reason in r:
                absent.setdefault(f"{reason}: {r[reason]}", []).append(name)
    return "\n".join([text, *(f"{', '.join(names)}: {reason}" for reason, names in absent.items())])


def _ends(unit: str) -> tuple[str, str]:
    return ("p80", "p20") if unit == "tokens/s" else ("p20", "p80")


def figure(seconds: float, unit: str, tokens: int | None) -> str:
    """Three digits in the unit."""
    return timing.three_digits(tokens / seconds if unit == "tokens/s" else seconds * 1e3)


def commit() -> str | None:
    """The commit of the working tree, ``+`` where it was changed since; None where it is no clone."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "") if head.returncode == 0 else None


def clocks(device: torch.device) -> dict[str, Any]:
    """How busy the machine is, and on a GPU its clocks, temperature and power."""
    noted: dict[str, Any] = {"load": machine.load()}
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        noted |= dict(zip(query.split(","), said.split(", "), strict=False)) if said else {}
    return noted
