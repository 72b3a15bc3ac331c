"""enable() and disable() on LLaMA: equal to stock, exact to restore, nothing left behind."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.stock import assert_stock, classes
from helpers.tiny_models import tiny_multimodal
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import rope_dist
from rope_dist.hf import enabled_modules

pytestmark = pytest.mark.usefixtures("stock_again")


@pytest.fixture
def stock(llama):
    return copy.deepcopy(llama)


class TestEqualsStock:
    """The model's own frequencies: the reference computes the same to the last bit."""

    @pytest.fixture(params=["sdpa", "eager"])
    def both(self, request, make_llama):
        model = make_llama(attn_implementation=request.param)
        enabled = copy.deepcopy(model)
        rope_dist.enable(enabled)
        return model, enabled

    def test_logits(self, both, ids):
        stock, enabled = both
        assert torch.equal(enabled(ids).logits, stock(ids).logits)

    def test_left_padding(self, both, ids):
        stock, enabled = both
        mask = torch.ones_like(ids)
        mask[0, :13] = 0
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        arguments = {"attention_mask": mask, "position_ids": position_ids}
        a, b = stock(ids, **arguments).logits, enabled(ids, **arguments).logits
        assert torch.equal(a[mask.bool()], b[mask.bool()])

    def test_packed_positions(self, both, ids):
        position_ids = torch.cat((torch.arange(25), torch.arange(15)))[None]
        a, b = (model(ids[:1], position_ids=position_ids).logits for model in both)
        assert torch.equal(a, b)

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_generate(self, both, ids, cache):
        stock, enabled = both
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        options = {
            "attention_mask": mask,
            "max_new_tokens": 12,
            "do_sample": False,
            "cache_implementation": cache,
            "output_logits": True,
            "return_dict_in_generate": True,
            "eos_token_id": None,
            "pad_token_id": 0,
            "disable_compile": True,
        }
        a, b = stock.generate(ids, **options), enabled.generate(ids, **options)
        assert torch.equal(a.sequences, b.sequences)
        assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))

    @pytest.mark.parametrize("use_reentrant", [None, False, True])
    def test_training_with_and_without_gradient_checkpointing(self, both, ids, use_reentrant):
        losses = []
        for model in both:
            model.train()
            if use_reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss)
        assert losses[0].item() == losses[1].item()
        for (name, a), (_, b) in zip(*(model.named_parameters() for model in both), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)

    def test_output_attentions(self, make_llama, ids):
        model = make_llama(attn_implementation="eager")
        expected = model(ids, output_attentions=True).attentions
        rope_dist.enable(model)
        ours = model(ids, output_attentions=True).attentions
        assert len(ours) == 2
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "longrope"])
    def test_models_that_are_scaled_already(self, make_llama, rope_type):
        parameters = {
            "linear": {"factor": 2.0},
            "dynamic": {"factor": 2.0},
            "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
            "llama3": {
                "factor": 2.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "longrope": {
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + i for i in range(8)],
                "original_max_position_embeddings": 64,
            },
        }[rope_type]
        model = make_llama(rope_parameters={"rope_theta": 10000.0, "rope_type": rope_type, **parameters})
        enabled = copy.deepcopy(model)
        rope_dist.enable(enabled)
        generator = torch.Generator().manual_seed(3)
        # Longer than the trained length and then shorter: what depends on the length changes both ways.
        for tokens in (40, 90, 50):
            ids = torch.randint(3, 128, (1, tokens), generator=generator)
            assert torch.equal(enabled(ids).logits, model(ids).logits), tokens

    def test_other_heads(self, ids):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(llama_config(num_labels=3)).eval()
        expected = model(ids).logits
        rope_dist.enable(model)
        assert torch.equal(model(ids).logits, expected)

    @pytest.mark.skipif(
        " " in torch.__path__[0], reason="torch's compiler cannot link to a path with a space"
    )
    def test_compiles_whole(self, llama, ids):
        expected = llama(ids).logits
        with rope_dist.enable(llama, factor=2, dynamic=False) as enabled:
            extended = llama(ids).logits
            compiled = torch.compile(llama, fullgraph=True)
            torch.testing.assert_close(compiled(ids).logits, extended, rtol=0, atol=1e-5)
        assert enabled.plan.interpolated_dims > 0
        assert not torch.allclose(extended, expected, atol=1e-4)


