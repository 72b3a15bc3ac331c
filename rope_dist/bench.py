"""The short benchmark: the rotary step of one layer against Hugging Face's on the device at hand (``rope-dist bench``).

:func:`rotary_step` measures it for any layer; the demonstration and ``benchmarks/`` use the same parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from . import ops
from .machine import describe, free_bytes
from .timing import error, ratio, sample, spread, three_digits, timer

HEADS, HEAD_DIM, THETA = (32, 8), 128, 500000.0
"""Queries and keys of Llama-3-8B."""
HUGGINGFACE, NEW, IN_PLACE = "huggingface", "rope_dist", "rope_dist, in place"
COPY = "copy of the same bytes"
TOLERANCE = 0.03


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
        ``machine``, ``device``, ``dtype`` and ``lengths``: by length what :func:`rotary_step` returns.

    Raises:
        ValueError: a length below 1 or too long for the memory, no such device, or seconds that are not positive.
        RuntimeError: an implementation computes something else than a rotation.
    """
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be at least 1, got {list(tokens)}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, got {seconds}")
    where, kind = device_of(device), getattr(torch, dtype)
    # Inputs, two copies, and Hugging Face's intermediate results.
    need, room = 8 * max(tokens) * sum(HEADS) * HEAD_DIM * kind.itemsize, free_bytes(where)
    if room is not None and need > room:
        raise ValueError(
            f"{max(tokens)} tokens need {need / 2**30:.1f} GiB of memory on {where}, {room / 2**30:.1f} GiB are free"
        )
    inv_freq = THETA ** (-torch.arange(0, HEAD_DIM, 2, device=where) / HEAD_DIM)
    options = {"dtype": kind, "seconds": seconds / len(tokens)}
    lengths = {str(n): rotary_step(HEADS, HEAD_DIM, inv_freq, n, **options) for n in tokens}
    return {"machine": describe(), "device": where.type, "dtype": dtype, "lengths": lengths}


@torch.inference_mode()
def rotary_step(
    heads: tuple[int, int],
    head_dim: int,
    inv_freq: torch.Tensor,
    tokens: int,
    *,
    dtype: torch.dtype,
    attention_scaling: float = 1.0,
    seconds: float = 15.0,
) -> dict[str, dict[str, Any]]:
    """Check and time the rotation of a layer's queries and keys: Hugging Face's, ours, and a copy of the same bytes.

    Args:
        heads: of queries and keys.
        head_dim: of each head.
        inv_freq: ``[R/2]`` float32 radians a token, on the device to measure.
        tokens: positions 0 to ``tokens - 1`` of one sequence.
        dtype: of queries and keys.
        attention_scaling: factor on cos and sin.
        seconds: about how long to measure; at least three rounds are made.

    Returns:
        ``seconds``: by implementation (:data:`HUGGINGFACE`, :data:`NEW`, :data:`IN_PLACE`, :data:`COPY`) the fields of
        :class:`rope_dist.timing.Spread`; ``speedup``: Hugging Face's time divided by each.

    Raises:
        RuntimeError: an implementation computes something else than a rotation.
    """
    angles = Angles(inv_freq, tokens, dtype, attention_scaling)
    x = Heads(heads, head_dim, tokens, dtype, inv_freq.device)
    calls = rotary_calls(x, angles)
    at = checked_tokens(tokens, inv_freq.device)
    wanted = [rotated(y[0, at], *angles.exact(at)) for y in x.before]
    for name, call in calls.items():
        x.reset()
        for got, right in zip(call(), wanted, strict=True):
            off = error(got[0, at], right)
            if off > TOLERANCE:
                raise RuntimeError(f"{name} is wrong here: a vector is off by {off:.0%} of its length")
    calls[COPY] = lambda: [a.copy_(b) for a, b in zip((x.q, x.k), x.before, strict=True)]
    times = sample(calls, timer(inv_freq.device, cold=True, queued=True), seconds=seconds)
    return {
        "seconds": {name: asdict(spread(values)) for name, values in times.items()},
        "speedup": {name: ratio(times[HUGGINGFACE], values) for name, values in times.items()},
    }


