"""Plans: from every kind of source, to JSON and back, into a config that stock transformers reads."""

import errno
import json
import math
import os

import pytest
import torch
from conftest import llama_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import rope_dist
from rope_dist import RopePlan
from rope_dist.defaults import DEFAULT_STRATEGY
from rope_dist.planning import pretrained_rope
from rope_dist.presets import PRESETS
from rope_dist.strategies import STRATEGIES


def plan(**changes) -> RopePlan:
    return rope_dist.plan(
        **{"theta": 10000.0, "head_dim": 16, "original_length": 64, "target_length": 128, **changes}
    )


class TestSources:
    def test_plain_numbers_preset_config_and_directory_agree(self, tmp_path):
        config = llama_config(hidden_size=512, max_position_embeddings=4096)
        config.save_pretrained(tmp_path)
        sources = [
            rope_dist.plan(theta=10000.0, head_dim=128, original_length=4096, factor=2),
            rope_dist.plan("llama2-7b", target_length=8192),
            rope_dist.plan(config, target_length=8192),
            rope_dist.plan(tmp_path, target_length=8192),
            rope_dist.plan(str(tmp_path / "config.json"), target_length=8192),
        ]
        assert all(made == sources[0] for made in sources)
        assert sources[1].source == "llama2-7b"

    def test_a_model_is_a_source(self, llama):
        assert rope_dist.plan(llama, factor=2) == rope_dist.plan(llama.config, factor=2)

    @pytest.mark.parametrize("name", list(PRESETS))
    def test_presets_plan(self, name):
        made = rope_dist.plan(name, factor=1)
        assert made.original_length == PRESETS[name].length
        assert made.interpolated_dims == 0

    def test_llama_3_1_starts_from_its_own_scaling(self):
        config = llama_config(
            hidden_size=512,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
        stock, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        for source in (config, "llama3.1-8b"):
            made = rope_dist.plan(source, factor=2, strategy="extrapolation")
            torch.testing.assert_close(made.inv_freq, stock, rtol=2e-7, atol=0.0)
            assert made.original_length == 131072
        interpolated = rope_dist.plan(config, factor=2, strategy="pi")
        torch.testing.assert_close(interpolated.inv_freq, stock / 2, rtol=2e-7, atol=0.0)
        assert interpolated.interpolated_dims == 128

    @pytest.mark.filterwarnings("ignore:.*short_factor is discarded")
    @pytest.mark.parametrize(
        ("parameters", "length"),
        [
            ({"rope_type": "linear", "factor": 3.0}, 192),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
            (
                {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.5] * 8,
                    "original_max_position_embeddings": 32,
                    "factor": 2.0,
                },
                64,
            ),
        ],
        ids=["linear", "yarn", "longrope"],
    )
    def test_a_scaled_model_is_extended_from_what_it_has(self, parameters, length):
        config = llama_config(rope_parameters={"rope_theta": 10000.0, **parameters})
        stock, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
        made = rope_dist.plan(config, factor=2, strategy="pi")
        assert made.original_length == length
        assert made.attention_scaling == pytest.approx(attention)
        torch.testing.assert_close(made.inv_freq, stock / 2, rtol=3e-7, atol=0.0)

    def test_partial_rotary(self):
        rope, head_dim = pretrained_rope(
            llama_config(rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 1.0})
        )
        assert (rope.rotary_dim, head_dim) == (16, 16)
        made = plan(head_dim=44, rotary_dim=30)
        share = made.config_overrides()["rope_parameters"]["partial_rotary_factor"]
        assert len(made.factors) == 15
        assert int(44 * share) == 30  # as readers truncate it

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"theta": None}, "missing: theta"),
            ({"theta": None, "head_dim": None, "original_length": None}, "give a model"),
            ({"head_dim": 15}, "head_dim must be a positive even number"),
            ({"head_dim": 0}, "head_dim"),
            ({"rotary_dim": 18}, "rotary_dim 18 is larger than head_dim 16"),
            ({"original_length": 0}, "original_length"),
            ({"target_length": 63}, "below the original length 64"),
            ({"target_length": 100.5}, "whole number"),
            ({"target_length": None}, "either target_length"),
            ({"factor": 2}, "either target_length"),
            ({"target_length": None, "factor": 0}, "factor must be a positive number"),
            ({"target_length": None, "factor": -2.0}, "factor must be a positive number"),
            ({"target_length": None, "factor": math.inf}, "factor must be a positive number"),
            ({"target_length": None, "factor": 10**400}, "factor must be a positive number"),
            ({"target_length": None, "factor": "2"}, "factor must be a positive number, got '2'"),
            ({"target_length": None, "factor": 1e308}, "factor 1e.308 times the original length 64 must be"),
            ({"target_length": 2**31}, "at most 2147483647"),
            ({"target_length": "128"}, "target length must be a finite number, got '128'"),
            ({"original_length": None}, "missing: original_length"),
            ({"theta": "1e4"}, "theta must be a finite number"),
            ({"theta": 1e38}, "at most 1e.30"),
            ({"head_dim": math.inf}, "head_dim must be a finite number"),
            ({"head_dim": 10**9}, "at most 65536"),
            ({"target_length": None, "factor": 0.5}, "below the original length"),
            ({"strategy": "dprope", "threshold": 0, "interpolated_dims": 4}, "not both"),
            ({"strategy": None}, "unknown strategy None"),
            ({"threshold": 0}, "auto has no setting 'threshold'; it has .*strategies that have it: dprope"),
            ({"strategy": "magic"}, "unknown strategy 'magic'; known: extrapolation"),
            ({"strategy": "yarn", "beta": 3}, "no setting 'beta'; it has beta_fast"),
            ({"strategy": "pi", "threshold": 3}, "no setting 'threshold'; it has none"),
            ({"intervals": 1}, "intervals"),
            ({"intervals": None}, "intervals must be a whole number"),
            ({"intervals": math.inf}, "intervals must be a whole number"),
            ({"intervals": 10**12}, "intervals must be a whole number"),
            ({"divergence": "kl"}, "divergence"),
            ({"source": "llama2-7b"}, "not both"),
            ({"strategy": "longrope", "factors": [math.nan] * 8}, "finite and positive"),
        ],
    )
    def test_bad_numbers_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            plan(**arguments)

    def test_unknown_models_are_refused_at_once(self, tmp_path):
        with pytest.raises(ValueError, match="unknown model 'llama2-8b', did you mean llama3-8b"):
            rope_dist.plan("llama2-8b", factor=2)
        with pytest.raises(ValueError, match=r"no config of a model at .*: the directory has no config.json"):
            rope_dist.plan(tmp_path, factor=2)
        with pytest.raises(
            ValueError, match=r"no config of a model at .*, neither a directory nor on the hub"
        ):
            rope_dist.plan(tmp_path / "none", factor=2)
        with pytest.raises(TypeError, match="cannot plan from a int"):
            rope_dist.plan(4096, factor=2)

    def test_a_plan_replaces_dynamic_scaling(self):
        """Up to its trained length a dynamic NTK model has the plain frequencies."""
        dynamic = llama_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
        made = rope_dist.plan(dynamic, factor=2)
        assert made == rope_dist.plan(llama_config(), factor=2)
        assert "dynamic NTK" in made.notes[0]
        assert made.notes[0] in made.summary()

    def test_of_several_embeddings_the_one_of_full_attention_is_extended(self):
        layered = Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
        full = layered.rope_parameters["full_attention"]
        plan = rope_dist.plan(layered, factor=2)
        assert plan.theta == full["rope_theta"] != layered.rope_parameters["sliding_attention"]["rope_theta"]
        overrides = plan.config_overrides(layered)["rope_parameters"]
        assert overrides["full_attention"]["rope_type"] == "longrope"
        assert overrides["sliding_attention"] == layered.rope_parameters["sliding_attention"]
        layered.rope_parameters = {"sliding_attention": full}
        with pytest.raises(ValueError, match="nothing to extend"):
            rope_dist.plan(layered, factor=2)
        layered.rope_parameters = {"sliding_attention": full, "full_attention": None}
        with pytest.raises(ValueError, match="nothing to extend"):
            rope_dist.plan(layered, factor=2)


