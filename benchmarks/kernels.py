"""The kernels on this GPU against what they replace: projection with rotation, rotary alone, decoding.

    python -m benchmarks.kernels --output DIR [--seconds 180]

Every way of a question is captured in a CUDA graph and replayed in turn, forwards and backwards (A B B A),
the L2 cache emptied before each replay, on the same random inputs. The matrix product alone and a copy of
the same bytes are timed in the same run: they are what the physical limit is stated against. Writes
``kernels.json`` and ``kernels.txt``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional

from rope_dist import ops
from rope_dist.files import write_text
from rope_dist.ops import native, tuning
from rope_dist.version import __version__

MODELS = {"LLaMA2-7B": (32, 32, 128, 4096, 1e4), "Llama-3-8B": (32, 8, 128, 4096, 5e5)}
LENGTHS = (8192, 16384)
DECODE_TOKENS = (1, 2, 4, 8, 16)
ROUNDS = 12

Ways = dict[str, Callable[[], object]]


@dataclass
class Shape:
    """One model's attention at one number of tokens, with random inputs in bfloat16."""

    model: str
    tokens: int
    device: torch.device
    sizes: tuple[int, int, int, int, float] | None = None

    def __post_init__(self) -> None:
        q_heads, k_heads, self.dim, depth, theta = self.sizes or MODELS[self.model]
        self.heads = (q_heads, k_heads, k_heads)
        generator = torch.Generator(self.device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).bfloat16()

        self.x = random(1, self.tokens, depth)
        self.weights = [random(h * self.dim, depth) / depth**0.5 for h in self.heads]
        inv_freq = 1.0 / theta ** (torch.arange(0, self.dim, 2, device=self.device) / self.dim)
        self.words = ops.turns(inv_freq)
        self.positions = torch.arange(self.tokens, device=self.device)[None]
        self.cos, self.sin = ops.cos_sin(inv_freq, self.positions)
        # Stock Hugging Face: both halves, in the model's dtype.
        self.stock = [torch.cat((t, t), -1).bfloat16() for t in (self.cos, self.sin)]

    def project(self) -> list[torch.Tensor]:
        """The three products, ``[1, S, H, D]``."""
        return [functional.linear(self.x, w).unflatten(-1, (-1, self.dim)) for w in self.weights]

    def random_heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys to rotate."""
        return tuple(
            torch.randn(1, self.tokens, h, self.dim, device=self.device).bfloat16() for h in self.heads[:2]
        )


def stock_rotary(q, k, cos, sin):
    """The formula that Hugging Face models run: a rotated copy, two products and a sum each."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    cos, sin = cos[:, :, None], sin[:, :, None]
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def projection_ways(shape: Shape, *, compiled: bool = True) -> Ways:
    """Projection with rotation, and its parts."""
    joined = torch.cat(shape.weights)
    at = {"head_dim": shape.dim, "inv_freq": shape.words, "position_ids": shape.positions}
    by_table = {"head_dim": shape.dim, "cos": shape.cos, "sin": shape.sin}

    def stock() -> object:
        q, k, v = shape.project()
        return *stock_rotary(q, k, *shape.stock), v

    ways: Ways = {
        "one product alone": lambda: functional.linear(shape.x, joined),
        "three products alone": shape.project,
        "products + own rotary": lambda: ops.qkv_rotary(shape.x, *shape.weights, path="separate", **at),
        "products + stock rotary": stock,
    }
    if compiled:
        ways["torch.compile of that"] = torch.compile(stock)
    rotary_dim = 2 * shape.words.shape[1]
    candidates = ops.projection.dispatch_projection.candidates(shape.x, *shape.weights, shape.dim, rotary_dim)
    for path in candidates:
        if path != "separate":
            ways[f"fused, {path}"] = lambda path=path: ops.qkv_rotary(
                shape.x, *shape.weights, path=path, **at
            )
    if "descriptors" in candidates:
        ways["fused, descriptors, table"] = lambda: ops.qkv_rotary(
            shape.x, *shape.weights, path="descriptors", **by_table
        )
    return ways