class TestSixteenBit:
    def test_bfloat16_is_no_farther_from_float64_than_stock(self, llama, ids):
        exact = copy.deepcopy(llama).double()(ids).logits
        narrow = copy.deepcopy(llama).bfloat16()
        stock_error = (narrow(ids).logits.double() - exact).square().mean().sqrt()
        rope_dist.enable(narrow)
        error = (narrow(ids).logits.double() - exact).square().mean().sqrt()
        assert error <= stock_error * 1.02

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_cast_does_not_degrade_the_frequencies(self, make_llama, dtype, when):
        model = make_llama(max_position_embeddings=16384)
        inv_freq = model.model.rotary_emb.inv_freq.double().clone()
        if when == "before":
            model.to(dtype)
            rope_dist.enable(model)
        else:
            rope_dist.enable(model)
            model.to(dtype)
        rotary = model.model.rotary_emb
        assert rotary.inv_freq.dtype == torch.float32
        tables = rotary(torch.zeros(1, dtype=dtype), torch.tensor([[16383]]))
        assert tables[0].dtype == torch.float32
        cos, sin = (table.chunk(2, dim=-1)[0] for table in tables)
        angle = 16383 * inv_freq
        # One float32 rounding of an angle of 16383 radians is 4.9e-4; bfloat16 frequencies are off by turns.
        assert (cos.double() - angle.cos()).abs().max() < 1e-3
        assert (sin.double() - angle.sin()).abs().max() < 1e-3

    def test_disable_gives_a_cast_model_its_own_buffers_back(self, llama):
        like = copy.deepcopy(llama).bfloat16()
        model = copy.deepcopy(like)
        rope_dist.enable(model, factor=4)
        rope_dist.disable(model)
        assert_stock(model, like)

    def test_autocast(self, llama, stock, ids):
        rope_dist.enable(llama)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = llama(ids).logits, stock(ids).logits
        assert ours.dtype == theirs.dtype
        exact = stock.double()(ids).logits
        assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()


class TestExtension:
    def test_the_plan_is_in_force(self, llama, ids):
        plan = rope_dist.plan(llama, factor=4, strategy="dprope")
        rope_dist.enable(llama, plan=plan)
        assert torch.equal(llama.model.rotary_emb.inv_freq, plan.inv_freq)
        assert llama.config.max_position_embeddings == 256
        assert llama.config.rope_dist["strategy"] == "dprope"

    @pytest.mark.parametrize("strategy", ["dprope", "yarn", "pi"])
    def test_saved_and_loaded_by_stock_transformers(self, llama, ids, tmp_path, strategy):
        rope_dist.enable(llama, target_length=200, strategy=strategy, dynamic=False)
        long = torch.randint(3, 128, (1, 150), generator=torch.Generator().manual_seed(5))
        expected = llama(long).logits
        llama.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert type(loaded.model.layers[0].self_attn) is LlamaAttention
        assert torch.equal(loaded(long).logits, expected)
        assert loaded.config.max_position_embeddings == 200
        # What was saved is a model like any other: it can be enabled as it is and extended further.
        rope_dist.enable(loaded)
        assert torch.equal(loaded(long).logits, expected)
        rope_dist.enable(loaded, target_length=400)
        assert loaded.config.max_position_embeddings == 400

    def test_yarns_attention_scaling_reaches_the_logits(self, llama, ids):
        plan = rope_dist.plan(llama, factor=4, strategy="yarn")
        rope_dist.enable(llama, plan=plan)
        cos, sin = llama.model.rotary_emb(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long))
        assert plan.attention_scaling > 1.1
        torch.testing.assert_close(cos, torch.full_like(cos, plan.attention_scaling))
        assert sin.abs().max() == 0

    def test_a_new_plan_replaces_the_old_one(self, llama, stock):
        rope_dist.enable(llama, factor=2)
        rope_dist.enable(llama, factor=4)  # of the trained 64 tokens, not of 128
        assert llama.config.max_position_embeddings == 256
        fresh = copy.deepcopy(stock)
        rope_dist.enable(fresh, factor=4)
        assert torch.equal(llama.model.rotary_emb.stage_inv_freq, fresh.model.rotary_emb.stage_inv_freq)
        rope_dist.enable(llama)  # nothing asked for: the plan stays
        assert llama.config.max_position_embeddings == 256
        rope_dist.disable(llama)
        assert_stock(llama, stock)

    def test_another_model_of_the_same_config_is_left_alone(self, ids):
        config = llama_config()
        one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
        rope_dist.enable(one, factor=2)
        assert other.config.max_position_embeddings == config.max_position_embeddings == 64
        assert one.model.config is one.config is one.model.layers[0].self_attn.config

    def test_changes_to_the_config_while_enabled_are_kept(self, llama):
        rope_dist.enable(llama, factor=2)
        llama.config.use_cache = False
        rope_dist.disable(llama)
        assert llama.config.use_cache is False
        assert llama.config.max_position_embeddings == 64


