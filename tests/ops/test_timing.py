"""What a timer measures on a GPU: the device's own time, on a simulated one."""

from __future__ import annotations

import pytest
import torch

from rope_dist import timing


class Gpu:
    """A device that works off what is enqueued, and a host that takes its time; both in seconds."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        self.log = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("record")
                self.at = gpu.enqueue(0.0)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Flush:
            def zero_(self):
                gpu.log.append("flush")
                gpu.enqueue(30e-6)

        def sleep(cycles):
            gpu.log.append("sleep")
            gpu.enqueue(cycles / timing.GPU_CLOCK)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
        monkeypatch.setattr(timing.torch, "empty", lambda *sizes, **options: Flush())
        monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 1 << 20)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)

    def enqueue(self, seconds: float) -> float:
        self.device = max(self.device, self.host) + seconds
        return self.device

    def call(self, launches: int, host: float, device: float):
        def run():
            self.log.append("call")
            for _ in range(launches):
                self.host += host
                self.enqueue(device)

        return run


# A small projection, a slow host, an eager chain of many launches.
CALLS = [(1, 140e-6, 17e-6), (1, 700e-6, 20e-6), (12, 500e-6, 3e-6)]


@pytest.mark.parametrize(("launches", "host", "device"), CALLS)
def test_a_queued_call_is_timed_without_the_host(monkeypatch, launches, host, device):
    gpu = Gpu(monkeypatch)
    time = timing.timer("cuda", cold=True, queued=True)
    seconds = [time(gpu.call(launches, host, device)) for _ in range(5)]
    # The first tells how long the host takes.
    for measured in seconds[1:]:
        assert measured == pytest.approx(launches * device)
    assert gpu.log[:5] == ["flush", "sleep", "record", "call", "record"]


def test_else_the_gaps_between_launches_count(monkeypatch):
    gpu = Gpu(monkeypatch)
    time = timing.timer("cuda")
    time(gpu.call(1, 0.0, 0.0))
    assert time(gpu.call(3, 140e-6, 17e-6)) == pytest.approx(3 * 140e-6 + 17e-6, rel=0.1)
    assert "sleep" not in gpu.log


def test_the_short_benchmark_and_the_choice_of_kernels_are_queued(monkeypatch):
    from rope_dist import bench
    from rope_dist.ops import autotune

    class Asked(Exception):
        pass

    def timer(device, **options):
        raise Asked(options)

    monkeypatch.setattr(bench, "timer", timer)
    with pytest.raises(Asked, match="'queued': True"):
        bench.bench(tokens=[8], device="cpu")
    monkeypatch.setattr(timing, "timer", timer)
    monkeypatch.setattr(autotune, "may_measure", lambda: True)
    problem = autotune.AutotuneKey("a GPU", "bfloat16", 8, 8, (8, 8), 8, 8)
    with pytest.raises(Asked, match="'queued': True"):
        autotune.choose(problem, {"separate": lambda: None})
