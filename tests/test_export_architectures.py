"""The table of how each engine's model files read rotary parameters, and what verify and export make of it."""

import json
import os
import shlex
from pathlib import Path

import pytest
import transformers
from helpers.model_families import OWN_HEAD_DIM, SMALL, config_of

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.architectures import ROPE_TYPES, STATUSES, reading, tables
from rope_dist.export.stock import StockModel

# Written down beside the table, after looking at the engines' model files; the opt-in tests read the wheels.
FAMILIES = {
    "Llama": {"vllm": "yes", "sglang": "yes", "mlx": "yes", "exllamav3": "yes"},
    "Mistral": {"vllm": "yes", "sglang": "yes", "mlx": "yes", "exllamav3": "yes"},
    "Qwen2": {"vllm": "yes", "sglang": "yes", "mlx": "yes", "exllamav3": "yes"},
    "Granite": {"vllm": "yes", "sglang": "yes", "mlx": "yes", "exllamav3": "unknown"},
    "Qwen3": {"vllm": "yes", "sglang": "yes", "mlx": "yes", "exllamav3": "yes"},
    "Mixtral": {"vllm": "yes", "sglang": "ignored", "mlx": "ignored", "exllamav3": "yes"},
    "Gemma": {"vllm": "yes", "sglang": "ignored", "mlx": "ignored", "exllamav3": "unknown"},
    "Gemma2": {"vllm": "yes", "sglang": "ignored", "mlx": "ignored", "exllamav3": "yes"},
    "Qwen3Moe": {"vllm": "yes", "sglang": "crash", "mlx": "ignored", "exllamav3": "yes"},
    "Olmo2": {"vllm": "flag", "sglang": "yes", "mlx": "yes", "exllamav3": "unknown"},
    "Arcee": {"vllm": "flag", "sglang": "yes", "mlx": "unknown", "exllamav3": "yes"},
    "SmolLM3": {"vllm": "flag", "sglang": "unknown", "mlx": "yes", "exllamav3": "yes"},
    "SeedOss": {"vllm": "flag", "sglang": "unknown", "mlx": "yes", "exllamav3": "yes"},
    "Starcoder2": {"vllm": "flag", "sglang": "ignored", "mlx": "ignored", "exllamav3": "unknown"},
    "Cohere": {"vllm": "crash", "sglang": "crash", "mlx": "ignored", "exllamav3": "yes"},
    "Glm4": {"vllm": "crash", "sglang": "crash", "mlx": "ignored", "exllamav3": "yes"},
}
# Yarn reaches what a longrope's class refuses.
YARN = {
    "Cohere": ("vllm", "yes"),
    "Glm4": ("sglang", "yes"),
    "Qwen3Moe": ("sglang", "yes"),
    "Mixtral": ("mlx", "ignored"),
}


@pytest.fixture
def source(tmp_path):
    def write(config):
        config.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return write


def states(path, plan):
    return {check.engine: check for check in export.verify(path, plan).checks}


