"""The rotary step on a CPU: ours, Hugging Face's, torch.compile of it, and passes over the same memory.

    python -m benchmarks.cpu_rotary [--repeats 7] [--output benchmarks/results/cpu_rotary.json]

Queries and keys as LLaMA has them, batch 1. "pass" adds 1 to every 32-bit word in place: the least that any
rotation in place can cost, whatever the type. All run in turn, so that a busy machine hurts all alike.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_dist import ops
from rope_dist.files import write_text
from rope_dist.info import info
from rope_dist.strategies import default_inv_freq
from rope_dist.timing import machine, medians, time_interleaved

MODELS = {"LLaMA2-7B": (32, 32, 10000.0), "Llama-3-8B": (32, 8, 500000.0)}
"""Query heads, key heads (of 128) and base."""
TOKENS = (8192, 16384)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def providers(heads: tuple[int, int], theta: float, tokens: int, dtype: torch.dtype) -> dict[str, Callable]:
    """What is timed, by name; every provider works on tensors of the same sizes."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, tokens, n, 128, generator=generator).to(dtype) for n in heads)
    cos, sin = ops.cos_sin(default_inv_freq(theta, 128), torch.arange(tokens)[None])
    stock_cos, stock_sin = (torch.cat((t, t), -1).to(dtype) for t in (cos, sin))
    # As the stock attention has them: [B, H, S, D] views of what the projections wrote.
    stock_q, stock_k = q.transpose(1, 2), k.transpose(1, 2)
    copies = torch.empty_like(q), torch.empty_like(k)
    words = q.view(torch.int32), k.view(torch.int32)
    other_words = copies[0].view(torch.int32), copies[1].view(torch.int32)
    compiled = torch.compile(apply_rotary_pos_emb, dynamic=False)

    def one_pass() -> None:
        # Of the copies: q and k must stay numbers that a rotation meets.
        for x in other_words:
            x.add_(1)

    def copy() -> None:
        for x, y in zip(other_words, words, strict=True):
            x.copy_(y)

    return {
        "ours, in place": lambda: ops.rotary(q, k, cos, sin, inplace=True),
        "pass": one_pass,
        "ours": lambda: ops.rotary(q, k, cos, sin),
        "copy": copy,
        "torch.compile": lambda: compiled(stock_q, stock_k, stock_cos, stock_sin),
        "Hugging Face": lambda: apply_rotary_pos_emb(stock_q, stock_k, stock_cos, stock_sin),
    }


def measure(repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and ratios of every case."""
    results = {}
    for model, (q_heads, k_heads, theta) in MODELS.items():
        for tokens in TOKENS:
            for name, dtype in DTYPES.items():
                torch.compiler.reset()
                times = time_interleaved(providers((q_heads, k_heads), theta, tokens, dtype), repeats=repeats)
                seconds = medians(times)
                ours = seconds["ours, in place"]
                results[f"{model}, {tokens // 1024}k, {name}"] = {
                    "seconds": seconds,
                    "pass / ours": seconds["pass"] / ours,
                    "Hugging Face / ours": seconds["Hugging Face"] / ours,
                    "torch.compile / ours": seconds["torch.compile"] / ours,
                }
    return results


def main() -> None:
    """Time every case, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--output", help="JSON file to write", default="benchmarks/results/cpu_rotary.json")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    with torch.inference_mode():
        results = measure(arguments.repeats)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    first = next(iter(results.values()))
    ratios = [key for key in first if key != "seconds"]
    rows = [
        [name, *(f"{s * 1e3:.1f}" for s in case["seconds"].values()), *(f"{case[r]:.2f}" for r in ratios)]
        for name, case in results.items()
    ]
    print(tabulate(rows, ["", *(f"{name}, ms" for name in first["seconds"]), *ratios]))
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.cpu_rotary", *sys.argv[1:]]),
        "machine": machine(),
        "built": info()["built"],
        "used": info()["used"]["cpu"],
        "repeats": arguments.repeats,
        "results": results,
    }
    write_text(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
