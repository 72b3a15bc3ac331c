"""What a model is that nothing of this package is left in."""

import torch

from rope_dist.hf import enabled_modules


def classes(model):
    return [type(module) for module in model.modules()]


def assert_stock(model, like):
    """Classes, frequencies, config and attributes are those of a stock model."""
    assert classes(model) == classes(like)
    assert not list(enabled_modules(model))
    for (name, a), (_, b) in zip(model.named_buffers(), like.named_buffers(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert model.config.to_dict() == like.config.to_dict()
    for (name, a), (_, b) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys(), name
