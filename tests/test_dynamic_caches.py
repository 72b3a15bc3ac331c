"""Caches of models with dynamic plans: each kind, its rows, copies, what shortens it, and what others put there."""

import concurrent.futures
import copy
import pickle
import threading

import pytest
import torch
import transformers
from helpers.growing import (
    CHUNKS,
    LENGTH,
    PADDING,
    TOKENS,
    assert_keys,
    dynamic_of,
    family,
    first_keys,
    grow,
    grown_family,
    growth_of,
    padded_positions,
    read,
    static_cache,
    stock_at,
    text,
    whole_family,
    whole_keys,
    written,
)
from transformers import DynamicCache
from transformers.cache_utils import Cache, QuantizedLayer, StaticLayer

import rope_dist
from rope_dist.hf import stages
from rope_dist.hf.cache_record import record_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def llama():
    return grown_family("llama")


class TestKinds:
    """Each kind of cache and layer."""

    @pytest.mark.parametrize("kind", ["none", "dynamic", "without config", "static"])
    def test_full_layers(self, kind):
        caches = {
            "none": lambda: None,
            "dynamic": lambda: DynamicCache(config=family("llama").config),
            "without config": DynamicCache,
            "static": static_cache,
        }
        ids = text(TOKENS)
        logits, cache = grow(llama()[0], ids, CHUNKS, caches[kind]())
        assert record_of(cache).stage == 4
        assert_keys(written(cache), whole_keys("llama", ids))
        if kind == "static":
            assert not cache.layers[0].keys[:, :, TOKENS:].any()  # its room
        expected, _ = grow(llama()[0], ids, CHUNKS)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["mistral", "qwen2"])
    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    @pytest.mark.parametrize("window", [16, 90, 200], ids=["full before", "full between", "never full"])
    def test_sliding_layers(self, name, static, window):
        changes = {"sliding_window": window}
        model, _ = grown_family(name, **changes)
        ids = text(TOKENS)
        cache = static_cache(name, **changes) if static else None
        _, cache = grow(model, ids, CHUNKS, cache)
        layer = cache.layers[0]
        assert layer.is_sliding
        kept = min(window if static else window - 1, TOKENS)
        whole = whole_family(name, 4, **changes)
        _, full = read(whole, ids, DynamicCache())  # without a window
        assert_keys(layer.keys[:, :, :kept], full.layers[0].keys[:, :, TOKENS - kept :])

    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    def test_layers_that_the_plan_leaves_alone(self, static):
        for name, alone in (("gemma3_text", 0), ("smollm3", 1)):
            model, _ = grown_family(name)
            assert alone not in growth_of(model).layers
            ids = text(LENGTH + 1)
            cache = static_cache(name) if static else None
            _, cache = grow(model, ids[:, :LENGTH], [20], cache)
            assert record_of(cache).stage == 0
            before = [layer.keys.clone() for layer in cache.layers]
            rope_dist.prepare_cache(model, cache, 1)
            assert record_of(cache).stage == 1
            changed = [not torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True)]
            assert changed == [i != alone for i in range(len(changed))]

    @pytest.mark.skipif(
        not torch.accelerator.is_available(), reason="transformers offloads from an accelerator only"
    )
    def test_offloaded(self):
        model = copy.deepcopy(llama()[0]).to(torch.accelerator.current_accelerator())
        ids = text(TOKENS).to(model.device)
        cache = DynamicCache(config=model.config, offloading=True)
        _, cache = grow(model, ids, CHUNKS, cache)
        assert_keys(first_keys(model, cache).cpu(), whole_keys("llama", ids.cpu()), 1e-5)

    def test_a_full_layer_that_has_dropped_keys_is_refused(self):
        model, _ = llama()
        _, cache = read(model, text(LENGTH))
        cache.layers[1].crop(-32)
        kept = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(
            ValueError, match="layer 1 of the cache, a DynamicLayer, has keys of 32 tokens where 64"
        ):
            rope_dist.prepare_cache(model, cache, 1)
        assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))
        assert record_of(cache).stage == 0


class Halved(QuantizedLayer):
    """Quantisation as simple as can be: 16 bits."""

    def _quantize(self, tensor, axis=None):
        return tensor.half()

    def _dequantize(self, qtensor):
        return qtensor.float()


