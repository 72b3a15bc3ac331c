"""What every benchmark does: check each provider, then time all in turn, beside a limit measured in the same run.

A *case* is one question at one size (rotary of Llama-3-8B at 8k in bfloat16). Its *providers* work on the same
random inputs. Each is called once on fresh inputs and compared with an exact result before it is timed; one
that is wrong, fails, or needs more memory than there is, is named with the reason and not timed.

How it is timed, and what keeps figures of a busy machine comparable:

- Providers run in turn, forwards and backwards (A B B A ...), on two copies of the inputs by turns.
- What compiles for seconds or minutes (``late``) comes last: a case that is stopped while something compiles has
  been timed without it, and that result is saved.
- Rounds go on until the median of each is known to 3 %, at least five; three where the case's time is over.
- Quoted are the median with the 20th and 80th percentile. A comparison is the median of the rounds' ratios,
  since a round's providers share what slowed it. ``quiet`` is the lowest median of three rounds in a row.
- On a GPU each step of a layer is captured in a CUDA graph and timed between events, first with the L2 cache
  overwritten before each call (the figure to quote), then with what the call before it left there (``warm``).
  The GPU is kept waiting until a call is enqueued: of ten microseconds the launch would be half.
  A whole model is timed from its call to the end of its last kernel, as its user waits for it.
- On a CPU it is wall time. The cache is overwritten where the tensors could stay in it.
- Peak memory is what one call adds at its highest, its results included. On a CPU it is what the process
  adds: tensors under some tens of MiB may come from memory that it had already.
"""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from rope_dist import machine, timing

BUFFERS = 2
TOLERANCES = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far one head of one token may be from the exact result, as a share of its length. Stock rounds cos and
sin to the model's type, and adds three rounded products; a float32 angle at 32k is off by 2e-3."""


class BenchmarkError(ValueError):
    """What was asked for cannot be measured here; one line says why."""


CUT_SHORT = "the run was cut short"
"""Why a result that was saved under way lacks a provider or a case."""

_PREPARED: dict[str, float] = {}
"""Seconds that a late provider took to prepare in the case before, by name."""


@dataclass
class Provider:
    """One way of doing what a case asks.

    Attributes:
        name: in the table.
        bind: from a case's inputs to the call that is timed; what the call returns is checked.
        kind: ``"ours"``, ``"stock"`` (what this package replaces), ``"peer"``, or ``"limit"`` (what no way can
            be faster than: not checked, not ranked).
        need: bytes that a call takes beyond the inputs.
        exact: instead of the case's, for a provider that pairs dimensions in another way.
        graph: whether a CUDA graph can hold the call.
        late: prepared only after all others were timed, since it compiles for seconds or minutes.
        labels: kept in the JSON, such as the version of a package.
    """

    name: str
    bind: Callable[[Any], Callable[[], Any]]
    kind: str = "peer"
    need: int = 0
    exact: Callable[[Any], list[torch.Tensor]] | None = None
    graph: bool = True
    late: bool = False
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass
class Absent:
    """A peer that cannot take part, and why."""

    name: str
    reason: str


@dataclass
class Case:
    """One question at one size.

    Attributes:
        name: in the table.
        inputs: makes the tensors; with a ``reset()`` if calls change them.
        providers: of the case, on those inputs.
        exact: the right results, computed in another way from fresh inputs; None where nothing is checked.
        pick: from what a call returns to the tensors that ``exact`` gives.
        tolerance: the largest :func:`rope_dist.timing.error`.
        bytes, flops: that must be moved and computed, for the roofline page.
        need: bytes that the inputs and the results take.
        kernel: whether it is one step of a layer, captured in a CUDA graph and timed with the cache overwritten;
            a whole model is timed as it is.
        labels: model, tokens, dtype and the like, kept in the JSON.
    """

    name: str
    inputs: Callable[[], Any]
    providers: Callable[[Any], Iterable[Provider | Absent]]
    exact: Callable[[Any], list[torch.Tensor]] | None = None
    pick: Callable[[Any], list[torch.Tensor]] = list
    tolerance: float = 0.0
    bytes: int = 0
    flops: int = 0
    need: int = 0
    kernel: bool = True
    gradients: bool = False
    labels: dict[str, Any] = field(default_factory=dict)


