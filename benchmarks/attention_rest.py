"""Qwen3's attention without its products: what stands between them, as the model runs it, batch 1.

The modules of a stock and an enabled model get random queries, keys and values in place of their projections', and an
attention function that returns what it is given: norms, rotation, transposes and Python are left. Rooflines are a copy
of queries and keys, and a pass over them in place.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Qwen3Config, Qwen3Model
from transformers.modeling_utils import local_torch_dtype

import rope_dist
from rope_dist.bench import Heads, checked_tokens, random, rotated

from . import models
from .baselines import COMPILED
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation
from .norm_rotary import EPS, SHAPES, normed, weights
from .shapes import DTYPES

NOTHING = "without_products"


def _without_products(module: nn.Module, q, k, v, mask=None, **_: Any):
    """Behind the signature of transformers' attention functions: queries ``[B, S, H, D]``, and keys for its weights."""
    return q.transpose(1, 2), k


AttentionInterface.register(NOTHING, _without_products)


class Given(nn.Module):
    """In place of a projection: a tensor that is there already, whatever it is called with."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


class Block(Heads):
    """Queries and keys, and a layer's attention modules, stock and enabled, that get them."""

    def __init__(self, size: Size, device: torch.device) -> None:
        shape, dtype = size.shape, DTYPES[size.dtype]
        super().__init__(shape.heads, shape.head_dim, size.tokens, dtype, device)
        config = Qwen3Config(
            hidden_size=64,  # of the projections, which are replaced
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=shape.q_heads,
            num_key_value_heads=shape.k_heads,
            head_dim=shape.head_dim,
            vocab_size=8,
            rms_norm_eps=EPS,
            max_position_embeddings=size.tokens,
            rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
            attn_implementation=NOTHING,
        )
        with device, local_torch_dtype(dtype):
            self.model = Qwen3Model(config).eval()
        models.float32_frequencies(self.model.rotary_emb, shape)
        attention = self.model.layers[0].self_attn
        for norm, weight in zip((attention.q_norm, attention.k_norm), weights(size, device), strict=True):
            norm.weight.data.copy_(weight)
        self.enabled = copy.deepcopy(self.model)
        rope_dist.enable(self.enabled)
        value = random(1, size.tokens, shape.widths[2], dtype=dtype, device=device, seed=2)
        for model in (self.model, self.enabled):
            attention = model.layers[0].self_attn
            attention.q_proj, attention.k_proj = Given(self.q.flatten(2)), Given(self.k.flatten(2))
            attention.v_proj, attention.o_proj = Given(value), nn.Identity()
        self.x = random(1, size.tokens, 1, dtype=dtype, device=device)
        self.position_ids = torch.arange(size.tokens, device=device)[None]

    def call(self, model: nn.Module):
        """The attention of ``model``; its tables are made before, as they are once for all layers."""
        attention, tables = model.layers[0].self_attn, model.rotary_emb(self.x, self.position_ids)
        return lambda: attention(self.x, position_embeddings=tables, attention_mask=None)


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    both = size.tokens * sum(shape.heads) * shape.head_dim * dtype.itemsize
    tokens = checked_tokens(size.tokens, device)

    def exact(x: Block) -> list[torch.Tensor]:
        angles = shape.angles(1, dtype, device).exact(tokens)
        return [
            rotated(normed(y[0, tokens].double(), w.double()), *angles)
            for y, w in zip(x.before, weights(size, device), strict=True)
        ]

    case = Case(
        name=str(size),
        inputs=lambda: Block(size, device),
        implementations=lambda x: implementations(x, options),
        exact=exact,
        pick=lambda out: [
            out[0][0, tokens].unflatten(-1, (-1, shape.head_dim)),
            out[1][0].transpose(0, 1)[tokens],
        ],
        tolerance=TOLERANCES[dtype],
        bytes=2 * both,
        # As in norm_rotary, and the values.
        need=22 * both,
        labels=size.labels,
    )
    return [case]


def implementations(x: Block, options: Options) -> list[Implementation]:
    targets = [torch.empty_like(y) for y in (x.q, x.k)]

    def one_pass(x: Block):
        integers = [torch.zeros_like(y).view(torch.int32) for y in (x.q, x.k)]
        return lambda: [y.add_(1) for y in integers]

    def copies(x: Block):
        return lambda: [target.copy_(y) for target, y in zip(targets, (x.q, x.k), strict=True)]

    found = [
        Implementation(models.ENABLED, lambda x: x.call(x.enabled), kind="ours"),
        Implementation("huggingface", lambda x: x.call(x.model), kind="reference"),
        Implementation("copy", copies, kind="roofline"),
        Implementation("pass in place", one_pass, kind="roofline"),
    ]
    if options.wants(COMPILED):

        def compiled(x: Block):
            attention = torch.compile(x.model.layers[0].self_attn, dynamic=False)
            tables = x.model.rotary_emb(x.x, x.position_ids)
            return lambda: attention(x.x, position_embeddings=tables, attention_mask=None)

        found.append(Implementation(COMPILED, compiled, late=True))
    return found


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Attention without its products",
    cases=cases,
    sizes={
        "cpu": ["Qwen3-0.6B: 8k 1k 16k: bf16 fp32"],
        "cuda": ["Qwen3-0.6B Qwen3-8B: 8k 16k", "Qwen3-8B: 1k"],
        "quick": ["Qwen3-0.6B: 256: bf16 fp32"],
    },
    share={"cpu": 6, "cuda": 4},
    baselines=(COMPILED,),
    shapes={name: shape for name, shape in SHAPES.items() if name.startswith("Qwen3")},
    sources=MODELS,
)
