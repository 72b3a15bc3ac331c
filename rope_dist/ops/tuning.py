"""Which way a projection with rotation is fastest: measured on this GPU, remembered on disk.

A fused kernel saves a pass over queries and keys and gives up some of the vendor library's matrix product;
which weighs more differs by GPU, shape and version, so nothing is assumed. The first call of a shape class
times the ways that can serve it, in the order A B B A with a cold L2 cache, and keeps the fastest. Until it
may measure (inside a CUDA graph's capture, or with ``ROPE_DIST_TUNE=0``) the unfused way is taken and
nothing is remembered.

Environment: ``ROPE_DIST_PATH`` fixes the way where it can serve a call; ``ROPE_DIST_TUNE=0`` forbids
measuring; ``ROPE_DIST_CACHE`` is the folder of the choices (``$XDG_CACHE_HOME/rope_dist``, else
``~/.cache/rope_dist``).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import timing
from ..files import write_text
from ..version import __version__

DEFAULT = "separate"
ROUNDS = 5


@dataclass(frozen=True)
class Problem:
    """A class of calls that share a choice.

    Attributes:
        rows: tokens, rounded up to a power of two.
        widths: rows of each weight.
        form: what else changes the kernel: ``"table"``, ``"bias"``, ``"interleaved"``, joined by ``+``.
    """

    device: str
    dtype: str
    rows: int
    depth: int
    widths: tuple[int, ...]
    head_dim: int
    rotary_dim: int
    form: str = ""

    def key(self) -> str:
        """One line that identifies the class within one set of versions."""
        return json.dumps(asdict(self), sort_keys=True)


def rows_class(rows: int) -> int:
    """``rows`` rounded up to a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def versions() -> dict[str, str]:
    """What a choice depends on besides the problem."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    cuda = torch.version.cuda or torch.version.hip or "none"
    return {"rope_dist": __version__, "torch": torch.__version__, "triton": triton, "cuda": cuda}


def cache_folder() -> Path:
    """Where choices are kept."""
    if folder := os.environ.get("ROPE_DIST_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rope_dist"


class Choices:
    """Choices of one set of versions: in memory, and in one JSON file that processes share."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else cache_folder()
        self.path = self.folder / "-".join(["choices", *(v.replace("/", "_") for v in versions().values())])
        self.path = self.path.with_name(self.path.name + ".json")
        self._lock = threading.RLock()
        self._entries: dict[str, dict] = self._read()

    def _read(self) -> dict[str, dict]:
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        entries = entries if isinstance(entries, dict) else {}
        return {key: entry for key, entry in entries.items() if isinstance(entry, dict) and "choice" in entry}

    def get(self, problem: Problem) -> str | None:
        """The way that was fastest, or None where that was not measured."""
        entry = self._entries.get(problem.key())
        return entry["choice"] if entry else None

    def put(self, problem: Problem, times: dict[str, float]) -> str:
        """Remember the fastest of ``times`` (milliseconds); a file that cannot be written only warns."""
        choice = min(times, key=times.get)
        with self._lock:
            entry = {"choice": choice, "milliseconds": times}
            # Another process may have written since: keep its entries.
            self._entries = {**self._read(), **self._entries, problem.key(): entry}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self._entries, indent=1))
            except OSError as error:
                warnings.warn(f"the choice of kernels cannot be kept in {self.folder}: {error}", stacklevel=2)
        return choice

    def rows(self) -> list[dict]:
        """One dictionary a choice: the problem's fields, ``choice`` and ``milliseconds``."""
        return [{**json.loads(key), **entry} for key, entry in self._entries.items()]


_CHOICES: Choices | None = None
_LOCK = threading.RLock()


def choices() -> Choices:
    """The choices of this process."""
    global _CHOICES
    with _LOCK:
        if _CHOICES is None or (_CHOICES.folder != cache_folder()):
            _CHOICES = Choices()
        return _CHOICES


def fixed() -> str | None:
    """The way that ``ROPE_DIST_PATH`` names, or None."""
    return os.environ.get("ROPE_DIST_PATH") or None


def may_measure() -> bool:
    """Whether timing is allowed now: a capture would record it, and it would wait for the device."""
    if os.environ.get("ROPE_DIST_TUNE") == "0" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def choose(problem: Problem, ways: dict[str, Callable[[], object]], timer: timing.Timer | None = None) -> str:
    """The name of the fastest of ``ways`` for ``problem``.

    Args:
        ways: callables by name; :data:`DEFAULT` is among them.
        timer: seconds of one call; by default the GPU's, with a cold cache.
    """
    known = choices().get(problem)
    if known in ways:
        return known
    if timer is None and not may_measure():
        return DEFAULT
    with _LOCK:
        known = choices().get(problem)
        if known in ways:
            return known
        return choices().put(problem, measure(ways, timer or timing.timer("cuda", cold=True)))


def measure(ways: dict[str, Callable[[], object]], timer: timing.Timer) -> dict[str, float]:
    """Median milliseconds of each way that runs, forwards and backwards in turn.

    A way that fails (too little memory, a kernel that does not compile here) is left out with a warning;
    :data:`DEFAULT` may not fail.
    """
    running = {}
    for name, way in ways.items():
        try:
            way()  # compiles, and warms the library's own choices
            running[name] = way
        except Exception as error:
            if name == DEFAULT:
                raise
            warnings.warn(f"rope_dist does without {name!r} here: {error}", stacklevel=2)
    times = timing.sample(running, timer, least=ROUNDS, most=ROUNDS)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
