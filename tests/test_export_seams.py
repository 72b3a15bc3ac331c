"""Forms, the table of engines and flags together; rope_dist on its own native exports."""

import json
import shlex

import pytest
import torch
from helpers.exports import write_gguf
from helpers.model_families import config_of
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.defaults import STRATEGIES
from rope_dist.dynamic import load_plan, trained_config
from rope_dist.export.architectures import VERSIONS, tables
from rope_dist.export.flags import GGUF_NAMES
from rope_dist.export.forms import NATIVE_STRATEGIES, ROUNDING, native_form
from rope_dist.export.gguf_file import METADATA
from rope_dist.export.stock import StockModel, read_config

NATIVE = {"yarn": "yarn", "auto-yarn": "yarn", "pi": "linear", "ntk": "default", "llama3": "llama3"}


@pytest.fixture
def source(make_llama, tmp_path):
    make_llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def type_of(directory):
    return json.loads((directory / "config.json").read_text())["rope_parameters"]["rope_type"]


@pytest.fixture
def sglang_reads(monkeypatch):
    """What SGLang's LLaMA reads, by rope type."""

    def set_entry(**entry):
        entry = {kind.replace("others", "*"): text for kind, text in entry.items()}
        monkeypatch.setitem(tables()["sglang"]["models"], "LlamaForCausalLM", entry)

    return set_entry


