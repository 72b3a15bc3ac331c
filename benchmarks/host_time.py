"""Host time of one call at one token, in microseconds: what an eager GPU waits for between kernels.

    python -m benchmarks.host_time [--seconds 40]

Triton's kernels are compiled for sm_90 and not launched (``host_driver.py``); the native rows are the CPU's own. The
arithmetic is small enough to be negligible. The stock layer's three products run on the CPU, where a fused kernel's
are left out: compare the rows of one backend with each other first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

import rope_dist
from rope_dist import ops, timing

from .host_driver import host_only

PATHS = ("separate", "pointers", "descriptors", "decode")
HUGGINGFACE = "huggingface"


def rotations() -> dict[str, Callable[[], object]]:
    """One token of Llama-3-8B's heads: ``[1, 1, 32 and 8, 128]`` bfloat16."""
    q, k = (torch.randn(1, 1, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
    inv_freq = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    position_ids = torch.tensor([[5000]])
    cos, sin = ops.cos_sin(inv_freq, position_ids)
    fixed = ops.turns(inv_freq)
    stock = [torch.cat((table, table), -1).bfloat16() for table in (cos, sin)]
    views = q.transpose(1, 2), k.transpose(1, 2)
    return {
        HUGGINGFACE: lambda: apply_rotary_pos_emb(*views, *stock),
        "rotary, in place": lambda: ops.rotary(q, k, cos, sin, inplace=True),
        "rotary, new tensors": lambda: ops.rotary(q, k, cos, sin),
        "rotary_at, in place": lambda: ops.rotary_at(q, k, fixed, position_ids, inplace=True),
    }


def layers() -> dict[str, Callable[[], object]]:
    """One token through an attention layer (hidden 256, 4 and 2 heads of 64), no cache, stock and enabled."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=64, attn_implementation="sdpa",
    )  # fmt: skip
    x = torch.randn(1, 1, 256, dtype=torch.bfloat16)
    position_ids = torch.tensor([[0]])
    found = {}
    for name in (HUGGINGFACE, "enabled"):
        holder = torch.nn.Module()
        holder.config = config
        holder.rotary_emb = LlamaRotaryEmbedding(config)
        holder.self_attn = LlamaAttention(config, 0).bfloat16().eval()
        if name == "enabled":
            rope_dist.enable(holder)
        tables = holder.rotary_emb(x, position_ids)
        found[name] = lambda m=holder.self_attn, t=tables: m(x, position_embeddings=t, attention_mask=None)
    return found


@contextlib.contextmanager
def path(name: str | None):
    """``ROPE_DIST_PATH`` set to ``name``."""
    before = os.environ.get("ROPE_DIST_PATH")
    if name:
        os.environ["ROPE_DIST_PATH"] = name
    try:
        yield
    finally:
        os.environ.pop("ROPE_DIST_PATH", None)
        if before is not None:
            os.environ["ROPE_DIST_PATH"] = before


def prepared(call: Callable[[], object], backend: str, fixed: str | None = None) -> Callable[[], float]:
    """Returns the seconds of one of ``CALLS`` calls; backend and path are set before the clock starts."""

    def run() -> float:
        context = host_only() if backend == "triton" else ops.use_backend(backend)
        with context, path(fixed), torch.inference_mode():
            call()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            return (time.perf_counter() - began) / CALLS

    return run


CALLS = 200


def sections() -> dict[str, dict[str, Callable[[], float]]]:
    """By section and name what returns the seconds of one call."""
    rotate, layer = rotations(), layers()
    found = {
        "rotation of one token": {HUGGINGFACE: prepared(rotate.pop(HUGGINGFACE), "auto")},
        "attention layer at one token": {HUGGINGFACE: prepared(layer[HUGGINGFACE], "auto")},
    }
    first, second = found.values()
    for backend in ("native", "triton"):
        first |= {f"{name} ({backend})": prepared(call, backend) for name, call in rotate.items()}
    second["enabled (native)"] = prepared(layer["enabled"], "native")
    second |= {f"enabled (triton, {name})": prepared(layer["enabled"], "triton", name) for name in PATHS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="(default: %(default)g)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    for title, calls in sections().items():
        for call in calls.values():
            call()  # compiles
        times = timing.sample(calls, lambda call: call(), seconds=seconds / 2)
        rows = [
            [
                name,
                f"{timing.spread(values).p50 * 1e6:.1f}",
                f"{timing.ratio(values, times[HUGGINGFACE]):.2f}",
            ]
            for name, values in times.items()
        ]
        headers = [title, "us a call", "to huggingface"]
        print(tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right")) + "\n")


if __name__ == "__main__":
    main()
