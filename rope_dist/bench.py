"""The short benchmark: the rotary step of one layer against stock on the device at hand (``rope-dist bench``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from . import ops
from .machine import describe, free_bytes
from .timing import Timer, error, ratio, sample, spread, three_digits, timer

HEADS, HEAD_DIM, THETA = (32, 8), 128, 500000.0
"""Queries and keys of Llama-3-8B."""
STOCK, OURS, IN_PLACE, COPY = "Hugging Face", "rope_dist", "rope_dist, in place", "copy of the same bytes"
ALLOWED = 0.03


def bench(
    *,
    tokens: Sequence[int] = (8192, 16384),
    dtype: str = "bfloat16",
    device: torch.device | str | None = None,
    seconds: float = 30.0,
) -> dict[str, Any]:
    """Time the rotary step of one Llama-3-8B layer, batch 1, at each length.

    Each implementation is compared with a float64 rotation before it is timed. Of a GPU its own time is measured,
    without the host's for the launches.

    Args:
        tokens: lengths.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        device: by default a GPU if there is one.
        seconds: about how long to measure; at least three rounds of each length are made.

    Returns:
        ``machine``, ``device``, ``dtype`` and ``lengths``: by length the ``seconds`` of each implementation (see
        :class:`rope_dist.timing.Spread`) and its ``speedup``, Hugging Face's time divided by its own.

    Raises:
        ValueError: a length below 1 or too long for the memory, no such device, or seconds that are not positive.
        RuntimeError: an implementation computes something else than a rotation.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be at least 1, got {list(tokens)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, got {seconds}")
    where = _device(device)
    clock = timer(where, cold=True, queued=True)
    # Inputs, two copies, and the stock function's intermediate results.
    need, room = (
        8 * max(tokens) * sum(HEADS) * HEAD_DIM * getattr(torch, dtype).itemsize,
        free_bytes(where),
    )
    if room is not None and need > room:
        raise ValueError(
            f"{max(tokens)} tokens need {need / 2**30:.1f} GiB of memory on {where}, {room / 2**30:.1f} GiB are free"
        )
    with torch.inference_mode():
        lengths = {
            str(n): _length(n, getattr(torch, dtype), where, clock, seconds / len(tokens)) for n in tokens
        }
    return {"machine": describe(), "device": where.type, "dtype": dtype, "lengths": lengths}


def text(result: dict[str, Any]) -> str:
    """A table a length, and what they say in one sentence."""
    lines = [", ".join(f"{key} {value}" for key, value in result["machine"].items())]
    for tokens, length in result["lengths"].items():
        rows = [
            [
                name,
                three_digits(s["p50"] * 1e3),
                f"{three_digits(s['p20'] * 1e3)} - {three_digits(s['p80'] * 1e3)}",
                f"{length['speedup'][name]:.2f}x",
            ]
            for name, s in length["seconds"].items()
        ]
        headers = [f"{tokens} tokens, {result['dtype']}", "median, ms", "20 - 80 %", "speedup"]
        align = ("left", "right", "right", "right")
        lines += ["", tabulate(rows, headers, disable_numparse=True, colalign=align)]
    return "\n".join([*lines, "", sentence(result)])


def sentence(result: dict[str, Any]) -> str:
    """``On this CPU the rotary step is 14x as fast as Hugging Face's at 8192 tokens ...``"""
    kind = {"cuda": "GPU"}.get(result["device"], result["device"].upper())
    parts = [
        f"{length['speedup'][OURS]:.2f}x as fast as Hugging Face's at {tokens} tokens "
        f"({length['speedup'][IN_PLACE]:.2f}x in place)"
        for tokens, length in result["lengths"].items()
    ]
    return f"On this {kind} the rotary step is {', '.join(parts)}."


def _device(name: torch.device | str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"no device {str(name)!r}; there are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {str(name)!r}: torch sees {torch.cuda.device_count()} GPUs")
    return device


def _length(
    tokens: int, dtype: torch.dtype, device: torch.device, clock: Timer, seconds: float
) -> dict[str, Any]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.empty(1, tokens, n, HEAD_DIM, dtype=dtype, device=device).normal_(generator=generator)
        for n in HEADS
    )
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32, device=device) / HEAD_DIM
    inv_freq = 1.0 / THETA**exponents
    cos, sin = ops.cos_sin(inv_freq, torch.arange(tokens, device=device)[None])
    stock_tables = [torch.cat((t, t), -1).to(dtype) for t in (cos, sin)]
    # As the stock attention has them: [B, H, S, D] views of what the projections wrote.
    views = q.transpose(1, 2), k.transpose(1, 2)
    turned = q.clone(), k.clone()
    target = torch.empty_like(q), torch.empty_like(k)

    def stock() -> list[torch.Tensor]:
        return [x.transpose(1, 2) for x in apply_rotary_pos_emb(*views, *stock_tables)]

    calls: dict[str, Callable[[], Any]] = {
        STOCK: stock,
        OURS: lambda: ops.rotary(q, k, cos, sin),
        IN_PLACE: lambda: ops.rotary(*turned, cos, sin, inplace=True),
    }
    some = torch.arange(0, tokens, max(tokens // 128, 1), device=device)
    angles = some.double()[:, None] * inv_freq.double()
    tables = [torch.cat((t, t), -1)[None] for t in (angles.cos(), angles.sin())]
    wanted = apply_rotary_pos_emb(*(x[:, some].double().transpose(1, 2) for x in (q, k)), *tables)
    for name, call in calls.items():
        for got, right in zip(call(), wanted, strict=True):
            off = error(got[:, some], right.transpose(1, 2))
            if off > ALLOWED:
                raise RuntimeError(f"{name} is wrong here: a vector is off by {off:.0%} of its length")
    calls[COPY] = lambda: [a.copy_(b) for a, b in zip(target, (q, k), strict=True)]
    for call in calls.values():
        call()
    times = sample(calls, clock, seconds=seconds)
    return {
        "seconds": {name: asdict(spread(values)) for name, values in times.items()},
        "speedup": {name: ratio(times[STOCK], values) for name, values in times.items()},
    }
