"""Exact results in float64, and what it means to equal them."""

from __future__ import annotations

import torch


def frequencies(rotary_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """``[R/2]`` float32, as a model's buffer holds them."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def exact_tables(
    inv_freq: torch.Tensor, positions: torch.Tensor, scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[*positions.shape, R/2]`` in float64, from the product of the float32 frequencies."""
    angles = positions.double()[..., None] * inv_freq.double()
    return angles.cos() * scaling, angles.sin() * scaling


def heads_of(layout: str, batch: int, length: int, heads: int, dim: int, dtype, device) -> torch.Tensor:
    """Random ``[B, S, H, D]`` in one of the layouts that callers have."""
    if layout == "BHSD":
        return torch.randn(batch, heads, length, dim, device=device).to(dtype).transpose(1, 2)
    if layout == "packed":  # a slice of a wider projection, not aligned to its start
        wide = torch.randn(batch, length, heads * dim + 8, device=device).to(dtype)
        return wide[..., 8:].unflatten(-1, (heads, dim))
    if layout == "strided":  # the last axis is not contiguous
        return torch.randn(batch, length, heads, dim, 2, device=device).to(dtype)[..., 0]
    return torch.randn(batch, length, heads, dim, device=device).to(dtype)


def exact(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """``x`` ``[B, S, H, D]`` rotated in float64, written as a complex product: not the code under test."""
    half = cos.shape[-1]
    x = x.double()
    rotated = x[..., : 2 * half]
    pairs = rotated.unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    value = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1))
    value = value * torch.complex(cos.double(), -sin.double() if conjugate else sin.double())[:, :, None]
    pairs = torch.stack((value.real, value.imag), dim=axis).flatten(-2)
    return torch.cat((pairs, x[..., 2 * half :]), dim=-1)


def assert_rounded(
    actual: torch.Tensor, expected: torch.Tensor, few: int = 2, share: float = 2e-4, slack: float = 1.0
) -> None:
    """16-bit ``actual`` is float64 ``expected`` rounded, but for ``few`` + ``share`` of the elements, by one ulp.

    Float32 compares to 1e-6 of the largest element. Where terms cancel, a unit in the last place may be
    smaller than the float32 error of the terms: 3e-7 of the largest element is allowed there. ``slack``
    multiplies both allowances.
    """
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    actual, expected = actual.cpu(), expected.cpu()
    largest = max(1.0, expected.abs().max().item())
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * largest)
        return
    rounded = expected.to(actual.dtype)
    differ = actual != rounded
    found = differ.sum().item() / actual.numel()
    assert differ.sum() <= few + slack * share * actual.numel(), f"{found:.1e} of the elements differ"
    spacing = torch.finfo(actual.dtype).eps * 2.0 ** torch.floor(torch.log2(expected.abs().clamp_min(1e-30)))
    off = (actual.double() - expected).abs() - torch.maximum(spacing, torch.tensor(slack * 3e-7 * largest))
    assert off.max() <= 0, f"an element is {off.max().item()} further off than one unit in the last place"


def at_new_memory(model: torch.nn.Module) -> torch.nn.Module:
    """A loaded model whose weights are where torch puts tensors, not in its mapped file.

    There they begin after a header of any length, and MKL rounds products with one token by the alignment on AVX2.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