class TestRestoring:
    def test_enable_enable_disable_leaves_stock(self, llama, stock, ids):
        expected = stock(ids).logits
        rope_dist.enable(llama)
        rope_dist.enable(llama)
        assert len(list(enabled_modules(llama))) == 3
        rope_dist.disable(llama)
        assert_stock(llama, stock)
        assert torch.equal(llama(ids).logits, expected)
        rope_dist.disable(llama)

    def test_disable_restores_the_very_classes(self, llama):
        rope_dist.enable(llama, factor=2)
        rope_dist.disable(llama)
        assert type(llama.model.layers[0].self_attn) is LlamaAttention
        assert type(llama.model.rotary_emb) is LlamaRotaryEmbedding

    def test_context_manager_restores_also_after_an_exception(self, llama, stock):
        with pytest.raises(RuntimeError, match="inside"), rope_dist.enable(llama, factor=2):
            raise RuntimeError("inside")
        assert_stock(llama, stock)

    def test_nested_contexts_restore_what_was_before(self, llama, stock):
        with rope_dist.enable(llama, factor=2) as outer:
            with rope_dist.enable(llama, factor=4):
                assert llama.config.max_position_embeddings == 256
            assert llama.config.max_position_embeddings == 128
            assert torch.equal(llama.model.rotary_emb.stage_inv_freq[-1], outer.plan.stages[-1].inv_freq)
        assert_stock(llama, stock)

    def test_disable_without_a_model_restores_all(self, llama, stock):
        rope_dist.enable(llama, factor=2)
        rope_dist.disable()
        assert_stock(llama, stock)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_copies_are_enabled_and_restorable(self, llama, stock, ids, copied):
        rope_dist.enable(llama, factor=2)
        twin = copied(llama)
        assert torch.equal(twin(ids).logits, llama(ids).logits)
        rope_dist.disable(twin)
        assert_stock(twin, stock)
        assert len(list(enabled_modules(llama))) == 3

    def test_state_dict_keys_do_not_change(self, llama, stock):
        rope_dist.enable(llama, factor=2)
        assert llama.state_dict().keys() == stock.state_dict().keys()

    def test_threads(self, llama, stock):
        errors = []

        def work(factor):
            try:
                for _ in range(10):
                    rope_dist.enable(llama, factor=factor)
                    rope_dist.disable(llama)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(factor,)) for factor in (2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        rope_dist.disable(llama)
        assert_stock(llama, stock)

    def test_accelerate_hooks_stay_and_run_the_right_forward(self, llama, stock, ids):
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        expected = stock(ids).logits
        for module in llama.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
        rope_dist.enable(llama)
        attention = llama.model.layers[0].self_attn
        assert attention._old_forward.__func__ is type(attention).forward
        assert torch.equal(llama(ids).logits, expected)
        rope_dist.disable(llama)
        assert attention._old_forward.__func__ is LlamaAttention.forward
        assert torch.equal(llama(ids).logits, expected)


class TestModelsYetToBeBuilt:
    def test_from_config_and_from_pretrained(self, llama, ids, tmp_path):
        llama.save_pretrained(tmp_path)
        builders = [PreTrainedModel.__dict__[name] for name in ("from_pretrained", "_from_config")]
        with rope_dist.enable(factor=2) as enabled:
            assert enabled.model is None
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
            built = AutoModelForCausalLM.from_config(llama_config())
            inner, info = LlamaModel.from_pretrained(tmp_path, output_loading_info=True)
            other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
            assert not info["mismatched_keys"]
            for model in (loaded, built, inner):
                assert model.config.max_position_embeddings == 128
                assert list(enabled_modules(model))
            assert not list(enabled_modules(other))
        assert [PreTrainedModel.__dict__[name] for name in ("from_pretrained", "_from_config")] == builders
        # Leaving the context undoes what it did, models built in it included.
        assert not list(enabled_modules(loaded))
        assert torch.equal(loaded(ids).logits, llama(ids).logits)

    def test_the_class_itself(self, ids):
        class Larger(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)  # ends with a post_init of its own
                self.model = LlamaModel(config)
                self.post_init()

        class WithHead(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                self.head = torch.nn.Linear(64, 1)

        class Fails(LlamaForCausalLM):
            def __init__(self, config):
                super().__init__(config)
                raise RuntimeError("no room")

        class Holder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = LlamaForCausalLM(llama_config())

        builders = [
            PreTrainedModel.__dict__[name] for name in ("from_pretrained", "_from_config", "post_init")
        ]
        with rope_dist.enable(factor=2):
            with pytest.raises(RuntimeError, match="no room"):
                Fails(llama_config())
            models = [cls(llama_config()) for cls in (LlamaModel, LlamaForCausalLM, Larger, WithHead)]
            models.append(Holder().inner)
            assert not list(enabled_modules(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2))))
            for model in models:
                assert model.config.max_position_embeddings == 128
                assert {module.config.max_position_embeddings for _, module in enabled_modules(model)} == {
                    128
                }
                assert len(list(enabled_modules(model))) == 3
                inner = getattr(model, "model", model)
                assert inner.config is model.config
        after = [PreTrainedModel.__dict__[name] for name in ("from_pretrained", "_from_config", "post_init")]
        assert after == builders
        for model in (*models, LlamaForCausalLM(llama_config())):
            assert not list(enabled_modules(model))
            assert model.config.max_position_embeddings == 64

    def test_parts_of_a_multimodal_model_share_its_config(self, tmp_path):
        """llava builds its language model by from_config: enabled alone, the whole config would not be extended."""
        model = tiny_multimodal("llava")
        model.save_pretrained(tmp_path)
        with rope_dist.enable(factor=2):
            for built in (type(model).from_pretrained(tmp_path), type(model)(model.config)):
                text = built.config.get_text_config()
                assert text.max_position_embeddings == 128
                assert text is built.model.language_model.config

    def test_disable_ends_it(self, llama, tmp_path):
        llama.save_pretrained(tmp_path)
        rope_dist.enable()
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert list(enabled_modules(model))
        rope_dist.disable()
        assert not list(enabled_modules(model))
        assert not list(enabled_modules(AutoModelForCausalLM.from_pretrained(tmp_path)))

    def test_the_latest_options_count(self):
        rope_dist.enable(factor=2)
        rope_dist.enable(factor=3)
        assert AutoModelForCausalLM.from_config(llama_config()).config.max_position_embeddings == 192

    def test_nested_contexts_go_back_to_the_outer_options(self):
        with rope_dist.enable(factor=2):
            with rope_dist.enable(factor=3):
                pass
            assert AutoModelForCausalLM.from_config(llama_config()).config.max_position_embeddings == 128
        assert AutoModelForCausalLM.from_config(llama_config()).config.max_position_embeddings == 64

    def test_other_families_load_as_ever(self):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
        with rope_dist.enable():
            model = AutoModelForCausalLM.from_config(config)
        assert type(model) is GPT2LMHeadModel
        assert not list(enabled_modules(model))

    def test_a_model_without_storage(self):
        """As transformers builds one before it loads weights, and users to look at a large model."""
        with rope_dist.enable(factor=2), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(llama_config())
            assert model.config.max_position_embeddings == 128
            assert model.model.rotary_emb.inv_freq.is_meta
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(llama_config())
            rope_dist.enable(model, factor=2)
        model.to_empty(device="cpu")
        rope_dist.disable(model)

    def test_a_failing_load_leaves_nothing(self, tmp_path):
        before = PreTrainedModel.__dict__["from_pretrained"]
        with pytest.raises(OSError, match="no file named"), rope_dist.enable():
            LlamaForCausalLM.from_pretrained(tmp_path)
        assert PreTrainedModel.__dict__["from_pretrained"] is before
        assert transformers.models.llama.modeling_llama.LlamaAttention is LlamaAttention


