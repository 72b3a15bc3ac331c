"""The least time that a GPU can take for a layer's parts, from their bytes and operations."""

from .shapes import SHAPES, Shape
from .tables import markdown

GPUS = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
"""Bytes a second of memory and dense bfloat16 operations a second, of NVIDIA's data sheets (SXM, A100 of 80 GB)."""
BYTES = 2
"""Of an element in bfloat16."""

Stages = tuple[tuple[float, float], ...]


def parts(shape: Shape, tokens: int) -> dict[str, Stages]:
    """Bytes and operations of what runs one after the other, by part."""
    total, heads = sum(shape.widths), sum(shape.heads)
    rotated = tokens * heads * shape.head_dim
    # Queries and keys read and written once, three multiply-adds an element.
    one_pass = (2 * rotated * BYTES, 3 * rotated)
    moved = tokens * (shape.hidden + total) + total * shape.hidden
    product = (moved * BYTES, 2 * tokens * shape.hidden * total)
    packed = (2 * tokens * total * BYTES, 3 * rotated)
    attention = 2 * tokens * (heads + shape.k_heads) * shape.head_dim * BYTES, 2 * tokens**2 * shape.widths[0]
    return {
        "rotary, one pass": (one_pass,),
        # A rotated copy, two products and a sum: each tensor is read or written ten times in all.
        "rotary of Hugging Face": ((5 * one_pass[0], one_pass[1]),),
        "projection with rotary": (product,),
        "projection, then rotary": (product, one_pass),
        "projection with rotary, forward + backward": (product, packed, product, product),
        "causal attention": (attention,),
    }


def seconds(stages: Stages, bandwidth: float, operations: float) -> float:
    """Of each stage what takes longer, moving or computing."""
    return sum(max(moved / bandwidth, done / operations) for moved, done in stages)


def table(model: str = "Llama-3-8B", lengths: tuple[int, ...] = (8192, 16384)) -> str:
    """Predicted milliseconds of one layer, bfloat16."""
    rows = [
        [f"{name}, {tokens // 1024}k", *(f"{seconds(stages, *gpu) * 1e3:.3f}" for gpu in GPUS.values())]
        for tokens in lengths
        for name, stages in parts(SHAPES[model], tokens).items()
    ]
    return (
        markdown(rows, [f"{model}, bf16, predicted ms", *GPUS])
        + "\n\nThe larger of bytes over memory bandwidth and operations over the tensor cores' peak, of NVIDIA's data "
        "sheets: a lower bound, not a measurement."
    )
