"""LLaMA's attention block (projections, rotary, attention, output) with each implementation of attention.

Stock and enabled blocks share their weights. The roofline is the four projections and PyTorch's attention alone,
without any rotary step.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask
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
    """A layer's attention and its input ``[1, S, hidden]``."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.model = models.build(size, 1, device)
        self.attention = self.model.model.layers[0].self_attn
        self.x = random(1, size.tokens, size.shape.hidden, dtype=DTYPES[size.dtype], device=device)
        self.position_ids = torch.arange(size.tokens, device=device)[None]

    def bind(self, implementation: str, ours: bool) -> Callable[[], torch.Tensor]:
        """The block with that attention, stock or enabled, its tables made before (once for all layers of a model)."""
        model = models.copied(self.model)
        model.config._attn_implementation = implementation
        model = models.enabled(model) if ours else model
        attention, mask = model.model.layers[0].self_attn, self._mask(implementation)
        tables = model.model.rotary_emb(self.x, self.position_ids)
        return lambda: attention(self.x, position_embeddings=tables, attention_mask=mask)[0]

    def _mask(self, implementation: str) -> Any:
        """What the model would hand to that implementation for one causal sequence."""
        more = {"device": self.x.device}
        sizes = [self.size.tokens] * 2
        if implementation == "eager":
            lowest = torch.finfo(self.x.dtype).min
            return torch.full([1, 1, *sizes], lowest, dtype=self.x.dtype, **more).triu_(1)
        if implementation == "flex_attention":
            return create_block_mask(lambda b, h, q, k: q >= k, None, None, *sizes, **more)
        return None

    def without_rotary(self) -> Callable[[], torch.Tensor]:
        """The four projections and PyTorch's attention."""
        attention, shape = self.attention, self.size.shape
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        options = {"is_causal": True, "enable_gqa": shape.q_heads != shape.k_heads}

        def call() -> torch.Tensor:
            q, k, v = (p(self.x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for p in projections)
            out = functional.scaled_dot_product_attention(q, k, v, **options)
            return attention.o_proj(out.transpose(1, 2).flatten(2))

        return call

    def exact(self, tokens: torch.Tensor) -> torch.Tensor:
        """The block's output at some tokens, in float64 from its weights."""
        shape, x = self.size.shape, self.x[0].double()
        angles = shape.angles(1, torch.float32, tokens.device)

        def project(rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
            return (rows @ module.weight.detach().double().T).unflatten(-1, (-1, shape.head_dim))

        q = rotated(project(x[tokens], self.attention.q_proj), *angles.exact(tokens)).transpose(0, 1)
        k = rotated(project(x, self.attention.k_proj), *angles.exact(self.position_ids[0])).transpose(0, 1)
        v, groups = project(x, self.attention.v_proj), shape.q_heads // shape.k_heads
        seen = tokens[:, None] >= self.position_ids
        heads = []
        # A head at a time: all scores in float64 would not fit.
        for head in range(shape.q_heads):
            scores = q[head] @ k[head // groups].T * shape.head_dim**-0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // groups])
        return torch.cat(heads, -1) @ self.attention.o_proj.weight.detach().double().T


def _fa4(module: nn.Module, q, k, v, attention_mask, scaling: float | None = None, **_: Any):
    """flash-attn-4 behind the signature of transformers' attention functions."""
    attention = importlib.import_module("flash_attn.cute").flash_attn_func
    out = attention(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scaling, causal=True)
    return (out[0] if isinstance(out, tuple) else out), None


AttentionInterface.register(FA4, _fa4)


def unavailable(implementation: str, size: Size, options: Options) -> str | None:
    """Why that implementation cannot run here, or None."""
    on_gpu = options.device.type == "cuda"
    if implementation == "eager" and not on_gpu and size.tokens > 4096 and options.baselines is None:
        return "takes seconds at this length on a CPU: ask with --baselines eager"
    if implementation in ("sdpa", "eager") or (implementation == "flex_attention" and on_gpu):
        return None
    if not on_gpu:
        return "needs a GPU"
    if implementation == FA4 and torch.cuda.get_device_capability(options.device)[0] < 9:
        return "needs Hopper or later"
    return missing("flash_attn.cute" if implementation == FA4 else "flash_attn.flash_attn_interface")


def implementations(size: Size, options: Options, block: Block) -> list[Implementation | Skipped]:
    """Stock and enabled, with each implementation of attention."""
    found: list[Implementation | Skipped] = []
    for name in (name for name in ATTENTION if name == "sdpa" or options.wants(name)):
        if reason := unavailable(name, size, options):
            found.append(Skipped(name, reason))
            continue
        more = {
            # Eager holds the scores, their float32 softmax and its rounded copy.
            "need": size.shape.q_heads * size.tokens**2 * 10 if name == "eager" else 0,
            "late": name not in ("sdpa", "eager"),
            "labels": installed("flash_attn") if "flash" in name else {},
        }
        stock = "reference" if name == "sdpa" else "baseline"
        for who, kind, ours in (("huggingface", stock, False), (models.ENABLED, "ours", True)):
            bind = partial(Block.bind, implementation=name, ours=ours)
            found.append(Implementation(f"{who}, {name}", bind, kind, **more))
    return [*found, Implementation("no rotary", Block.without_rotary, "roofline")]


def cases(size: Size, options: Options) -> list[Case]:
    shape, dtype = size.shape, DTYPES[size.dtype]
    tokens, width = checked_tokens(size.tokens, options.device), sum(shape.widths) + shape.widths[0]
    case = Case(
        name=str(size),
        inputs=cache(lambda: Block(size, options.device)),
        implementations=partial(implementations, size, options),
        exact=lambda block: [block.exact(tokens)],
        pick=lambda out: [out[0, tokens]],
        # A softmax of rounded scores, and the output's product after it.
        tolerance=2 * TOLERANCES[dtype],
        bytes=(size.tokens * (2 * shape.hidden + 2 * width) + shape.hidden * width) * dtype.itemsize,
        need=models.parameters_bytes(size, 1) + 12 * size.tokens * width * dtype.itemsize,
        labels=size.labels,
    )
    return [case]


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
    products=True,
    baselines=ATTENTION[1:],
    sources=MODELS,
)
