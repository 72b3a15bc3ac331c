"""Exports of dynamic plans: the trained model up to its length and the last stage past it, in stock engines."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import llama_config
from helpers.exports import LlamaCpp, stock_run, write_gguf
from helpers.model_families import FAMILIES, SLIDING_THEN_FULL, SMALL, config_of
from helpers.tensors import at_new_memory
from packaging.version import Version
from test_export_gguf import fields, tensors
from test_export_hf import other_versions
from test_export_models import config_for, gemma3, llava, ministral3, qwen_vl_as_on_the_hub

import rope_dist
from rope_dist import dynamic_plan, export
from rope_dist.cli import main
from rope_dist.dynamic import trained_config
from rope_dist.export.gguf_reading import read

IDS = torch.randint(3, 96, (1, 128), generator=torch.Generator().manual_seed(5))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture
def llama(make_llama):
    """Weights large enough that a wrong frequency moves the logits by far more than rounding."""
    return make_llama(initializer_range=0.3)


@pytest.fixture
def plan(llama):
    return dynamic_plan(llama, factor=2, attention_factor=1)


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits[:, -32:]


def reasons(path, plan, **options):
    return {check.engine: check.reason for check in export.verify(path, plan, **options).checks}


def config_export(source, plan, out):
    """The config alone; a skip where an older transformers cannot change this model's frequencies by the length."""
    try:
        return export.hf(source, plan, out, config_only=True)
    except ValueError as error:
        if Version(transformers.__version__) >= Version("5.24") or "not follow the plan in" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def entries(directory):
    return json.loads((directory / "config.json").read_text())


