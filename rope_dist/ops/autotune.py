"""Which path of a projection with rotation is fastest, and in which configuration: measured on this GPU, kept on disk.

A fused kernel saves a pass over queries and keys and gives up some of the vendor library's matrix product;
which weighs more differs by GPU, shape and version, so nothing is assumed. The first call of a shape class
times the candidates that can serve it, in the order A B B A with a cold L2 cache and the GPU never waiting for the
host, and keeps the fastest; the unfused one unless another wins by twice what the measurement is uncertain by.
A kernel's tiles and stages are candidates like any other (``configurations.py``): ``"triton_tma:128x256x64/4"``.
Until it may measure (inside a CUDA graph's capture, or with ``ROPE_DIST_TUNE=0``) the unfused path is taken and
nothing is remembered. So it is under ``torch.use_deterministic_algorithms(True)``.

Environment: ``ROPE_DIST_PATH`` fixes the path (and its configuration, if it names one) where it can serve a call;
``ROPE_DIST_TUNE=0`` forbids measuring; ``ROPE_DIST_CACHE`` is the folder of the choices
(``$XDG_CACHE_HOME/rope_dist``, else ``~/.cache/rope_dist``).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .. import timing
from ..files import folder_lock, write_text
from ..version import __version__
from .backend import environment

DEFAULT = "separate"
LEAST_ROUNDS, MOST_ROUNDS = 9, 41
TOLERANCE = 0.005
SECONDS = 2.0


@dataclass(frozen=True)
class AutotuneKey:
    """A class of calls that share a choice.

    Attributes:
        rows: tokens, rounded up to a power of two.
        widths: rows of each weight.
        form: what else changes the kernels: ``"table"``, ``"bias"``, ``"interleaved"``, ``"no TMA"`` (GPUs and
            matrices that descriptors cannot serve), joined by ``+``.
    """

    device: str
    dtype: str
    rows: int
    depth: int
    widths: tuple[int, ...]
    head_dim: int
    rotary_dim: int
    form: str = ""

    def line(self) -> str:
        """One line that identifies the class within one set of versions."""
        return json.dumps(asdict(self), sort_keys=True)


def rows_class(rows: int) -> int:
    """``rows`` rounded up to a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def versions() -> dict[str, str]:
    """What a choice depends on besides its key."""
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


class AutotuneCache:
    """AutotuneCache of one set of versions: in memory, and in one JSON file that processes share."""

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
        return {key: entry for key, entry in entries.items() if _is_choice(key, entry)}

    def get(self, key: AutotuneKey) -> str | None:
        """The path that was fastest, or None where that was not measured."""
        entry = self._entries.get(key.line())
        return entry["choice"] if entry else None

    def put(self, key: AutotuneKey, times: dict[str, float], choice: str | None = None) -> str:
        """Remember ``choice`` (None: the fastest) of ``times`` in milliseconds.

        A file that cannot be written only warns.
        """
        choice = choice or min(times, key=lambda name: times[name])
        with self._lock:
            self._entries = {**self._entries, key.line(): {"choice": choice, "milliseconds": times}}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with folder_lock(self.path):
                    # Another process may have written since: keep its entries.
                    self._entries = {**self._read(), **self._entries}
                    write_text(self.path, json.dumps(self._entries, indent=1))
            except OSError as error:
                warnings.warn(f"the choice of kernels cannot be kept in {self.folder}: {error}", stacklevel=2)
        return choice

    def rows(self) -> list[dict]:
        """One dictionary a choice: the fields of its key, ``choice`` and ``milliseconds``."""
        return [{**json.loads(key), **entry} for key, entry in self._entries.items()]


def _is_choice(key: str, entry: object) -> bool:
    """Whether an entry of a file is one that :meth:`AutotuneCache.put` writes: others are as if they were not there."""
    try:
        fields_of_key = json.loads(key)
    except ValueError:
        return False
    return (
        isinstance(fields_of_key, dict)
        and fields_of_key.keys() == {field.name for field in fields(AutotuneKey)}
        and isinstance(entry, dict)
        and isinstance(entry.get("choice"), str)
        and isinstance(entry.get("milliseconds"), dict)
        and all(isinstance(time, int | float) for time in entry["milliseconds"].values())
    )


_CACHE: AutotuneCache | None = None
_LOCK = threading.RLock()


def cache() -> AutotuneCache:
    """The choices of this process."""
    global _CACHE
    with _LOCK:
        if _CACHE is None or (_CACHE.folder != cache_folder()):
            _CACHE = AutotuneCache()
        return _CACHE


def fixed() -> str | None:
    """The path that ``ROPE_DIST_PATH`` names, or None."""
    return environment("ROPE_DIST_PATH") or None


def may_measure() -> bool:
    """Whether timing is allowed now: a capture would record it, and it would wait for the device."""
    if os.environ.get("ROPE_DIST_TUNE") == "0" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def choose(
    key: AutotuneKey, candidates: Mapping[str, Callable[[], object]], timer: timing.Timer | None = None
) -> str:
    """The name of the fastest of ``candidates`` for ``key``.

    Args:
        candidates: callables by name; :data:`DEFAULT` is among them.
        timer: seconds of one call; by default the GPU's, with a cold cache.
    """
    known = cache().get(key)
    if known is not None and known in candidates:
        return known
    if timer is None and not may_measure():
        return DEFAULT
    with _LOCK:
        known = cache().get(key)
        if known is not None and known in candidates:
            return known
        times = measure(candidates, timer or timing.timer("cuda", cold=True, queued=True))
        medians = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
        return cache().put(key, medians, fastest(times))


def fastest(times: dict[str, list[float]]) -> str:
    """The name with the least time; :data:`DEFAULT` unless that is below its by twice what is uncertain, so that
    processes agree.

    Args:
        times: one time a round for each name. What slows a round down leaves its ratios.
    """
    ratios = {
        name: [a / b for a, b in zip(seconds, times[DEFAULT], strict=True)] for name, seconds in times.items()
    }
    surely = {
        name: statistics.median(values)
        for name, values in ratios.items()
        if statistics.median(values) * (1 + 2 * timing.uncertainty(values)) < 1
    }
    return min(surely, key=lambda name: surely[name], default=DEFAULT)


def measure(candidates: Mapping[str, Callable[[], object]], timer: timing.Timer) -> dict[str, list[float]]:
    """Seconds of each candidate that runs, one a round, forwards and backwards in turn.

    A candidate that fails (too little memory, a kernel that does not compile here) is left out with a warning;
    :data:`DEFAULT` may not fail.
    """
    running = {}
    for name, call in candidates.items():
        try:
            call()  # compiles, and warms the library's own choices
            running[name] = call
        except Exception as error:
            if name == DEFAULT:
                raise
            warnings.warn(f"rope_dist does without {name!r} here: {error}", stacklevel=2)
    return timing.sample(
        running, timer, least=LEAST_ROUNDS, most=MOST_ROUNDS, seconds=SECONDS, tolerance=TOLERANCE
    )
