"""Correction of cached keys: those of one layer, batch 1, as Hugging Face's cache holds them, to other frequencies.

"Hugging Face" is its rotary function with tables of the difference, and a copy back into the cache. The roofline is a
pass in place over the same bytes.
"""

import torch

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, Angles, checked_tokens, random, rotated

from .baselines import COMPILED
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation
from .shapes import DTYPES, Shape

FACTOR = 2.0
"""By which the new frequencies are lower than those that the keys were rotated by."""


class Cache:
    """Keys ``[1, heads, tokens, D]``; ``before`` is what they were."""

    def __init__(self, size: Size, device: torch.device) -> None:
        shape = size.shape.k_heads, size.tokens, size.shape.head_dim
        self.before = random(1, *shape, dtype=DTYPES[size.dtype], device=device)
        self.keys = self.before.clone()

    def reset(self) -> None:
        """Undo corrections."""
        self.keys.copy_(self.before)


def correction_bytes(shape: Shape, tokens: int, itemsize: int = 2) -> int:
    """Read and written by one correction of the keys of all layers."""
    return 2 * shape.layers * tokens * shape.widths[1] * itemsize


def decoded_token_bytes(shape: Shape, tokens: int, itemsize: int = 2) -> int:
    """Read for one token that is decoded with that many in the cache: the weights and the cache, keys and values.

    Weights of the embedding that is not the output's are not counted: one row of them is read.
    """
    queries, keys, values = shape.widths
    attention = shape.hidden * (queries + keys + values) + queries * shape.hidden
    layer = attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    weights = shape.layers * layer + shape.hidden + shape.vocabulary * shape.hidden
    return (weights + shape.layers * tokens * (keys + values)) * itemsize


def decoded_tokens(shape: Shape, tokens: int) -> float:
    """As how many decoded tokens' bytes one correction moves."""
    return correction_bytes(shape, tokens) / decoded_token_bytes(shape, tokens)


def remark(shape: Shape, tokens: int) -> str:
    corrected, decoded = correction_bytes(shape, tokens), decoded_token_bytes(shape, tokens)
    return (
        f"one correction of all {shape.layers} layers of {shape.name} at {tokens} tokens moves {corrected / 1e9:.2f} "
        f"GB in bf16, {decoded_tokens(shape, tokens):.2f} of what one decoded token reads ({decoded / 1e9:.1f} GB)"
    )


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    inv_freq = shape.inv_freq(device)
    moved = 2 * size.tokens * shape.widths[1] * dtype.itemsize
    tokens = checked_tokens(size.tokens, device)

    def exact(x: Cache) -> list[torch.Tensor]:
        difference = inv_freq.double() / FACTOR - inv_freq.double()
        angles = tokens.double()[:, None, None] * difference
        return [rotated(x.before[0].transpose(0, 1)[tokens], angles.cos(), angles.sin())]

    case = Case(
        name=str(size),
        inputs=lambda: Cache(size, device),
        implementations=lambda _: implementations(size, options),
        exact=exact,
        pick=lambda keys: [keys[0].transpose(0, 1)[tokens]],
        tolerance=TOLERANCES[dtype],
        bytes=moved,
        # Two copies with their originals, and Hugging Face's intermediate results.
        need=6 * moved,
        labels={**size.labels, "decoded_tokens": decoded_tokens(shape, size.tokens)},
        remark=remark(shape, size.tokens),
    )
    return [case]


def implementations(size: Size, options: Options) -> list[Implementation]:
    inv_freq = size.shape.inv_freq(options.device)
    old, new = (ops.to_fixed_point(x) for x in (inv_freq, inv_freq / FACTOR))
    # Negative ones.
    tables = Angles(inv_freq / FACTOR - inv_freq, size.tokens, DTYPES[size.dtype])

    def ours(x: Cache):
        def call():
            ops.rerotate_(x.keys.transpose(1, 2), old, new, tables.position_ids)
            return x.keys

        return call

    def stock(keys: torch.Tensor) -> torch.Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        # Without queries.
        return keys.copy_(apply_rotary_pos_emb(keys[:, :0], keys, *tables.huggingface)[1])

    def one_pass(x: Cache):
        integers = torch.zeros_like(x.keys).view(torch.int32)
        return lambda: integers.add_(1)

    found = [
        Implementation("rope_dist, in place", ours, kind="ours"),
        Implementation(HUGGINGFACE, lambda x: lambda: stock(x.keys), kind="reference"),
        Implementation("pass in place", one_pass, kind="roofline"),
    ]
    if options.wants(COMPILED):
        compiled = torch.compile(stock, dynamic=False)
        found.append(Implementation(COMPILED, lambda x: lambda: compiled(x.keys), late=True))
    return found


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Correction of cached keys",
    cases=cases,
    sizes={
        "cpu": ["Llama-3-8B: 8k 16k: fp32 bf16"],
        "cuda": ["Llama-3-8B: 8k 16k", "Llama-3-8B: 32k"],
        "quick": ["SmolLM2-135M: 256: bf16 fp32"],
    },
    share={"cpu": 7, "cuda": 4},
    baselines=(COMPILED,),
)
