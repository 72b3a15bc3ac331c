"""Keys in the caches of models with dynamic plans: whatever the pieces, those of the stage that the text is in."""

import pytest
import torch
from helpers.growing import (
    LENGTH,
    assert_keys,
    dynamic_of,
    first_keys,
    grow,
    grown_family,
    read,
    stock_at,
    text,
    whole_family,
    whole_keys,
)
from helpers.tiny_models import ROTARY_TYPES, tiny_multimodal
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_dist.hf.cache_record import record_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


FAMILIES = (
    "llama",
    "qwen3",  # norms of queries and keys
    "phi",  # partial
    "stablelm",
    "gpt_neox",
    "cohere",  # interleaved
    "glm",
    "deepseek_v3",  # latent: the rotated part of its keys is where others keep values
    "gemma3_text",  # full layers only
    "smollm3",  # a layer without rotation
    "mistral",  # sliding layers with the frequencies of the others
    "gpt_oss",
)
PIECES = st.lists(st.integers(1, 50), max_size=12)


class TestPieces:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_in_any_pieces_as_read_whole(self, name):
        model, plan = grown_family(name)
        assert plan.lengths[0] == LENGTH
        assert len(plan.lengths) == 7

        @settings(max_examples=5)
        @given(PIECES, st.integers(LENGTH - 4, 4 * LENGTH + 9), st.integers(0, 9))
        def check(pieces, tokens, tail):
            ids = text(tokens)
            _, cache = grow(model, ids[:, : tokens - tail], pieces)
            _, cache = grow(model, ids, [1] * tail, cache, start=tokens - tail)
            assert record_of(cache).stage == plan.stage(tokens)
            assert_keys(first_keys(model, cache), whole_keys(name, ids))

        check()


HYBRIDS = [name for name in ("qwen3_next", "lfm2", "falcon_h1") if name in ROTARY_TYPES]


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_with_other_states(name):
    """As stock's that reads the same pieces: its linear attention depends on them, in some versions by far."""
    model, plan = grown_family(name)
    ids = text(110)
    pieces = [60, 20, 1, 1, 20, 1, 1]
    (_, cache), (_, its) = (grow(m, ids, pieces) for m in (model, whole_family(name, plan.stage(110))))
    assert record_of(cache).stage == 3
    assert_keys(first_keys(model, cache), first_keys(model, its))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_several_position_axes(name):
    """Time, height and width of each token, other ones in each row, which are exchanged on the way."""
    stock = tiny_multimodal(name)
    model, plan = dynamic_of(stock)
    ids = text(100)
    steps = torch.arange(100)
    axes = torch.stack([steps, steps // 3, steps % 9 + steps // 5])
    positions = torch.stack([axes, axes.flip(0)], dim=1)
    _, cache = read(model, ids[:, :60], position_ids=positions[..., :60])
    _, cache = read(model, ids[:, 60:85], cache, position_ids=positions[..., 60:85])
    order = torch.tensor([1, 0])
    cache.reorder_cache(order)
    ids, positions = ids[order], positions[:, order]
    for start in range(85, 100, 5):
        _, cache = read(
            model, ids[:, start : start + 5], cache, position_ids=positions[..., start : start + 5]
        )
    _, whole = read(stock_at(stock, plan, 100), ids, position_ids=positions)
    assert record_of(cache).stage == 2
    assert_keys(first_keys(model, cache), first_keys(model, whole))