class TestRefusals:
    """Each says what is wrong, and the model is as it was."""

    def test_another_family(self):
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
        before = classes(model)
        with pytest.raises(
            ValueError,
            match=r"GPT2LMHeadModel \(model_type gpt2\) has no attention with a rotary embedding",
        ):
            rope_dist.enable(model)
        assert classes(model) == before
        with pytest.raises(ValueError, match="Linear has no attention with a rotary embedding"):
            rope_dist.enable(torch.nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"head_dim": 32}, "the plan is for head_dim 32, the model has 16"),
            ({"head_dim": 16, "rotary_dim": 8}, "the plan is for rotary_dim 8, the model has 16"),
            ({"head_dim": 16, "theta": 5e5}, "the plan is for theta 500000.0, the model has 10000.0"),
        ],
    )
    def test_a_plan_for_another_model(self, llama, stock, arguments, message):
        plan = rope_dist.plan(**{"theta": 10000.0, "original_length": 64, "factor": 2, **arguments})
        with pytest.raises(ValueError, match=message):
            rope_dist.enable(llama, plan=plan)
        assert_stock(llama, stock)

    def test_a_plan_for_unscaled_frequencies_on_a_scaled_model(self, make_llama):
        model = make_llama(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0})
        with pytest.raises(ValueError, match="start from different frequencies"):
            rope_dist.enable(
                model, plan=rope_dist.plan(theta=10000.0, head_dim=16, original_length=64, factor=2)
            )

    def test_a_plan_for_another_trained_length_warns(self, llama):
        plan = rope_dist.plan(theta=10000.0, head_dim=16, original_length=32, factor=4)
        with pytest.warns(UserWarning, match="takes 32 tokens as trained, the model's config says 64"):
            rope_dist.enable(llama, plan=plan)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"target_length": 32}, ValueError, "below the original length 64"),
            ({"factor": 0}, ValueError, "factor must be a positive number"),
            ({"factor": 2, "target_length": 128}, ValueError, "one of target_length, factor and plan"),
            ({"factor": 2, "strategy": "magic"}, ValueError, "unknown strategy"),
            (
                {"factor": 2, "strategy": "dprope", "threshold": 0, "interpolated_dims": 4},
                ValueError,
                "not both",
            ),
            (
                {"strategy": "dprope", "threshold": 0},
                ValueError,
                "threshold are of a strategy: give target_length",
            ),
            ({"original_length": 64}, ValueError, "original_length is of a new plan"),
            (
                {"factor": 2, "settings": {"fast_periods": "x"}},
                ValueError,
                "fast_periods must be a finite number",
            ),
            ({"plan": {"factors": [1.0]}}, TypeError, "plan must be a RopePlan or a DynamicPlan, got dict"),
        ],
    )
    def test_bad_arguments(self, llama, stock, arguments, error, message):
        with pytest.raises(error, match=message):
            rope_dist.enable(llama, **arguments)
        assert_stock(llama, stock)

    @pytest.mark.parametrize("ready", [False, True])
    def test_a_plan_that_stock_could_not_read(self, llama, stock, monkeypatch, ready):
        arguments = {"plan": rope_dist.plan(llama, factor=2)} if ready else {"factor": 2}

        def without(*_, **__):
            raise KeyError("longrope")

        monkeypatch.setitem(transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS, "longrope", without)
        with pytest.raises(ValueError, match="stock transformers cannot run this plan in LlamaConfig"):
            rope_dist.enable(llama, **arguments)
        assert_stock(llama, stock)

    def test_bad_arguments_without_a_model_change_nothing(self):
        before = PreTrainedModel.__dict__["from_pretrained"]
        for arguments in (
            {"factor": 0},
            {"factor": 2, "strategy": "magic"},
            {"target_length": 3, "factor": 3},
        ):
            with pytest.raises(ValueError, match=r"factor|strategy"):
                rope_dist.enable(**arguments)
        assert PreTrainedModel.__dict__["from_pretrained"] is before

    def test_something_that_is_no_model(self):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            rope_dist.enable("llama2-7b")
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            rope_dist.disable("llama2-7b")

    def test_a_forward_replaced_on_the_instance(self, llama, stock):
        attention = llama.model.layers[1].self_attn
        attention.forward = attention.forward
        with pytest.raises(ValueError, match=r"forward of model\.layers\.1\.self_attn has been replaced"):
            rope_dist.enable(llama)
        del attention.forward
        assert_stock(llama, stock)

    def test_a_changed_subclass(self, llama, stock):
        class MyAttention(LlamaAttention):
            pass

        attention = llama.model.layers[1].self_attn
        attention.__class__ = MyAttention
        with pytest.raises(ValueError, match="a MyAttention, a changed LlamaAttention"):
            rope_dist.enable(llama)
        attention.__class__ = LlamaAttention
        assert_stock(llama, stock)
