"""Native forms: stock transformers and the engines' formulas compute the plan from them, rope_dist reads them back."""

import json
import shlex

import pytest
import torch
from conftest import llama_config
from helpers.exports import stock_run
from transformers import AutoConfig, AutoModelForCausalLM

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.forms import ROUNDING, native_form
from rope_dist.export.stock import StockModel, read_config
from rope_dist.model_config import read_rope

NATIVE = {"yarn": "yarn", "auto-yarn": "yarn", "pi": "linear", "ntk": "default", "llama3": "llama3"}


@pytest.fixture
def source(make_llama, tmp_path):
    make_llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rope_of(directory):
    return json.loads((directory / "config.json").read_text())["rope_parameters"]


@pytest.mark.parametrize("strategy", NATIVE)
class TestRoundTrip:
    def test_every_engine_computes_the_plan(self, source, tmp_path, strategy):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = export.hf(source, plan, tmp_path / "out")
        assert rope_of(out)["rope_type"] == NATIVE[strategy]
        assert export.verify(out, plan, source=source)
        file = json.loads((out / "config.json").read_text())
        for name, read in export.ENGINES.items():
            found = read(file)
            torch.testing.assert_close(found.inv_freq, plan.inv_freq, rtol=ROUNDING, atol=0), name
            assert found.attention_scaling == pytest.approx(plan.attention_scaling, rel=1e-7), name
            assert found.length == plan.target_length, name

    def test_stock_gives_the_enabled_models_logits(self, source, tmp_path, strategy):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = export.hf(source, plan, tmp_path / "out")
        ids = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(5))
        got = stock_run(out, ids, tmp_path)
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        with torch.no_grad(), rope_dist.enable(model, plan=plan):
            torch.testing.assert_close(got["logits"], model(ids).logits[:, -32:], rtol=0, atol=1e-4)

    def test_rope_dist_recognises_its_export(self, source, tmp_path, strategy):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = export.hf(source, plan, tmp_path / "out")
        again = export.hf(out, plan, tmp_path / "again")  # extended already, by this plan
        assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()
        found = read_rope(read_config(out))
        assert (found.rope.theta, found.rope.length, found.recorded) == (10000.0, 128, 64)
        torch.testing.assert_close(
            found.rope.base_factors.float(), torch.tensor(plan.factors), rtol=1e-6, atol=0
        )
        with pytest.warns(UserWarning, match="extended the model from 64 to 128"):
            further = rope_dist.plan(out, factor=4, strategy="pi")  # from what it has
        assert (further.original_length, further.target_length) == (128, 256)
        expected = torch.tensor(plan.factors).double() * 2
        torch.testing.assert_close(torch.tensor(further.factors).double(), expected, rtol=1e-6, atol=0)
        longer = export.hf(out, further, tmp_path / "longer")
        assert rope_of(longer)["rope_type"] == "longrope"
        assert export.verify(longer, further)

    def test_longrope_is_exact_to_the_bit(self, source, tmp_path, strategy, capsys):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        plan.save(tmp_path / "plan.json")
        arguments = ("--plan", tmp_path / "plan.json", "--form", "longrope", "-o", tmp_path / "out")
        assert main(["export", "hf", str(source), *map(str, arguments)]) == 0
        assert rope_of(tmp_path / "out")["rope_type"] == "longrope"
        found = StockModel(read_config(tmp_path / "out")).engine_config()
        assert torch.equal(found.inv_freq, plan.inv_freq)

    def test_flags_give_the_plan(self, source, tmp_path, strategy, capsys):
        """vLLM and SGLang update transformers' config by the printed JSON."""
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        plan.save(tmp_path / "plan.json")
        for engine, length in (("vllm", "--max-model-len"), ("sglang", "--context-length")):
            arguments = ["export", "flags", engine, str(source), "--plan", str(tmp_path / "plan.json")]
            assert main(arguments) == 0
            flag, tokens, _, overrides = shlex.split(capsys.readouterr().out)
            assert (flag, tokens) == (length, "128")
            config = AutoConfig.from_pretrained(source)
            config.update(json.loads(overrides))
            found = StockModel(config).engine_config()
            torch.testing.assert_close(found.inv_freq, plan.inv_freq, rtol=ROUNDING, atol=0)
            assert found.attention_scaling == pytest.approx(plan.attention_scaling)
            file = json.loads(config.to_json_string(use_diff=False))
            assert export.ENGINES[engine](file).length == 128


@pytest.mark.parametrize("strategy", ["dprope", "auto", "refined"])
def test_no_native_form(source, tmp_path, strategy):
    plan = rope_dist.plan(source, factor=2, strategy=strategy)
    assert native_form(plan) is None
    with pytest.raises(ValueError, match=f"no native form: the frequencies of {strategy}"):
        export.hf(source, plan, tmp_path / "out", form="native")
    assert rope_of(export.hf(source, plan, tmp_path / "out"))["rope_type"] == "longrope"


def test_what_is_not_native_where_the_strategy_is(source, tmp_path):
    scaled = llama_config(
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    assert export.native_entries(rope_dist.plan(scaled, factor=2, strategy="yarn"), scaled) is None
    dynamic = rope_dist.dynamic_plan(source, factor=2, strategy="ntk")
    assert export.native_entries(dynamic) is None
    plan = rope_dist.plan(source, factor=2, strategy="yarn")
    edited = rope_dist.RopePlan.from_dict({**plan.to_dict(), "settings": {**plan.settings, "beta_fast": 1.2}})
    assert native_form(edited) is None  # Its factors are not those of its settings.


def test_an_engine_that_reads_the_native_form_otherwise_gets_factors(source, tmp_path):
    """MLX rounds YaRN's ramp; a plan that does not, and does not scale, is exact there as a longrope."""
    plan = rope_dist.plan(source, factor=2, strategy="yarn", truncate=False, attention_factor=1)
    assert rope_of(export.hf(source, plan, tmp_path / "a"))["rope_type"] == "yarn"
    assert rope_of(export.hf(source, plan, tmp_path / "b", engines=("mlx",)))["rope_type"] == "longrope"


def test_a_form_that_there_is_not(source, tmp_path):
    plan = rope_dist.plan(source, factor=2, strategy="yarn")
    with pytest.raises(ValueError, match="one of native, longrope, got 'yarn'"):
        export.hf(source, plan, tmp_path / "out", form="yarn")


def test_transformers_serve_takes_a_directory(source, capsys):
    assert main(["export", "flags", "transformers", str(source), "--factor", "2"]) == 2
    assert "write the extended model with rope-dist export hf" in capsys.readouterr().err
