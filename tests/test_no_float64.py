"""Angles on a device without float64, as Apple's MPS: a stand-in that refuses it, for a machine that has none."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rope_dist.hf.window_calls import Window, Windowing
from rope_dist.ops import fixed_point

MPS = torch.device("mps")


class OnMps(torch.Tensor):
    """A CPU tensor that says it is on MPS. What is computed from it is too, and may not be float64."""

    device = MPS

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        return out.as_subclass(OnMps) if isinstance(out, torch.Tensor) else out


class Moves(TorchFunctionMode):
    """``x.to("mps")`` and ``torch.zeros(..., device="mps")`` give such tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and args[1] == MPS:
            return args[0].as_subclass(OnMps)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == MPS:
            return func(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnMps)
        return func(*args, **kwargs)


def test_the_stand_in_refuses_float64():
    with pytest.raises(TypeError, match="float64"):
        torch.arange(3).as_subclass(OnMps).double()


@pytest.mark.parametrize("far", ["plan", "grouped"])
@pytest.mark.parametrize("of_queries", [False, True])
def test_rotations_beyond_a_window(far, of_queries):
    trained = 1e4 ** -(torch.arange(8) / 8)
    change = fixed_point.to_fixed_point(-0.75 * trained[None])
    windowing = Windowing(Window(20, far), None, trained, trained[None] / 4, change, (1.0,), None)
    positions = torch.arange(0, 1_000_000, 99_999)[None]
    stage = 4 if far == "grouped" else 0
    expected = windowing.rotations(positions, stage, of_queries=of_queries)
    with Moves():
        found = windowing.rotations(positions.as_subclass(OnMps), stage, of_queries=of_queries)
    for one, other in zip(found, expected, strict=True):
        assert one.device == MPS
        assert torch.equal(one.as_subclass(torch.Tensor), other)


def test_fixed_point():
    inv_freq, positions = 1e4 ** -(torch.arange(8) / 8), torch.tensor([[0, 7, 1_000_000]])
    with Moves():
        q64 = fixed_point.to_fixed_point(inv_freq.as_subclass(OnMps))
        cos, sin = fixed_point.tables(q64, positions.as_subclass(OnMps))
    assert q64.device == cos.device == sin.device == MPS
    exact = positions[..., None] * inv_freq.double() % (2 * math.pi)
    torch.testing.assert_close(cos.as_subclass(torch.Tensor).double(), exact.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(sin.as_subclass(torch.Tensor).double(), exact.sin(), rtol=0, atol=2e-7)
