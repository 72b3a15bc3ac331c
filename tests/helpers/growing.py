"""Texts that are read in pieces, and stock models that read them whole."""

from __future__ import annotations

import copy
import functools
import inspect

import torch
from torch import nn
from transformers import StaticCache

import rope_dist
from helpers.tiny_models import tiny_model
from rope_dist import DynamicPlan

LENGTH = 64
"""Tokens that tiny models were trained to read."""


def text(tokens: int, rows: int = 2, seed: int = 1) -> torch.Tensor:
    """Token ids ``[rows, tokens]`` of tiny models; a longer text of one seed does not begin as a shorter one does."""
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def cache_argument(model: nn.Module) -> str:
    """What the installed transformers calls the cache of a model."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def read(model, ids, cache=None, **inputs):
    """Logits of a call, and the cache, which is made where there is none."""
    if cache is not None:
        inputs[cache_argument(model)] = cache
    output = model(ids, use_cache=True, **inputs)
    return output.logits, output[cache_argument(model)]


def grow(model, ids, pieces, cache=None, start=0, positions=None):
    """Read ``ids`` from ``start`` on in pieces, the last one being what is left: logits and the cache.

    Args:
        positions: ``[B, T]`` of the tokens of all of ``ids``; those of padding are 0.
    """
    logits = []
    for piece in (*pieces, ids.shape[1]):
        end = min(start + piece, ids.shape[1])
        if end > start:
            inputs = {}
            if positions is not None:
                mask = torch.ones_like(ids[:, :end])
                mask[:, :-1] = (positions[:, 1:end] > 0).long() if end > 1 else mask[:, :-1]
                inputs = {"position_ids": positions[:, start:end], "attention_mask": mask}
            made, cache = read(model, ids[:, start:end], cache, **inputs)
            logits.append(made)
        start = max(start, end)
    return torch.cat(logits, dim=1) if logits else None, cache


def padded_positions(ids: torch.Tensor, padding: list[int]) -> torch.Tensor:
    """Positions ``[B, T]`` of rows that begin with so much padding."""
    steps = torch.arange(ids.shape[1])
    return torch.stack([(steps - some).clamp(min=0) for some in padding])


def dynamic_of(model: nn.Module, **options) -> tuple[nn.Module, DynamicPlan]:
    """A copy of a stock model, enabled with a dynamic plan, 4 times the trained length unless told otherwise."""
    enabled = copy.deepcopy(model)
    if not {"factor", "target_length", "stages", "plan"} & options.keys():
        options["factor"] = 4
    return enabled, rope_dist.enable(enabled, dynamic=True, **options).plan


def stock_at(model: nn.Module, plan: DynamicPlan, length: int) -> nn.Module:
    """A stock model, built anew, that reads every text by the frequencies of the stage for ``length`` tokens."""
    config = copy.deepcopy(model.config)
    if plan.stage(length):
        config.get_text_config(decoder=True).__dict__.update(plan.at(length).config_overrides(model.config))
    stock = type(model)(config).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def growth_of(model: nn.Module):
    """What the decoder of an enabled model keeps of its dynamic plan."""
    return next(m._rope_dist_growth for m in model.modules() if "_rope_dist_growth" in m.__dict__)


def first_keys(model: nn.Module, cache) -> torch.Tensor:
    """``[B, H, T, D]`` of the first layer whose keys a dynamic model corrects: they depend on no earlier rotation."""
    growth = growth_of(model)
    index = min(growth.layers)
    return written(cache, index, growth.layers[index].tensor)


def written(cache, index: int = 0, tensor: str = "keys") -> torch.Tensor:
    """What a layer of a cache has been given: of a static one, without its room."""
    layer = cache.layers[index]
    return getattr(layer, tensor)[:, :, : int(cache.get_seq_length(index))]


@functools.cache
def family(name: str, **changes) -> nn.Module:
    """A stock model, not to be changed."""
    return tiny_model(name, **changes)


def assert_keys(found, expected, tolerance=1e-6):
    """Equal to within ``tolerance`` of the largest."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@functools.cache
def _grown_family(name, **changes):
    return dynamic_of(family(name, **changes))


def grown_family(name, **changes):
    """A dynamic model and its plan."""
    model, plan = _grown_family(name, **changes)
    rope_dist.enable(model, plan=plan)  # again, where another test has disabled every model
    return model, plan


@functools.cache
def whole_family(name, stage, **changes):
    _, plan = grown_family(name, **changes)
    return stock_at(family(name, **changes), plan, plan.lengths[stage])


def whole_keys(name, ids, positions=None, **changes):
    """First keys that stock makes of a text that is read whole under the plan of its stage."""
    model, plan = grown_family(name, **changes)
    _, cache = grow(whole_family(name, plan.stage(ids.shape[1]), **changes), ids, (), positions=positions)
    return first_keys(model, cache)


TOKENS = 150  # of the stage for 161: five stages, four changes
CHUNKS = [30, 30, 10, 1, 1, 1, 20, 1, 1, 40, 1]
PADDING = [0, 7, 25, 3]


def static_cache(name="llama", tokens=4 * LENGTH, **changes):
    return StaticCache(family(name, **changes).config, max_cache_len=tokens)
