"""Keys in the caches of models with dynamic plans: whatever the pieces, those of the stage that the text is in."""

import pytest
import torch
from helpers.growing import (
    LENGTH,
    assert_keys,
    first_keys,
    grow,
    grown_family,
    text,
    whole_keys,
)
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