class Angles:
    """Frequencies and tables of positions ``0 .. tokens - 1`` in every form that an implementation takes.

    Attributes:
        inv_freq: ``[R/2]`` float32; ``inv_freq_q64`` is what :func:`rope_dist.ops.to_fixed_point` makes of it.
        position_ids: ``[1, tokens]``.
        cos, sin: ``[1, tokens, R/2]`` float32.
        huggingface: cos and sin with each pair's value twice, in the model's dtype.
    """

    def __init__(
        self, inv_freq: torch.Tensor, tokens: int, dtype: torch.dtype, attention_scaling: float = 1.0
    ) -> None:
        self.inv_freq, self.scaling = inv_freq, attention_scaling
        self.inv_freq_q64 = ops.to_fixed_point(inv_freq)
        self.position_ids = torch.arange(tokens, device=inv_freq.device)[None]
        self.cos, self.sin = ops.cos_sin(inv_freq, self.position_ids, attention_scaling)
        self.huggingface = tuple(torch.cat((t, t), -1).to(dtype) for t in (self.cos, self.sin))

    def exact(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[n, 1, R/2]`` in float64 of the float32 frequencies at those positions."""
        angles = positions.double()[:, None, None] * self.inv_freq.double()
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class Heads:
    """Random queries and keys ``q``, ``k`` ``[1, tokens, heads, D]``; ``before`` is what they were."""

    def __init__(
        self, heads: Sequence[int], head_dim: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.before = [
            random(1, tokens, n, head_dim, dtype=dtype, device=device, seed=seed)
            for seed, n in enumerate(heads)
        ]
        self.q, self.k = (x.clone() for x in self.before)

    def reset(self) -> None:
        """Undo rotations in place."""
        self.q.copy_(self.before[0])
        self.k.copy_(self.before[1])


def rotary_calls(x: Heads, angles: Angles) -> dict[str, Callable[[], Any]]:
    """Hugging Face's rotation and ours; each call returns rotated queries and keys ``[1, S, H, D]``."""
    return {
        HUGGINGFACE: lambda: huggingface(x.q, x.k, angles),
        NEW: lambda: ops.rotary(x.q, x.k, angles.cos, angles.sin),
        IN_PLACE: lambda: ops.rotary(x.q, x.k, angles.cos, angles.sin, inplace=True),
    }


def huggingface(q: torch.Tensor, k: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's rotation of ``[B, S, H, D]``: it sees ``[B, H, S, D]`` views, as in its attention."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *angles.huggingface)
    return q.transpose(1, 2), k.transpose(1, 2)


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, inverse: bool = False
) -> torch.Tensor:
    """``x`` ``[n, H, D]`` rotated in float64, as a complex product: independent of the operators."""
    rotary_dim = 2 * cos.shape[-1]
    pairs = x[..., :rotary_dim].double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    value = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1))
    value = value * torch.complex(cos, -sin if inverse else sin)
    values = torch.stack((value.real, value.imag), dim=axis).flatten(-2)
    return torch.cat((values, x[..., rotary_dim:].double()), -1)


def checked_tokens(tokens: int, device: torch.device, count: int = 256) -> torch.Tensor:
    """Positions at which results are compared: the first, the last, and others at random."""
    if tokens <= count:
        return torch.arange(tokens, device=device)
    generator = torch.Generator().manual_seed(tokens)
    inner = torch.randint(1, tokens - 1, (count - 2,), generator=generator)
    return torch.cat((torch.tensor([0, tokens - 1]), inner)).sort().values.to(device)


def random(
    *sizes: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, the same for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(*sizes, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)


def text(result: dict[str, Any]) -> str:
    """A table a length, and what they show in one sentence."""
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
        f"{length['speedup'][NEW]:.2f}x as fast as Hugging Face's at {tokens} tokens "
        f"({length['speedup'][IN_PLACE]:.2f}x in place)"
        for tokens, length in result["lengths"].items()
    ]
    return f"On this {kind} the rotary step is {', '.join(parts)}."


def device_of(name: torch.device | str | None) -> torch.device:
    """That device, by default a GPU if there is one; ``ValueError`` where there is none of that name."""
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
