"""Keys of a cache corrected to other frequencies, against keys that were rotated by those at once."""

from __future__ import annotations

import pytest
import torch

from rope_dist import ops
from rope_dist.ops import fixed_point

OLD = 10000.0 ** (-torch.arange(16) / 16)
NEW = OLD / torch.linspace(1, 4, 16)


def test_the_difference_is_exact():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randint(-(2**31), 2**31, (2, 500), generator=generator).int() for _ in range(2))

    def values(words: torch.Tensor) -> list[int]:
        return [upper * 2**32 + lower for upper, lower in zip(*words.tolist(), strict=True)]

    found = values(fixed_point.difference(new, old))
    assert all((d - (n - o)) % 2**64 == 0 for d, n, o in zip(found, values(new), values(old), strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_rotated_by_the_new_frequencies(backend, device, dtype, interleaved):
    k = torch.randn(2, 9, 3, 40, device=device, dtype=dtype)
    at = torch.randint(-1_000_000, 1_000_000, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    options = {"interleaved": interleaved}
    exact, _ = ops.rotary_at(k.double(), None, NEW.to(device), at, attention_scaling=1.5, **options)
    # As a Hugging Face cache holds them: [B, H, S, D].
    cache = (
        ops.rotary_at(k, None, OLD.to(device), at, attention_scaling=1.2, **options)[0]
        .transpose(1, 2)
        .contiguous()
    )
    pointer = cache.data_ptr()
    for _ in range(2):  # the second one takes the cached launch
        keys = cache.clone()
        out = ops.rerotate_(
            keys.transpose(1, 2), OLD.to(device), NEW.to(device), at, attention_scaling=1.5 / 1.2, **options
        )
        assert out.data_ptr() == keys.data_ptr()
        error = (keys.transpose(1, 2).double() - exact).abs()
        # Rounded twice; of a pair as long as the key.
        bound = 3 * torch.finfo(dtype).eps * 1.5 * k.double().norm(dim=-1, keepdim=True)
        assert (error <= bound).all()
    assert cache.data_ptr() == pointer
    assert (keys.transpose(1, 2)[..., 32:] == k[..., 32:]).all()


def test_packed_sequences(backend, device):
    k = torch.randn(10, 2, 32, device=device)
    bounds = torch.tensor([0, 4, 10], device=device)
    rotated, _ = ops.rotary_at(k, None, OLD.to(device), cu_seqlens=bounds)
    ops.rerotate_(rotated, OLD.to(device), NEW.to(device), cu_seqlens=bounds)
    torch.testing.assert_close(rotated, ops.rotary_at(k, None, NEW.to(device), cu_seqlens=bounds)[0])


def test_frequencies_that_do_not_belong_together():
    with pytest.raises(ValueError, match="one shape and dtype"):
        ops.rerotate_(torch.randn(1, 3, 2, 32), OLD, NEW[:8])
    with pytest.raises(ValueError, match="one shape and dtype"):
        ops.rerotate_(torch.randn(1, 3, 2, 32), OLD, NEW.double())