class TestFrequencies:
    @pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0, 1000000.0])
    @pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
    def test_equal_stock_bit_for_bit_where_factors_are_1(self, theta, head_dim):
        config = llama_config(
            hidden_size=4 * head_dim,
            max_position_embeddings=512,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
        )
        stock = LlamaRotaryEmbedding(config).inv_freq
        assert torch.equal(rope_dist.plan(config, factor=2, strategy="extrapolation").inv_freq, stock)
        made = rope_dist.plan(config, factor=2, strategy="dprope")
        kept = torch.tensor(made.factors) == 1
        assert kept.any()
        assert not kept.all()
        assert torch.equal(made.inv_freq[kept], stock[kept])

    @pytest.mark.parametrize("strategy", ["dprope", "yarn", "ntk", "llama3", "pi"])
    @pytest.mark.parametrize("factor", [1.37, 2, 4])
    def test_stock_transformers_computes_the_same_from_the_config(self, strategy, factor):
        config = llama_config(hidden_size=512, max_position_embeddings=512)
        made = rope_dist.plan(config, factor=factor, strategy=strategy)
        for key, value in made.config_overrides().items():
            setattr(config, key, value)
        rotary = LlamaRotaryEmbedding(config)
        assert torch.equal(rotary.inv_freq, made.inv_freq)
        assert rotary.attention_scaling == made.attention_scaling


