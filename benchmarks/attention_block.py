"""LLaMA's attention block (projections, rotary, attention, output) with each implementation of attention.

Stock and enabled blocks share their weights. The roofline is the four projections and PyTorch's attention alone,
without any rotary step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from rope_dist.bench import checked_tokens, random, rotated

from . import models
from .baselines import installed, missing
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation, Skipped
from .shapes import DTYPES

FA4 = "flash-attn-4"
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", FA4)


class Block:
    """A layer's attention, stock and enabled, its input ``[1, S, hidden]`` and stock's and our tables."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.model = models.build(size, 1, device)
        self.x = random(1, size.tokens, size.shape.hidden, dtype=DTYPES[size.dtype], device=device)
        self.positions = torch.arange(size.tokens, device=device)[None]

    def call(self, model: nn.Module, mask: Any) -> Callable[[], torch.Tensor]:
        """The block of that model, its tables made before (a model makes them once for all layers)."""
        attention = model.model.layers[0].self_attn
        tables = model.model.rotary_emb(self.x, self.positions)
        return lambda: attention(self.x, position_embeddings=tables, attention_mask=mask)[0]


@cache
def _fa4_function() -> Callable:
    return importlib.import_module("flash_attn.cute").flash_attn_func


def _fa4(module: nn.Module, q, k, v, attention_mask, scaling: float | None = None, **_: Any):
    """flash-attn-4 behind the signature of transformers' attention functions."""
    flash_attn_func = _fa4_function()
    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scaling, causal=True)
    return (out[0] if isinstance(out, tuple) else out), None


AttentionInterface.register(FA4, _fa4)


def unavailable(implementation: str, options: Options) -> str | None:
    """Why that implementation cannot run here, or None."""
    if implementation in ("sdpa", "eager"):
        return None
    if options.device.type != "cuda":
        return "needs a GPU"
    if implementation == "flex_attention":
        return None
    if implementation == FA4 and torch.cuda.get_device_capability(options.device)[0] < 9:
        return "needs Hopper or later"
    return missing("flash_attn.cute" if implementation == FA4 else "flash_attn.flash_attn_interface")


def _mask(implementation: str, size: Size, device: torch.device) -> Any:
    """What the model would hand to that implementation for one causal sequence."""
    if implementation == "eager":
        lowest = torch.finfo(DTYPES[size.dtype]).min
        full = torch.full((size.tokens, size.tokens), lowest, dtype=DTYPES[size.dtype], device=device)
        return full.triu_(1)[None, None]
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def causal(batch, head, q, k):
            return q >= k

        return create_block_mask(causal, None, None, size.tokens, size.tokens, device=device)
    return None


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    shared: list[Block] = []

    def inputs() -> Block:
        if not shared:
            shared.append(Block(size, device))
        return shared[0]

    def exact(block: Block) -> list[torch.Tensor]:
        return [_exact(block, size, checked_tokens(size.tokens, device))]

    def pick(out: torch.Tensor) -> list[torch.Tensor]:
        return [out[0, checked_tokens(size.tokens, device)]]

    width = sum(shape.widths) + shape.widths[0]
    case = Case(
        name=str(size),
        inputs=inputs,
        implementations=partial(implementations, size, options),
        exact=exact,
        pick=pick,
        # A softmax of rounded scores, and the output's product after it.
        tolerance=2 * TOLERANCES[dtype],
        bytes=(size.tokens * (2 * shape.hidden + 2 * width) + shape.hidden * width) * dtype.itemsize,
        need=models.parameters_bytes(size, 1) + 12 * size.tokens * width * dtype.itemsize,
        labels=size.labels,
    )
    return [case]


def _exact(block: Block, size: Size, tokens: torch.Tensor) -> torch.Tensor:
    """The block's output at some tokens, in float64 from its weights."""
    shape = size.shape
    attention = block.model.model.layers[0].self_attn
    angles = shape.angles(1, torch.float32, tokens.device)
    x = block.x[0].double()
    q, k, v = (
        (rows @ m.weight.detach().double().T).unflatten(-1, (-1, shape.head_dim))
        for rows, m in ((x[tokens], attention.q_proj), (x, attention.k_proj), (x, attention.v_proj))
    )
    q = rotated(q, *angles.exact(tokens)).transpose(0, 1)
    k = rotated(k, *angles.exact(block.positions[0])).transpose(0, 1)
    groups = shape.q_heads // shape.k_heads
    seen = tokens[:, None] >= block.positions
    heads = []
    # A head at a time: all scores in float64 would not fit.
    for head in range(shape.q_heads):
        scores = q[head] @ k[head // groups].T * shape.head_dim**-0.5
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // groups])
    return torch.cat(heads, -1) @ attention.o_proj.weight.detach().double().T


def implementations(size: Size, options: Options, block: Block) -> list[Implementation | Skipped]:
    """Stock and enabled, with each implementation of attention."""
    found: list[Implementation | Skipped] = []
    for attention in ATTENTION:
        if attention != "sdpa" and not options.wants(attention):
            continue
        reason = unavailable(attention, options)
        slow = attention == "eager" and options.device.type == "cpu" and size.tokens > 4096
        if slow and options.baselines is None:
            reason = "takes seconds at this length on a CPU: ask with --baselines eager"
        if reason:
            found.append(Skipped(attention, reason))
            continue
        kinds = {"huggingface": "reference" if attention == "sdpa" else "baseline", models.ENABLED: "ours"}
        for name, kind in kinds.items():
            found.append(
                Implementation(
                    f"{name}, {attention}",
                    partial(_bind, kind == "ours", attention, size, options.device),
                    kind=kind,
                    # Eager holds the scores, their float32 softmax and its rounded copy.
                    need=size.shape.q_heads * size.tokens**2 * 10 if attention == "eager" else 0,
                    late=attention not in ("sdpa", "eager"),
                    labels=installed("flash_attn") if "flash" in attention else {},
                )
            )
    found.append(Implementation("no rotary", partial(_without_rotary, size.shape), kind="roofline"))
    return found


def _bind(ours: bool, implementation: str, size: Size, device: torch.device, block: Block):
    model = models.with_attention(block.model, implementation)
    model = models.enabled(model) if ours else model
    return block.call(model, _mask(implementation, size, device))


def _without_rotary(shape, block: Block) -> Callable[[], torch.Tensor]:
    attention = block.model.model.layers[0].self_attn
    grouped = shape.q_heads != shape.k_heads

    def call() -> torch.Tensor:
        q, k, v = (
            p(block.x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return attention.o_proj(out.transpose(1, 2).flatten(2))

    return call


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="LLaMA's attention block",
    cases=cases,
    sizes={
        "cpu": ["tiny-256: 8k 16k 1k 4k"],
        "cuda": ["Llama-3-8B LLaMA2-7B: 8k 16k", "Llama-3-8B: 1k 4k 32k"],
        "quick": ["tiny-256: 1k"],
    },
    share={"cpu": 12, "cuda": 11},
    baselines=ATTENTION[1:],
    sources=MODELS,
)