class TestFormAndTable:
    def flags_type(self, plan, source):
        arguments = export.flags("sglang", plan, read_config(source))
        return json.loads(shlex.split(arguments)[-1])["rope_parameters"]["rope_type"]

    @pytest.mark.parametrize("strategy", NATIVE)
    def test_longrope_where_the_engine_reads_only_that(self, source, tmp_path, sglang_reads, strategy):
        sglang_reads(**{"others": "ignored: there", "longrope": "yes"})
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        assert type_of(export.hf(source, plan, tmp_path / "any")) == NATIVE[strategy]
        assert type_of(export.hf(source, plan, tmp_path / "out", engines=["sglang"])) == "longrope"
        assert self.flags_type(plan, source) == "longrope"
        with pytest.raises(ValueError, match="sglang cannot run llama by a plan: there; --force-engine"):
            export.hf(source, plan, tmp_path / "native", engines=["sglang"], form="native")
        forced = export.hf(
            source, plan, tmp_path / "native", engines=["sglang"], form="native", force_engine=True
        )
        assert type_of(forced) == NATIVE[strategy]
        assert not export.verify(forced, plan, engines=["sglang"])
        assert export.verify(forced, plan)

    def test_native_where_the_engine_reads_only_that(self, source, tmp_path, sglang_reads):
        sglang_reads(**{"others": "yes", "longrope": "crash: there"})
        plan = rope_dist.plan(source, factor=2, strategy="yarn")
        assert type_of(export.hf(source, plan, tmp_path / "out", engines=["sglang"])) == "yarn"
        assert self.flags_type(plan, source) == "yarn"
        with pytest.raises(ValueError, match="sglang cannot run llama by a plan: there; --force-engine"):
            export.hf(source, plan, tmp_path / "longrope", engines=["sglang"], form="longrope")
        other = rope_dist.plan(source, factor=2, strategy="dprope")
        for call in (
            lambda: export.hf(source, other, tmp_path / "other", engines=["sglang"]),
            lambda: export.flags("sglang", other, read_config(source)),
        ):
            with pytest.raises(ValueError, match="sglang cannot run llama by a plan: there"):
                call()

    def test_an_engine_whose_formula_differs_names_the_way_out(self, source, tmp_path):
        plan = rope_dist.plan(source, factor=2, strategy="yarn", truncate=False)
        for form, reason in (
            ("native", "does not follow the plan in mlx"),
            ("longrope", "mlx does not scale"),
        ):
            with pytest.raises(ValueError, match=rf"{reason}.*; --force-engine"):
                export.hf(source, plan, tmp_path / "out", engines=["mlx"], form=form)
            out = export.hf(source, plan, tmp_path / form, engines=["mlx"], form=form, force_engine=True)
            assert export.verify(out, plan)
            assert next(check.reason for check in export.verify(out, plan).checks if check.engine == "mlx")

    def test_a_vision_tower_with_a_rotary_embedding_of_its_own(self, source, tmp_path):
        """The form is the language model's: a longrope is compared bit for bit."""
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        out = export.hf(source, plan, tmp_path / "out", config_only=True)
        file = json.loads((out / "config.json").read_text())
        nudged = {**file["rope_parameters"], "long_factor": [f * (1 + 2e-7) for f in plan.factors]}
        nudged["short_factor"] = nudged["long_factor"]
        del file["rope_scaling"]
        first = {"vision_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}
        (out / "config.json").write_text(json.dumps({**first, **file, "rope_parameters": nudged}))
        assert not export.verify(out, plan)


@pytest.mark.parametrize("strategy", NATIVE)
class TestOnNativeExports:
    def test_enable(self, source, tmp_path, strategy):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = export.hf(source, plan, tmp_path / "out")
        ids = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(5))
        stock = AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            expected = stock(ids).logits
            model = AutoModelForCausalLM.from_pretrained(out).eval()
            # By the plan that it was extended by; then by another, from what it has.
            with rope_dist.enable(model, plan=plan):
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
        further = rope_dist.plan(out, target_length=256, strategy="pi")
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        before = model.config.to_dict()
        with rope_dist.enable(model, plan=further):
            found = StockModel(model.config).engine_config()
            assert found.length == 256
            torch.testing.assert_close(found.inv_freq, plan.inv_freq / 2, rtol=2 * ROUNDING, atol=0)
        assert model.config.to_dict() == before

    def test_a_dynamic_plan(self, source, tmp_path, strategy):
        """Its trained stage is what the export computes; a second one starts there again."""
        plan = rope_dist.plan(source, factor=2, strategy=strategy, **ONE_SCALING.get(strategy, {}))
        out = export.hf(source, plan, tmp_path / "out")
        config = read_config(out)
        assert trained_config(config).to_dict() == config.to_dict()
        dynamic = rope_dist.dynamic_plan(out, target_length=256, strategy="pi")
        assert dynamic.original_length == 128
        torch.testing.assert_close(dynamic.stages[0].inv_freq, plan.inv_freq, rtol=ROUNDING, atol=0)
        again = export.hf(out, dynamic, tmp_path / "again")
        assert export.verify(again, dynamic)
        back = trained_config(read_config(again))
        assert back.rope_parameters == config.rope_parameters
        assert back.max_position_embeddings == 128
        repeated = rope_dist.dynamic_plan(again, target_length=256, strategy="pi")
        assert repeated.stages == dynamic.stages
        dynamic.save(tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == dynamic
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        with rope_dist.enable(model, plan=dynamic):
            pass
        assert model.config.rope_parameters == config.rope_parameters

    def test_both_forms_in_turn(self, source, tmp_path, strategy):
        """Nothing of one form stays in the other."""
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        native, longrope = (
            export.hf(source, plan, tmp_path / form, form=form) for form in ("native", "longrope")
        )
        for first, form, same in ((native, "longrope", longrope), (longrope, "native", native)):
            out = export.hf(first, plan, tmp_path / f"{form}-again", form=form)
            found, expected = (json.loads((d / "config.json").read_text()) for d in (out, same))
            if "model_max_length" in found:  # Of a linear scaling; another form is not to read less.
                assert found.pop("model_max_length") == (64 if form == "native" else 128)
                expected.pop("model_max_length", None)
            assert found == expected


SETTINGS = {"longrope": {"factors": [1.0] * 4 + [2.5] * 4}}
ONE_SCALING = {"yarn": {"attention_factor": 1}, "auto-yarn": {"attention_factor": 1}}


class TestLengths:
    def test_a_linear_scaling(self, source, tmp_path):
        """Engines that multiply a length by the factor read model_max_length; the others never the trained length."""
        (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
        plan = rope_dist.plan(source, factor=2, strategy="pi")
        out = export.hf(source, plan, tmp_path / "out")
        file = json.loads((out / "config.json").read_text())
        assert (file["max_position_embeddings"], file["model_max_length"]) == (128, 64)
        assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 128
        # vLLM takes the smaller of the config's and the tokenizer's, before it multiplies.
        assert min(64, 128) * file["rope_parameters"]["factor"] == 128
        for read in export.ENGINES.values():
            assert read(file).length == 128
        # Without it these two would allow twice the length.
        del file["model_max_length"]
        assert {name for name, read in export.ENGINES.items() if read(file).length != 128} == {
            "vllm",
            "sglang",
        }


class TestFlags:
    @pytest.mark.parametrize("kind", ["Mixtral", "Olmo2", "Qwen3", "Gemma2"])
    @pytest.mark.parametrize("strategy", ["dprope", "yarn", "pi"])
    def test_families(self, kind, strategy, tmp_path):
        """transformers computes the plan from the changed config; vLLM's own flag is there where it needs one."""
        config = config_of(kind)
        plan = rope_dist.plan(config, factor=2, strategy=strategy)
        words = shlex.split(export.flags("vllm", plan, config))
        config.update(json.loads(words[3]))
        found = StockModel(config).engine_config()
        torch.testing.assert_close(found.inv_freq, plan.inv_freq, rtol=ROUNDING, atol=0)
        assert words[4:] == (["--enforce-eager"] if (kind, strategy) == ("Olmo2", "dprope") else [])

    def test_a_gguf_file_for_another_engine(self, llama, tmp_path, capsys):
        path = write_gguf(llama, tmp_path / "model.gguf")
        assert main(["export", "flags", "vllm", str(path), "--factor", "2"]) == 2
        assert "model.gguf is a GGUF file" in capsys.readouterr().err
        assert main(["export", "hf", str(path), "--factor", "2", "-o", str(tmp_path / "out")]) == 2
        assert "rope-dist export gguf" in capsys.readouterr().err


def test_native_strategies(source, tmp_path):
    for strategy in STRATEGIES:
        plan = rope_dist.plan(source, factor=2, strategy=strategy, **SETTINGS.get(strategy, {}))
        assert (native_form(plan) is not None) == (strategy in NATIVE_STRATEGIES), strategy
    plan = rope_dist.plan(source, factor=2, strategy="auto")
    with pytest.raises(
        ValueError, match="those of yarn, auto-yarn, pi, ntk, dynamic-ntk, llama3, extrapolation are"
    ):
        export.hf(source, plan, tmp_path / "out", form="native")


class TestLlamaServer:
    def flags(self, path, plan, tmp_path):
        plan.save(tmp_path / "plan.json")
        return main(["export", "flags", "llama-server", str(path), "--plan", str(tmp_path / "plan.json")])

    def test_the_plan_of_another_model(self, llama, make_llama, tmp_path, capsys):
        path = write_gguf(llama, tmp_path / "model.gguf")
        other = rope_dist.plan(make_llama(hidden_size=128), factor=2, strategy="pi")
        assert self.flags(path, other, tmp_path) == 2
        assert "the plan is for head_dim 32" in capsys.readouterr().err

    def test_a_file_that_is_extended_already(self, llama, tmp_path, capsys):
        path = write_gguf(llama, tmp_path / "model.gguf")
        plan = rope_dist.plan(llama, factor=2, strategy="pi")
        assert self.flags(path, plan, tmp_path) == 0
        out = export.gguf(path, plan, tmp_path / "out.gguf")
        capsys.readouterr()
        assert self.flags(out, plan, tmp_path) == 2
        assert "as it was before the extension" in capsys.readouterr().err

    def test_a_model_with_a_scaling_of_its_own(self, tmp_path, capsys):
        arguments = ["llama-server", "llama3.1-8b", "--factor", "2", "--strategy", "pi"]
        assert main(["export", "flags", *arguments]) == 2
        assert "trained with a scaling: write a file" in capsys.readouterr().err

    def test_an_architecture_with_other_layers(self, llama, tmp_path, capsys):
        path = write_gguf(llama, tmp_path / "model.gguf", arch="gemma2")
        assert self.flags(path, rope_dist.plan(llama, factor=2, strategy="pi"), tmp_path) == 2
        assert "every layer of the architecture 'gemma2'" in capsys.readouterr().err

    @pytest.mark.parametrize("strategy", ["pi", "ntk", "auto-yarn", "auto"])
    @pytest.mark.parametrize("given", ["directory", "file", "file and plan"])
    def test_a_model_with_a_base_per_layer_type(self, given, strategy, llama, tmp_path, capsys):
        """Gemma 3 is refused by name, however it is given, and told what to do; never by another reason first."""
        source, options = tmp_path / "gemma3", ["--factor", "2", "--strategy", strategy]
        if given == "directory":
            Gemma3TextConfig(num_hidden_layers=6).save_pretrained(source)
        else:
            source = write_gguf(llama, tmp_path / "model.gguf", arch="gemma3")
        if given == "file and plan":
            rope_dist.plan(llama, factor=2, strategy=strategy).save(tmp_path / "plan.json")
            options = ["--plan", str(tmp_path / "plan.json")]
        assert main(["export", "flags", "llama-server", str(source), *options]) == 2
        (error,) = capsys.readouterr().err.splitlines()[-1:]
        assert "gemma3" in error
        assert "has a rotary embedding per layer type" in error
        assert error.endswith("write the extended model with rope-dist export hf, and run it in transformers")

    def test_an_architecture_does_not_hide_the_model(self):
        config = Gemma3TextConfig(num_hidden_layers=6)
        plan = rope_dist.plan(config, factor=2, strategy="pi")
        with pytest.raises(ValueError, match="gemma3_text has a rotary embedding per layer type"):
            export.flags("llama-server", plan, config, architecture="gemma")
        with pytest.raises(ValueError, match="gemma3 has a rotary embedding per layer type"):
            export.flags("llama-server", plan, architecture="gemma3")

    def test_names(self):
        assert set(GGUF_NAMES.values()) <= METADATA


def test_formulas_are_of_the_tables_versions():
    """The docstring of each formula names the version of the table (transformers 4 and TensorRT-LLM have none)."""
    assert set(VERSIONS) == set(export.ENGINES)
    for engine, read in export.ENGINES.items():
        version = VERSIONS[engine].removesuffix(".x")
        assert ".".join(version.split(".")[:2]) in read.__doc__.splitlines()[0], engine