def quantised(kind):
    config = family("llama").config
    if kind == "halved":
        layers = [Halved(residual_length=20) for _ in range(config.num_hidden_layers)]
        return Cache(layers=layers)
    cls = getattr(transformers.cache_utils, "Fp8QuantizedLayer", None)
    if cls is None:
        pytest.skip("this transformers has no 8-bit cache of its own")
    return Cache(layers=[cls() for _ in range(config.num_hidden_layers)])


@pytest.mark.parametrize("kind", ["halved", "fp8"])
def test_quantised(kind):
    """As stock's up to the trained length; past it one error, and the cache as it was."""
    model, _ = llama()
    ids = text(LENGTH + 20)
    logits, cache = grow(model, ids[:, :LENGTH], [30, 1, 1, 20], quantised(kind))
    expected, _ = grow(family("llama"), ids[:, :LENGTH], [30, 1, 1, 20], quantised(kind))
    assert torch.equal(logits, expected)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="cannot be corrected: give a cache that is not quantised"):
        read(model, ids[:, LENGTH : LENGTH + 1], cache)
    assert cache.get_seq_length() == record_of(cache).length == LENGTH
    assert record_of(cache).stage == 0
    for a, b in zip(cache.layers, before.layers, strict=True):
        for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
            assert torch.equal(*(first_of(getattr(x, name)) for x in (a, b))), name
    # One that begins past the trained length is never corrected within the last stage.
    long = text(4 * LENGTH)
    logits, cache = grow(model, long, [200 + 4], quantised(kind))
    assert record_of(cache).stage == 6


def first_of(value):
    return value[0] if isinstance(value, tuple) else value


class TestRows:
    """Rows at different positions, in other orders."""

    @pytest.fixture
    def rows(self):
        """A cache past the trained length, its ids and positions."""
        ids = text(TOKENS, rows=4)
        positions = padded_positions(ids, PADDING)
        _, cache = grow(llama()[0], ids[:, :90], CHUNKS, positions=positions[:, :90])
        assert record_of(cache).stage == 2
        return cache, ids, positions

    def check(self, cache, ids, positions):
        """The cache is of the first 90 tokens of these rows: it goes on right."""
        _, cache = grow(llama()[0], ids, [1, 20, 1], cache, start=90, positions=positions)
        assert record_of(cache).stage == 4
        assert_keys(written(cache), whole_keys("llama", ids, positions))

    def test_padded(self, rows):
        self.check(*rows)

    @pytest.mark.parametrize("name", ["glm", "deepseek_v3", "mistral"])
    def test_padded_families(self, name):
        ids = text(TOKENS, rows=4)
        positions = padded_positions(ids, PADDING)
        model, _ = grown_family(name)
        _, cache = grow(model, ids, CHUNKS, positions=positions)
        assert_keys(first_keys(model, cache), whole_keys(name, ids, positions))

    def test_reordered(self, rows):
        cache, *of = rows
        order = torch.tensor([2, 2, 0, 3])
        cache.reorder_cache(order)
        self.check(cache, *(x[order] for x in of))

    def test_repeated(self, rows):
        cache, *of = rows
        cache.batch_repeat_interleave(2)
        self.check(cache, *(x.repeat_interleave(2, dim=0) for x in of))

    @pytest.mark.parametrize("chosen", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])])
    def test_selected(self, rows, chosen):
        cache, *of = rows
        cache.batch_select_indices(chosen)
        self.check(cache, *(x[chosen] for x in of))

    def test_one_row_of_positions_for_all(self):
        ids = text(TOKENS, rows=4)
        _, cache = grow(llama()[0], ids[:, :90], CHUNKS)
        order = torch.tensor([2, 2, 0, 3])
        cache.reorder_cache(order)
        _, cache = grow(llama()[0], ids[order], [1], cache, start=90)
        assert_keys(written(cache), whole_keys("llama", ids[order]))


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_each_goes_on_alone(self, kind, copied):
        model, _ = llama()
        ids, other = text(TOKENS), text(TOKENS, seed=2)
        other[:, :90] = ids[:, :90]
        _, cache = grow(model, ids[:, :90], CHUNKS, static_cache() if kind == "static" else None)
        twin = copied(cache)
        assert type(twin) is type(cache)
        assert record_of(twin).positions(0, 90).tolist() == record_of(cache).positions(0, 90).tolist()
        for one, its in ((twin, other), (cache, ids)):
            grow(model, its, [1, 20], one, start=90)
            assert record_of(one).stage == 4
            assert_keys(written(one), whole_keys("llama", its))

    def test_a_shallow_copy_is_the_same_cache(self):
        model, _ = llama()
        ids = text(TOKENS)
        _, cache = grow(model, ids[:, :90], CHUNKS)
        twin = copy.copy(cache)
        grow(model, ids[:, :120], [], twin, start=90)
        _, cache = grow(model, ids, [1], cache, start=120)
        assert_keys(written(cache), whole_keys("llama", ids))

    def test_in_another_process_and_in_a_copy_of_the_model(self):
        model, _ = llama()
        ids = text(TOKENS)
        _, cache = grow(model, ids[:, :90], CHUNKS)
        twin, its = pickle.loads(pickle.dumps((model, cache)))
        expected, _ = grow(model, ids, [1, 20], cache, start=90)
        found, its = grow(twin, ids, [1, 20], its, start=90)
        assert torch.equal(found, expected)
        assert_keys(written(its), whole_keys("llama", ids))


