"""Configs as models are published: their trained length, what an extension keeps of them, and their faults."""

import copy
import json

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.model_families import SMALL
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import rope_dist
from rope_dist.layer_types import ROTATES_WINDOWS_ONLY
from rope_dist.model_config import load_config, read_rope
from rope_dist.trained_length import LENGTH_KEYS


def linear(factor: float, **more) -> dict:
    return {"rope_scaling": {"type": "linear", "factor": factor}, **more}


def yarn(factor: float, original: int, **more) -> dict:
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return {"rope_scaling": scaling, **more}


LLAMA31 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

# The keys of published configs, and what their model cards say of the length.
PUBLISHED = {
    "Llama-2-7b": ({}, 4096, 4096),
    "vicuna-13b-v1.5-16k": (linear(4.0), 4096, 16384),
    "vicuna-13b-v1.5-16k with its length": (linear(4.0, max_sequence_length=16384), 4096, 16384),
    "the same, written after scaling": (linear(4.0), 16384, 16384),
    "Llama-2-7b-longlora-32k": (linear(8.0), 4096, 32768),
    "LLaMA-2-7B-32K": (linear(8.0), 32768, 32768),
    "deepseek-coder-6.7b": (linear(4.0, rope_theta=100000.0, model_max_length=16384), 16384, 16384),
    "Llama-3.1-8B": (
        {"rope_scaling": {**LLAMA31, "factor": 8.0, "original_max_position_embeddings": 8192}},
        131072,
        131072,
    ),
    "Llama-3.2-1B": (
        {"rope_scaling": {**LLAMA31, "factor": 32.0, "original_max_position_embeddings": 8192}},
        131072,
        131072,
    ),
    "Llama 3.1's scaling written into Llama-3-8B": (
        {"rope_scaling": {**LLAMA31, "factor": 8.0, "original_max_position_embeddings": 8192}},
        8192,
        65536,
    ),
    "Qwen2.5 with YaRN as documented": (yarn(4.0, 32768), 32768, 131072),
    "Qwen2.5 with YaRN, length raised": (yarn(4.0, 32768), 131072, 131072),
    "Qwen3 with YaRN as documented": (yarn(4.0, 32768), 40960, 131072),
    "DeepSeek-V3's YaRN": (yarn(40, 4096), 163840, 163840),
    "a rounded factor": (yarn(3.05, 42975), 131072, 131072),
    "Phi-3-mini-128k": (
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096}},
        131072,
        131072,
    ),
    "Phi-3-mini-128k, top level": (
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096},
        131072,
        131072,
    ),
    "MiniCPM4": ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32768}}, 32768, 32768),
    "InternLM2": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 32768, 32768),
}