class TestTable:
    def test_entries(self):
        for engine, found in tables().items():
            assert found["version"], engine
            for name, entry in found["models"].items():
                assert entry.get("as") == "text" or "*" in entry, name
                for kind, text in entry.items():
                    if kind == "as":
                        continue
                    how, _, reason = text.partition(": ")
                    assert kind in ("*", "sliding", *ROPE_TYPES), name
                    assert how in STATUSES, name
                    assert (how == "yes") == (reason == ""), name
                    assert "/" not in reason, name

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_families(self, kind):
        model = StockModel(config_of(kind))
        assert {engine: reading(engine, model).how for engine in FAMILIES[kind]} == FAMILIES[kind]
        if kind in YARN:
            engine, how = YARN[kind]
            assert reading(engine, model, "yarn").how == how

    def test_more_families(self):
        """In the table itself, by the engine's names."""
        expected = {
            "vllm": {
                "Qwen3NextForCausalLM": "yes",
                "GptOssForCausalLM": "ignored",
                "DeepseekV3ForCausalLM": "ignored",
                "Phi3ForCausalLM": "yes",
                "Llama4ForCausalLM": "yes",
                "Ernie4_5ForCausalLM": "ignored",
                "HunYuanDenseV1ForCausalLM": "flag",
                "Olmo3ForCausalLM": "flag",
                "Gemma3ForCausalLM": "unknown",
            },
            "sglang": {
                "Qwen3NextForCausalLM": "yes",
                "GptOssForCausalLM": "crash",
                "DeepseekV3ForCausalLM": "ignored",
                "HunYuanDenseV1ForCausalLM": "yes",
                "GraniteMoeForCausalLM": "ignored",
                "Gemma3ForCausalLM": "ignored",
                "Ernie4_5_ForCausalLM": "crash",
            },
            "mlx": {
                "qwen3_next": "yes",
                "gpt_oss": "crash",
                "phi3": "crash",
                "hunyuan_v1_dense": "crash",
                "deepseek_v3": "ignored",
                "llama4_text": "ignored",
                "granitemoehybrid": "ignored",
            },
        }
        for engine, names in expected.items():
            models = tables()[engine]["models"]
            for name, how in names.items():
                entry = models[name]
                assert entry.get("longrope", entry["*"]).partition(":")[0] == how, (engine, name)

    def test_other_models_and_engines_are_unknown(self):
        model = StockModel(config_of("Helium"))
        assert {
            engine: reading(engine, model).how for engine in ("vllm", "sglang", "exllamav3")
        } == dict.fromkeys(("vllm", "sglang", "exllamav3"), "unknown")
        for engine in ("tensorrt-llm", "ollama", "llama.cpp"):
            assert reading(engine, model).how == "unknown"
        with pytest.raises(ValueError, match="unknown rope_type 'ntk'"):
            reading("vllm", model, "ntk")

    def test_layers_with_a_sliding_window_of_their_own(self):
        config = config_of("Olmo2")
        assert reading("sglang", StockModel(config)).how == "yes"
        config.layer_types = ["sliding_attention", "full_attention"]
        found = reading("sglang", StockModel(config))
        assert found.how == "ignored"
        assert "sliding window" in found.reason

    @pytest.mark.parametrize("engine", ["vllm", "sglang"])
    @pytest.mark.parametrize("strategy", ["dprope", "yarn"])
    def test_a_model_with_an_original_length_of_its_own(self, engine, strategy, source, tmp_path):
        """Phi-3's config class has 4096, which transformers puts over that of its longrope: the plan's goes there."""
        config = transformers.Phi3Config(**SMALL)
        plan = rope_dist.plan(config, factor=2, strategy=strategy)
        out = export.hf(source(config), plan, tmp_path / "out", config_only=True, engines=[engine])
        overrides = json.loads(shlex.split(export.flags(engine, plan, config))[-1])
        started = transformers.Phi3Config(**SMALL)
        started.update(overrides)
        started.standardize_rope_params()  # as vLLM does after it
        for read in (transformers.AutoConfig.from_pretrained(out), started):
            assert read.rope_parameters["original_max_position_embeddings"] == 128
        # Without that entry the engine would derive a scaling from 4096 and 128, or misread position 4096.
        file = json.loads((out / "config.json").read_text())
        del file["original_max_position_embeddings"]
        rope = {k: v for k, v in file["rope_scaling"].items() if "mscale" not in k}
        (out / "config.json").write_text(json.dumps({**file, "rope_scaling": rope, "rope_parameters": rope}))
        assert transformers.AutoConfig.from_pretrained(out).original_max_position_embeddings == 4096
        reason = states(out, plan)[engine].reason
        assert (reason is None) == (strategy == "dprope"), reason  # 128 / 4096 is no scaling

    def test_the_wheels_give_the_table(self):
        """Opt-in: the engines' own source, read again."""
        folder = os.environ.get("ROPE_DIST_ENGINES")
        if not folder:
            pytest.skip("ROPE_DIST_ENGINES names no folder with wheels of the engines")
        from tools.engine_models import TABLE, read, text

        found = read(Path(folder))
        if not found:
            pytest.skip("ROPE_DIST_ENGINES has no wheel of an engine")
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        versions = {engine: table[engine]["version"] for engine in found}
        assert {engine: one["version"] for engine, one in found.items()} == versions
        assert json.loads(text(found)) == {engine: table[engine] for engine in found}


