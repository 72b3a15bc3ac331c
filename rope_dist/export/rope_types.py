"""Frequencies of each ``rope_type`` as serving engines compute them, in the order of their float32 operations.

They repeat ``rope_dist/strategies/formulas.py`` on purpose: that computes factors in float64 and defines plans, these
round as the engines do, and exports are compared by them.

Where engines differ only in what they read (defaults, keys that they ignore), they share a function here. What each one
reads is in ``engines.py``. Frequencies are ``[rotary_dim / 2]`` float32, radians per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..strategies import default_inv_freq


def linear(theta: float, rotary_dim: int, factor: float) -> torch.Tensor:
    """Position interpolation: every frequency divided by ``factor``."""
    return default_inv_freq(theta, rotary_dim) / factor


def longrope(theta: float, rotary_dim: int, factors: Sequence[float]) -> torch.Tensor:
    """A factor for each pair; ``ValueError`` if there is another number of them."""
    given = torch.tensor(factors, dtype=torch.float32)
    if given.shape != (rotary_dim // 2,):
        raise ValueError(f"there are {given.numel()} factors for {rotary_dim // 2} rotary pairs")
    return default_inv_freq(theta, rotary_dim, given)


def longrope_scaling(factor: float, original: int) -> float:
    """The scaling of cos and sin that engines derive for a longrope."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn(
    theta: float,
    rotary_dim: int,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
    extrapolation_factor: float = 1,
) -> torch.Tensor:
    """YaRN of transformers, vLLM, SGLang, TensorRT-LLM and ExLlamaV3."""
    wavelengths = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    kept = (1 - yarn_ramp(theta, rotary_dim, original, beta_fast, beta_slow, truncate)) * extrapolation_factor
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def yarn_mlx(
    theta: float, rotary_dim: int, factor: float, original: int, *, beta_fast: float, beta_slow: float
) -> torch.Tensor:
    """YaRN of mlx-lm, which mixes wavelengths and always rounds the bounds of the ramp."""
    trained = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    scaled = factor * trained
    kept = 1.0 - yarn_ramp(theta, rotary_dim, original, beta_fast, beta_slow, True)
    return 1.0 / ((scaled * trained) / (scaled * kept + trained * (1 - kept)))


def yarn_ramp(
    theta: float, rotary_dim: int, original: int, beta_fast: float, beta_slow: float, truncate: bool
) -> torch.Tensor:
    """``[rotary_dim / 2]``: 0 where a frequency is kept, 1 where it is divided by the factor."""
    low, high = (
        (rotary_dim * math.log(original / (periods * 2 * math.pi))) / (2 * math.log(theta))
        for periods in (beta_fast, beta_slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scaling of cos and sin."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def llama3(
    plain: torch.Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original: int
) -> torch.Tensor:
    """Llama 3.1's scaling of transformers, vLLM, SGLang, TensorRT-LLM and ExLlamaV3, from the plain frequencies."""
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    slow = wavelengths > original / low_freq_factor
    fast = wavelengths < original / high_freq_factor
    return torch.where(fast, plain, torch.where(slow, plain / factor, mixed))


def llama3_mlx(
    theta: float,
    rotary_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original: int,
) -> torch.Tensor:
    """Llama 3.1's scaling of mlx-lm, which scales wavelengths."""
    wavelengths = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    tokens = 2 * math.pi * wavelengths
    scaled = torch.where(tokens > original / low_freq_factor, wavelengths * factor, wavelengths)
    smooth = (original / tokens - low_freq_factor) / (high_freq_factor - low_freq_factor)
    medium = (tokens > original / high_freq_factor) & (tokens < original / low_freq_factor)
    return 1.0 / torch.where(medium, scaled / ((1 - smooth) / factor + smooth), scaled)


def dynamic(theta: float, rotary_dim: int, factor: float, length: float, trained: int) -> torch.Tensor:
    """Dynamic NTK at ``length`` tokens of a model of ``trained`` tokens."""
    base = theta * ((factor * length / trained) - (factor - 1)) ** (rotary_dim / (rotary_dim - 2))
    return default_inv_freq(base, rotary_dim)


def dynamic_alpha(theta: float, rotary_dim: int, alpha: float) -> torch.Tensor:
    """Hunyuan's ``dynamic`` with an ``alpha``: the same for every length."""
    return default_inv_freq(theta * alpha ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


def ntk(theta: float, rotary_dim: int, factor: float, mixed_b: float | None) -> torch.Tensor:
    """vLLM's ``ntk``: fixed NTK, or mixed by ``mixed_b``."""
    if mixed_b is None:
        return default_inv_freq(theta * factor, rotary_dim) / factor ** (2 / rotary_dim)
    rate = torch.tensor(factor).log() / (rotary_dim / 2) ** mixed_b
    return (
        default_inv_freq(theta, rotary_dim)
        / (rate * torch.arange(1, rotary_dim // 2 + 1).float() ** mixed_b).exp()
    )


def proportional(theta: float, head_dim: int, rotary_dim: int, factor: float = 1.0) -> torch.Tensor:
    """Gemma 4: ``[head_dim / 2]``, zero for the pairs that do not rotate; exponents relative to the whole head."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / head_dim
    still = torch.zeros((head_dim - rotary_dim) // 2)
    return torch.cat((1.0 / theta**exponents, still)) / factor
