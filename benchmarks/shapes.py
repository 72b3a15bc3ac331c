"""Sizes of well-known models, and random tensors of those sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rope_dist import ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-shaped model, as its published ``config.json`` has them."""

    name: str
    q_heads: int
    k_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    theta: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Rows of the three projections."""
        return self.q_heads * self.head_dim, self.k_heads * self.head_dim, self.k_heads * self.head_dim

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """``[D/2]`` float32 radians a token."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("LLaMA2-7B", 32, 32, 128, 4096, 11008, 32, 32000, 1e4),
        Shape("LLaMA2-13B", 40, 40, 128, 5120, 13824, 40, 32000, 1e4),
        Shape("Llama-3-8B", 32, 8, 128, 4096, 14336, 32, 128256, 5e5),
        Shape("TinyLlama-1.1B", 32, 4, 64, 2048, 5632, 22, 32000, 1e4),
        Shape("SmolLM2-135M", 9, 3, 64, 576, 1536, 30, 49152, 1e5),
        Shape("four heads", 4, 2, 64, 256, 704, 2, 4096, 1e4),
    )
}
"""By name; the last is no published model but one that two CPU cores can read at 16k."""


class Angles:
    """Frequencies and tables of positions ``0 .. tokens - 1``, in every form that a provider takes."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.inv_freq = shape.inv_freq(device)
        self.words = ops.turns(self.inv_freq)
        self.positions = torch.arange(tokens, device=device)[None]
        self.cos, self.sin = ops.cos_sin(self.inv_freq, self.positions)
        # Stock Hugging Face: each pair's value twice, in the model's type.
        self.stock = tuple(torch.cat((t, t), -1).to(dtype) for t in (self.cos, self.sin))

    def exact(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[n, 1, D/2]`` in float64 of the float32 frequencies at those positions."""
        angles = tokens.double()[:, None, None] * self.inv_freq.double()
        return angles.cos(), angles.sin()


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, inverse: bool = False
) -> torch.Tensor:
    """``x`` ``[n, H, D]`` rotated in float64, as a complex product: independent of the operators."""
    half = x.shape[-1] // 2
    pairs = x.double().unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    value = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1))
    value = value * torch.complex(cos, -sin if inverse else sin)
    return torch.stack((value.real, value.imag), dim=axis).flatten(-2)


def checked_tokens(tokens: int, device: torch.device, count: int = 256) -> torch.Tensor:
    """Positions at which results are compared: the first, the last, and others at random."""
    if tokens <= count:
        return torch.arange(tokens, device=device)
    generator = torch.Generator().manual_seed(tokens)
    inner = torch.randperm(tokens - 2, generator=generator)[: count - 2] + 1
    return torch.cat((torch.tensor([0, tokens - 1]), inner)).sort().values.to(device)


def random(
    *sizes: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, the same for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(*sizes, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)
