"""enable(dynamic=True) and disable(): by each option, copied, saved, cast, refused, restored."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.growing import (
    LENGTH,
    dynamic_of,
    family,
    grow,
    growth_of,
    read,
    stock_at,
    text,
    written,
)
from helpers.stock import assert_stock
from transformers import DynamicCache, LlamaForCausalLM

import rope_dist
from rope_dist import DynamicPlan
from rope_dist.hf import enabled_modules
from rope_dist.hf.cache_record import record_of

pytestmark = pytest.mark.usefixtures("stock_again", "one_thread")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
class TestEnabling:
    def check(self, model, stock, plan):
        """The model reads by the stages of a plan, with caches and without."""
        for tokens in (LENGTH, 100):
            ids = text(tokens)
            expected = stock_at(stock, plan, tokens)(ids).logits
            assert torch.equal(model(ids).logits, expected)
        _, cache = grow(model, ids, [60, 1])
        whole = read(stock_at(stock, plan, 100), ids)[1]
        assert (written(cache) - written(whole)).abs().max() < 1e-6 * written(whole).abs().max()

    def test_a_context(self):
        stock = family("llama")
        model = copy.deepcopy(stock)
        with rope_dist.enable(model, factor=4, dynamic=True) as enabled:
            assert isinstance(enabled.plan, DynamicPlan)
            self.check(model, stock, enabled.plan)
        assert_stock(model, stock)

    @pytest.mark.parametrize("by", ["target_length", "stages", "plan", "strategy"])
    def test_by(self, by):
        stock = family("llama")
        options = {
            "target_length": {"target_length": 256, "dynamic": True},
            "stages": {"stages": [90, 256], "dynamic": True},
            "plan": {"plan": rope_dist.dynamic_plan(stock, factor=4)},
            "strategy": {"factor": 4, "strategy": "yarn", "dynamic": True},
        }[by]
        model = copy.deepcopy(stock)
        plan = rope_dist.enable(model, **options).plan
        assert plan.target_length == 256
        assert plan.lengths == (64, 90, 256) or by != "stages"
        self.check(model, stock, plan)
        rope_dist.disable(model)
        assert_stock(model, stock)

    def test_other_plans_and_back(self):
        stock = family("llama")
        model = copy.deepcopy(stock)
        ids = text(100)
        rope_dist.enable(model, factor=2, dynamic=False)
        static = model(ids).logits
        with rope_dist.enable(model, factor=4, dynamic=True) as enabled:
            self.check(model, stock, enabled.plan)
            with rope_dist.enable(model, factor=2, dynamic=True) as inner:
                self.check(model, stock, inner.plan)
            self.check(model, stock, enabled.plan)
            rope_dist.enable(model)  # nothing asked for: the plan stays
            self.check(model, stock, enabled.plan)
            rope_dist.enable(model, plan=enabled.plan)
            assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
            self.check(model, stock, enabled.plan)
        assert not hasattr(model.model, "_rope_dist_growth")
        assert torch.equal(model(ids).logits, static)
        rope_dist.disable(model)
        assert_stock(model, stock)

    def test_models_yet_to_be_built(self, tmp_path):
        family("llama").save_pretrained(tmp_path)
        stock = LlamaForCausalLM.from_pretrained(tmp_path)
        with rope_dist.enable(factor=4, dynamic=True):
            model = LlamaForCausalLM.from_pretrained(tmp_path)
            self.check(model, stock, growth_of(model).plan)
            unextended = LlamaForCausalLM.from_pretrained(tmp_path)
            assert growth_of(unextended).plan is not growth_of(model).plan
        assert_stock(model, stock)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, copied):
        stock = family("llama")
        model, plan = dynamic_of(stock)
        model(text(100))  # whichever stage is in force
        twin = copied(model)
        rope_dist.disable(model)
        assert_stock(model, stock)
        self.check(twin, stock, plan)
        assert torch.equal(model(text(100)).logits, stock(text(100)).logits)
        rope_dist.disable(twin)
        assert_stock(twin, stock)

    def test_saved(self, tmp_path):
        """Stock reads by the last stage; enabled again, the model is what it was."""
        stock = family("llama")
        model, plan = dynamic_of(stock)
        assert model.state_dict().keys() == stock.state_dict().keys()
        model(text(100))
        model.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        ids = text(50)
        assert torch.equal(loaded(ids).logits, stock_at(stock, plan, 256)(ids).logits)
        assert loaded.config.max_position_embeddings == 256
        again = rope_dist.enable(loaded, factor=4, dynamic=True).plan
        assert again == plan
        self.check(loaded, stock, plan)
        rope_dist.disable(loaded)  # as it was loaded
        assert torch.equal(loaded(ids).logits, stock_at(stock, plan, 256)(ids).logits)
        farther = rope_dist.enable(loaded, factor=8, dynamic=True).plan
        assert (farther.original_length, farther.target_length) == (64, 512)
        self.check(loaded, stock, farther)
        rope_dist.enable(loaded, plan=plan)
        self.check(loaded, stock, plan)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_cast(self, dtype):
        stock = family("llama")
        model, plan = dynamic_of(stock)
        model(text(100))
        model.to(dtype)
        for name, buffer in model.model.rotary_emb.named_buffers():
            assert buffer.dtype == torch.float32, name
        static = copy.deepcopy(stock).to(dtype)
        rope_dist.enable(static, plan=plan.at(100))
        assert torch.equal(model(text(100)).logits, static(text(100)).logits)
        assert torch.equal(
            model(text(40)).logits, dynamic_of(copy.deepcopy(stock).to(dtype))[0](text(40)).logits
        )
        rope_dist.disable(model)
        like = copy.deepcopy(stock).to(dtype)
        like.model.rotary_emb = copy.deepcopy(stock.model.rotary_emb)  # in the dtype that it was enabled with
        assert_stock(model, like)

    def test_adapters(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        stock = family("llama")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj"], init_lora_weights=False
        )
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(stock), config)
        plain = copy.deepcopy(model)
        plan = rope_dist.enable(model, factor=4, dynamic=True).plan
        ids = text(100)
        assert torch.equal(model(ids[:, :LENGTH]).logits, plain(ids[:, :LENGTH]).logits)
        _, cache = grow(model, ids, [60, 1])
        rope_dist.enable(plain, plan=plan.at(100))
        assert (written(cache) - written(read(plain, ids)[1])).abs().max() < 5e-6
        found = model.generate(
            ids[:, :60], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found.shape[1] == 90
        rope_dist.disable(model)
        assert not list(enabled_modules(model))

    def test_nothing_keeps_a_model_alive(self):
        model, _ = dynamic_of(family("llama"))
        _, cache = read(model, text(100))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert record_of(cache).length == 100


class TestErrors:
    """One error each, and the model as it was."""

    @pytest.fixture
    def model(self):
        model = copy.deepcopy(family("llama"))
        yield model
        assert_stock(model, family("llama"))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"dynamic": True}, ValueError, "needs an end: give target_length, factor or stages"),
            ({"dynamic": 1, "factor": 2}, TypeError, "dynamic must be True, False or None"),
            ({"stages": [128], "dynamic": False}, ValueError, "stages are of a dynamic plan"),
            ({"stages": "128", "dynamic": True}, ValueError, "stages must be a list of lengths"),
            ({"stages": [], "dynamic": True}, ValueError, "stages must be a list of lengths"),
            ({"stages": [128, 100], "dynamic": True}, ValueError, "must rise"),
            ({"stages": [64, 128], "dynamic": True}, ValueError, "past the original length 64"),
            ({"stages": [90, 128], "factor": 4, "dynamic": True}, ValueError, "for the target length 256"),
            ({"stages": [90.5], "dynamic": True}, ValueError, "length of a stage"),
            ({"target_length": 32, "dynamic": True}, ValueError, "length"),
            ({"factor": 1, "dynamic": True}, ValueError, "past the original length 64, got 64"),
            ({"factor": 2, "dynamic": True, "strategy": "none such"}, ValueError, "none such"),
            ({"plan": "a plan"}, TypeError, "plan must be a RopePlan or a DynamicPlan"),
        ],
    )
    def test_options(self, model, options, error, match):
        with pytest.raises(error, match=match):
            rope_dist.enable(model, **options)

    def test_a_plan_and_stages(self, model):
        plan = rope_dist.dynamic_plan(model, factor=4)
        for options in ({"stages": [256]}, {"factor": 4}):
            with pytest.raises(ValueError, match="give"):
                rope_dist.enable(model, plan=plan, dynamic=True, **options)

    def test_a_plan_for_another_model(self, model):
        other = LlamaForCausalLM(llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
        with pytest.raises(ValueError, match="theta"):
            rope_dist.enable(model, plan=rope_dist.dynamic_plan(other, factor=4))

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("hunyuan_v1_dense", "cannot be corrected: more is done after the rotation"),
            ("phimoe", "makes its tables of more than frequencies"),
            ("deepseek_v4", "cannot be corrected: its tables are not known"),
            ("zamba2", "its layer of the cache changes"),
        ],
    )
    def test_families_whose_keys_cannot_be_corrected(self, name, match):
        if name not in transformers.CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {name}")
        model = copy.deepcopy(family(name))
        with pytest.raises(ValueError, match=match) as raised:
            rope_dist.enable(model, factor=4, dynamic=True)
        assert "a static plan (dynamic=False)" in str(raised.value)
        assert_stock(model, family(name))

    def test_an_enabled_model_stays_as_it_was(self):
        model, plan = dynamic_of(family("llama"))
        ids = text(100)
        before = model(ids).logits
        for options in ({"stages": [64], "dynamic": True}, {"factor": 0.5, "dynamic": True}):
            with pytest.raises(ValueError, match=r"original length|factor"):
                rope_dist.enable(model, **options)
        assert growth_of(model).plan is plan
        assert torch.equal(model(ids).logits, before)

    def test_what_stock_refuses(self):
        model, _ = dynamic_of(family("llama"))
        with pytest.raises(ValueError, match="input_ids"):
            model()
        assert torch.equal(model(text(30)).logits, family("llama")(text(30)).logits)

    def test_prepare_cache_of_a_model_without_a_dynamic_plan(self, model):
        with pytest.raises(ValueError, match="has no dynamic plan"):
            rope_dist.prepare_cache(model, DynamicCache(), 1)
