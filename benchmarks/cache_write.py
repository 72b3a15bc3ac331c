"""Rotary with the key/value cache write: one layer's queries, keys and values, to a paged cache of blocks of 16.

The cache is of the model's type and of float8. "Hugging Face" are its rotary function and ``index_copy_``, as its
static cache has it; "rotary, then writes" is this package's rotary kernel in place with the same copies. The roofline
copies the bytes that have to be moved.
"""

import torch

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, Angles, Heads, checked_tokens, huggingface, random, rotated

from .baselines import COMPILED, missing
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation, Skipped
from .shapes import DTYPES

BLOCK = 16
FP8 = torch.float8_e4m3fn
SCALE = 0.02
FP8_TOLERANCE = 6e-2
"""Three bits of a number are stored: it is off by 3% at the root mean square."""
VLLM = "vLLM"
FLASHINFER = "FlashInfer"


class Layer(Heads):
    """Heads with values ``v``, caches of twice as many entries, and the entry of every token, at random."""

    def __init__(self, size: Size, cache: torch.dtype, device: torch.device) -> None:
        shape, dtype = size.shape, DTYPES[size.dtype]
        super().__init__(shape.heads, shape.head_dim, size.tokens, dtype, device)
        self.v = random(1, size.tokens, shape.k_heads, shape.head_dim, dtype=dtype, device=device, seed=2)
        blocks = 2 * -(-size.tokens // BLOCK)
        self.blocks = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(device)
        index = torch.arange(size.tokens, device=device)
        self.slots = self.blocks[index // BLOCK] * BLOCK + index % BLOCK
        self.caches = [
            torch.zeros(blocks, BLOCK, shape.k_heads, shape.head_dim, device=device).to(cache)
            for _ in range(2)
        ]

    def reset(self) -> None:
        """Undo what a call changed: what one writes must not be found by the check of the next."""
        super().reset()
        for cache in self.caches:
            cache.view(torch.uint8).zero_()

    def stored(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What the caches have of those tokens, in float32."""
        found = [
            cache.view(torch.uint8).flatten(0, 1)[self.slots[tokens]].view(cache.dtype)
            for cache in self.caches
        ]
        return [x.float() * (SCALE if x.dtype == FP8 else 1.0) for x in found]


def cases(size: Size, options: Options) -> list[Case]:
    return [case(size, options, cache) for cache in (DTYPES[size.dtype], FP8)]


def case(size: Size, options: Options, cache: torch.dtype) -> Case:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    q_width, k_width = (size.tokens * heads * shape.head_dim for heads in shape.heads)
    tokens = checked_tokens(size.tokens, device)

    def exact(x: Layer) -> list[torch.Tensor]:
        angles = shape.angles(1, dtype, device).exact(tokens)
        return [*(rotated(y[0, tokens], *angles) for y in x.before), x.v[0, tokens].double()]

    fp8 = cache == FP8
    moved = 2 * (q_width + k_width) * dtype.itemsize + 2 * k_width * cache.itemsize
    return Case(
        name=f"{size}, float8" if fp8 else str(size),
        inputs=lambda: Layer(size, cache, device),
        implementations=lambda x: implementations(size, options, fp8),
        exact=exact,
        # Queries, and the layer whose caches were written.
        pick=lambda outputs: [outputs[0][0, tokens], *outputs[1].stored(tokens)],
        tolerance=FP8_TOLERANCE if fp8 else TOLERANCES[dtype],
        bytes=moved,
        need=10 * moved,
        labels={**size.labels, "cache": str(cache).removeprefix("torch.")},
    )


def implementations(size: Size, options: Options, fp8: bool) -> list[Implementation | Skipped]:
    angles = size.shape.angles(size.tokens, DTYPES[size.dtype], options.device)
    scales = {"k_scale": SCALE, "v_scale": SCALE} if fp8 else {}
    at = {"inv_freq": angles.inv_freq_q64, "position_ids": angles.position_ids}

    def fused(x: Layer):
        return lambda: (
            ops.rotary_write_cache(x.q, x.k, x.v, *x.caches, x.slots, inplace=True, **at, **scales),
            x,
        )

    def write(k, v, caches, slots) -> None:
        for new, cache in zip((k, v), caches, strict=True):
            if fp8:
                new = (new.float() / SCALE).clamp(-448, 448).to(FP8).view(torch.uint8)
            cache.view(new.dtype).flatten(0, 1).index_copy_(0, slots, new[0])

    def stock(q, k, v, caches, slots) -> torch.Tensor:
        q, k = huggingface(q, k, angles)
        write(k, v, caches, slots)
        return q

    def apart(x: Layer):
        def call():
            q, k = ops.rotary_at(x.q, x.k, **at, inplace=True)
            write(k, x.v, x.caches, x.slots)
            return q, x

        return call

    def copy(x: Layer):
        # As many bytes as are read and written; of 8 bits half of what is read.
        sources = [
            x.q,
            *(y.flatten().view(c.dtype)[: y.numel()] for y, c in zip((x.k, x.v), x.caches, strict=True)),
        ]
        sources = [y.view(torch.uint8) for y in sources]
        targets = [torch.empty_like(y) for y in sources]
        return lambda: [a.copy_(b) for a, b in zip(targets, sources, strict=True)]

    found = [
        Implementation("rope_dist, one launch", fused, kind="ours"),
        Implementation("rotary, then writes", apart),
        Implementation(
            HUGGINGFACE, lambda x: lambda: (stock(x.q, x.k, x.v, x.caches, x.slots), x), kind="reference"
        ),
        Implementation("copy", copy, kind="roofline"),
    ]
    if options.wants(COMPILED):
        compiled = torch.compile(stock, dynamic=False)
        found.append(
            Implementation(
                COMPILED, lambda x: lambda: (compiled(x.q, x.k, x.v, x.caches, x.slots), x), late=True
            )
        )
    if options.wants(VLLM):
        found.append(vllm(options, angles, fp8))
    if options.wants(FLASHINFER):
        found.append(flashinfer(options, angles, fp8))
    return found


def vllm(options: Options, angles: Angles, fp8: bool) -> Implementation | Skipped:
    """vLLM's two kernels: rotary in place, then the write."""
    if reason := unavailable(options, "vllm._custom_ops"):
        return Skipped(VLLM, reason)
    from vllm._custom_ops import reshape_and_cache_flash, rotary_embedding

    positions, table = angles.position_ids.flatten(), torch.cat((angles.cos[0], angles.sin[0]), -1)
    scale = torch.tensor(SCALE if fp8 else 1.0, device=options.device)

    def make(x: Layer):
        caches = [cache.view(torch.uint8) if fp8 else cache for cache in x.caches]
        flat, typed = [y[0].flatten(1) for y in (x.q, x.k)], table.to(x.q.dtype)

        def call():
            rotary_embedding(positions, *flat, x.q.shape[-1], typed, True)
            reshape_and_cache_flash(x.k[0], x.v[0], *caches, x.slots, "fp8" if fp8 else "auto", scale, scale)
            return x.q, x

        return call

    return Implementation(VLLM, make, late=True)


def flashinfer(options: Options, angles: Angles, fp8: bool) -> Implementation | Skipped:
    """FlashInfer's two kernels, likewise; its pages are the blocks of the one sequence."""
    if fp8:
        return Skipped(FLASHINFER, "its kernel for 8 bits rounds the queries too")
    if reason := unavailable(options, "flashinfer"):
        return Skipped(FLASHINFER, reason)
    from flashinfer import append_paged_kv_cache, apply_rope_with_cos_sin_cache_inplace

    positions, table = angles.position_ids.flatten().int(), torch.cat((angles.cos[0], angles.sin[0]), -1)

    def make(x: Layer):
        flat, pages = [y[0].flatten(1) for y in (x.q, x.k)], -(-len(positions) // BLOCK)
        integers = [torch.tensor(n, dtype=torch.int32, device=options.device) for n in ([0, pages], [BLOCK])]
        blocks, sequence = x.blocks[:pages].int(), torch.zeros_like(positions)

        def call():
            apply_rope_with_cos_sin_cache_inplace(positions, *flat, x.q.shape[-1], table, is_neox=True)
            append_paged_kv_cache(
                x.k[0], x.v[0], sequence, positions, tuple(x.caches), blocks, integers[0], integers[1]
            )
            return x.q, x

        return call

    return Implementation(FLASHINFER, make, late=True)


def unavailable(options: Options, module: str) -> str | None:
    return "needs a GPU" if options.device.type != "cuda" else missing(module)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Rotary with the cache write",
    cases=cases,
    sizes={
        "cpu": ["Llama-3-8B: 8k"],
        "cuda": ["Llama-3-8B LLaMA2-7B: 8k 128", "Llama-3-8B: 1 16 1k"],
        "quick": ["SmolLM2-135M: 64"],
    },
    share={"cuda": 8},
    baselines=(COMPILED, VLLM, FLASHINFER),
)
