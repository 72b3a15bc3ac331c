"""Models with a window against a float64 sum over all pairs of tokens, whose angles are those of docs/window.md."""

import copy
import math
import pickle
import sys

import pytest
import torch
from helpers.growing import cache_argument, family, read, text
from helpers.model_families import model_of
from helpers.stock import assert_stock
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rope_dist
from rope_dist.hf import Window
from rope_dist.hf.windowing import windowing_of
from rope_dist.layer_types import unextendable

LENGTH = 64  # tokens that the models were trained to read
WINDOW, TOKENS = 24, 150  # by which the two rules for groups differ


def model(name="Llama", **changes):
    return model_of(name, initializer_range=0.15, **changes)  # attention that depends on its positions


def angles(window, plan, inv_freq, far_inv_freq, positions, key_positions, tokens):
    """Of each pair of tokens ``[B, S, T, R/2]``: the published formulas, by distance."""
    p, k = positions[..., :, None].double(), key_positions[..., None, :].double()
    distance, theta, far = (p - k)[..., None], inv_freq.double(), far_inv_freq.double()
    size = window.size
    if window.far in ("grouped", "jet-long"):
        length = tokens if isinstance(plan, rope_dist.DynamicPlan) else plan.target_length
        # Self-Extend's rule, whose largest text has (L - w) G + w tokens, and Jet-Long's.
        reach = (length - size) / (LENGTH - size)
        group = max(1, math.ceil(reach if window.far == "grouped" else length / LENGTH))
        beyond = ((p // group + size - size // group) - k // group)[..., None] * theta
    else:
        beyond = size * theta + (distance - size) * far
    return torch.where(distance < size, distance * theta, beyond), distance[..., 0] >= size


def by_pairs(stock, ids, window, plan, scaling=1.0, mask=None, positions=None):
    """Logits of a Llama in float64, every pair of queries and keys rotated by its own angle."""
    stock = copy.deepcopy(stock).double()
    module = sys.modules[type(stock).__module__]
    inv_freq = stock.model.rotary_emb.inv_freq.float()
    last = plan.at(ids.shape[1]) if isinstance(plan, rope_dist.DynamicPlan) else plan
    far_inv_freq = inv_freq / torch.tensor(last.factors)
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    angle, is_far = angles(window, plan, inv_freq, far_inv_freq, positions, positions, ids.shape[1])
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    if mask is not None:
        seen = seen & mask

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        q, k = (torch.complex(*x.chunk(2, -1)) for x in (query, key))
        logits = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
        for pair in range(q.shape[-1]):
            products = q[..., :, None, pair] * k[..., None, :, pair].conj()
            logits += (
                products * torch.polar(torch.ones_like(angle[..., pair]), angle[..., pair])[:, None]
            ).real
        logits *= scaling
        if window.scaling == "all":
            logits *= factor
        elif window.scaling == "far":
            logits = torch.where(is_far[:, None], logits * factor, logits)
        weights = torch.nan_to_num(torch.softmax(logits.masked_fill(~seen, float("-inf")), -1))
        return (weights @ value).transpose(1, 2), None

    factor = scaling
    ALL_ATTENTION_FUNCTIONS["by_pairs"] = attention
    before = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = lambda q, k, cos, sin: (q, k)
    try:
        stock.config._attn_implementation = "by_pairs"
        with torch.no_grad():
            return stock(ids, position_ids=positions).logits
    finally:
        module.apply_rotary_pos_emb = before
        del ALL_ATTENTION_FUNCTIONS["by_pairs"]


FORMS = {
    "plan": {"factor": 4, "dynamic": False},
    "dynamic plan": {"factor": 4},
    "pi": {"factor": 4, "dynamic": False, "strategy": "pi"},  # Leaky ReRoPE
    "grouped": {"factor": 4, "dynamic": False, "far": "grouped"},  # Self-Extend
    "dynamic grouped": {"factor": 4, "far": "grouped"},
    "jet-long": {"factor": 4, "far": "jet-long"},
    "far scaling": {"factor": 4, "dynamic": False, "strategy": "yarn", "far_scaling": "far"},
    "scaling": {"factor": 4, "dynamic": False, "strategy": "yarn", "far_scaling": "all"},
}


class TestAgainstAllPairs:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form(self, form):
        stock, ids = model(), text(TOKENS)
        enabled = copy.deepcopy(stock)
        done = rope_dist.enable(enabled, window=WINDOW, **FORMS[form])
        plan = done.plan
        last = plan.at(TOKENS) if isinstance(plan, rope_dist.DynamicPlan) else plan
        expected = by_pairs(stock, ids, done.window, plan, last.attention_scaling**2)
        with torch.no_grad():
            torch.testing.assert_close(enabled(ids).logits.double(), expected, rtol=0, atol=2e-4)
            assert (stock(ids).logits.double() - expected).abs().max() > 0.1

    @pytest.mark.parametrize("form", ["plan", "grouped"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex", "flash"])
    def test_padding_on_the_left(self, form, implementation):
        stock, ids = model(attn_implementation="eager" if implementation == "eager" else "sdpa"), text(TOKENS)
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        enabled = copy.deepcopy(stock)
        done = rope_dist.enable(enabled, window=WINDOW, **FORMS[form])
        if implementation == "flash":  # the masks of flash-attention; it does not run on a CPU itself
            enabled.config._attn_implementation_internal = "flash_attention_2"
        keys, given = mask[:, None, None].bool(), mask
        if implementation == "flex":
            enabled.config._attn_implementation_internal = "flex_attention"
            given = create_block_mask(
                lambda b, h, i, j: (i >= j) & (mask[b, j] > 0), 2, None, TOKENS, TOKENS, "cpu"
            )
        expected = by_pairs(stock, ids, done.window, done.plan, mask=keys, positions=positions)
        with torch.no_grad():
            found = enabled(ids, attention_mask=given, position_ids=positions).logits.double()
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-4)

    @pytest.mark.parametrize("implementation", ["sdpa", "flash"])
    def test_packed_texts(self, implementation):
        stock, ids = model(), text(TOKENS, rows=1)
        positions = torch.cat([torch.arange(90), torch.arange(1), torch.arange(59)])[None]
        enabled = copy.deepcopy(stock)
        done = rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        if implementation == "flash":
            enabled.config._attn_implementation_internal = "flash_attention_2"
        with torch.no_grad():
            found = enabled(ids, position_ids=positions, use_cache=False).logits.double()
        for part in (slice(0, 90), slice(90, 91), slice(91, 150)):
            expected = by_pairs(stock, ids[:, part], done.window, done.plan)
            torch.testing.assert_close(found[:, part], expected, rtol=0, atol=2e-4)

    @torch.no_grad()
    def test_scaling_of_all_logits_of_a_longer_text_from_its_beginning(self):
        enabled, ids = model(), text(60)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["scaling"])
        cache = DynamicCache(config=enabled.config)
        with rope_dist.expect_length(60):
            whole = enabled(ids).logits
            pieces = [enabled(ids[:, i : i + 15], past_key_values=cache).logits for i in range(0, 60, 15)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-4)


class TestEqualsStock:
    @pytest.mark.parametrize("form", FORMS)
    @torch.no_grad()
    def test_texts_within_the_window(self, form):
        stock, ids = model(), text(60)
        enabled = copy.deepcopy(stock)
        rope_dist.enable(enabled, window=60, **FORMS[form])
        torch.testing.assert_close(enabled(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("form", ["dynamic plan", "dynamic grouped", "jet-long"])
    @torch.no_grad()
    def test_dynamic_plans_within_the_trained_length(self, form):
        stock, ids = model(), text(LENGTH)
        enabled = copy.deepcopy(stock)
        rope_dist.enable(enabled, window=WINDOW, **FORMS[form])
        torch.testing.assert_close(enabled(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
        with rope_dist.expect_length(TOKENS):
            assert (enabled(ids).logits - stock(ids).logits).abs().max() > 0.1

    @torch.no_grad()
    def test_a_far_plan_of_factor_1(self):
        stock, ids = model(), text(TOKENS)
        enabled = copy.deepcopy(stock)
        plan = rope_dist.plan(stock, factor=1, strategy="pi")
        rope_dist.enable(enabled, plan=plan, window=WINDOW)
        windowing = windowing_of(enabled)
        for is_trained in (windowing.is_trained, lambda stage: False):  # also through the two parts
            windowing.is_trained = is_trained
            torch.testing.assert_close(enabled(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)


FAMILIES = ("Llama", "Qwen3", "SmolLM3", "Gemma", "Gemma3", "Olmo3", "Glm", "GPTNeoX", "Cohere", "Granite")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_all_distances_far_is_the_plan_itself(name):
    """Partial rotations, interleaved pairs, norms after the projections, sliding layers beside: every layout."""
    enabled, ids = model(name), text(TOKENS)
    stock_logits = enabled(ids).logits
    if why := unextendable(enabled.config):
        pytest.skip(f"this transformers cannot extend it: {why}")
    plan = rope_dist.plan(enabled, factor=4)
    with rope_dist.enable(enabled, plan=plan):
        static = enabled(ids).logits
    rope_dist.enable(enabled, plan=plan, window=1, far_scaling="far")
    object.__setattr__(windowing_of(enabled).window, "size", 0)  # enable() refuses it
    scale = (static - stock_logits).abs().max()
    assert (enabled(ids).logits - static).abs().max() < 1e-4 * max(scale, 1)
    assert scale > 0.1


class TestCaches:
    @pytest.mark.parametrize("form", ["plan", "grouped", "far scaling"])
    @pytest.mark.parametrize("static", [False, True])
    @torch.no_grad()
    def test_read_in_pieces(self, form, static):
        enabled, ids = model(), text(TOKENS)
        rope_dist.enable(enabled, window=WINDOW, **FORMS[form])
        expected = enabled(ids).logits
        cache = StaticCache(config=enabled.config, max_cache_len=TOKENS + 9) if static else None
        parts, start = [], 0
        for piece in (70, 1, 1, 40, 38):
            logits, cache = read(enabled, ids[:, start : start + piece], cache)
            parts.append(logits)
            start += piece
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_cached_keys_are_the_trained_models(self):
        stock, ids = model(num_hidden_layers=1), text(TOKENS)
        enabled = copy.deepcopy(stock)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["dynamic plan"])
        caches = []
        for one in (stock, enabled):
            cache = None
            for start in range(0, TOKENS, 50):
                _, cache = read(one, ids[:, start : start + 50], cache)
            caches.append(cache)
        torch.testing.assert_close(caches[1].layers[0].keys, caches[0].layers[0].keys, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_a_growing_text_goes_from_stage_to_stage(self):
        """With one layer keys are of no stage, so that the last token is that of the whole text."""
        enabled, ids = model(num_hidden_layers=1), text(TOKENS)
        for form in ("dynamic plan", "dynamic grouped", "jet-long"):
            rope_dist.enable(enabled, window=WINDOW, **FORMS[form])
            _, cache = read(enabled, ids[:, :50])
            for token in range(50, TOKENS):
                logits, cache = read(enabled, ids[:, token : token + 1], cache)
            torch.testing.assert_close(logits[:, -1], enabled(ids).logits[:, -1], rtol=0, atol=1e-4)

    @torch.no_grad()
    def test_cropped_and_reordered(self):
        enabled, ids = model(), text(TOKENS, rows=2)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = enabled(ids, attention_mask=mask, position_ids=positions).logits
        _, cache = read(enabled, ids[:, :140], attention_mask=mask[:, :140], position_ids=positions[:, :140])
        read(
            enabled, ids[:, 140:141], cache, attention_mask=mask[:, :141], position_ids=positions[:, 140:141]
        )
        cache.crop(-11)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = [1, 0]
        given = {"attention_mask": mask[swapped], "position_ids": positions[swapped][:, 130:]}
        logits, _ = read(enabled, ids[swapped][:, 130:], cache, **given)
        torch.testing.assert_close(logits, expected[swapped][:, 130:], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generate_with_padding(self, beams):
        enabled = model()
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        ids = text(100)
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
        both = enabled.generate(ids, attention_mask=mask, **options)
        alone = enabled.generate(ids[1:, 30:], attention_mask=mask[1:, 30:], **options)
        assert torch.equal(both[1, 100:], alone[0, 70:])
        without = enabled.generate(ids[1:, 30:], attention_mask=mask[1:, 30:], use_cache=False, **options)
        assert torch.equal(alone, without)

    def test_corrected_keys_are_refused(self):
        enabled, ids = model(), text(TOKENS)
        rope_dist.enable(enabled, factor=4)
        _, cache = read(enabled, ids)
        plan = rope_dist.enable(enabled).plan
        rope_dist.enable(enabled, plan=plan, window=WINDOW)
        with pytest.raises(ValueError, match="were corrected for another stage"):
            read(enabled, ids[:, :1], cache)


def loss_of(enabled, ids):
    logits = enabled(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


class TestTraining:
    def gradients(self, enabled, ids, checkpointing):
        enabled.zero_grad()
        enabled.train()
        if checkpointing:
            enabled.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        loss_of(enabled, ids).backward()
        enabled.gradient_checkpointing_disable()
        return {name: parameter.grad.clone() for name, parameter in enabled.named_parameters()}

    def test_gradients_are_those_of_all_pairs(self):
        """By a difference in one direction, in float64."""
        enabled, ids = model(dtype=torch.float64), text(TOKENS, rows=1)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        weight = enabled.model.layers[0].self_attn.k_proj.weight
        grad = self.gradients(enabled, ids, None)["model.layers.0.self_attn.k_proj.weight"]
        direction, step = grad / grad.norm(), 1e-3  # the loss itself is of float32 logits
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * direction
                losses.append(loss_of(enabled, ids).item())
                weight -= sign * step * direction
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(grad.norm().item(), rel=1e-4)

    @pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
    def test_checkpoints(self, kind):
        enabled, ids = model(), text(TOKENS, rows=1)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        expected, found = (self.gradients(enabled, ids, how) for how in (None, kind))
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
    def test_checkpoints_keep_the_stage_of_their_call(self, kind):
        """Run again after ``expect_length`` has ended, as on a GPU in another thread, where calls share positions."""
        enabled, ids = model(), text(60, rows=1)
        rope_dist.enable(enabled, window=WINDOW, strategy="pi", **FORMS["dynamic plan"])
        enabled.train()
        positions, found = torch.arange(60)[None], []
        for how in (None, kind):
            enabled.zero_grad()
            if how is not None:
                enabled.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            losses = []
            for length in (TOKENS, 60):
                with rope_dist.expect_length(length):
                    logits = enabled(ids, position_ids=positions, use_cache=False).logits
                    losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
            assert abs(losses[0] - losses[1]) > 1e-3  # of two stages
            (losses[0] + losses[1]).backward()
            found.append({name: parameter.grad.clone() for name, parameter in enabled.named_parameters()})
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)

    def test_dropout_is_refused(self):
        enabled = model(attention_dropout=0.1).train()
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        with pytest.raises(ValueError, match="has no dropout: set the config's attention_dropout to 0"):
            enabled(text(TOKENS))


class TestEnabling:
    @torch.no_grad()
    def test_disable_restores_the_model(self):
        stock = model()
        enabled = copy.deepcopy(stock)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        assert enabled.config.to_dict() == stock.config.to_dict()
        rope_dist.disable(enabled)
        assert_stock(enabled, stock)

    @pytest.mark.parametrize("first", [None, {"factor": 2}, {"factor": 4, "window": 9, "far": "grouped"}])
    @torch.no_grad()
    def test_a_context_restores_what_was_before(self, first):
        enabled, ids = model(), text(TOKENS)
        if first is not None:
            rope_dist.enable(enabled, **first)
        before = enabled(ids).logits
        with rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"]) as done:
            assert done.window == Window(WINDOW)
            assert (enabled(ids).logits - before).abs().max() > 0.1
        assert torch.equal(enabled(ids).logits, before)

    @torch.no_grad()
    def test_another_plan_replaces_the_window(self):
        enabled, ids = model(), text(TOKENS)
        rope_dist.enable(enabled, factor=4, dynamic=False)
        expected = enabled(ids).logits
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        windowed = enabled(ids).logits
        assert rope_dist.enable(enabled).window == Window(WINDOW)  # and none keeps it
        assert torch.equal(enabled(ids).logits, windowed)
        rope_dist.enable(enabled, factor=4, dynamic=False)
        assert torch.equal(enabled(ids).logits, expected)
        assert windowing_of(enabled) is None
        assert "save_pretrained" not in enabled.__dict__

    @torch.no_grad()
    def test_copies_and_pickles(self):
        enabled, ids = model(), text(TOKENS)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        expected = enabled(ids).logits
        for other in (copy.deepcopy(enabled), pickle.loads(pickle.dumps(enabled))):
            rope_dist.disable(enabled)
            assert torch.equal(other(ids).logits, expected)
            rope_dist.disable(other)
            assert_stock(other, enabled)

    @torch.no_grad()
    def test_models_yet_to_be_built(self):
        try:
            rope_dist.enable(window=WINDOW, **FORMS["plan"])
            assert windowing_of(model()).window == Window(WINDOW)
        finally:
            rope_dist.disable()

    def test_a_static_plan_where_a_dynamic_one_is_refused(self):
        """Its tables are of more than frequencies: as without a window."""
        enabled = family("phimoe")
        done = rope_dist.enable(enabled, factor=4, window=WINDOW)
        assert isinstance(done.plan, rope_dist.RopePlan)
        assert "makes its tables of more than frequencies" in done.why_static
        rope_dist.disable(enabled)
        with pytest.raises(ValueError, match="makes its tables of more than frequencies"):
            rope_dist.enable(enabled, factor=4, window=WINDOW, dynamic=True)

    def test_supported(self):
        found = rope_dist.supported("llama", "gemma2", "gpt_oss")
        assert found["llama"].why_no_window == ""
        assert "its logits are capped" in found["gemma2"].why_no_window
        assert "its attention has sinks" in found["gpt_oss"].why_no_window

    def test_report(self):
        enabled = model("Gemma3")
        done = rope_dist.enable(enabled, factor=4, window=WINDOW, far_scaling="far")
        sliding, full = rope_dist.report(enabled)
        assert sliding.window == ""
        expected = f"distances below {WINDOW} as trained, beyond by auto 4x, attention scaling of far logits"
        assert full.window == expected
        assert full.window in str(done)

    def test_sliding_layers_are_left_alone(self):
        enabled = model("Gemma3")
        rope_dist.enable(enabled, factor=4, window=WINDOW)
        kinds = [type(layer.self_attn).__name__ for layer in enabled.model.layers]
        assert kinds == ["EnabledGemma3Attention", "WindowedGemma3Attention"]

    @torch.no_grad()
    def test_compiled_as_it_is(self):
        enabled, ids = model(num_hidden_layers=1), text(TOKENS)
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        expected = enabled(ids).logits
        found = torch.compile(enabled, backend="eager")(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("Gemma2", "Gemma2Attention cannot have a window: its logits are capped"),
            ("Mistral", "every layer sees a sliding window of tokens"),
            ("DiffLlama", r"DiffLlama\w*Attention cannot have a window: (how it calls|it does not call)"),
        ],
    )
    def test_models(self, name, reason):
        enabled = model(name)
        before = [type(module) for module in enabled.modules()]
        with pytest.raises(ValueError, match=reason):
            rope_dist.enable(enabled, window=WINDOW, factor=4)
        assert [type(module) for module in enabled.modules()] == before

    @pytest.mark.parametrize("index", [None, 2, -1])
    def test_a_layer_that_does_not_say_which_it_is(self, index):
        enabled = model("Gemma3")
        enabled.model.layers[0].self_attn.layer_idx = index
        with pytest.raises(ValueError, match=rf"which of 2 layers it is in \(layer_idx {index}\)"):
            rope_dist.enable(enabled, factor=4, window=WINDOW)
        assert windowing_of(enabled) is None

    def test_sinks(self):
        enabled = model("GptOss", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        with pytest.raises(ValueError, match="GptOssAttention cannot have a window: its attention has sinks"):
            rope_dist.enable(enabled, window=WINDOW, factor=4)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"window": 0, "factor": 4}, "window must be a positive whole number of tokens, got 0"),
            ({"window": 2.5, "factor": 4}, "positive whole number"),
            ({"window": 9}, "a window needs a far plan"),
            ({"factor": 4, "far": "grouped"}, "far and far_scaling are of a window"),
            (
                {"window": 9, "factor": 4, "far": "leaky"},
                "far must be 'plan' or 'grouped' or 'jet-long', got 'leaky'",
            ),
            (
                {"window": 9, "factor": 4, "far_scaling": "both"},
                "far_scaling must be 'none' or 'far' or 'all'",
            ),
            ({"window": 9, "factor": 4, "far": "grouped", "strategy": "yarn"}, "takes no strategy"),
            ({"window": 9, "factor": 4, "far": "grouped", "far_scaling": "all"}, "of the plan's frequencies"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            rope_dist.enable(model(), **arguments)

    def test_a_model_that_was_loaded_extended(self, tmp_path):
        enabled = model()
        rope_dist.enable(enabled, factor=2)
        enabled.save_pretrained(tmp_path)
        loaded = type(enabled).from_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="was loaded extended, and a window needs its trained frequencies"
        ):
            rope_dist.enable(loaded, window=WINDOW, factor=4)

    def test_saving_and_exports(self, tmp_path):
        from rope_dist.export import hf

        enabled = model()
        plan = rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"]).plan
        with pytest.raises(ValueError, match="no config says that LlamaForCausalLM has a window"):
            enabled.save_pretrained(tmp_path / "a")
        for config_only in (False, True):
            with pytest.raises(ValueError, match="has a window"):
                hf(enabled, plan, tmp_path / "b", config_only=config_only)
        assert not list(tmp_path.iterdir())
        rope_dist.disable(enabled)
        enabled.save_pretrained(tmp_path / "a")

    def test_other_caches(self):
        enabled = model()
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        with pytest.raises(TypeError, match=r"needs a transformers.Cache"):
            enabled(text(9), **{cache_argument(enabled): [1]})

    def test_a_layer_by_itself(self):
        enabled = model()
        rope_dist.enable(enabled, window=WINDOW, **FORMS["plan"])
        layer = enabled.model.layers[0].self_attn
        x, positions = torch.randn(1, 30, 48), torch.arange(30)[None]
        tables = enabled.model.rotary_emb(x, positions)
        with pytest.raises(ValueError, match="runs outside of its model: it needs position_ids"):
            layer(x, position_embeddings=tables, attention_mask=None)
        layer(x, position_embeddings=tables, attention_mask=None, position_ids=positions)