class TestDirectory:
    def test_the_config(self, llama, plan, tmp_path):
        file = entries(export.hf(llama, plan, tmp_path / "out"))
        # transformers 5 and vLLM read the first, transformers 4 the second, and Phi3 and transformers 4 the top level.
        for rope in (file["rope_parameters"], file["rope_scaling"]):
            assert rope["short_factor"] == [1.0] * 8
            assert rope["long_factor"] == list(plan.stages[-1].factors)
            assert rope["original_max_position_embeddings"] == 64
            assert rope["attention_factor"] == rope["short_mscale"] == rope["long_mscale"] == 1
        assert file["original_max_position_embeddings"] == 64
        assert file["max_position_embeddings"] == 128
        assert file["rope_dist"]["stages"] == list(plan.lengths)

    @pytest.mark.parametrize("path", other_versions())
    def test_another_transformers_changes_at_the_trained_length(self, llama, plan, tmp_path, path):
        out = export.hf(llama, plan, tmp_path / "out")
        got = stock_run(out, IDS[:, :64], tmp_path, path)
        torch.testing.assert_close(got["logits"], logits(llama, IDS[:, :64]), rtol=0, atol=1e-5)
        assert torch.equal(got["inv_freq"], plan.stages[0].inv_freq)
        got = stock_run(out, IDS[:, :65], tmp_path, path)
        with rope_dist.enable(llama, plan=plan.stages[-1]):
            extended = logits(llama, IDS[:, :65])
        torch.testing.assert_close(got["logits"], extended, rtol=0, atol=1e-5)
        assert torch.equal(got["inv_freq"], plan.stages[-1].inv_freq)
        assert (extended - logits(llama, IDS[:, :65])).abs().max() > 0.1

    def test_exactly_the_trained_model_up_to_its_length(self, llama, plan, tmp_path):
        """Bit for bit, also after a long text; and past the length the last stage."""
        out = export.hf(llama, plan, tmp_path / "out")
        model = at_new_memory(transformers.AutoModelForCausalLM.from_pretrained(out).eval())
        for length in (1, 40, 64, 65, 128, 64, 2):
            if length <= 64:
                assert torch.equal(logits(model, IDS[:, :length]), logits(llama, IDS[:, :length]))
            else:
                with rope_dist.enable(llama, plan=plan.stages[-1]):
                    extended = logits(llama, IDS[:, :length])
                torch.testing.assert_close(logits(model, IDS[:, :length]), extended, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("kind", "stale"), [("llama", True), ("phi3", False)])
    def test_generating_past_the_trained_length(self, kind, stale, llama, tmp_path):
        """As docs/export.md says: most models keep keys that the short factors rotated, Phi3 reads the text again."""
        model = llama
        if kind == "phi3":
            if Version(transformers.__version__) < Version("5.20"):
                pytest.skip(
                    f"transformers {transformers.__version__} drops the cache and goes on with the last token"
                )
            torch.manual_seed(0)
            config = transformers.Phi3Config(
                **SMALL, original_max_position_embeddings=64, initializer_range=0.3
            )
            model = transformers.Phi3ForCausalLM(config).eval()
        out = export.hf(model, dynamic_plan(model, factor=2, strategy="pi"), tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        cached, read_again = (
            model.generate(
                IDS[:, :60], max_new_tokens=20, do_sample=False, eos_token_id=-1, use_cache=use_cache
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached[:, :65], read_again[:, :65])
        assert torch.equal(cached, read_again) is not stale

    def test_a_model_trained_with_a_scaling(self, make_llama, tmp_path):
        """Its own factors are the short ones; their frequencies agree with stock's up to a rounding."""
        model = make_llama(initializer_range=0.3, rope_parameters=LLAMA3)
        plan = dynamic_plan(model, factor=2, strategy="pi")
        out = export.hf(model, plan, tmp_path / "out")
        short = entries(out)["rope_parameters"]["short_factor"]
        assert short == list(plan.pretrained.factors)
        assert max(short) == 4
        exported = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        got, expected = (logits(m, IDS[:, :64]) for m in (exported, model))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)

    def test_the_same_directory_from_a_model_a_directory_and_itself(self, llama, plan, tmp_path):
        llama.save_pretrained(tmp_path / "source")
        export.hf(llama, plan, tmp_path / "a")
        export.hf(tmp_path / "source", plan, tmp_path / "b")
        export.hf(tmp_path / "b", plan, tmp_path / "c")
        with rope_dist.enable(llama, plan=plan):
            export.hf(llama, plan, tmp_path / "d")
        a, *others = (entries(tmp_path / name) for name in "abcd")
        assert all(other == a for other in others)

    def test_enabling_what_was_exported(self, llama, plan, tmp_path):
        """The trained model is found again, and cached keys are corrected."""
        out = export.hf(llama, plan, tmp_path / "out")
        model = at_new_memory(transformers.AutoModelForCausalLM.from_pretrained(out).eval())
        with rope_dist.enable(model, factor=2, dynamic=True, attention_factor=1) as enabled:
            assert enabled.plan == plan
            got = logits(model, IDS[:, :64]), logits(model, IDS)
        with rope_dist.enable(llama, plan=plan):
            assert torch.equal(got[0], logits(llama, IDS[:, :64]))
            assert torch.equal(got[1], logits(llama, IDS))

    @pytest.mark.parametrize(
        "make",
        [
            llama_config,
            lambda: llama_config(rope_parameters=LLAMA3),
            gemma3,
            llava,
            lambda: transformers.AutoConfig.for_model(**qwen_vl_as_on_the_hub()),
            lambda: config_of("Mixtral", head_dim=None),
            lambda: config_of("Glm", partial_rotary_factor=0.5),
            lambda: transformers.Phi3Config(**SMALL, original_max_position_embeddings=64),
            lambda: transformers.PhimoeConfig(**SMALL, num_local_experts=2),
        ],
        ids=["llama", "llama3", "gemma3", "llava", "qwen2.5-vl", "mixtral", "glm", "phi3", "phimoe"],
    )
    def test_the_trained_model_is_found_again(self, make, tmp_path):
        config = make()
        config.save_pretrained(tmp_path / "source")
        plan = dynamic_plan(config, factor=2, strategy="dprope")
        out = config_export(tmp_path / "source", plan, tmp_path / "out")
        loaded = transformers.AutoConfig.from_pretrained(out)
        before = transformers.AutoConfig.from_pretrained(tmp_path / "source")
        # What the class derives is written for transformers 4.
        explicit = {"_name_or_path": None, "head_dim": None, "partial_rotary_factor": None}
        trained, expected = (c.get_text_config(decoder=True) for c in (trained_config(loaded), before))
        assert {**trained.to_dict(), **explicit} == {**expected.to_dict(), **explicit}
        assert dynamic_plan(loaded, factor=2, strategy="dprope") == plan
        assert reasons(out, plan, source=tmp_path / "source")["transformers"] is None

    def test_layers_of_another_type_keep_theirs(self, tmp_path):
        """Gemma3's full layers change with the length, its sliding ones do not, and only transformers 5 has a form."""
        config = config_of("Gemma3Text", **SLIDING_THEN_FULL)
        config.save_pretrained(tmp_path / "source")
        plan = dynamic_plan(config, factor=2, strategy="pi")
        out = config_export(tmp_path / "source", plan, tmp_path / "out")
        rope = entries(out)["rope_parameters"]
        assert rope["full_attention"]["short_factor"] == [1.0] * len(plan.stages[0].factors)
        assert rope["full_attention"]["long_factor"] == list(plan.stages[-1].factors)
        assert rope["sliding_attention"] == config.rope_parameters["sliding_attention"]
        assert "original_max_position_embeddings" not in entries(out)
        assert "per layer type" in reasons(out, plan)["vllm"]

    def test_a_model_that_scales_queries_by_the_original_length(self, tmp_path):
        config = ministral3()  # by 64, and its YaRN reads 256
        config.save_pretrained(tmp_path / "source")
        plan = dynamic_plan(config, factor=2, strategy="dprope")
        with pytest.raises(ValueError, match=r"ministral3 scales its queries .* of 64, .* not at 256"):
            export.hf(tmp_path / "source", plan, tmp_path / "out", config_only=True)
        assert not (tmp_path / "out").exists()


class TestEngines:
    def test_which_run_it(self, llama, plan, tmp_path):
        out = export.hf(llama, plan, tmp_path / "out", engines=["transformers-4", "vllm"])
        found = reasons(out, plan)
        assert [found[e] for e in ("transformers", "transformers-4", "vllm")] == [None] * 3
        for engine, reason in {
            "sglang": "chooses the factors of a whole batch",
            "mlx": "reads every text by long_factor",
            "tensorrt-llm": "derives a scaling",
        }.items():
            assert reason in found[engine]
            with pytest.raises(ValueError, match=f"{reason}.*export a static plan"):
                export.hf(llama, plan, tmp_path / "other", engines=[engine])
        assert not (tmp_path / "other").exists()

    def test_vllm_chooses_by_max_model_len(self, llama, plan, tmp_path):
        file = entries(export.hf(llama, plan, tmp_path / "out"))
        read_by = export.ENGINES["vllm"]
        for tokens, stage in ((1, 0), (64, 0), (65, -1), (128, -1)):
            found = read_by(file, tokens=tokens)
            assert torch.equal(found.inv_freq, plan.stages[stage].inv_freq)
            assert found.attention_scaling == 1
            assert found.length == 128
        # Without the option it stops at the trained length.
        found = read_by(file)
        assert torch.equal(found.inv_freq, plan.stages[0].inv_freq)
        assert found.length == 64

    @pytest.mark.parametrize("strategy", ["auto", "yarn"])
    def test_a_scaling_past_the_trained_length_is_refused(self, llama, tmp_path, strategy):
        plan = dynamic_plan(llama, factor=2, strategy=strategy)
        with pytest.raises(
            ValueError, match=r"scales cos and sin by 1\.0.* one scaling .* attention_factor=1"
        ):
            export.hf(llama, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        export.hf(
            llama, dynamic_plan(llama, factor=2, strategy=strategy, attention_factor=1), tmp_path / "out"
        )

    def test_a_trained_scaling_stays(self, make_llama, tmp_path):
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
        model = make_llama(initializer_range=0.3, rope_parameters=rope)
        plan = dynamic_plan(model, factor=2, strategy="dprope")
        out = export.hf(model, plan, tmp_path / "out", engines=["vllm"])
        assert entries(out)["rope_parameters"]["attention_factor"] == model.model.rotary_emb.attention_scaling
        assert entries(out)["rope_parameters"]["short_mscale"] > 1.1

    @pytest.mark.parametrize("path", other_versions())
    def test_transformers_4_agrees(self, path, tmp_path):
        """The other version itself, on every family and some that are refused: short, long, and short again."""
        runs = {}
        for kind in (*FAMILIES, "Cohere", "Glm", "Phi3", "GptOss", "HunYuanDenseV1", "DeepseekV3", "Olmo"):
            config = config_for(kind)
            config.save_pretrained(tmp_path / kind)
            plan = dynamic_plan(config, factor=2, strategy="dprope")
            frequencies = [plan.stages[0].inv_freq, plan.stages[-1].inv_freq]
            torch.save([plan.original_length, *frequencies], tmp_path / f"{kind}.pt")
            out = config_export(tmp_path / kind, plan, tmp_path / f"{kind}-out")
            runs[kind] = reasons(out, plan)["transformers-4"] is None
        command = [sys.executable, "-c", _TRANSFORMERS_4, str(tmp_path), *runs]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        version, found = done.stdout.splitlines()[-2:]
        if version.startswith("5."):
            pytest.skip(f"{path} is transformers {version}, not 4")
        assert json.loads(found) == runs
        assert sum(runs.values()) > 15


_TRANSFORMERS_4 = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
folder, *kinds = sys.argv[1:]
found = {}
for kind in kinds:
    length, short, long = torch.load(f"{folder}/{kind}.pt")
    ids = torch.arange(length + 1)[None] % 90 + 3
    try:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{folder}/{kind}-out"))
            rotary = model.model.rotary_emb
            right = []
            for tokens, planned in ((length, short), (length + 1, long), (length, short)):
                model(ids[:, :tokens])
                right.append(torch.equal(rotary.inv_freq, planned) and rotary.attention_scaling == 1)
        found[kind] = all(right)
    except Exception as error:
        print(kind, error, file=sys.stderr)
        found[kind] = False
print(transformers.__version__)
print(json.dumps(found))
"""


class TestVerify:
    @pytest.mark.parametrize(
        ("key", "value", "reason"),
        [
            ("short_factor", [1.5] * 8, "with 64 tokens the frequencies differ"),
            ("long_factor", [1.0] * 8, "with 65 tokens the factors are missing"),
            ("original_max_position_embeddings", 65, "with 65 tokens the factors are missing"),
            ("original_max_position_embeddings", 63, "with 64 tokens the frequencies differ"),
            ("attention_factor", 1.1, "with 64 tokens cos and sin are scaled by 1.1"),
        ],
    )
    def test_what_differs_is_said_with_the_length(self, llama, plan, tmp_path, key, value, reason):
        out = export.hf(llama, plan, tmp_path / "out", config_only=True)
        file = entries(out)
        file.update({key: value} if key in file else {})
        for schema in ("rope_parameters", "rope_scaling"):
            file[schema][key] = value
        (out / "config.json").write_text(json.dumps(file))
        found = reasons(out, plan)
        assert reason in found["transformers"]
        assert reason in found["transformers-4"]
        assert not export.verify(out, plan)

    def test_a_static_plan_and_a_dynamic_export_and_the_other_way_round(self, llama, plan, tmp_path):
        dynamic = export.hf(llama, plan, tmp_path / "dynamic")
        assert "change with the length" in reasons(dynamic, plan.stages[-1])["transformers"]
        static = export.hf(llama, plan.stages[-1], tmp_path / "static")
        assert "with 64 tokens the frequencies differ" in reasons(static, plan)["transformers"]

    def test_a_plan_of_another_model(self, llama, tmp_path):
        for what, config in (
            ("theta", llama_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
            ("the trained length", llama_config(max_position_embeddings=32)),
            ("the trained length", llama_config(max_position_embeddings=128)),
        ):
            other = dynamic_plan(config, target_length=256, strategy="pi")
            with pytest.raises(ValueError, match=f"the plan is for {what}"):
                export.hf(llama, other, tmp_path / "out")
        scaled = llama_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0})
        other = dynamic_plan(scaled, target_length=128, strategy="pi")
        export.hf(llama, other, tmp_path / "out")  # by a factor of 1: the same model


class TestCommandLine:
    @pytest.fixture
    def source(self, llama, tmp_path):
        llama.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    def test_plan_export_verify(self, llama, source, plan, tmp_path, capsys):
        file, settings = str(tmp_path / "plan.json"), ("--set", "attention_factor=1")
        assert main(["plan", str(source), "--dynamic", "--factor", "2", *settings, "-o", file]) == 0
        assert main(["export", "hf", str(source), "--plan", file, "-o", str(tmp_path / "a")]) == 0
        printed = capsys.readouterr().out
        assert "as trained up to 64 tokens, past it by the plan for 128; docs/export.md" in printed
        options = ("--dynamic", "--target", "128", *settings, "--engine", "vllm")
        assert main(["export", "hf", str(source), *options, "-o", str(tmp_path / "b")]) == 0
        assert entries(tmp_path / "a") == entries(tmp_path / "b")
        assert main(["verify", str(tmp_path / "a"), "--plan", file, "--engine", "vllm"]) == 0
        assert export.verify(tmp_path / "a", plan)

    def test_gguf(self, llama, tmp_path):
        pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rope-dist[export]'")
        source, out = write_gguf(llama, tmp_path / "model.gguf"), tmp_path / "out.gguf"
        options = ("--dynamic", "--target", "128", "--strategy", "pi")
        assert main(["export", "gguf", str(source), *options, "-o", str(out)]) == 0
        assert export.verify(out, dynamic_plan(llama, factor=2, strategy="pi"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("export", "hf", "SOURCE", "--dynamic", "--factor", "2"), "--set attention_factor=1"),
            (("export", "hf", "SOURCE", "--dynamic", "--plan", "STATIC"), "STATIC is a static plan"),
            (("export", "hf", "SOURCE", "--plan", "DYNAMIC", "--set", "a=1"), "a plan has its own"),
            (("export", "hf", "SOURCE", "--plan", "DYNAMIC", "--engine", "mlx"), "export a static plan"),
            (("export", "hf", "SOURCE", "--factor", "2", "--set", "a=1"), "auto has no setting 'a'"),
            (("export", "hf", "SOURCE", "--factor", "2", "--dynamic=1"), "does not take a value"),
            (
                ("export", "vllm", "SOURCE", "--plan", "DYNAMIC"),
                "give it a static plan, or none for texts of up to 64",
            ),
            (("verify", "SOURCE", "--plan", "DYNAMIC"), "with 65 tokens the factors are missing"),
        ],
    )
    def test_what_is_refused(self, source, plan, tmp_path, capsys, arguments, message):
        plan.save(tmp_path / "dynamic.json")
        plan.stages[-1].save(tmp_path / "static.json")
        paths = {"SOURCE": source, "DYNAMIC": tmp_path / "dynamic.json", "STATIC": tmp_path / "static.json"}
        given = [str(paths.get(a, a)) for a in arguments]
        output = ["-o", str(tmp_path / "out")] if "hf" in arguments else []
        capsys.readouterr()
        assert main([*given, *output]) == 2
        error = capsys.readouterr().err
        assert message.replace("STATIC", str(paths["STATIC"])) in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


class TestGguf:
    @pytest.fixture(autouse=True)
    def needs(self):
        pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rope-dist[export]'")

    @pytest.fixture
    def model(self, make_llama):
        """llama.cpp rounds a context up to 256 tokens."""
        return make_llama(initializer_range=0.3, max_position_embeddings=256)

    @pytest.fixture
    def plan(self, model):
        return dynamic_plan(model, factor=2, strategy="dprope")

    @pytest.mark.parametrize("scaled", [False, True])
    def test_only_the_rope_changes(self, model, plan, tmp_path, scaled):
        """Also where the file has factors already (Llama 3), whose place the short ones take."""
        factors = [1.0] * len(plan.stages[0].factors) if scaled else None
        source = write_gguf(model, tmp_path / "model.gguf", factors=factors)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        before, after = tensors(source), tensors(out)
        assert ("rope_freqs.weight" in before) == scaled
        for name, stage in (("short", plan.stages[0]), ("long", plan.stages[-1])):
            factors = after.pop(f"rope_factors_{name}.weight")
            assert factors[2] == torch.tensor(stage.factors).numpy().tobytes()
        before.pop("rope_freqs.weight", None)
        assert after == before
        found = fields(out)
        assert found["llama.rope.scaling.type"][1] == "longrope"
        assert found["llama.rope.scaling.original_context_length"][1] == 256
        assert found["llama.context_length"][1] == 512
        assert "llama.rope.scaling.attn_factor" not in found
        assert export.verify(out, plan)
        # llama.cpp refuses a file whose tensors are not in the order of their data, without gaps.
        header = read(out)
        end = 0
        for tensor in header.tensors.values():
            assert tensor.offset == end
            end += -(-tensor.size // header.alignment) * header.alignment
        assert out.stat().st_size == header.data_start + end

    @torch.no_grad()
    def test_llama_cpp_chooses_by_the_context(self, model, plan, tmp_path):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
        out = export.gguf(write_gguf(model, tmp_path / "model.gguf"), plan, tmp_path / "out.gguf")
        ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(3)).tolist()

        def expected():
            return model(torch.tensor([ids])).logits[0, -2].double().log_softmax(-1)[ids[-1]].item()

        trained = expected()
        with rope_dist.enable(model, plan=plan.stages[-1]):
            extended = expected()
        assert abs(trained - extended) > 0.1
        for context, value in ((256, trained), (512, extended)):
            got = LlamaCpp(out, context).log_probability(ids[:-1], ids[-1])
            assert got == pytest.approx(value, abs=1e-3)

    def test_what_is_refused(self, model, plan, tmp_path):
        source = write_gguf(model, tmp_path / "model.gguf")
        with pytest.raises(ValueError, match=r"one scaling .* attention_factor=1"):
            export.gguf(source, dynamic_plan(model, factor=2), tmp_path / "out.gguf")
        other = dynamic_plan(model, original_length=128, target_length=512, strategy="dprope")
        with pytest.raises(ValueError, match=r"a trained length of 128, .* has 256"):
            export.gguf(source, other, tmp_path / "out.gguf")
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        for again in (plan, plan.stages[-1]):
            with pytest.raises(ValueError, match=r"llama\.cpp chooses by the context"):
                export.gguf(out, again, tmp_path / "again.gguf")
        found = export.verify(out, dynamic_plan(model, factor=4, strategy="dprope"))
        assert "with 257 tokens the frequencies differ" in found.checks[0].reason
        assert "chooses by the context" in export.verify(out, plan.stages[-1]).checks[0].reason
        assert not (tmp_path / "again.gguf").exists()
