"""enable() and the configs of models: loaded extended, scaled already, with parts."""

import copy

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.stock import assert_stock
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import rope_dist

pytestmark = pytest.mark.usefixtures("stock_again")


class TestGoingOn:
    """A model that was extended and saved is loaded again."""

    @pytest.fixture
    def saved(self, llama, tmp_path):
        """The plan and the folder of a model extended from 64 tokens to 128."""
        plan = rope_dist.plan(llama, factor=2)
        with rope_dist.enable(llama, plan=plan):
            llama.save_pretrained(tmp_path / "first")
        return plan, tmp_path / "first"

    def test_the_same_plan_is_taken(self, saved, ids, recwarn):
        plan, folder = saved
        model = LlamaForCausalLM.from_pretrained(folder)
        loaded = copy.deepcopy(model)
        rope_dist.enable(model, plan=plan)
        assert torch.equal(model.model.rotary_emb.inv_freq, plan.inv_freq)
        assert torch.equal(model(ids).logits, copy.deepcopy(loaded)(ids).logits)
        assert model.config.to_dict() == loaded.config.to_dict()
        assert not recwarn.list
        rope_dist.disable(model)
        assert_stock(model, loaded)

    def test_another_plan_from_the_model_before_is_refused(self, saved, llama):
        _, folder = saved
        model = LlamaForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="start from different frequencies"):
            rope_dist.enable(model, plan=rope_dist.plan(llama, factor=4))

    def test_the_same_factor_changes_nothing(self, saved, tmp_path):
        """However often: the config records from which length the factor counts."""
        plan, folder = saved
        for again in ("second", "third"):
            model = LlamaForCausalLM.from_pretrained(folder)
            assert rope_dist.enable(model, factor=2).plan.target_length == 128
            assert torch.equal(model.model.rotary_emb.inv_freq, plan.inv_freq)
            assert model.model.rotary_emb.attention_scaling == plan.attention_scaling
            assert model.config.rope_dist["original_length"] == 64
            assert "extended the model from 64 tokens already" in rope_dist.plan(folder, factor=2).summary()
            folder = tmp_path / again
            model.save_pretrained(folder)

    def test_nor_does_it_for_models_yet_to_be_built(self, llama, tmp_path):
        llama.save_pretrained(tmp_path / "0")
        lengths = []
        for i in range(3):
            with rope_dist.enable(factor=2):
                model = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
                lengths.append(model.config.max_position_embeddings)
                model.save_pretrained(tmp_path / str(i + 1))
        assert lengths == [128, 128, 128]

    def test_a_larger_factor_counts_from_the_first_length_and_says_so(self, saved):
        plan, folder = saved
        model = LlamaForCausalLM.from_pretrained(folder)
        with pytest.warns(
            UserWarning, match="extended the model from 64 to 128 tokens already; factor 4 counts"
        ):
            further = rope_dist.enable(model, factor=4, strategy="pi").plan
        assert (further.original_length, further.target_length) == (128, 256)
        last = further.stages[-1]
        torch.testing.assert_close(last.inv_freq, plan.inv_freq / 2, rtol=2e-7, atol=0.0)
        assert model.config.rope_dist["original_length"] == 64

    def test_a_smaller_factor_is_refused(self, saved):
        _, folder = saved
        model = LlamaForCausalLM.from_pretrained(folder)
        with pytest.raises(
            ValueError, match=r"factor 1 counts from the 64.*original_length=128 if it was trained"
        ):
            rope_dist.enable(model, factor=1)

    def test_trained_at_the_new_length_it_is_extended_from_there(self, saved, recwarn):
        _, folder = saved
        model = LlamaForCausalLM.from_pretrained(folder)
        assert rope_dist.enable(model, factor=2, original_length=128).plan.target_length == 256
        assert model.config.rope_dist["original_length"] == 128
        assert not recwarn.list


def test_frequencies_are_compared_to_rounding(make_llama):
    """A preset computes Llama 3.1's scaling in float64, transformers in float32."""
    plan = rope_dist.plan("llama3.1-8b", factor=2)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_llama(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 5e5, "original_max_position_embeddings": 8192, **scaling},
    )
    assert plan.base_factors != rope_dist.plan(model, factor=1).base_factors
    rope_dist.enable(model, plan=plan)
    assert torch.equal(model.model.rotary_emb.inv_freq, plan.inv_freq)


def test_a_dynamic_model_takes_a_plan_from_plain_numbers(make_llama, ids):
    model = make_llama(rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0})
    expected = model(ids).logits
    numbers = {"theta": 1e4, "head_dim": 16, "original_length": 64, "factor": 2}
    with rope_dist.enable(model, plan=rope_dist.plan(**numbers, strategy="extrapolation")):
        assert torch.equal(model(ids).logits, expected)
    assert model.config.rope_parameters["rope_type"] == "dynamic"


VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}


def multimodal(name):
    text = {key: getattr(llama_config(), key) for key in ("hidden_size", "num_attention_heads", "vocab_size")}
    text |= {
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    text |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision, kind, more = {
        "Llava": ("CLIP", "Llama", {}),
        "Mistral3": ("Pixtral", "Mistral", {}),
        "Gemma3": ("Siglip", "Gemma3Text", {"mm_tokens_per_image": 4}),
    }[name]
    if name == "Gemma3":
        text |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(
            vision_config=getattr(transformers, f"{vision}VisionConfig")(**VISION),
            text_config=getattr(transformers, f"{kind}Config")(**text),
            image_token_index=127,
            **more,
        )
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llava", "Mistral3", "Gemma3"])
def test_a_multimodal_model(name, tmp_path):
    model = multimodal(name)
    stock, config = copy.deepcopy(model), model.config
    other = type(model)(config)  # of the same config
    ids = torch.randint(3, 120, (1, 100), generator=torch.Generator().manual_seed(1))
    own = stock(ids).logits
    rope_dist.enable(model, factor=2, dynamic=False)
    extended = model(ids).logits
    assert not torch.allclose(extended, own, atol=1e-4)
    assert model.config.text_config.max_position_embeddings == 128
    overrides = rope_dist.plan(stock, factor=2).config_overrides(config)
    assert overrides == {key: getattr(model.config.text_config, key) for key in overrides}
    assert model.config.text_config is model.model.language_model.config
    assert model.config.vision_config is model.model.vision_tower.config
    assert (
        config.text_config.max_position_embeddings == other.config.text_config.max_position_embeddings == 64
    )
    model.save_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "stock")  # which writes into the config too
    loaded = type(model).from_pretrained(tmp_path)
    for (buffer, a), (_, b) in zip(loaded.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(a, b), buffer
    torch.testing.assert_close(loaded(ids).logits, extended, rtol=1e-5, atol=1e-5)
    assert rope_dist.enable(loaded, factor=2).plan.target_length == 128
    rope_dist.disable(model)
    assert_stock(model, stock)
    assert torch.equal(model(ids).logits, own)
