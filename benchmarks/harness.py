"""What every benchmark does: check each implementation, then time all in turn, beside a roofline of the same run.

A *case* is a benchmark at one size (rotary of Llama-3-8B at 8k in bfloat16). Its *implementations* work on the same
random inputs. Each is called once on fresh inputs and compared with an exact result before it is timed; one
that is wrong, fails, or needs more memory than there is, is listed with the reason and not timed.

How it is timed, and what keeps the times of a busy machine comparable:

- Implementations run in turn, forwards and backwards (A B B A ...), on two copies of the inputs alternately.
- What compiles for seconds or minutes (``late``) comes last: a case that is stopped by then is timed without it.
- Rounds go on until the median of each is known to 3 %, at least five; three where the case's time is over.
- Reported are the median with the 20th and 80th percentile. A comparison is the median of the rounds' ratios,
  since the calls of a round share what slowed it. ``quiet`` is the lowest median of three rounds in a row.
- On a GPU each step of a layer is captured in a CUDA graph and timed between events while the launch is hidden, first
  with the L2 cache overwritten before each call (the time to report), then with what is left there (``warm``).
  A whole model is timed from its call to the end of its last kernel, as its user waits for it.
- On a CPU it is wall time. The cache is overwritten where the tensors could stay in it.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch

from rope_dist import machine, timing

BUFFERS = 2
TOLERANCES = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far one head of one token may be from the exact result, as a share of its length. Hugging Face rounds cos and
sin to the model's type, and adds three rounded products; a float32 angle at 32k is off by 2e-3."""
CUT_SHORT = "skipped: the run was cut short"
"""Note of a result that was saved under way."""
Rows = list[dict[str, Any]]
Exact = Callable[[Any], list[torch.Tensor]]


class BenchmarkError(ValueError):
    """What was asked for cannot be measured here; the message is one line."""


@dataclass
class Implementation:
    """One implementation of what a case computes.

    Attributes:
        bind: from a case's inputs to the call that is timed; what the call returns is checked.
        kind: ``"ours"``, ``"reference"`` (what this package replaces: ratios are to it), ``"baseline"``, or
            ``"roofline"`` (a bound that none can be faster than: not checked, not ranked).
        need: bytes that a call takes beyond the inputs.
        exact: instead of the case's, for one that pairs dimensions in another way.
        late: prepared only after all others were timed, since it compiles for seconds or minutes.
        labels: more columns of its row, such as the version of a package.
    """

    name: str
    bind: Callable[[Any], Callable[[], Any]]
    kind: str = "baseline"
    need: int = 0
    exact: Exact | None = None
    late: bool = False
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Skipped:
    """A baseline that cannot run here, and why."""

    name: str
    reason: str
    kind: str = "baseline"
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """A benchmark at one size.

    Attributes:
        inputs: makes the tensors; with a ``reset()`` if calls change them.
        implementations: of the case, on those inputs.
        exact: the right results, computed in another way from fresh inputs; None where nothing is checked.
        pick: from what a call returns to the tensors that ``exact`` gives.
        tolerance: the largest :func:`rope_dist.timing.error`.
        bytes: that must be moved.
        need: bytes that the inputs and the results take.
        kernel: whether it is one step of a layer, captured in a CUDA graph and timed with the cache overwritten;
            a whole model is timed as it is.
        gradients: whether calls are made with autograd.
        repeat: how often a bound call does its work: its time is divided by it.
        labels: columns of each row: model, tokens, dtype and the like.
        remark: a sentence below its results, without a capital and a full stop.
    """

    name: str
    inputs: Callable[[], Any]
    implementations: Callable[[Any], Iterable[Implementation | Skipped]]
    exact: Exact | None = None
    pick: Callable[[Any], list[torch.Tensor]] = list
    tolerance: float = 0.0
    bytes: int = 0
    need: int = 0
    kernel: bool = True
    gradients: bool = False
    repeat: int = 1
    labels: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


_PREPARED: dict[str, float] = {}
"""Seconds that a late implementation took to prepare in the case before, by name."""