class TestShorterAgain:
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_cropped_below_the_trained_length(self, kind):
        """The first tokens were read as stock reads them: so are the next again."""
        if kind == "static" and not hasattr(StaticLayer, "crop"):
            pytest.skip("static caches of this transformers cannot be cropped")
        model, _ = llama()
        ids = text(100)
        _, cache = grow(model, ids, [40], static_cache() if kind == "static" else None)
        assert record_of(cache).stage == 2
        cache.crop(-60)
        assert record_of(cache).length == 40
        found, cache = grow(model, ids[:, :50], [1, 5], cache, start=40)
        assert record_of(cache).stage == 0
        expected, stock = grow(family("llama"), ids[:, :50], [40, 1, 5])
        assert_keys(written(cache), written(stock))
        torch.testing.assert_close(found, expected[:, 40:], rtol=1e-5, atol=1e-5)

    def test_goes_back_to_an_earlier_stage_only_when_well_below_its_end(self):
        model, plan = llama()
        ids = text(100)
        _, cache = read(model, ids[:, :70])
        for left, stage in ((63, 1), (60, 1), (59, 0)):
            cache.crop(left - cache.get_seq_length())
            _, cache = read(model, ids[:, left : left + 1], cache)
            assert record_of(cache).stage == stage, left
        whole = stock_at(family("llama"), plan, 10)
        assert_keys(written(cache), written(read(whole, ids[:, :60])[1]))

    def test_cropped_to_nothing(self):
        model, _ = llama()
        ids = text(100)
        _, cache = read(model, ids)
        cache.crop(-100)
        found, _ = read(model, ids[:, :50], cache)
        assert torch.equal(found, read(family("llama"), ids[:, :50])[0])

    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_reset(self, name):
        model, _ = grown_family(name)
        ids = text(100)
        cache = static_cache(name)
        read(model, ids, cache)
        cache.reset()
        assert (record_of(cache).stage, record_of(cache).length) == (0, 0)
        ids = text(TOKENS, seed=5)
        start, _ = read(model, ids[:, :30], cache)
        expected, _ = read(family(name), ids[:, :30], static_cache(name))
        assert torch.equal(start, expected)
        grow(model, ids, [30, 60], cache, start=30)
        whole = whole_family(name, 4)
        _, full = read(whole, ids, DynamicCache())
        kept = cache.layers[0].keys.shape[2] if name == "mistral" else TOKENS
        assert_keys(cache.layers[0].keys[:, :, :kept], written(full)[:, :, TOKENS - kept :])


