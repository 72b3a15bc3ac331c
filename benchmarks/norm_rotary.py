"""RMS norm and rotary: queries and keys of one layer of a model that normalises them, batch 1.

As in ``rotary``; "Hugging Face" are the model's two norms and its rotary function, and "norms, then rotary" are
PyTorch's ``rms_norm`` and this package's rotary kernel in place.
"""

import torch
from torch.nn.functional import rms_norm

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, Heads, checked_tokens, huggingface, random, rotated

from .baselines import COMPILED, missing
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation, Skipped
from .shapes import DTYPES, Shape

EPS = 1e-6
VLLM = "vLLM"
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Qwen3-0.6B", 16, 8, 128, 1024, 3072, 28, 151936, 1e6),
        Shape("Qwen3-8B", 32, 8, 128, 4096, 12288, 36, 151936, 1e6),
        Shape("OLMo-2-7B", 32, 32, 128, 4096, 11008, 32, 100352, 5e5),
    )
}
JOINT = ("OLMo-2-7B",)
"""Models that normalise all heads of a token together."""


def weights(size: Size, device: torch.device) -> list[torch.Tensor]:
    """Of the norms of queries and keys, around 1."""
    shape, dtype = size.shape, DTYPES[size.dtype]
    joint = shape.name in JOINT
    widths = [heads * shape.head_dim if joint else shape.head_dim for heads in shape.heads]
    return [1 + random(n, dtype=dtype, device=device, seed=9 + i, scale=0.1) for i, n in enumerate(widths)]


def cases(size: Size, options: Options) -> list[Case]:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    both = size.tokens * sum(shape.heads) * shape.head_dim * dtype.itemsize
    tokens = checked_tokens(size.tokens, device)

    def exact(x: Heads) -> list[torch.Tensor]:
        angles = shape.angles(1, dtype, device).exact(tokens)
        return [
            rotated(normed(y[0, tokens].double(), w.double()), *angles)
            for y, w in zip(x.before, weights(size, device), strict=True)
        ]

    case = Case(
        name=str(size),
        inputs=lambda: Heads(shape.heads, shape.head_dim, size.tokens, dtype, device),
        implementations=lambda _: implementations(size, options),
        exact=exact,
        pick=lambda outputs: [y[0, tokens] for y in outputs],
        tolerance=TOLERANCES[dtype],
        bytes=2 * both,
        # Two copies with their originals, and Hugging Face's intermediate results, float32 for the norms.
        need=20 * both,
        labels=size.labels,
    )
    return [case]


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of ``[tokens, heads, D]`` by its formula, each head by itself or all together."""
    flat = x if weight.shape[0] == x.shape[-1] else x.flatten(-2)
    flat = flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return flat.view_as(x)


def implementations(size: Size, options: Options) -> list:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    device = options.device
    angles = size.shape.angles(size.tokens, DTYPES[size.dtype], device)
    q_weight, k_weight = weights(size, device)
    modules = [Qwen3RMSNorm(w.shape[0], eps=EPS).to(w) for w in (q_weight, k_weight)]
    for module, weight in zip(modules, (q_weight, k_weight), strict=True):
        module.weight.data.copy_(weight)
    targets: list[torch.Tensor] = []

    def flat(norm, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm(x) if weight.shape[0] == x.shape[-1] else norm(x.flatten(-2)).view_as(x)

    def stock(q: torch.Tensor, k: torch.Tensor):
        return huggingface(flat(modules[0], q, q_weight), flat(modules[1], k, k_weight), angles)

    def fused(inplace: bool):
        def make(x: Heads):
            return lambda: ops.norm_rotary(
                x.q, x.k, q_weight, k_weight, angles.cos, angles.sin, eps=EPS, inplace=inplace
            )

        return make

    def apart(x: Heads):
        def call():
            q, k = (
                flat(lambda y, w=w: rms_norm(y, w.shape, w, EPS), y, w)
                for y, w in ((x.q, q_weight), (x.k, k_weight))
            )
            return ops.rotary(q, k, angles.cos, angles.sin, inplace=True)

        return call

    def copy(x: Heads):
        if not targets:
            targets.extend(torch.empty_like(y) for y in (x.q, x.k))
        return lambda: [target.copy_(y) for target, y in zip(targets, (x.q, x.k), strict=True)]

    def one_pass(x: Heads):
        integers = [torch.zeros_like(y).view(torch.int32) for y in (x.q, x.k)]
        return lambda: [y.add_(1) for y in integers]

    found = [
        Implementation("rope_dist, in place", fused(True), kind="ours"),
        Implementation("rope_dist, new tensors", fused(False), kind="ours"),
        Implementation("norms, then rotary", apart),
        Implementation(HUGGINGFACE, lambda x: lambda: stock(x.q, x.k), kind="reference"),
        Implementation("copy", copy, kind="roofline"),
        Implementation("pass in place", one_pass, kind="roofline"),
    ]
    if options.wants(COMPILED):
        compiled = torch.compile(stock, dynamic=False)
        found.append(Implementation(COMPILED, lambda x: lambda: compiled(x.q, x.k), late=True))
    if options.wants(VLLM):
        found.append(vllm(size, options, angles, q_weight, k_weight))
    return found


def vllm(size: Size, options: Options, angles, q_weight, k_weight) -> Implementation | Skipped:
    """vLLM's kernel, of packed queries, keys and values, in place; here of values without heads."""
    if options.device.type != "cuda":
        return Skipped(VLLM, "needs a GPU")
    if size.shape.name in JOINT:
        return Skipped(VLLM, "its kernel normalises each head by itself")
    if reason := missing("vllm._custom_ops"):
        return Skipped(VLLM, reason)
    from vllm._custom_ops import fused_qk_norm_rope

    shape, table = size.shape, torch.cat((angles.cos[0], angles.sin[0]), -1).to(q_weight.dtype)
    positions = angles.position_ids.flatten()

    def make(x: Heads):
        heads = sum(shape.heads)
        packed = torch.cat((x.q[0], x.k[0]), 1).flatten(1)

        def call():
            fused_qk_norm_rope(
                packed, *shape.heads, 0, shape.head_dim, EPS, q_weight, k_weight, table, True, positions
            )
            return packed.view(1, -1, heads, shape.head_dim).split(shape.heads, 2)

        return call

    return Implementation(VLLM, make, late=True)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Norm and rotary",
    cases=cases,
    sizes={
        "cpu": ["Qwen3-0.6B: 8k: fp32 bf16", "OLMo-2-7B: 8k: fp32", "Qwen3-8B: 8k 16k"],
        "cuda": ["Qwen3-0.6B Qwen3-8B OLMo-2-7B: 8k 16k", "Qwen3-8B: 1k 4k 32k"],
        "quick": ["Qwen3-0.6B: 256: bf16 fp32"],
    },
    share={"cpu": 10, "cuda": 12},
    baselines=(COMPILED, VLLM),
    shapes=SHAPES,
)
