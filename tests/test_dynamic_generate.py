"""generate() of models with dynamic plans, through several stages."""

import copy

import pytest
import torch
from helpers.growing import (
    LENGTH,
    PADDING,
    assert_keys,
    cache_argument,
    dynamic_of,
    family,
    first_keys,
    grow,
    grown_family,
    padded_positions,
    read,
    static_cache,
    stock_at,
    text,
    whole_family,
    written,
)
from transformers import DynamicCache

import rope_dist
from rope_dist.hf.cache_record import record_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def llama():
    return grown_family("llama")


class AsReadWhole:
    """A logits processor that compares the first keys of the cache, now and then, with those of tokens read whole."""

    def __init__(self, cache, name="llama", padding=None):
        self.cache, self.name, self.padding, self.lengths = cache, name, padding, []

    def __call__(self, input_ids, scores):
        model, _ = grown_family(self.name)
        self.lengths.append(input_ids.shape[1])
        if input_ids.shape[1] % 5:
            return scores
        ids = input_ids[:, : self.cache.get_seq_length()]
        positions = None if self.padding is None else padded_positions(ids, self.padding)
        _, whole = grow(whole_family(self.name, record_of(self.cache).stage), ids, (), positions=positions)
        assert_keys(first_keys(model, self.cache), first_keys(model, whole))
        return scores


class TestGenerate:
    """Through several stages, looking at the keys of each step."""

    def generate(self, model, ids, tokens, **options):
        options = {
            "do_sample": False,
            "max_new_tokens": tokens,
            "eos_token_id": None,
            "pad_token_id": 0,
            **options,
        }
        return model.generate(ids, **options)

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_left_padding(self, kind):
        model, _ = llama()
        ids = text(61, rows=4)
        mask = torch.ones_like(ids)
        for row, padding in enumerate(PADDING):
            ids[row, :padding], mask[row, :padding] = 0, 0
        cache = DynamicCache() if kind == "dynamic" else static_cache()
        look = AsReadWhole(cache, padding=PADDING)
        options = {"attention_mask": mask, cache_argument(model): cache, "logits_processor": [look]}
        self.generate(model, ids, 22, disable_compile=True, **options)
        assert look.lengths[-1] == 82
        assert record_of(cache).stage == 2

    @pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
    def test_beams(self, name):
        model, _ = grown_family(name)
        cache = DynamicCache()
        look = AsReadWhole(cache, name)
        options = {"num_beams": 3, cache_argument(model): cache, "logits_processor": [look]}
        self.generate(model, text(61), 22, **options)
        assert cache.layers[0].keys.shape[0] == 6
        assert record_of(cache).stage == 2

    def test_several_samples_of_each_prompt(self):
        model, _ = llama()
        torch.manual_seed(0)
        cache = DynamicCache()
        look = AsReadWhole(cache)
        options = {"num_return_sequences": 3, "do_sample": True, cache_argument(model): cache}
        self.generate(model, text(61), 22, logits_processor=[look], **options)
        assert record_of(cache).stage == 2

    @pytest.mark.parametrize("assistant", ["prompt lookup", "another model", "a dynamic model"])
    @pytest.mark.parametrize("at_once", [False, True])
    def test_assisted(self, at_once, assistant, make_llama):
        """Tokens and keys are those of greedy decoding, whatever was rolled back.

        Where a few tokens are read at once the last of them decide the stage of all: tokens can only be equal where
        that changes none, as in this model, whose weights are small, or in one stage (``at_once``).
        """
        stock = family("llama") if at_once else make_llama()
        model, plan = dynamic_of(stock)
        ids = text(18, rows=1).repeat(1, 3)
        helper = copy.deepcopy(stock)  # often wrong
        noise = torch.randn(helper.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        helper.lm_head.weight += 0.5 * helper.lm_head.weight.std() * noise
        if assistant == "a dynamic model":
            rope_dist.enable(helper, factor=4, dynamic=True)
        cache, calls = DynamicCache(), []
        model.model.register_forward_pre_hook(lambda *_: calls.append(cache.get_seq_length()))
        options = (
            {"prompt_lookup_num_tokens": 4} if assistant == "prompt lookup" else {"assistant_model": helper}
        )
        options |= {cache_argument(model): cache, "eos_token_id": 1000}  # transformers 5.6 takes no None
        with rope_dist.expect_length(120 if at_once else 1):
            expected = self.generate(model, ids, 50)
            calls.clear()
            found = self.generate(model, ids, 50, **options)
        assert torch.equal(found, expected)
        assert len(calls) < 50  # several tokens a call
        left = cache.get_seq_length()
        assert record_of(cache).stage == 3
        whole = stock_at(stock, plan, 120)
        assert_keys(written(cache), written(read(whole, found[:, :left])[1]))

    def test_without_a_cache(self):
        model, plan = llama()
        ids = text(LENGTH - 3)
        found = self.generate(model, ids, 8, use_cache=False)
        for tokens in range(LENGTH - 3, LENGTH + 5):
            logits = stock_at(family("llama"), plan, tokens)(found[:, :tokens]).logits
            assert torch.equal(logits[:, -1].argmax(-1), found[:, tokens])