def measure(
    case: Case, device: torch.device, *, seconds: float, save: Callable[[dict], None] = lambda found: None
) -> dict:
    """Check and time every provider of ``case``.

    Args:
        seconds: for preparing and timing; a third of it is for timing whatever the preparation took, and
            three rounds are made in any case. A late provider is left out where its preparation took longer in
            the case before than there is time for.
        save: is given the result as it stands, whenever there is more of it.

    Returns:
        The case's labels, ``bytes``, ``flops``, and ``results``: by provider its kind, and seconds, ratios and
        peak bytes, or why there are none. ``ranking`` has the timed ones, fastest first.

    Raises:
        BenchmarkError: the inputs do not fit into memory.
    """
    began = time.perf_counter()
    # What the compiler keeps of the case before holds its tensors.
    torch.compiler.reset()
    release(device)
    require_memory(case, device)
    results: dict[str, dict] = {}
    found = {
        "name": case.name,
        **case.labels,
        "bytes": case.bytes,
        "flops": case.flops,
        "results": results,
        "ranking": [],
    }
    with torch.enable_grad() if case.gradients else torch.inference_mode():
        try:
            buffers = [case.inputs() for _ in range(BUFFERS)]
            expected = case.exact(buffers[0]) if case.exact else None
        except (torch.OutOfMemoryError, MemoryError) as failure:
            raise BenchmarkError(
                f"{case.name} ran out of memory on {device}: choose smaller --lengths or --models"
            ) from failure
        _admit_and_time(case, device, buffers, expected, found, began, seconds, save)
        del buffers, expected
    release(device)
    return found


def _admit_and_time(case, device, buffers, expected, found, began, seconds, save) -> None:
    """Fill ``found``: everything but the late providers first, then one of those after the other."""
    results = found["results"]
    running: dict[str, list[Callable[[], Any]]] = {}

    def admit(provider: Provider) -> None:
        entry = results[provider.name] = {"kind": provider.kind, **provider.labels}
        calls = _admit(provider, case, buffers, expected, device, entry)
        if calls:
            running[provider.name] = calls

    def time_all(seconds: float, most: int = timing.MOST_ROUNDS) -> None:
        for name, times in _times(running, case, device, seconds, most, results).items():
            results[name] |= times
        _compare(results)
        found["ranking"] = ranking(results)
        save(found)

    late = []
    for provider in case.providers(buffers[0]):
        if isinstance(provider, Absent):
            results[provider.name] = {"kind": "peer", "skipped": provider.reason}
        elif provider.late:
            results[provider.name] = {"kind": provider.kind, **provider.labels, "skipped": CUT_SHORT}
            late.append(provider)
        else:
            admit(provider)
    if late:
        started = time.perf_counter()
        time_all(0.0, most=1)
        # More rounds, where they cost next to nothing.
        if time.perf_counter() - started < seconds / 50:
            time_all(seconds / 10)
    for provider in late:
        started = time.perf_counter()
        left = max(began + seconds - started, seconds / 2)
        if left < _PREPARED.get(provider.name, 0.0):
            results[provider.name]["skipped"] = (
                f"no time left: it took {_PREPARED[provider.name]:.0f} s to prepare"
            )
            continue
        admit(provider)
        _PREPARED[provider.name] = time.perf_counter() - started
        if provider is not late[-1]:
            time_all(0.0)
    # Preparing may have taken all of it.
    time_all(max(began + seconds - time.perf_counter(), seconds / 3))


def ranking(results: dict[str, dict]) -> list[str]:
    """The timed providers that are no limits, fastest first."""
    timed = [name for name, r in results.items() if "seconds" in r and r["kind"] != "limit"]
    return sorted(timed, key=lambda name: results[name].get("to stock", results[name]["seconds"]["p50"]))


