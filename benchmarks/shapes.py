"""Sizes of well-known models."""

from dataclasses import dataclass

import torch

from rope_dist.bench import Angles

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
    def heads(self) -> tuple[int, int]:
        """Of queries and keys."""
        return self.q_heads, self.k_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        """Rows of the three projections."""
        return self.q_heads * self.head_dim, self.k_heads * self.head_dim, self.k_heads * self.head_dim

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        """``[D/2]`` float32 radians a token."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return 1.0 / self.theta**exponents

    def angles(self, tokens: int, dtype: torch.dtype, device: torch.device) -> Angles:
        """Of positions 0 to ``tokens - 1``."""
        return Angles(self.inv_freq(device), tokens, dtype)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("LLaMA2-7B", 32, 32, 128, 4096, 11008, 32, 32000, 1e4),
        Shape("LLaMA2-13B", 40, 40, 128, 5120, 13824, 40, 32000, 1e4),
        Shape("Llama-3-8B", 32, 8, 128, 4096, 14336, 32, 128256, 5e5),
        Shape("TinyLlama-1.1B", 32, 4, 64, 2048, 5632, 22, 32000, 1e4),
        Shape("SmolLM2-135M", 9, 3, 64, 576, 1536, 30, 49152, 1e5),
        Shape("tiny-256", 4, 2, 64, 256, 704, 2, 4096, 1e4),
        Shape("tiny-64", 4, 2, 16, 64, 176, 2, 4096, 1e4),
    )
}
"""By name; not published are ``tiny-256``, which two CPU cores can read at 16k, and ``tiny-64``, whose arithmetic takes
no time beside its calls."""
