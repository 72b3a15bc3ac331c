"""Models with dynamic plans: stock's up to the trained length, a static plan's past it; and their gradients."""

import copy
import functools
import warnings

import pytest
import torch
from helpers.growing import (
    LENGTH,
    dynamic_of,
    family,
    grow,
    growth_of,
    padded_positions,
    read,
    stock_at,
    text,
    written,
)
from transformers import DynamicCache, StaticCache

import rope_dist

pytestmark = pytest.mark.usefixtures("stock_again", "one_thread")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


FAMILIES = (
    "llama",
    "qwen3",
    "phi",
    "gpt_neox",
    "glm",
    "deepseek_v3",
    "gemma3_text",
    "mistral",
    "smollm3",
    "gpt_oss",
)
# The reference computes what these do to the last bit; of the others it rounds a norm otherwise.
EXACT = {"llama", "phi", "gpt_neox", "mistral", "smollm3"}


@pytest.mark.usefixtures("no_grad")
class TestUpToTheTrainedLength:
    """To the last bit what the same model computes without a plan, and what stock computes."""

    def models(self, name):
        dynamic, _ = dynamic_of(family(name))
        plain = copy.deepcopy(family(name))
        rope_dist.enable(plain)
        return dynamic, [plain, *([family(name)] if name in EXACT else [])]

    @pytest.mark.parametrize("name", FAMILIES)
    def test_whole_and_token_by_token(self, name):
        dynamic, others = self.models(name)
        ids = text(LENGTH)
        whole = dynamic(ids, use_cache=False).logits
        assert all(torch.equal(whole, model(ids, use_cache=False).logits) for model in others)
        static = functools.partial(StaticCache, family(name).config, max_cache_len=LENGTH)
        for make in (DynamicCache, static):
            logits, cache = grow(dynamic, ids, [LENGTH - 9] + [1] * 9, make())
            for model in others:
                expected, its = grow(model, ids, [LENGTH - 9] + [1] * 9, make())
                assert torch.equal(logits, expected)
                for a, b in zip(cache.layers, its.layers, strict=True):
                    assert torch.equal(a.keys, b.keys)

    @pytest.mark.parametrize("implementation", [None, "static"])
    @pytest.mark.parametrize("beams", [1, 2])
    def test_generate(self, implementation, beams):
        dynamic, _ = dynamic_of(family("llama"))
        ids, mask = text(50, rows=3), torch.ones(3, 50, dtype=torch.long)
        ids[1, :20], mask[1, :20] = 0, 0
        options = {
            "attention_mask": mask,
            "max_new_tokens": LENGTH - 50,
            "do_sample": False,
            "num_beams": beams,
            "cache_implementation": implementation,
            "output_logits": True,
            "return_dict_in_generate": True,
            "eos_token_id": None,
            "pad_token_id": 0,
            "disable_compile": True,
        }
        found, expected = (model.generate(ids, **options) for model in (dynamic, family("llama")))
        assert found.sequences.shape[1] == LENGTH
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))

    def test_after_longer_texts(self):
        """Each text begins anew."""
        dynamic, _ = dynamic_of(family("llama"))
        for tokens in (LENGTH, 3 * LENGTH, LENGTH, 20):
            ids = text(tokens)
            found = grow(dynamic, ids, [tokens // 2, 1, 1])[0]
            if tokens <= LENGTH:
                assert torch.equal(found, grow(family("llama"), ids, [tokens // 2, 1, 1])[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_sixteen_bits(self, dtype):
        plain = copy.deepcopy(family("llama")).to(dtype)
        dynamic, _ = dynamic_of(plain)
        rope_dist.enable(plain)
        ids = text(LENGTH)
        assert torch.equal(grow(dynamic, ids, [40, 1, 1])[0], grow(plain, ids, [40, 1, 1])[0])


@pytest.mark.usefixtures("no_grad")
class TestPastTheTrainedLength:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_read_whole_as_by_the_static_plan_of_the_stage(self, name):
        dynamic, plan = dynamic_of(family(name))
        for tokens in (LENGTH + 1, 4 * LENGTH + 5):
            ids = text(tokens)
            static = copy.deepcopy(family(name))
            rope_dist.enable(static, plan=plan.at(tokens))
            found = dynamic(ids, use_cache=False).logits
            assert torch.equal(found, static(ids, use_cache=False).logits)
            expected = stock_at(family(name), plan, tokens)(ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_embeddings_instead_of_ids_and_the_decoder_alone(self):
        dynamic, plan = dynamic_of(family("llama"))
        ids = text(100)
        expected = stock_at(family("llama"), plan, 100)
        embedded = dynamic.get_input_embeddings()(ids)
        assert torch.equal(dynamic(inputs_embeds=embedded).logits, expected(ids).logits)
        assert torch.equal(dynamic.model(ids)[0], expected.model(ids)[0])

    def test_padded(self):
        dynamic, plan = dynamic_of(family("llama"))
        ids = text(100, rows=3)
        positions = padded_positions(ids, [0, 30, 50])
        found, _ = grow(dynamic, ids, [], positions=positions)
        expected, _ = grow(stock_at(family("llama"), plan, 100), ids, [], positions=positions)
        real = torch.arange(100) > torch.tensor([0, 30, 50])[:, None]
        assert torch.equal(found[real], expected[real])


def pairs(keys):
    """Keys ``[..., D]`` as complex numbers, float64."""
    first, second = keys.double().chunk(2, dim=-1)
    return torch.complex(first, second)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@torch.no_grad()
def test_sixteen_bit_keys_after_eight_corrections(dtype, unit):
    """Each is off by at most one unit of its pair's length a rounding, and by about the root of their number."""
    stages = [72, 80, 88, 96, 112, 128, 160, 256]
    model, plan = dynamic_of(copy.deepcopy(family("llama")).to(dtype), stages=stages, strategy="yarn")
    assert plan.stages[-1].attention_scaling > 1.1
    unrotated = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: unrotated.append(call[2]))
    ids = text(256)
    _, cache = grow(model, ids, [LENGTH, 8, 8, 8, 8, 16, 16, 32, 90])
    found = pairs(written(cache))
    heads = found.shape[1]
    unrotated = pairs(torch.cat(unrotated, dim=1).unflatten(-1, (heads, -1)).transpose(1, 2))
    stage = plan.stages[-1]
    angles = torch.outer(torch.arange(256).double(), stage.inv_freq.double())
    exact = unrotated * torch.polar(torch.full_like(angles, stage.attention_scaling), angles)
    error = (found - exact).abs() / exact.abs()
    before = 0
    once = None
    for corrections, length in zip(range(8, -1, -1), plan.lengths, strict=True):
        of = error[:, :, before:length]
        assert of.max() <= (corrections + 1) * unit * 1.01, length
        if corrections in (8, 0):
            rms = of.square().mean().sqrt()
            once = rms if corrections == 0 else once
            if corrections == 8:
                eight = rms
        before = length
    assert 0.6 * 3 < eight / once < 1.2 * 3  # sqrt(8 + 1)


class TestGradients:
    def losses(self, model, ids, checkpointing=None):
        model = copy.deepcopy(model).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about a cache that checkpointing does not make
            loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    @pytest.mark.parametrize("tokens", [LENGTH, LENGTH + 1, 200])
    @pytest.mark.parametrize("checkpointing", [None, False, True])
    def test_those_of_stock_under_the_plan_of_the_stage(self, tokens, checkpointing):
        dynamic, plan = dynamic_of(family("llama"))
        dynamic(text(100))  # another stage was in force
        found = self.losses(dynamic, text(tokens), checkpointing)
        expected = self.losses(stock_at(family("llama"), plan, tokens), text(tokens))
        assert found[0] == expected[0]
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_checkpoints_of_layers_that_have_each_a_rotary_embedding(self):
        """They make their tables again in the backward pass, when no call runs any more."""
        dynamic, plan = dynamic_of(family("moshi"))
        assert len(growth_of(dynamic).others) == 1
        dynamic(text(40))
        found = self.losses(dynamic, text(200), checkpointing=False)
        expected = self.losses(stock_at(family("moshi"), plan, 200), text(200))
        assert found[0] == expected[0]
        for name, gradient in expected[1].items():
            if gradient is not None:
                torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.parametrize("second", [torch.enable_grad, torch.no_grad])
    def test_keys_that_need_one_are_not_changed_in_place(self, second):
        """The first call's gradient survives the correction of what it cached."""
        dynamic, plan = dynamic_of(family("llama"))
        ids = text(80)
        logits, cache = read(dynamic, ids[:, :60])
        expected = torch.autograd.grad(logits.square().mean(), dynamic.lm_head.weight, retain_graph=True)[0]
        kept = [layer.keys for layer in cache.layers]
        values = [keys.detach().clone() for keys in kept]
        with second():
            more, cache = read(dynamic, ids[:, 60:], cache)
        assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
        whole = read(stock_at(family("llama"), plan, 80), ids)[1]
        torch.testing.assert_close(written(cache), written(whole), rtol=0, atol=5e-6)
        weight = dynamic.model.layers[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(logits.square().mean(), weight, retain_graph=True)
        (alone,) = torch.autograd.grad(read(dynamic, ids[:, :60])[0].square().mean(), weight)
        torch.testing.assert_close(gradient, alone)
        assert torch.equal(expected, torch.autograd.grad(logits.square().mean(), dynamic.lm_head.weight)[0])
        assert more.requires_grad == (second is torch.enable_grad)

    def test_a_gradient_goes_through_a_correction(self):
        """Of the sum of the first keys, which stock's read whole has as well."""
        dynamic, plan = dynamic_of(family("llama"))
        ids = text(120)
        _, cache = grow(dynamic, ids, [60, 10, 30])
        whole = stock_at(family("llama"), plan, 120)
        gradients = []
        for model, its in ((dynamic, cache), (whole, read(whole, ids)[1])):
            weight = model.model.layers[0].self_attn.k_proj.weight
            gradients.append(torch.autograd.grad(written(its).sin().sum(), weight)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (torch.inference_mode, torch.inference_mode),
            (torch.inference_mode, torch.no_grad),
            (torch.no_grad, torch.inference_mode),
        ],
    )
    def test_inference_mode(self, first, second):
        dynamic, plan = dynamic_of(family("llama"))
        ids = text(80)
        with first():
            _, cache = read(dynamic, ids[:, :60])
        with second():
            _, cache = read(dynamic, ids[:, 60:], cache)
        with torch.no_grad():
            whole = read(stock_at(family("llama"), plan, 80), ids)[1]
        assert (written(cache) - written(whole)).abs().max() < 5e-6