def _admit(provider, case, buffers, expected, device, entry) -> list[Callable[[], Any]] | None:
    """The bound calls of a provider that is right, or None with the reason in ``entry``."""
    room = machine.free_bytes(device)
    if room is not None and provider.need > room:
        entry["skipped"] = f"needs {_gib(provider.need)} of memory, {_gib(room)} are free"
        return None
    try:
        calls = [provider.bind(inputs) for inputs in buffers]
        _reset(buffers[0])
        outputs = calls[0]()
        if provider.kind != "limit" and (provider.exact or expected is not None):
            wanted = provider.exact(buffers[0]) if provider.exact else expected
            off = [timing.error(a, b) for a, b in zip(case.pick(outputs), wanted, strict=True)]
            entry["error"] = max(off)
            if entry["error"] > case.tolerance:
                entry["refused"] = (
                    f"wrong: a vector is off by {entry['error']:.1%} of its length, {case.tolerance:.1%} is allowed"
                )
                return None
        del outputs
        entry["peak_bytes"] = peak_memory(calls[1], device)
    except Exception as failure:
        # Whatever a peer raises is its result here; the others go on.
        entry["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        release(device)
        return None
    finally:
        _reset(buffers[0])
    if device.type == "cuda" and case.kernel and provider.graph:
        try:
            # A graph keeps its own addresses, so each copy of the inputs has one.
            calls = [captured(call).replay for call in calls]
        except RuntimeError as failure:
            entry["failed"] = f"cannot be captured in a CUDA graph: {failure}".splitlines()[0][:200]
            return None
    return calls


def _times(running, case, device, seconds, most, results) -> dict[str, dict]:
    if not running:
        return {}
    # On a CPU two copies of large tensors push each other out of the cache.
    overwrite = case.kernel and (
        device.type == "cuda" or case.bytes < 2 * machine.last_level_cache_bytes(device)
    )
    modes = {"seconds": overwrite}
    if device.type == "cuda" and case.kernel:
        modes["warm_seconds"] = False
    found: dict[str, dict] = {name: {} for name in running}
    base = next((name for name in running if results[name]["kind"] == "stock"), None)
    for mode, cold in modes.items():
        turns = {name: cycle(calls) for name, calls in running.items()}
        calls = {name: partial(_next, turn) for name, turn in turns.items()}
        whole = device.type == "cuda" and not case.kernel
        timer = _whole if whole else timing.timer(device, cold=cold, queued=True)
        times = timing.sample(calls, timer, seconds=seconds / len(modes), most=most)
        for name, values in times.items():
            found[name][mode] = asdict(timing.spread(values))
            if mode == "seconds" and base:
                found[name]["to stock"] = timing.ratio(values, times[base])
    return found


def _whole(call: Callable[[], object]) -> float:
    """Seconds until the GPU has finished the call, the time of the CPU that launches it included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _next(turn: Iterable[Callable[[], Any]]) -> None:
    next(turn)()


def _compare(results: dict[str, dict]) -> None:
    """Beside each time the share of it that the limit takes."""
    limits = [r["seconds"]["p50"] for r in results.values() if r["kind"] == "limit" and "seconds" in r]
    for result in results.values():
        if limits and "seconds" in result and result["kind"] != "limit":
            result["limit share"] = min(limits) / result["seconds"]["p50"]


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


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call adds at its highest; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        # Linux: 5 sets the high-water mark back to what is in use.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return None
    before = _high_water()
    call()
    return max(_high_water() - before, 0)


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def require_memory(case: Case, device: torch.device) -> None:
    """:class:`BenchmarkError` where the case's own tensors do not fit."""
    room = machine.free_bytes(device)
    if room is not None and case.need > room:
        raise BenchmarkError(
            f"{case.name} needs {_gib(case.need)} of memory on {device}, {_gib(room)} are free: "
            "choose smaller --lengths or --models"
        )


def release(device: torch.device) -> None:
    """Give back what a case held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset(inputs: Any) -> None:
    reset = getattr(inputs, "reset", None)
    if reset:
        reset()


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