@pytest.mark.parametrize("strategy", ["dprope", "yarn"])
def test_float64_is_a_measure_of_every_strategy(strategy):
    made = plan(strategy=strategy, dtype="float64")
    assert made.dtype == made.to_dict()["dtype"] == "float64"
    assert made.disturbance == pytest.approx(plan(strategy=strategy).disturbance, rel=0.05)
    assert RopePlan.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="float32, float64"):
        plan(strategy=strategy, dtype=torch.float16)


class TestJson:
    @given(
        theta=st.floats(2, 1e7),
        head_dim=st.integers(2, 32).map(lambda n: 2 * n),
        length=st.integers(4, 500),
        factor=st.floats(1, 9),
        strategy=st.sampled_from(["dprope", "yarn", "ntk", "dynamic-ntk", "llama3", "pi", "extrapolation"]),
    )
    def test_round_trip_is_lossless(self, theta, head_dim, length, factor, strategy):
        made = plan(
            theta=theta,
            head_dim=head_dim,
            original_length=length,
            target_length=None,
            factor=factor,
            strategy=strategy,
        )
        read = RopePlan.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
        assert read == made
        assert torch.equal(read.inv_freq, made.inv_freq)
        assert read.to_dict() == made.to_dict()

    def test_a_file_round_trip_keeps_the_source(self, tmp_path):
        made = rope_dist.plan("llama3.1-8b", factor=1)
        made.save(tmp_path / "plan.json")
        read = RopePlan.load(tmp_path / "plan.json")
        assert read == made
        assert read.source == "llama3.1-8b"
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_documented_keys(self):
        data = rope_dist.plan(
            theta=500000, head_dim=128, original_length=8192, target_length=32768, strategy="dprope"
        ).to_dict()
        assert len(data["factors"]) == len(data["inv_freq"]) == len(data["disturbance_per_pair"]) == 64
        assert data["disturbance"] == pytest.approx(sum(data["disturbance_per_pair"]) / 64)
        expected = {"strategy": "dprope", "threshold": 2e-3, "original_length": 8192, "target_length": 32768}
        assert {key: data[key] for key in expected} == expected

    @pytest.mark.parametrize("kept", [0, 1, 50, 500, -2])
    def test_a_truncated_file_is_refused(self, tmp_path, kept):
        path = tmp_path / "plan.json"
        plan().save(path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"plan\.json is not a whole JSON file"):
            RopePlan.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, 'the key "format"'),
            ({"version": 99}, "version 99"),
            ({"factors": None}, '"factors" of the plan is of the wrong type'),
            ({"factors": [1.0]}, "8 numbers"),
            ({"factors": ["1"] * 8}, "list of numbers"),
            ({"factors": [1.0] * 7 + [math.nan]}, "finite and positive"),
            ({"factors": [1.0] * 7 + [-1.0]}, "finite and positive"),
            ({"factors": [1.0] * 7 + [3.0]}, "contradicts itself"),
            ({"factors": [1.0] * 7 + [10**400]}, "list of numbers"),
            ({"factors": [1.0] * 7 + [math.inf]}, "finite and positive"),
            ({"theta": 10**400}, '"theta" of the plan is of the wrong type'),
            ({"head_dim": 15}, "even"),
            ({"head_dim": True}, "wrong type"),
            ({"rotary_dim": 32}, "larger than head_dim"),
            ({"target_length": 32}, "below the original length"),
            ({"theta": -1.0}, "above 1"),
            ({"attention_scaling": 0.0}, "attention_scaling"),
            ({"disturbance_per_pair": [0.0]}, "8 numbers"),
            ({"divergence": "kl"}, "divergence"),
            ({"intervals": 1}, "intervals"),
            ({"dtype": "float16"}, "dtype"),
            ({"notes": [3]}, '"notes" of the plan must be a list of texts'),
            ({"original_length_from": 3}, '"original_length_from" of the plan is of the wrong type'),
        ],
    )
    def test_a_corrupt_file_is_refused_by_name(self, tmp_path, change, message):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({**plan().to_dict(), **change}))
        with pytest.raises(ValueError, match=rf"plan\.json: .*{message}"):
            RopePlan.load(path)

    @pytest.mark.parametrize(
        "key", ["factors", "theta", "strategy", "inv_freq", "source", "original_length_from", "notes"]
    )
    def test_a_missing_key_is_named(self, key):
        data = plan().to_dict()
        del data[key]
        with pytest.raises(ValueError, match=f'no "{key}"'):
            RopePlan.from_dict(data)

    @pytest.mark.parametrize("data", [None, [], "plan", 3])
    def test_another_json_file_is_refused(self, data):
        with pytest.raises(ValueError, match="not a rope_dist plan"):
            RopePlan.from_dict(data)

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "plan.json"
        plan().save(path)
        before = path.read_bytes()

        def full(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            plan(factor=4, target_length=None).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_a_missing_file_is_one_clear_error(self, tmp_path):
        with pytest.raises(ValueError, match="cannot read the plan"):
            RopePlan.load(tmp_path / "none.json")


def test_repr_and_summary_are_readable():
    made = rope_dist.plan("llama2-7b", target_length=16384, strategy="dprope")
    assert repr(made) == (
        "RopePlan(dprope, 4096 -> 16384 (4x), theta=10000, head_dim=128, 64 of 128 dimensions interpolated, "
        "threshold=0.002, attention_scaling=1, disturbance=23.04e-3)"
    )
    assert "46-63" in made.summary()


class TestSettings:
    @pytest.mark.parametrize(
        "given", [{"factor": 8}, {"settings": {"factor": 8}}, {"settings": {"factor": 8.0}}], ids=str
    )
    def test_llama3s_own_factor_beside_a_length(self, given):
        """Llama 3.1's scaling: 8 for sixteen times the length, as its config has it."""
        made = rope_dist.plan("llama3-8b", target_length=131072, strategy="llama3", **given)
        assert made.settings["factor"] == 8
        assert made.factors == PRESETS["llama3.1-8b"].factors

    def test_factor_is_the_length_where_none_is_given(self):
        made = plan(target_length=None, factor=4, strategy="llama3", settings={"factor": 3})
        assert (made.target_length, made.settings["factor"]) == (256, 3)
        made = plan(target_length=None, factor=4, strategy="dynamic-ntk")
        assert (made.target_length, made.settings["factor"]) == (256, 4)

    def test_measures_of_dprope_are_those_of_the_plan(self):
        made = plan(strategy="dprope", settings={"intervals": 90, "dtype": "float64"})
        assert (
            (made.intervals, made.dtype)
            == (90, "float64")
            == (made.settings["intervals"], made.settings["dtype"])
        )
        assert made == plan(strategy="dprope", intervals=90, dtype="float64")

    @pytest.mark.parametrize("name", ["target_length", "theta", "strategy", "source", "rope", "settings"])
    def test_names_of_plans_own_options_are_no_settings(self, name):
        with pytest.raises(ValueError, match=f"dprope has no setting '{name}'; it has threshold"):
            plan(strategy="dprope", settings={name: 5})

    @pytest.mark.parametrize(
        ("strategy", "name"),
        [
            ("yarn", "beta_fast"),
            ("yarn", "beta_slow"),
            ("llama3", "low_freq_factor"),
            ("llama3", "high_freq_factor"),
            ("mrrope-uni", "fast_periods"),
            ("auto", "slow_periods"),
            ("refined", "tolerance"),
            ("refined", "slack"),
            ("refined", "smoothing"),
            ("dprope", "smoothing"),
        ],
    )
    @pytest.mark.parametrize("value", ["abc", None, [1], True, {}], ids=repr)
    def test_a_value_of_the_wrong_type(self, strategy, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            plan(strategy=strategy, settings={name: value})

    @pytest.mark.parametrize(
        ("strategy", "settings", "message"),
        [
            ("yarn", {"attention_factor": "abc"}, "attention_factor must be a positive number, got 'abc'"),
            ("yarn", {"truncate": "no"}, "truncate must be true or false"),
            ("llama3", {"factor": [8]}, "llama3's factor must be a finite number"),
            ("dynamic-ntk", {"factor": "2"}, "dynamic-ntk's factor must be a finite number"),
            ("dprope", {"threshold": [1]}, "threshold must be a finite number"),
            ("dprope", {"interpolated_dims": "4"}, "interpolated_dims must be a finite number"),
            ("dprope", {"interpolated_dims": 2.5}, "interpolated_dims must be a whole number from 0 to 16"),
            ("dprope", {"candidates": 3}, "at least two candidate strategies"),
            ("dprope", {"candidates": ["pi", 3]}, "unknown strategy 3"),
            ("longrope", {"factors": "abc"}, "longrope's factors must be 8 numbers"),
            ("longrope", {"factors": [[1.0], "a"]}, "longrope's factors must be 8 numbers"),
            (
                "longrope",
                {"factors": [1.0] * 8, "attention_factor": [1]},
                "attention_factor must be a positive number",
            ),
            ("refined", {"dtype": 3}, "dtype must be one of"),
            ("refined", {"divergence": ["kl"]}, "divergence must be one of"),
        ],
    )
    def test_other_values(self, strategy, settings, message):
        with pytest.raises(ValueError, match=message):
            plan(strategy=strategy, settings=settings)

    def test_given_twice_or_no_mapping(self):
        with pytest.raises(ValueError, match="'beta_fast' is given twice"):
            plan(strategy="yarn", beta_fast=16, settings={"beta_fast": 16})
        with pytest.raises(ValueError, match="settings must be a mapping"):
            plan(strategy="yarn", settings=["beta_fast"])

    def test_the_default_strategy(self):
        assert plan().strategy == DEFAULT_STRATEGY == rope_dist.strategies.DEFAULT_STRATEGY == "auto"


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(strategy, dtype):
    settings = {"factors": [1.0] * 8} if strategy == "longrope" else {}
    expected = plan(strategy=strategy, **settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert plan(strategy=strategy, **settings) == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_ambient_device_does_not_matter(strategy):
    settings = {"factors": [1.0] * 8} if strategy == "longrope" else {}
    expected = plan(strategy=strategy, **settings)
    with torch.device("meta"):
        made = plan(strategy=strategy, **settings)
        assert made == expected
        assert made.inv_freq.device.type == "cpu"
        assert RopePlan.from_dict(made.to_dict()) == expected
