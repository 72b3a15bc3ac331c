"""Dynamic plans: a ladder of static plans, its JSON, its record in a config, and the trained model found again."""

import copy
import json
import math
import os
import threading
import warnings

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.model_families import SLIDING_THEN_FULL, SMALL, config_of
from hypothesis import given
from hypothesis import strategies as st
from test_export_models import gemma3, llava

import rope_dist
from rope_dist import DynamicPlan, RopePlan, dynamic_plan
from rope_dist.cli import main
from rope_dist.defaults import STRATEGY_NAMES
from rope_dist.dynamic import STAGE_RATIO, check_trained, ladder, load_plan, trained_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}
NUMBERS = {"theta": 10000.0, "head_dim": 16, "original_length": 64}


def extended(config, plan):
    """What ``enable()`` writes into a config, saved and loaded as JSON."""
    text = config.get_text_config(decoder=True)
    text.__dict__.update(plan.config_overrides(text))
    return type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))


@pytest.fixture(scope="module")
def plan():
    return dynamic_plan("llama2-7b", stages=(4871, 5793, 6889, 8192))


class TestLadder:
    @given(st.integers(1000, 10**6), st.floats(1.001, 64), st.floats(1.05, 4))
    def test_it_rises_by_at_most_the_ratio(self, original, scale, ratio):
        target = math.ceil(original * scale)
        lengths = ladder(original, target, ratio)
        assert lengths[-1] == target
        steps = [b / a for a, b in zip((original, *lengths), lengths, strict=False)]
        assert all(1 < step < ratio * 1.001 for step in steps)
        assert max(steps) / min(steps) < 1.003
        # As few as there can be.
        assert len(lengths) == max(1, math.ceil(math.log(target / original) / math.log(ratio) - 1e-9))

    def test_short_lengths_stay_apart(self):
        assert ladder(2, 3) == (3,)
        assert ladder(4, 8, 1.25) == (5, 6, 7, 8)
        assert ladder(8192, 8193) == (8193,)

    def test_the_default(self):
        """Its ratio is a constant of the module."""
        assert ladder(8192, 16384, 1.25) == (9742, 11585, 13777, 16384)
        assert ladder(8192, 16384) == ladder(8192, 16384, STAGE_RATIO)
        made = dynamic_plan("llama2-7b", factor=2)
        assert made.lengths == (4096, *ladder(4096, 8192))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((64, 64), "needs a target length past the original length 64, got 64"),
            ((64, 32), "needs a target length past the original length 64, got 32"),
            ((64, 128, 1), "the ratio of stages must be above 1, got 1"),
            ((64, 128, math.nan), "the ratio of stages"),
            ((64, 128, "x"), "the ratio of stages"),
            ((0, 128), "the original length"),
            ((64, 128.5), "the target length"),
        ],
    )
    def test_bad_ones(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ladder(*arguments)


class TestPlan:
    def test_its_stages_are_the_static_plans(self, plan):
        assert plan.lengths == (4096, 4871, 5793, 6889, 8192)
        for stage in plan.stages[1:]:
            assert stage == rope_dist.plan("llama2-7b", target_length=stage.target_length)
        first = plan.stages[0]
        assert torch.equal(first.inv_freq, plan.pretrained.inv_freq)
        assert (first.attention_scaling, first.disturbance) == (1, 0)

    def test_properties(self, plan):
        assert (plan.strategy, plan.source, plan.scale) == ("auto", "llama2-7b", 2)
        assert (plan.original_length, plan.target_length) == (4096, 8192)
        assert plan.settings == rope_dist.plan("llama2-7b", target_length=8192).settings
        assert repr(plan) == "DynamicPlan(auto, 2x, theta=10000, stages: 4096, 4871, 5793, 6889, 8192)"
        summary = plan.summary()
        assert summary.startswith(repr(plan))
        assert "1 - 4096  as trained" in summary
        assert "4097 - 4871  auto" in summary
        assert len(summary.splitlines()) == 2 + 2 + len(plan.stages)

    def test_the_stage_of_a_length(self, plan):
        for length, stage in (
            (1, 0),
            (4096, 0),
            (4097, 1),
            (4871, 1),
            (4872, 2),
            (8192, 4),
            (8193, 4),
            (10**9, 4),
        ):
            assert plan.stage(length) == stage
            assert plan.at(length) is plan.stages[stage]

    @pytest.mark.parametrize("length", [0, -1, 2.0, "64", None, True])
    def test_what_is_no_length(self, plan, length):
        with pytest.raises(ValueError, match="must be a positive whole number of tokens, got"):
            plan.at(length)

    @pytest.mark.parametrize("strategy", STRATEGY_NAMES)
    def test_every_strategy(self, strategy):
        settings = {"factors": [1.5] * 8} if strategy == "longrope" else {}
        made = dynamic_plan(**NUMBERS, factor=2, strategy=strategy, **settings)
        assert made.lengths == (64, *ladder(64, 128))
        assert {stage.strategy for stage in made.stages[1:]} == {made.strategy} == {strategy}
        for stage in made.stages[1:]:
            numbers = {**NUMBERS, "target_length": stage.target_length}
            assert stage == rope_dist.plan(**numbers, strategy=strategy, **settings)
        assert DynamicPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made

    @pytest.mark.parametrize(
        ("strategy", "settings"),
        [
            ("auto", {"attention_factor": 1.0, "fast_periods": 32.0}),
            ("yarn", {"beta_fast": 16.0, "truncate": False}),
            ("dprope", {"threshold": 0.0}),
            ("llama3", {"factor": 8.0}),
        ],
    )
    def test_settings_reach_every_stage(self, strategy, settings):
        by_name = dynamic_plan(**NUMBERS, target_length=128, strategy=strategy, **settings)
        in_a_mapping = dynamic_plan(**NUMBERS, target_length=128, strategy=strategy, settings=settings)
        assert by_name == in_a_mapping
        for stage in by_name.stages[1:]:
            assert settings.items() <= stage.settings.items()

    def test_how_the_disturbance_is_measured_reaches_every_stage(self):
        made = dynamic_plan(
            **NUMBERS, factor=2, intervals=36, dtype="float64", divergence="extended-pretrained"
        )
        for stage in made.stages:
            assert (stage.intervals, stage.dtype, stage.divergence) == (36, "float64", "extended-pretrained")

    def test_stages_of_ones_own(self):
        made = dynamic_plan(**NUMBERS, stages=[80, 100, 256])
        assert made.lengths == (64, 80, 100, 256)
        assert dynamic_plan(**NUMBERS, stages=(80, 100, 256), target_length=256) == made
        assert dynamic_plan(**NUMBERS, stages=(80, 100, 256), factor=4) == made
        assert dynamic_plan(**NUMBERS, stages=[256]).lengths == (64, 256)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give either target_length .* or factor"),
            ({"target_length": 64}, "needs a target length past the original length 64"),
            ({"target_length": 32}, "below the original length|past the original length"),
            ({"factor": 1}, "needs a target length past the original length 64"),
            ({"factor": 2, "target_length": 128}, "give either target_length .* or factor"),
            ({"factor": 2, "strategy": "magic"}, "unknown strategy 'magic'"),
            ({"factor": 2, "beta_fast": 3}, "auto has no setting 'beta_fast'"),
            ({"stages": []}, r"must be a list of lengths in tokens, got \[\]"),
            ({"stages": 128}, "must be a list of lengths in tokens, got 128"),
            ({"stages": "80,128"}, "must be a list of lengths in tokens, got '80,128'"),
            ({"stages": [80, 80]}, "must rise, got 80, 80"),
            ({"stages": [128, 80]}, "must rise, got 128, 80"),
            ({"stages": [64, 128]}, "stages must be past the original length 64, got 64"),
            ({"stages": [80, 128.5]}, "the length of a stage"),
            ({"stages": [80, True]}, "the length of a stage"),
            ({"stages": [80, 128], "target_length": 256}, "for the target length 256, got 128"),
            ({"stages": [80, 128], "factor": 4}, "for the target length 256, got 128"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            dynamic_plan(**NUMBERS, **options)

    def test_what_is_no_model(self):
        with pytest.raises(TypeError, match="cannot plan from a int"):
            dynamic_plan(3, factor=2)
        with pytest.raises(ValueError, match="unknown model 'lama2-7b'"):
            dynamic_plan("lama2-7b", factor=2)

    def test_a_ladder_put_together_by_hand(self, plan):
        first, *others = plan.stages
        assert DynamicPlan((first, others[-1])).lengths == (4096, 8192)
        assert DynamicPlan([first, *others]) == plan
        yarn = rope_dist.plan("llama2-7b", target_length=8192, strategy="yarn")
        other = rope_dist.plan("llama3-8b", target_length=16384)
        longer = rope_dist.plan("llama2-7b", original_length=2048, target_length=8192)
        scaled = rope_dist.plan("llama2-7b", target_length=4096, attention_factor=1.2)
        for stages, message in (
            ([first], "at least two stages, got 1"),
            ([], "at least two stages, got 0"),
            (others, "the first stage must be the trained model"),
            ([scaled, *others], "the first stage must be the trained model"),
            ([first, *others[::-1]], "must rise, got 8192 before 6889"),
            ([first, first], "must rise, got 4096 before 4096"),
            ([first, others[0], yarn], "by one strategy, got auto and yarn"),
            ([first, other], "all stages must extend one model"),
            ([first, longer], "all stages must extend one model"),
        ):
            with pytest.raises(ValueError, match=message):
                DynamicPlan(stages)
        with pytest.raises(TypeError, match="stages must be RopePlans, got str"):
            DynamicPlan([first, "plan"])


class TestJson:
    def test_round_trip(self, plan, tmp_path):
        plan.save(tmp_path / "plan.json")
        assert DynamicPlan.load(tmp_path / "plan.json") == load_plan(tmp_path / "plan.json") == plan
        data = json.loads((tmp_path / "plan.json").read_text())
        assert data == plan.to_dict()
        assert data["lengths"] == list(plan.lengths)
        static = plan.stages[-1]
        static.save(tmp_path / "static.json")
        assert load_plan(tmp_path / "static.json") == static
        with pytest.raises(ValueError, match=r"static\.json is a static plan: read it with RopePlan\.load"):
            DynamicPlan.load(tmp_path / "static.json")
        with pytest.raises(ValueError, match=r"a dynamic plan: read it with DynamicPlan\.load"):
            RopePlan.load(tmp_path / "plan.json")

    @pytest.mark.parametrize("index", [None, -1])
    def test_a_pipe_is_read_once(self, plan, tmp_path, index):
        """As of ``--plan <(...)``."""
        written = plan if index is None else plan.stages[index]
        os.mkfifo(tmp_path / "pipe")
        writer = threading.Thread(target=written.save, args=(tmp_path / "pipe",))
        writer.start()
        assert load_plan(tmp_path / "pipe") == written
        writer.join()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "other"}, 'the key "format" is not'),
            ({"version": 2}, "version 2 of the format of dynamic plans is not known"),
            ({"stages": None}, '"stages" of the plan must be a list of plans'),
            ({"stages": []}, "at least two stages"),
            ({"stages": [3, 4]}, "not a rope_dist plan"),
            ({"lengths": [64, 128]}, 'the plan contradicts itself: its "lengths"'),
            ({"lengths": None}, 'the plan contradicts itself: its "lengths"'),
        ],
    )
    def test_a_damaged_plan(self, plan, change, message, tmp_path, capsys):
        data = {**plan.to_dict(), **change}
        with pytest.raises(ValueError, match=message):
            DynamicPlan.from_dict(data)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"plan\.json: "):
            load_plan(path)
        assert main(["verify", str(tmp_path), "--plan", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rope-dist: error: ")
        assert error.count("\n") == 1

    def test_a_damaged_stage(self, plan):
        data = copy.deepcopy(plan.to_dict())
        data["stages"][2]["factors"][5] = 7.0
        with pytest.raises(ValueError, match="inv_freq does not follow from its factors"):
            DynamicPlan.from_dict(data)

    def test_what_is_no_plan(self, tmp_path):
        for text, message in (
            ("{", "not a whole JSON file"),
            ("[]", "not a rope_dist plan"),
            ("3", "not a rope_dist"),
        ):
            (tmp_path / "plan.json").write_text(text)
            with pytest.raises(ValueError, match=message):
                load_plan(tmp_path / "plan.json")
        with pytest.raises(ValueError, match="cannot read the plan"):
            load_plan(tmp_path / "nothing.json")


CONFIGS = {
    "llama": llama_config,
    "llama3": lambda: llama_config(rope_parameters=LLAMA3),
    "yarn": lambda: llama_config(rope_parameters=YARN),
    "gemma3, parameters per layer type": lambda: config_of("Gemma3Text", **SLIDING_THEN_FULL),
    "gemma3, multimodal": gemma3,
    "llava": llava,
    "mixtral, head_dim open": lambda: config_of("Mixtral", head_dim=None),
    "phi3": lambda: transformers.Phi3Config(**SMALL, original_max_position_embeddings=64),
    "a length twice": lambda: llama_config(max_seq_len=64),
}


class TestConfig:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_the_record_gives_the_trained_model_back(self, name):
        config = CONFIGS[name]()
        before, made = copy.deepcopy(config), dynamic_plan(config, factor=2, strategy="pi")
        loaded = extended(config, made)
        text = loaded.get_text_config(decoder=True)
        assert text.max_position_embeddings == 128
        assert text.rope_dist["stages"] == list(made.lengths)
        assert trained_config(loaded).to_dict() == type(before).from_dict(before.to_dict()).to_dict()
        assert trained_config(before) is before
        # Planned for anew, from what it was trained with.
        assert dynamic_plan(loaded, factor=2, strategy="pi") == made
        longer = dynamic_plan(loaded, factor=4, strategy="ntk")
        assert longer == dynamic_plan(before, factor=4, strategy="ntk")
        again = extended(loaded, longer)
        assert again.get_text_config(decoder=True).max_position_embeddings == 256
        assert trained_config(again).to_dict() == trained_config(loaded).to_dict()
        check_trained(made, before)
        check_trained(made, loaded)

    def test_the_trained_factors_and_scaling(self):
        """Of a model that was trained with a scaling the first stage has all of it."""
        for rope in (LLAMA3, YARN):
            config = llama_config(rope_parameters=rope)
            made = dynamic_plan(config, factor=2, strategy="pi")
            rotary = transformers.LlamaModel(config).rotary_emb
            torch.testing.assert_close(made.stages[0].inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
            for stage in made.stages:
                assert stage.attention_scaling == pytest.approx(rotary.attention_scaling)
            assert made.stages[0].interpolated_dims == 0

    def test_stock_computes_the_last_stage(self):
        config = llama_config()
        made = dynamic_plan(config, factor=2)
        rotary = transformers.LlamaModel(extended(config, made)).rotary_emb
        assert torch.equal(rotary.inv_freq, made.stages[-1].inv_freq)
        assert rotary.attention_scaling == made.stages[-1].attention_scaling

    def test_a_config_without_a_record_is_the_trained_one(self):
        """A static extension counts as what the model was trained with; so does one that another hand changed."""
        config = llama_config()
        static = rope_dist.plan(config, factor=2)
        config.__dict__.update(static.config_overrides(config))
        assert trained_config(config) is config
        assert dynamic_plan(config, target_length=256).lengths[0] == 128
        changed = extended(llama_config(), dynamic_plan(llama_config(), factor=2))
        changed.max_position_embeddings = 4096
        assert trained_config(changed) is changed

    def test_a_directory_and_a_model(self, llama, tmp_path):
        made = dynamic_plan(llama, factor=2)
        llama.save_pretrained(tmp_path)
        assert dynamic_plan(tmp_path, factor=2) == dynamic_plan(str(tmp_path), factor=2) == made
        assert dynamic_plan(tmp_path, factor=2).source == rope_dist.plan(tmp_path, factor=2).source
        assert dynamic_plan(llama.config, factor=2) == made

    def test_a_length_that_the_user_knows_better(self):
        made = dynamic_plan(llama_config(), original_length=32, factor=2)
        assert made.lengths == (32, *ladder(32, 64))
        check_trained(made, llama_config())

    def test_another_model_is_refused(self):
        made = dynamic_plan(llama_config(), factor=2, strategy="pi")
        for config, message in (
            (llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "for theta 10000"),
            (llama_config(head_dim=32), "for head_dim 16, the model has 32"),
            (llama_config(max_position_embeddings=32), "for the trained length 64, the model has 32"),
            (llama_config(max_position_embeddings=128), "for the trained length 64, the model has 128"),
            (llama_config(rope_parameters=LLAMA3), "start from different frequencies"),
            (
                llama_config(rope_parameters={**LONGROPE, "long_factor": [1.0] * 8, "factor": 2.0}),
                "attention scaling",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                check_trained(made, config)

    def test_a_model_with_frequencies_of_its_own_for_long_texts(self, tmp_path):
        config = llama_config(rope_parameters=LONGROPE)
        config.save_pretrained(tmp_path)
        for source in (config, tmp_path):
            with pytest.raises(
                ValueError, match=r"LlamaConfig has frequencies of its own .* give it a static plan"
            ):
                dynamic_plan(source, factor=2)
        equal = llama_config(rope_parameters={**LONGROPE, "short_factor": [2.0] * 8})
        assert dynamic_plan(equal, factor=2).pretrained.factors == (2.0,) * 8

    def test_warnings_come_once(self):
        """From the plan for the target; those of the other stages say the same."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            static = llama_config()
            static.__dict__.update(rope_dist.plan(static, factor=2).config_overrides(static))
            made = dynamic_plan(static, factor=4)
        assert made.lengths[0] == 128
        assert [str(w.message)[:40] for w in caught] == ["rope_dist extended the model from 64 to "]
        assert caught[0].filename == __file__