class TestTrainedLength:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published(self, name):
        keys, written, length = PUBLISHED[name]
        found = read_rope(llama_config(max_position_embeddings=written, **copy.deepcopy(keys)))
        assert found.rope.length == length
        assert found.length_from

    def test_from_vicunas_length_position_interpolation_is_one_eighth(self):
        for written in (4096, 16384):
            config = llama_config(max_position_embeddings=written, **linear(4.0))
            made = rope_dist.plan(config, target_length=32768, strategy="pi")
            assert made.factors == (8.0,) * 8
        assert made.original_length == 16384

    def test_the_reason_is_printed(self):
        made = rope_dist.plan(
            llama_config(max_position_embeddings=4096, max_sequence_length=16384, **linear(4.0)), factor=1
        )
        reason = "factor 4 x max_position_embeddings 4096, as max_sequence_length says"
        assert made.original_length_from == reason
        assert f"trained length: 16384 tokens ({reason})" in made.summary()
        assert rope_dist.RopePlan.from_dict(made.to_dict()).original_length_from == reason

    def test_layer_types_have_the_length_of_the_whole(self):
        """Gemma 3 4B: scaled linearly by 8, and written with what it reads."""
        config = transformers.Gemma3TextConfig(
            **{**SMALL, "max_position_embeddings": 131072},
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
        rope = read_rope(config).rope
        assert rope.length == 131072
        assert rope.factors == (8.0,) * 8

    @pytest.mark.parametrize(
        ("tokenizer", "length"), [(8192, 8192), (4096, 4096), (10**30, None), (None, None)]
    )
    def test_the_tokenizer_settles_what_both_readings_allow(self, tmp_path, tokenizer, length):
        """Trained at 2048 and written after scaling, or at 4096 and written before."""
        llama_config(max_position_embeddings=4096, **linear(2.0)).save_pretrained(tmp_path)
        if tokenizer is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": tokenizer}))
        if length is None:
            with pytest.raises(
                ValueError, match=r"not clear: .* is 8192; .* is 4096. Give it as original_length"
            ):
                rope_dist.plan(tmp_path, factor=2)
            return
        made = rope_dist.plan(tmp_path, factor=2)
        assert made.original_length == length
        assert made.original_length_from.endswith("as model_max_length of the tokenizer says")
        model = transformers.LlamaForCausalLM(load_config(tmp_path))
        assert rope_dist.plan(model, factor=2) == made

    @pytest.mark.parametrize(
        ("keys", "written", "message"),
        [
            (linear(2.0), 4096, "factor 2 x max_position_embeddings 4096 is 8192"),
            (linear(4.0, max_sequence_length=8192), 4096, "max_sequence_length 8192"),
            (linear(4.0, model_max_length=16384, seq_length=4096), 4096, "seq_length 4096"),
            (yarn(4.0, 8192), 131072, r"max_position_embeddings 131072; factor 4 x original\S* 8192"),
            (yarn(4.0, 32768), 4096, "max_position_embeddings 4096; factor 4"),
            ({"max_sequence_length": 16384}, 4096, "max_position_embeddings 4096; max_sequence_length 16384"),
        ],
        ids=["linear", "linear and a length", "two lengths", "yarn", "yarn from more", "plain"],
    )
    def test_contradictions_are_settled_by_the_caller(self, keys, written, message):
        config = llama_config(max_position_embeddings=written, **copy.deepcopy(keys))
        with pytest.raises(ValueError, match=f"not clear.*{message}.*original_length .--original"):
            rope_dist.plan(config, factor=2)
        model = transformers.LlamaForCausalLM(config)
        with pytest.raises(ValueError, match="original_length"):
            rope_dist.enable(model, factor=2)
        made = rope_dist.plan(config, factor=2, original_length=8192)
        assert (made.original_length, made.target_length) == (8192, 16384)
        assert "given as original_length" in made.summary()
        # With either the model is extended, without a warning.
        assert rope_dist.enable(model, factor=2, original_length=8192).plan.stages[-1] == made
        rope_dist.disable(model)
        rope_dist.enable(model, plan=made)
        assert model.config.max_position_embeddings == 16384
        rope_dist.disable(model)

    def test_beside_a_preset(self):
        made = rope_dist.plan("llama2-7b", original_length=8192, factor=2)
        assert (made.original_length, made.target_length) == (8192, 16384)
        with pytest.raises(ValueError, match="original_length must be"):
            rope_dist.plan("llama2-7b", original_length=1, factor=2)


def text_config(name: str, **changes) -> transformers.PretrainedConfig:
    return getattr(transformers, name)(**{**SMALL, "head_dim": 16, **changes})


class TestMerge:
    """What stock computes beside frequencies stays: the plans extrapolate, so the frequencies stay too."""

    def extended(self, config):
        made = rope_dist.plan(config, factor=2, strategy="extrapolation")
        new = copy.deepcopy(config)
        new.__dict__.update(made.config_overrides(config))
        # As it comes back from a file.
        return type(config).from_dict(json.loads(new.to_json_string()))

    @torch.no_grad()
    def test_ministral3_scales_queries_by_position(self):
        config = text_config(
            "Ministral3Config",
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        )
        torch.manual_seed(0)
        stock = transformers.Ministral3ForCausalLM(config).eval()
        extended = transformers.Ministral3ForCausalLM(self.extended(config)).eval()
        extended.load_state_dict(stock.state_dict())
        ids = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(extended(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
        parameters = extended.config.rope_parameters
        assert parameters["llama_4_scaling_beta"] == 0.1
        assert parameters["original_max_position_embeddings"] == 16
        # Extended again and saved, it is read with the same length.
        assert read_rope(extended.config).rope.length == 128

    @pytest.mark.parametrize("rope_type", ["yarn", "default"])
    def test_deepseek_scales_its_softmax(self, rope_type):
        parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        if rope_type == "yarn":
            parameters |= {"factor": 40.0, "original_max_position_embeddings": 64}
        config = transformers.DeepseekV3Config(
            **{**SMALL, "max_position_embeddings": 64},
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            rope_parameters=parameters,
        )
        stock = DeepseekV3Attention(config, 0)
        assert DeepseekV3Attention(self.extended(config), 0).scaling == stock.scaling
        if rope_type == "yarn":
            assert stock.scaling > 1.5 * 16**-0.5  # there is something to keep

    def test_sections_of_multimodal_positions(self):
        config = transformers.Qwen2_5_VLTextConfig(
            **SMALL, rope_scaling={"type": "mrope", "mrope_section": [2, 2, 2]}
        )
        assert self.extended(config).rope_parameters["mrope_section"] == [2, 2, 2]

    @torch.no_grad()
    def test_phimoe_has_scalings_of_its_own(self):
        config = text_config("PhimoeConfig", num_local_experts=2, num_experts_per_tok=2)
        made = rope_dist.plan(config, factor=2, strategy="yarn")
        config.__dict__.update(made.config_overrides(config))
        rotary = transformers.models.phimoe.modeling_phimoe.PhimoeRotaryEmbedding(config)
        cos, _ = rotary(torch.zeros(1), torch.zeros(1, 1, dtype=torch.long))
        torch.testing.assert_close(cos, torch.full_like(cos, made.attention_scaling))
        again = read_rope(config).rope
        assert again.attention_scaling == made.attention_scaling

    @torch.no_grad()
    def test_a_partial_rotary_factor_that_the_model_ignores(self, tmp_path):
        config = llama_config(rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5})
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(1))
        expected = model(ids).logits
        with rope_dist.enable(model, factor=2, strategy="extrapolation", dynamic=False) as enabled:
            assert enabled.plan.rotary_dim == 16
            assert torch.equal(model(ids).logits, expected)
            model.save_pretrained(tmp_path)
        assert torch.equal(transformers.LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
        assert model.config.rope_parameters["partial_rotary_factor"] == 0.5

    def test_a_partial_rotary_factor_that_the_model_follows(self):
        config = transformers.StableLmConfig(**SMALL, partial_rotary_factor=0.5)  # 6 of 12
        made = rope_dist.plan(config, factor=2)
        assert (made.rotary_dim, made.head_dim) == (6, 12)
        assert self.extended(config).rope_parameters["partial_rotary_factor"] == 0.5

    def test_other_names_of_the_length_are_raised(self):
        config = llama_config(**dict.fromkeys(LENGTH_KEYS[:3], 64))
        overrides = rope_dist.plan(config, factor=2).config_overrides(config)
        assert [overrides[key] for key in LENGTH_KEYS[:3]] == [128] * 3
        assert not set(LENGTH_KEYS[3:]) & set(overrides)

    def test_what_stock_cannot_compute_is_refused(self):
        made = rope_dist.plan(theta=10000.0, head_dim=32, original_length=64, factor=2)
        with pytest.raises(ValueError, match="stock transformers cannot run this plan in LlamaConfig"):
            made.config_overrides(llama_config())
        other = rope_dist.plan(theta=10000.0, head_dim=16, original_length=64, factor=2, strategy="pi")
        assert made.config_overrides()["rope_parameters"]["rope_type"] == "longrope"
        assert other.config_overrides(llama_config())["max_position_embeddings"] == 128


class TestFamilies:
    @pytest.mark.parametrize("model_type", ROTATES_WINDOWS_ONLY)
    def test_nothing_to_extend(self, model_type):
        if model_type not in transformers.CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
        config = transformers.CONFIG_MAPPING[model_type]()
        with pytest.raises(
            ValueError, match=f"nothing to extend: {model_type} rotates only the layers that see"
        ):
            rope_dist.plan(config, factor=2)

    def test_without_a_window_there_is(self):
        config = text_config("Exaone4Config", sliding_window=None, layer_types=["full_attention"] * 2)
        assert rope_dist.plan(config, factor=2).target_length == 128

    def test_proportional_frequencies_of_whole_heads(self):
        if "proportional" not in transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS:
            pytest.skip(f"transformers {transformers.__version__} has no proportional frequencies")
        config = llama_config(
            rope_parameters={
                "rope_type": "proportional",
                "rope_theta": 1e4,
                "factor": 2.0,
                "partial_rotary_factor": 1.0,
            }
        )
        made = rope_dist.plan(config, factor=2, strategy="pi")
        assert made.factors == (4.0,) * 8

    def test_a_config_without_a_head_size(self):
        config = llama_config()
        config.__dict__.update(head_dim=None, num_attention_heads=None)
        with pytest.raises(ValueError, match="LlamaConfig says no head_dim"):
            rope_dist.plan(config, factor=2)

    def test_short_factors_are_given_up_with_a_warning(self):
        config = llama_config(
            rope_scaling={**LONGROPE, "original_max_position_embeddings": 32}, max_position_embeddings=64
        )
        with pytest.warns(UserWarning, match="short_factor is discarded: texts of up to 32 tokens"):
            made = rope_dist.plan(config, factor=2)
        assert "short_factor is discarded" in made.summary()


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_position_embeddings": 8192.0},
            r"config\.json .*'max_position_embeddings' expected int, got float",
        ),
        (
            {"max_position_embeddings": None},
            r"config\.json .*'max_position_embeddings' expected int, got None",
        ),
        (
            {"max_position_embeddings": "8192"},
            r"config\.json .*'max_position_embeddings' expected int, got str",
        ),
        ({"max_position_embeddings": -5}, "max_position_embeddings of LlamaConfig must be a whole number"),
        ({"head_dim": 128.0}, r"config\.json .*'head_dim' with value 128.0"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 66}, r"66.* multiple of .*num|66.* multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "config"),
        ({"rope_theta": "1e4"}, "rope_theta of LlamaConfig must be a finite number, got '1e4'"),
        ({"rope_theta": None}, "rope_theta of LlamaConfig must be a finite number, got None"),
        ({"rope_scaling": [1]}, "config"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "factor of LlamaConfig must be a positive number",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": -1}},
            "factor of LlamaConfig must be a positive number",
        ),
        ({"rope_scaling": {"type": "magic", "factor": 4}}, "rope_type 'magic' of LlamaConfig is not known"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "x"}}, "config"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "longrope"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": "0.5"}},
            "must be a finite number, got '0.5'$",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2}}, "above 0 and at most 1"),
    ],
    ids=str,
)
def test_a_config_at_fault_is_one_clear_error(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message) as raised:
        rope_dist.plan(tmp_path, factor=2)
    text = str(raised.value)
    assert str(tmp_path) in text
    assert "nor on the hub" not in text
    assert "\n" not in text
    assert len(text) < 500


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(
        ValueError, match=r"config\.json is not a config that transformers reads: .*valid JSON"
    ):
        rope_dist.plan(tmp_path, factor=2)
    with pytest.raises(ValueError, match="'llama2-7b' is a preset, which has no config"):
        load_config("llama2-7b")