def measure(
    case: Case, device: torch.device, *, seconds: float, save: Callable[[Rows], None] = lambda rows: None
) -> Rows:
    """Check and time every implementation of ``case``.

    Args:
        seconds: for preparing and timing; a third of it is for timing whatever the preparation took, and
            three rounds are made in any case. A late implementation is left out where its preparation took longer
            in the case before than there is time for.
        save: is given the rows as they stand, whenever there is more in them.

    Returns:
        A row an implementation: the case's labels, ``implementation``, ``kind``; ``seconds`` (the median), ``p20``,
        ``p80``, ``quiet``, ``rounds``, ``ratio`` (to the reference), ``roofline`` (share of the bound), ``error``,
        ``peak_bytes`` (what one call adds to a GPU's memory); or a ``note`` that says why it was not timed.

    Raises:
        BenchmarkError: the inputs do not fit into memory.
    """
    began = time.perf_counter()
    # What the compiler keeps of the case before holds its tensors.
    torch.compiler.reset()
    release(device)
    require_memory(case, device)
    with torch.enable_grad() if case.gradients else torch.inference_mode():
        run = _Run(case, device, save)
        run.everything(began, seconds)
    rows = list(run.rows.values())
    del run
    release(device)
    return rows


class _Run:
    def __init__(self, case: Case, device: torch.device, save: Callable[[Rows], None]) -> None:
        self.case, self.device, self.save = case, device, save
        self.rows: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, list[Callable[[], Any]]] = {}
        try:
            self.buffers = [case.inputs() for _ in range(BUFFERS)]
            self.expected = case.exact(self.buffers[0]) if case.exact else None
        except (torch.OutOfMemoryError, MemoryError) as failure:
            raise BenchmarkError(
                f"{case.name} ran out of memory on {device}: choose smaller --lengths or --models"
            ) from failure

    def everything(self, began: float, seconds: float) -> None:
        """All but the late implementations first, then one of those after the other."""
        late = []
        for implementation in self.case.implementations(self.buffers[0]):
            if isinstance(implementation, Skipped):
                self._row(implementation, note=f"skipped: {implementation.reason}")
            elif implementation.late:
                self._row(implementation, note=CUT_SHORT)
                late.append(implementation)
            else:
                self.admit(implementation)
        if late:
            started = time.perf_counter()
            self.time(0.0, most=1)
            # More rounds, where they cost next to nothing.
            if time.perf_counter() - started < seconds / 50:
                self.time(seconds / 10)
        for implementation in late:
            started, before = time.perf_counter(), _PREPARED.get(implementation.name, 0.0)
            if max(began + seconds - started, seconds / 2) < before:
                self._row(implementation, note=f"skipped: no time left, it took {before:.0f} s to prepare")
                continue
            self.admit(implementation)
            _PREPARED[implementation.name] = time.perf_counter() - started
            if implementation is not late[-1]:
                self.time(0.0)
        # Preparing may have taken all of it.
        self.time(max(began + seconds - time.perf_counter(), seconds / 3))

    def _row(self, implementation: Implementation | Skipped, **columns: Any) -> dict[str, Any]:
        case, name = self.case, implementation.name
        row = {"case": case.name, **case.labels} | ({"bytes": case.bytes} if case.bytes else {})
        row |= {"remark": case.remark} if case.remark else {}
        row |= {"implementation": name, "kind": implementation.kind, **implementation.labels, **columns}
        self.rows[name] = row
        return row

    def admit(self, implementation: Implementation) -> None:
        """Bind and check it: its calls, or a note in its row."""
        row, on_gpu = self._row(implementation), self.device.type == "cuda"
        if lacking := _lacking(implementation.need, self.device):
            row["note"] = f"skipped: needs {lacking}"
            return
        at = ""
        try:
            calls = [implementation.bind(inputs) for inputs in self.buffers]
            _reset(self.buffers[0])
            self._check(implementation, calls[0](), row)
            if "note" in row:
                return
            if on_gpu:
                row["peak_bytes"] = peak_memory(calls[1])
            else:
                calls[1]()  # warm, as the first copy is
            if on_gpu and self.case.kernel:
                at = "not captured in a CUDA graph"
                # A graph keeps its own addresses, so each copy of the inputs has one.
                calls = [captured(call).replay for call in calls]
        except Exception as failure:
            # Whatever a baseline raises is its result here; the others go on.
            row["note"] = f"failed: {at or type(failure).__name__}: {failure}".splitlines()[0][:200]
            release(self.device)
        else:
            self.calls[implementation.name] = calls
        finally:
            _reset(self.buffers[0])

    def _check(self, implementation: Implementation, outputs: Any, row: dict[str, Any]) -> None:
        wanted = implementation.exact(self.buffers[0]) if implementation.exact else self.expected
        if implementation.kind == "roofline" or wanted is None:
            return
        row["error"] = max(timing.error(a, b) for a, b in zip(self.case.pick(outputs), wanted, strict=True))
        if row["error"] > (allowed := self.case.tolerance):
            row["note"] = (
                f"wrong: a vector is off by {row['error']:.1%} of its length, {allowed:.1%} is allowed"
            )

    def time(self, seconds: float, most: int | None = None) -> None:
        """Rounds of all admitted so far, and save."""
        case, on_gpu = self.case, self.device.type == "cuda"
        # On a CPU two copies of large tensors push each other out of the cache.
        cold = case.kernel and (on_gpu or case.bytes < 2 * machine.last_level_cache_bytes(self.device))
        modes = {"": cold, "warm_": False} if on_gpu and case.kernel else {"": cold}
        reference = next((name for name in self.calls if self.rows[name]["kind"] == "reference"), None)
        for prefix, overwrite in modes.items() if self.calls else ():
            calls = {name: partial(lambda two: next(two)(), cycle(two)) for name, two in self.calls.items()}
            whole = on_gpu and not case.kernel
            timer = _whole if whole else timing.timer(self.device, cold=overwrite, queued=True)
            times = timing.sample(calls, timer, seconds=seconds / len(modes), most=most or timing.MOST_ROUNDS)
            for name, values in times.items():
                found = timing.spread([value / case.repeat for value in values])
                row = self.rows[name]
                row |= {prefix + "seconds": found.p50, prefix + "p20": found.p20, prefix + "p80": found.p80}
                if not prefix:
                    row |= {"quiet": found.quiet, "rounds": found.rounds}
                    row |= {"ratio": timing.ratio(values, times[reference])} if reference else {}
        rows = list(self.rows.values())
        bounds = [row["seconds"] for row in rows if row["kind"] == "roofline" and "seconds" in row]
        for row in rows if bounds else ():
            if "seconds" in row and row["kind"] != "roofline":
                row["roofline"] = min(bounds) / row["seconds"]
        self.save(rows)


def _whole(call: Callable[[], object]) -> float:
    """Seconds until the GPU has finished the call, the time of the CPU that launches it included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def ranking(rows: Rows) -> Rows:
    """Those timed, fastest first; bounds come last."""
    timed = [row for row in rows if "seconds" in row]
    return sorted(timed, key=lambda row: (row["kind"] == "roofline", row.get("ratio", row["seconds"])))


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` as a CUDA graph, so that launches cost the same for all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that one call adds to the GPU's memory at its highest."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def require_memory(case: Case, device: torch.device) -> None:
    """:class:`BenchmarkError` where the case's own tensors do not fit."""
    if lacking := _lacking(case.need, device, f" on {device}"):
        raise BenchmarkError(f"{case.name} needs {lacking}: choose smaller --lengths or --models")


def _lacking(need: int, device: torch.device, where: str = "") -> str | None:
    """What is needed and what is there, if that is less."""
    room = machine.free_bytes(device)
    if room is None or need <= room:
        return None
    return f"{need / 2**30:.1f} GiB of memory{where}, {room / 2**30:.1f} GiB are free"


def release(device: torch.device) -> None:
    """Give back what a case held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset(inputs: Any) -> None:
    if reset := getattr(inputs, "reset", None):
        reset()