class TestCachesOfOthers:
    def test_filled_by_stock_up_to_the_trained_length(self):
        ids = text(TOKENS)
        _, cache = read(family("llama"), ids[:, :40])
        with pytest.warns(
            UserWarning, match="40 of the 40 tokens in the cache were not read under this plan"
        ):
            read(llama()[0], ids[:, 40:50], cache)
        _, cache = grow(llama()[0], ids, [30, 1], cache, start=50)
        assert_keys(written(cache), whole_keys("llama", ids))

    def test_filled_on_by_stock(self):
        ids = text(TOKENS)
        _, cache = read(llama()[0], ids[:, :30])
        _, cache = read(family("llama"), ids[:, 30:50], cache)
        with pytest.warns(
            UserWarning, match="20 of the 50 tokens in the cache were not read under this plan"
        ):
            read(llama()[0], ids[:, 50:60], cache)
        _, cache = grow(llama()[0], ids, [30, 1], cache, start=60)
        assert_keys(written(cache), whole_keys("llama", ids))

    @pytest.mark.parametrize("first", [0, 30, LENGTH + 1])
    def test_filled_past_the_trained_length(self, first):
        ids = text(LENGTH + 9)
        cache = read(llama()[0], ids[:, :first])[1] if first else None
        _, cache = grow(family("llama"), ids, [], cache, start=first)
        before = copy.deepcopy(cache)
        with pytest.raises(
            ValueError, match=f"73 tokens, of which {73 - first} were read by another model or plan"
        ):
            read(llama()[0], ids[:, :1], cache)
        self.assert_unchanged(cache, before)

    def test_of_another_plan(self):
        ids = text(LENGTH + 9)
        other, _ = dynamic_of(family("llama"), factor=2)
        _, cache = read(other, ids)
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="the cache was filled under another plan"):
            read(llama()[0], ids[:, :1], cache)
        self.assert_unchanged(cache, before)
        assert record_of(cache).plan == record_of(before).plan
        cache.crop(-(LENGTH + 9))  # empty, it is anyone's
        found, cache = read(llama()[0], ids, cache)
        assert torch.equal(found, read(llama()[0], ids)[0])

    def test_of_an_equal_plan(self):
        ids = text(TOKENS)
        other, plan = dynamic_of(family("llama"))
        assert plan is not llama()[1]
        _, cache = grow(other, ids[:, :90], CHUNKS)
        _, cache = grow(llama()[0], ids, [1], cache, start=90)
        assert_keys(written(cache), whole_keys("llama", ids))

    def test_of_another_kind(self):
        with pytest.raises(TypeError, match="needs a cache of transformers, got list"):
            read(llama()[0], text(3), [])

    def assert_unchanged(self, cache, before):
        assert type(cache) is type(before)
        for a, b in zip(cache.layers, before.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


class TestSeveral:
    def test_two_caches_in_turn(self):
        model, _ = llama()
        short, long = text(50), text(150)
        pieces = [(20, 60), (1, 1), (1, 60), (28, 29)]
        expected = [
            grow(model, ids, of)[0] for ids, of in zip((short, long), zip(*pieces, strict=True), strict=True)
        ]
        caches, ends, found = [None, None], [0, 0], [[], []]
        for piece in pieces:
            for i, ids in enumerate((short, long)):
                ends[i] += piece[i]
                logits, caches[i] = read(model, ids[:, ends[i] - piece[i] : ends[i]], caches[i])
                found[i].append(logits)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(torch.cat(a, dim=1), b)

    def test_two_threads_at_once(self):
        model, _ = llama()
        texts = [text(40, seed=3), text(TOKENS, seed=4)]
        pieces = [[20] + [1] * 20, CHUNKS + [1] * 11]
        expected = [grow(model, *pair)[0] for pair in zip(texts, pieces, strict=True)]
        barrier = threading.Barrier(2)

        def run(ids, pieces):
            with torch.no_grad():
                barrier.wait()
                return [grow(model, ids, pieces)[0] for _ in range(4)]

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, texts, pieces))
        for runs, one in zip(found, expected, strict=True):
            assert all(torch.equal(run, one) for run in runs)

    def test_a_call_that_fails_midway(self):
        model, _ = llama()
        ids = text(TOKENS)
        expected, _ = grow(model, ids, [60, 60, 1])
        _, cache = read(model, ids[:, :60])

        def fail(*args):
            raise RuntimeError("midway")

        for where in (model.model.embed_tokens, model.model.rotary_emb, model.model.layers[0].self_attn):
            with where.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="midway"):
                read(model, ids[:, 60:120], cache)
            assert cache.get_seq_length() == 60
            # Outside of a call the embedding knows nothing of one that failed.
            assert stages.current_call(llama()[1]) is None
        found, cache = grow(model, ids, [60, 1], cache, start=60)
        torch.testing.assert_close(found, expected[:, 60:], rtol=1e-5, atol=1e-5)
        assert_keys(written(cache), whole_keys("llama", ids))