class TestVerify:
    @pytest.mark.parametrize("kind", FAMILIES)
    def test_states(self, kind, source, tmp_path):
        directory = source(config_of(kind))
        plan = rope_dist.plan(directory, factor=2, strategy="dprope")
        out = export.hf(directory, plan, tmp_path / "out", config_only=True)
        checks = states(out, plan)
        for engine, how in FAMILIES[kind].items():
            if engine not in checks:
                continue
            state = checks[engine].state
            start = {
                "yes": "as planned",
                "flag": "as planned; start it with --enforce-eager",
                "unknown": "unknown: ",
            }
            assert state.startswith(start.get(how, "no: ")), (engine, state)
            assert how != "yes" or state == "as planned"
            assert tables()[engine]["version"] in str(export.verify(out, plan))

    def test_a_named_engine_that_ignores_it_is_refused(self, source, tmp_path, capsys):
        directory = source(config_of("Mixtral"))
        plan = rope_dist.plan(directory, factor=2, strategy="dprope")
        plan.save(tmp_path / "plan.json")
        out = tmp_path / "out"
        command = ["export", "hf", str(directory), "--plan", str(tmp_path / "plan.json"), "-o", str(out)]
        command += ["--config-only", "--engine", "sglang"]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "sglang cannot run mixtral by a plan: mixtral.py:174 is given theta alone" in error
        assert "--force-engine" in error
        assert not out.exists()
        assert main([*command, "--force-engine"]) == 0
        assert "no: mixtral.py:174" in capsys.readouterr().out
        assert not export.verify(out, plan, engines=["sglang"]).ok
        with pytest.raises(ValueError, match="does not follow the plan in sglang"):
            export.verify(out, plan, engines=["sglang"]).raise_for_failure()

    def test_a_named_engine_of_which_nothing_is_known_is_refused(self, source, tmp_path):
        directory = source(config_of("SmolLM3"))
        plan = rope_dist.plan(directory, factor=2, strategy="dprope")
        with pytest.raises(ValueError, match=r"it is not known whether sglang runs smollm3 .*--force-engine"):
            export.hf(directory, plan, tmp_path / "out", config_only=True, engines=["sglang"])
        out = export.hf(
            directory, plan, tmp_path / "out", config_only=True, engines=["sglang"], force_engine=True
        )
        found = export.verify(out, plan, engines=["sglang"])
        assert not found.ok
        with pytest.raises(ValueError, match=r"it is not known whether .* follows the plan in sglang"):
            found.raise_for_failure()
        assert export.verify(out, plan).ok

    def test_an_engine_that_needs_a_flag_is_not_refused(self, source, tmp_path):
        directory = source(config_of("Olmo2"))
        plan = rope_dist.plan(directory, factor=2, strategy="dprope")
        out = export.hf(directory, plan, tmp_path / "out", config_only=True, engines=["vllm"])
        found = export.verify(out, plan, engines=["vllm"])
        assert found.ok
        assert "as planned; start it with --enforce-eager" in str(found)
        assert "--max-model-len 128 --enforce-eager\n" in (out / "README.md").read_text()

    def test_an_unknown_architecture_is_as_planned_nowhere(self, source, tmp_path):
        directory = source(config_of("Helium", **OWN_HEAD_DIM))
        file = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**file, "architectures": None}))
        plan = rope_dist.plan(directory, factor=2, strategy="dprope")
        out = export.hf(directory, plan, tmp_path / "out", config_only=True)
        for engine, check in states(out, plan).items():
            if engine not in ("transformers", "transformers-4", "mlx"):  # in their tables
                assert check.state.startswith("unknown: "), engine