def rotary_ways(shape: Shape, *, compiled: bool = True) -> Ways:
    """Rotary alone, in place where it can be, and a copy of the same bytes."""
    q, k = shape.random_heads()
    both = torch.cat((q.flatten(), k.flatten()))
    target = torch.empty_like(both)
    ways: Ways = {
        "copy of the same bytes": lambda: target.copy_(both),
        "in place, positions": lambda: ops.rotary_at(q, k, shape.words, shape.positions, inplace=True),
        "in place, table": lambda: ops.rotary(q, k, shape.cos, shape.sin, inplace=True),
        "new tensors, positions": lambda: ops.rotary_at(q, k, shape.words, shape.positions),
        "stock": lambda: stock_rotary(q, k, *shape.stock),
    }
    if native.unavailable(q) is None:
        ways["native library, new tensors, positions"] = lambda: _native(q, k, shape)
    if compiled:
        ways["torch.compile of stock"] = torch.compile(lambda: stock_rotary(q, k, *shape.stock))
    return ways


def _native(q: torch.Tensor, k: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    with ops.use_backend("native"):
        return ops.rotary_at(q, k, shape.words, shape.positions)


def questions(device: torch.device) -> Iterator[tuple[str, Callable[[], Ways]]]:
    """Names and ways of everything that is measured."""
    for model in MODELS:
        for tokens in LENGTHS:
            yield (
                f"projection {model} {tokens}",
                lambda m=model, t=tokens: projection_ways(Shape(m, t, device)),
            )
            yield f"rotary {model} {tokens}", lambda m=model, t=tokens: rotary_ways(Shape(m, t, device))
    for model in MODELS:
        for tokens in DECODE_TOKENS:
            yield (
                f"decode {model} {tokens}",
                lambda m=model, t=tokens: projection_ways(Shape(m, t, device), compiled=False),
            )


def captured(way: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``way`` as a CUDA graph, so that launches cost the same for all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph


def measure(ways: Ways, rounds: int = ROUNDS) -> dict[str, dict]:
    """Milliseconds (p20, p50, p80) and peak extra MB of each way; ``error`` where it does not run."""
    results: dict[str, dict] = {}
    graphs = {}
    for name, way in ways.items():
        try:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            graphs[name] = captured(way)
            results[name] = {"peak_mb": peak / 2**20}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    timer = tuning.gpu_timer()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds):
        order = list(graphs)
        for name in order if index % 2 == 0 else reversed(order):
            samples[name].append(timer(graphs[name].replay))
    for name, times in samples.items():
        p20, p50, p80 = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
        results[name].update(p20_ms=p20, p50_ms=p50, p80_ms=p80)
    return results


def table(results: dict[str, dict]) -> str:
    """The results of one question, each way beside the first."""
    base = next((r["p50_ms"] for r in results.values() if "p50_ms" in r), None)
    rows = []
    for name, result in results.items():
        if "error" in result:
            rows.append([name, result["error"][:60], "", "", ""])
            continue
        spread = f"{result['p20_ms']:.4f} - {result['p80_ms']:.4f}"
        ratio = f"{result['p50_ms'] / base:.3f}"
        rows.append([name, f"{result['p50_ms']:.4f}", spread, ratio, f"{result['peak_mb']:.0f}"])
    return tabulate(
        rows, ["way", "median, ms", "20 - 80 %", "to the first", "peak, MB"], disable_numparse=True
    )


def machine() -> dict[str, object]:
    """The GPU, its driver and clocks, and the versions."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        query: driver,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **tuning.versions(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write the files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for kernels.json and kernels.txt")
    parser.add_argument(
        "--seconds", type=float, default=180, help="begin no new question after this (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs a GPU", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", "benchmarks.kernels", *sys.argv[1:]]),
        "version": __version__,
        "machine": machine(),
        "rounds": ROUNDS,
        "results": {},
        "left_out": [],
    }
    text = [json.dumps(report["machine"])]
    for name, ways in questions(torch.device("cuda")):
        if time.monotonic() - start > options.seconds:
            report["left_out"].append(name)
            continue
        torch.compiler.reset()
        with torch.inference_mode():
            report["results"][name] = measure(ways())
        torch.cuda.empty_cache()
        text += ["", name, table(report["results"][name])]
        print("\n".join(text[-3:]), flush=True)
        # Written each time: a run that is cut short leaves what it measured.
        write_text(options.output / "kernels.json", json.dumps(report, indent=1) + "\n")
        write_text(options.output / "kernels.txt", "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
