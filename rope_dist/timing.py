"""Side-by-side timing.

The benchmarks, ``rope-dist bench``, the demonstration and the choice of kernels all time with :func:`sample`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from .machine import last_level_cache_bytes

Timer = Callable[[Callable[[], object]], float]
"""Seconds of one call."""

FEWEST_ROUNDS = 3
LEAST_ROUNDS = 5
MOST_ROUNDS = 60
TOLERANCE = 0.03
GPU_CLOCK = 2e9
"""Cycles a second that a GPU does not exceed by much: a slower one waits longer."""


@dataclass(frozen=True)
class Spread:
    """Seconds of one implementation.

    Attributes:
        p20, p50, p80: percentiles over all rounds; ``p50`` is what to report.
        quiet: the lowest median of three rounds in a row. Other work on the machine only ever adds time, so
            on a busy one this is nearer to the truth than the median of all.
        rounds: timed calls.
    """

    p20: float
    p50: float
    p80: float
    quiet: float
    rounds: int


def sample(
    calls: Mapping[str, Callable[[], object]],
    timer: Timer,
    *,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
    seconds: float = math.inf,
    tolerance: float = TOLERANCE,
) -> dict[str, list[float]]:
    """Time every call once a round, forwards and backwards in turn (A B B A), so that drift hits all alike.

    Args:
        calls: what to time, by name, each called before and so compiled and warm.
        timer: seconds of one call, from :func:`timer`.
        least: rounds before medians may count as known.
        most: rounds at most.
        seconds: no round is begun after this, but for the first three.
        tolerance: enough rounds when every median is known to this share (:func:`uncertainty`).

    Returns:
        One time a round for each name. Times of one round belong together: compare with :func:`ratio`.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    began = time.perf_counter()
    for done in range(1, most + 1):
        for name in order:
            times[name].append(timer(calls[name]))
        order.reverse()
        late = time.perf_counter() - began >= seconds
        known = done >= least and all(uncertainty(values) <= tolerance for values in times.values())
        if known or (late and done >= FEWEST_ROUNDS):
            break
    return times


def uncertainty(times: Sequence[float]) -> float:
    """Half the width of the median's 95 % interval, as a share of the median.

    The standard error of a median is 1.25 standard deviations over the root of the number, and the 20th and
    the 80th percentile of a normal distribution lie 1.68 standard deviations apart.
    """
    if len(times) < 2:
        return math.inf
    found = spread(times)
    return 1.96 * 1.25 * (found.p80 - found.p20) / 1.68 / math.sqrt(len(times)) / max(found.p50, 1e-12)


def spread(times: Sequence[float]) -> Spread:
    """Percentiles of one implementation's times."""
    p20, p50, p80 = (
        (quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
        if len(times) > 1
        else [times[0]] * 3
    )
    blocks = [times[i : i + 3] for i in range(0, max(len(times) - 2, 1), 3)]
    return Spread(p20, p50, p80, min(median(block) for block in blocks), len(times))


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """How many times ``base`` one implementation takes: the median of the rounds' ratios.

    What slows the machine down for a while slows both of a round down, and leaves their ratio.
    """
    return median(a / b for a, b in zip(times, base, strict=True))


def timer(device: torch.device | str, *, cold: bool = False, queued: bool = False) -> Timer:
    """Seconds of a call: wall time on a CPU, between two events of the current stream on a GPU.

    Args:
        cold: a buffer as large as the last level of cache (on a GPU, twice that) is overwritten before each
            call, not timed.
        queued: a GPU is kept waiting until the whole call is enqueued, so that its own time is measured. Else
            it idles between the launches of a short call, and what is measured is the host.
    """
    device = torch.device(device)
    pause = 1e-3
    size = last_level_cache_bytes(device) * (2 if device.type == "cuda" else 1) if cold else 0
    flush = torch.empty(size, dtype=torch.int8, device=device)

    def wall(call: Callable[[], object]) -> float:
        flush.zero_()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def events(call: Callable[[], object]) -> float:
        nonlocal pause
        # Events and waiting are the current device's.
        with torch.cuda.device(device) if device.index is not None else contextlib.nullcontext():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            if queued:
                torch.cuda._sleep(int(pause * GPU_CLOCK))
            start.record()
            began = time.perf_counter()
            call()
            # With room for a host that is slower the next time, and an end where a call waits for the device.
            pause = min(max(pause, 2 * (time.perf_counter() - began)), 0.05)
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return events if device.type == "cuda" else wall


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of two vectors of the last axis, as a share of the expected one's length.

    Args:
        actual: any floating dtype.
        expected: the same shape, on the same device. Infinite where shapes differ or a number is not finite.
    """
    if actual.shape != expected.shape:
        return math.inf
    expected = expected.double()
    distance = (actual.double() - expected).norm(dim=-1)
    worst = (distance / expected.norm(dim=-1).clamp_min(1e-30)).max().item()
    return worst if math.isfinite(worst) else math.inf


def three_digits(value: float) -> str:
    """``value`` for a table: three significant digits (10.0), more of a number above 999; no exponent from 0.001 on."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
