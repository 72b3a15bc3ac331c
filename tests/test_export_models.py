"""Models that are not a plain LLaMA: what an export keeps, which engines run it, what is refused and why."""

import json
import logging
import os
import shlex
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.model_families import FAMILIES, OWN_HEAD_DIM, SLIDING_THEN_FULL, SMALL, config_of
from test_export_hf import other_versions

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.stock import StockModel, changed

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
IDS = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(5))


def llava():
    text = {**SMALL, "model_type": "llama", "initializer_range": 0.3}
    return transformers.LlavaConfig(
        text_config=text, vision_config={**VISION, "model_type": "clip_vision_model"}
    )


def mistral3():
    text = {**SMALL, **OWN_HEAD_DIM, "model_type": "mistral", "initializer_range": 0.3}
    return transformers.Mistral3Config(text_config=text, vision_config={**VISION, "model_type": "pixtral"})


def gemma3():
    return transformers.Gemma3Config(
        text_config={**SMALL, **SLIDING_THEN_FULL, **OWN_HEAD_DIM}, vision_config=VISION
    )


def deepseek():
    """Its softmax is scaled by its YaRN, 4 times as strongly as without."""
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    return transformers.DeepseekV3Config(
        **{**SMALL, **MLA, "max_position_embeddings": 256}, rope_parameters=rope
    )


def ministral3():
    rope = {**YARN, "llama_4_scaling_beta": 0.1}
    return config_of("Ministral3", max_position_embeddings=256, rope_parameters=rope)


def qwen_vl_as_on_the_hub():
    """Flat, as Qwen2.5-VL-7B-Instruct keeps it."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **SMALL,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 48},
    }


HUB = {
    # As google/gemma-3-1b-it and allenai/Olmo-3-7B keep them: no rope_parameters, nothing says "per layer type".
    "gemma3_text": {
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        **OWN_HEAD_DIM,
    },
    "olmo3": {"rope_theta": 500000, "rope_scaling": None, **SLIDING_THEN_FULL},
}


@pytest.fixture
def directory(tmp_path):
    def write(config):
        if isinstance(config, dict):
            (tmp_path / "source").mkdir()
            (tmp_path / "source" / "config.json").write_text(json.dumps(config))
        else:
            config.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return write


def numbers_plan(config, **options):
    """A plan for a model from numbers: some models are refused by plan() itself."""
    text = config.get_text_config()
    rope = text.rope_parameters
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = {
        "theta": rope["rope_theta"],
        "head_dim": head_dim,
        "original_length": text.max_position_embeddings,
    }
    return rope_dist.plan(**numbers, factor=2, **{"strategy": "dprope", **options})


def hf(source, plan, out, **options):
    """The config alone: there are no weights."""
    return export.hf(source, plan, out, config_only=True, **options)


def reasons(path, plan, **options):
    return {check.engine: check.reason for check in export.verify(path, plan, **options).checks}


class TestComposite:
    @pytest.mark.parametrize("make", [llava, mistral3])
    @torch.no_grad()
    def test_the_language_model_is_extended(self, make, tmp_path):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(make()).eval()
        model.save_pretrained(tmp_path / "source")
        plan = rope_dist.plan(tmp_path / "source", factor=2, strategy="dprope")
        out = export.hf(tmp_path / "source", plan, tmp_path / "out")
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(out).eval()
        assert torch.equal(loaded.model.language_model.rotary_emb.inv_freq, plan.inv_freq)
        assert loaded.config.get_text_config().max_position_embeddings == 128
        trained = model(input_ids=IDS).logits
        with rope_dist.enable(model, plan=plan):
            extended = model(input_ids=IDS).logits
        torch.testing.assert_close(loaded(input_ids=IDS).logits, extended, rtol=1e-5, atol=1e-5)
        assert (trained - extended).abs().max() > 1e-3
        found = reasons(out, plan)
        assert [found[e] for e in ("transformers", "transformers-4", "vllm", "sglang")] == [None] * 4
        assert "inside" in found["mlx"]
        # The rest of the config is the source's.
        before, after = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "source", out))
        assert {**before, "text_config": None} == {**after, "text_config": None}

    def test_a_text_config_that_leaves_its_shape_to_the_class(self, directory, tmp_path):
        """As llava-hf/llava-1.5-7b-hf: every engine knows the defaults of LLaMA."""
        text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
        vision = {**VISION, "model_type": "clip_vision_model"}
        source = directory({"model_type": "llava", "text_config": text, "vision_config": vision})
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        assert plan.head_dim == 128
        assert reasons(hf(source, plan, tmp_path / "out"), plan)["vllm"] is None

    @pytest.mark.parametrize("make", [llava, mistral3, gemma3])
    def test_what_save_pretrained_writes_verifies(self, make, tmp_path):
        config = make()
        plan = rope_dist.plan(config, factor=2, strategy="dprope")
        text = config.text_config
        text.__dict__.update(plan.config_overrides(text))
        config.save_pretrained(tmp_path / "saved")
        found = export.verify(tmp_path / "saved", plan)
        assert (found.checks[0].engine, found.checks[0].reason) == ("transformers", None)
        make().save_pretrained(tmp_path / "plain")
        assert "factors are missing" in reasons(tmp_path / "plain", plan)["transformers"]
        if make is gemma3:
            # Nothing else has a form for it, so nothing else is required.
            assert found.ok
            assert all("per layer type" in c.reason for c in found.checks[1:])
        else:
            # transformers 4 takes it for a model without scaling, as with any LLaMA.
            assert "factors are missing" in found.checks[1].reason

    def test_positions_in_time_height_and_width(self, directory, tmp_path, capsys):
        """As on the hub: flat, which transformers 5 reads but does not write."""
        source = directory(qwen_vl_as_on_the_hub())
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        out = hf(source, plan, tmp_path / "out")
        file = json.loads((out / "config.json").read_text())
        assert file["text_config"]["rope_parameters"]["mrope_section"] == [2, 2, 2]
        loaded = transformers.AutoConfig.from_pretrained(out)
        assert (
            loaded.vision_config.to_dict()
            == transformers.AutoConfig.from_pretrained(source).vision_config.to_dict()
        )
        found = reasons(out, plan, source=source)
        assert found["transformers"] is None
        assert "mrope_section" in found["vllm"]
        assert "factors are missing" in reasons(source, plan)["transformers"]
        # vLLM has no longrope for them.
        plan.save(tmp_path / "plan.json")
        assert main(["export", "vllm", str(source), "--plan", str(tmp_path / "plan.json")]) == 2
        assert "positions in time, height and width (mrope_section)" in capsys.readouterr().err
        with pytest.raises(ValueError, match="vllm cannot run qwen2_5_vl"):
            hf(source, plan, tmp_path / "required", engines=["vllm"])

    def test_a_language_model_that_only_the_whole_model_builds(self):
        """PaddleOCR-VL's text config has no class of its own: its rotary embedding says what its positions are."""
        config = transformers.PaddleOCRVLConfig()
        text = config.get_text_config()
        assert type(text) not in transformers.MODEL_MAPPING
        assert "mrope_section" not in text.rope_parameters
        assert StockModel(config).multimodal_positions


class TestKept:
    def test_a_softmax_that_is_scaled_by_its_yarn(self, directory, tmp_path):
        source = directory(deepseek())
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        config = transformers.AutoConfig.from_pretrained(hf(source, plan, tmp_path / "out"))
        model, stock = transformers.DeepseekV3Model(config), transformers.DeepseekV3Model(deepseek())
        assert torch.equal(model.rotary_emb.inv_freq, plan.inv_freq)
        assert model.layers[0].self_attn.scaling == stock.layers[0].self_attn.scaling

    def test_what_an_artefact_lost_is_seen_beside_its_source(self, directory, tmp_path):
        source = directory(deepseek())
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        file = json.loads((source / "config.json").read_text())
        (tmp_path / "out").mkdir()
        naive = {**file, **export.config_entries(plan)}  # replaced as a whole
        (tmp_path / "out" / "config.json").write_text(json.dumps(naive))
        assert reasons(tmp_path / "out", plan)["transformers"] is None
        assert "mscale_all_dim" in reasons(tmp_path / "out", plan, source=source)["transformers"]
        plan.save(tmp_path / "plan.json")
        arguments = ("verify", tmp_path / "out", "--plan", tmp_path / "plan.json", "--source", source)
        assert main([str(a) for a in arguments]) == 2

    def test_scalars_are_compared_not_names(self):
        """mscale_all_dim stays, but the factor that it works on does not: 0.331 becomes 0.177."""
        after = deepseek()
        after.rope_parameters = {**after.rope_parameters, "factor": 1.0}
        reason = changed(StockModel(deepseek()), StockModel(after))
        configs = (deepseek(), after)
        was, now = (transformers.DeepseekV3Model(c).layers[0].self_attn.scaling for c in configs)
        assert was > 1.2 * now
        assert reason == f"layers.0.self_attn.scaling is {now:.6g}, {was:.6g} in the model"
        assert changed(StockModel(deepseek()), StockModel(deepseek())) is None

    @pytest.mark.parametrize("strategy", ["dprope", "yarn"])
    def test_queries_scaled_by_their_position(self, strategy, directory, tmp_path):
        """Ministral 3 scales them by the original length of its YaRN, which stays."""
        source = directory(ministral3())
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = hf(source, plan, tmp_path / "out")
        rope = transformers.AutoConfig.from_pretrained(out).rope_parameters
        assert rope["llama_4_scaling_beta"] == 0.1
        assert rope["original_max_position_embeddings"] == 64
        found = reasons(out, plan, source=source)
        # These derive the scaling of cos and sin from the original length, where they are not told.
        assert [found[e] for e in ("transformers", "vllm", "sglang")] == [None] * 3
        assert "0.1" in export.vllm_arguments(plan, ministral3())
        naive = {
            **json.loads((out / "config.json").read_text()),
            "rope_parameters": {**rope, "llama_4_scaling_beta": 0},
        }
        (out / "config.json").write_text(json.dumps({**naive, "rope_scaling": None}))
        assert "llama_4_scaling_beta" in reasons(out, plan, source=source)["transformers"]

    def test_a_class_with_scalings_of_its_own(self, tmp_path):
        """PhiMoE's config wants short_mscale and long_mscale whatever the plan."""
        config = transformers.PhimoeConfig(**SMALL, num_local_experts=2)
        config.save_pretrained(tmp_path / "source")
        plan = rope_dist.plan(config, factor=2, strategy="dprope")
        out = hf(tmp_path / "source", plan, tmp_path / "out")
        rotary = transformers.PhimoeModel(transformers.AutoConfig.from_pretrained(out)).rotary_emb
        cos, _ = rotary(torch.zeros(1), torch.arange(128)[None])
        expected = (torch.arange(128.0)[:, None] * plan.inv_freq).cos()
        torch.testing.assert_close(cos[0, :, : plan.rotary_dim // 2], expected)


def config_for(kind):
    return {
        "Glm": lambda: config_of("Glm", partial_rotary_factor=0.5),
        "Ernie4_5": lambda: transformers.Ernie4_5Config(**SMALL, **OWN_HEAD_DIM),
        "DeepseekV3": lambda: transformers.DeepseekV3Config(**{**SMALL, **MLA}),
        "GptOss": lambda: config_of("GptOss", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "Olmo": lambda: transformers.OlmoConfig(**SMALL),
        "Phi3": lambda: transformers.Phi3Config(**SMALL),
    }.get(kind, lambda: config_of(kind))()


class TestEngines:
    @pytest.mark.parametrize(
        ("kind", "engine", "reason"),
        [
            ("Olmo", "transformers-4", "`type` and a `factor`"),
            ("Olmo2", "transformers-4", "`type` and a `factor`"),
            ("Phi3", "transformers-4", "`short_factor` and `long_factor`"),
            ("Cohere", "vllm", "pairs neighbouring dimensions"),
            ("Ernie4_5", "vllm", "pairs neighbouring dimensions"),
            ("Glm4", "vllm", "pairs neighbouring dimensions"),
            ("GptOss", "vllm", "takes every type for yarn"),
            ("Cohere", "sglang", "pairs neighbouring dimensions"),
            ("DeepseekV3", "vllm", "DeepSeek's YaRN"),
            ("DeepseekV3", "sglang", "DeepSeek's YaRN"),
            ("Mixtral", "sglang", "mixtral.py:174 is given theta alone"),
            ("Gemma", "sglang", "gemma.py:130 is given theta alone"),
            ("Gemma2", "sglang", "gemma2.py:154 is given theta alone"),
            ("Starcoder2", "sglang", "starcoder2.py:103 is given theta alone"),
            ("Qwen3Moe", "sglang", "qwen3_moe.py:723 passes fused_set_kv_buffer_arg"),
            ("GptOss", "sglang", "passes fused_set_kv_buffer_arg"),
            ("Cohere", "mlx", "cohere.py:67 is given theta alone"),
            ("Mixtral", "mlx", "mixtral.py:59 is given theta alone"),
            ("Gemma", "mlx", "gemma.py:53 is given theta alone"),
            ("Gemma2", "mlx", "gemma2.py:57 is given theta alone"),
            ("Qwen3Moe", "mlx", "qwen3_moe.py:61 is given theta alone"),
            ("GptOss", "mlx", "no max_position_embeddings"),
        ],
    )
    def test_what_is_known_to_fail_is_not_as_planned(self, kind, engine, reason, directory, tmp_path):
        source = directory(config_for(kind))
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        out = hf(source, plan, tmp_path / "out")  # the other engines run it
        found = export.verify(out, plan)
        assert found.ok
        assert reason in next(check.reason for check in found.checks if check.engine == engine)
        assert not export.verify(out, plan, engines=[engine]).ok
        with pytest.raises(ValueError, match=f"{engine} cannot run"):
            hf(source, plan, tmp_path / "required", engines=[engine])
        assert not (tmp_path / "required").exists()
        if engine == "vllm":
            with pytest.raises(ValueError, match="vllm cannot run"):
                export.vllm_arguments(plan, config_for(kind))

    @pytest.mark.parametrize(
        "config",
        [
            config_of("Cohere2", sliding_window=16),
            config_of("Exaone4", sliding_window=16, layer_types=SLIDING_THEN_FULL["layer_types"]),
        ],
        ids=lambda config: config.model_type,
    )
    def test_a_rotation_in_sliding_layers_only(self, config, directory):
        """Nothing of it grows with the text, whatever the frequencies say: no engine follows a plan."""
        source = directory(config)
        plan = numbers_plan(config)
        with pytest.raises(ValueError, match="there is nothing to extend"):
            hf(source, plan, source.parent / "out")
        with pytest.raises(ValueError, match="there is nothing to extend"):
            export.vllm_arguments(plan, config)
        file = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**file, **export.config_entries(plan)}))
        found = reasons(source, plan)
        assert "there is nothing to extend" in found["transformers"]
        assert all(found.values())
        assert not export.verify(source, plan)

    def test_the_same_family_without_a_window_is_exported(self, directory, tmp_path):
        config = config_of("Exaone4", sliding_window=None, layer_types=["full_attention"] * 2)
        source = directory(config)
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        assert reasons(hf(source, plan, tmp_path / "out"), plan)["transformers"] is None

    def test_a_class_that_derives_its_head_dim(self, directory, tmp_path):
        """Falcon's config takes none, and its file must not get one."""
        config = transformers.FalconConfig(
            **{k: v for k, v in SMALL.items() if "key_value" not in k and "intermediate" not in k}
        )
        source = directory(config)
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        found = reasons(hf(source, plan, tmp_path / "out"), plan)
        assert found["transformers"] is None
        assert "not tried" in found["transformers-4"]

    @pytest.mark.parametrize("kind", HUB)
    def test_frequencies_per_layer_type_as_on_the_hub(self, kind, directory, tmp_path, capsys):
        """For transformers 5 alone: the full layers are extended, the others keep theirs."""
        file = {"model_type": kind, **SMALL, **HUB[kind]}
        source = directory({**file, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
        before = transformers.AutoConfig.from_pretrained(source)
        if kind == "olmo3" and "full_attention" not in before.rope_parameters:
            pytest.skip(f"transformers {transformers.__version__} scales all layers of olmo3")
        plan = rope_dist.plan(source, factor=2, strategy="yarn")
        out = hf(source, plan, tmp_path / "out")
        assert "rope_scaling" not in json.loads((out / "config.json").read_text())
        after = transformers.AutoConfig.from_pretrained(out)
        assert after.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
        assert after.rope_parameters["full_attention"]["long_factor"] == list(plan.factors)
        verification = export.verify(out, plan, source=source)
        assert verification.ok
        assert all("per layer type" in check.reason for check in verification.checks[1:])
        with pytest.raises(ValueError, match="transformers-4 cannot run"):
            hf(source, plan, tmp_path / "required", engines=["transformers-4"])
        plan.save(tmp_path / "plan.json")
        assert main(["export", "vllm", str(source), "--plan", str(tmp_path / "plan.json")]) == 2
        assert (
            f"it is not known whether vllm runs {kind} by a plan: the model has a rotary embedding per layer type"
            in capsys.readouterr().err
        )

    @pytest.mark.parametrize("path", other_versions())
    def test_transformers_4_agrees(self, path, tmp_path):
        """The other version itself, on every family and some that are refused."""
        kinds = [*FAMILIES, "Cohere", "Glm", "Phi3", "GptOss", "HunYuanDenseV1", "DeepseekV3", "Olmo"]
        runs = {}
        for kind in kinds:
            config = config_for(kind)
            config.save_pretrained(tmp_path / kind)
            plan = rope_dist.plan(config, factor=2, strategy="yarn")
            torch.save(plan.inv_freq, tmp_path / f"{kind}.pt")
            try:
                out = hf(tmp_path / kind, plan, tmp_path / f"{kind}-out")
            except ValueError:
                continue  # per layer type
            runs[kind] = reasons(out, plan)["transformers-4"] is None
        done = subprocess.run(
            [sys.executable, "-c", _TRANSFORMERS_4, str(tmp_path), *runs],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == runs
        assert not runs["Olmo2"]
        assert sum(runs.values()) > 15


_TRANSFORMERS_4 = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, *kinds = sys.argv[1:]
found = {}
for kind in kinds:
    try:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{folder}/{kind}-out"))
            model(torch.arange(3, 90)[None])
        rotary = model.model.rotary_emb
        planned = torch.load(f"{folder}/{kind}.pt")
        found[kind] = torch.equal(rotary.inv_freq, planned) and rotary.attention_scaling != 1
    except Exception as error:
        print(kind, error, file=sys.stderr)
        found[kind] = False
print(json.dumps(found))
"""


class TestVllm:
    def test_entries_of_a_part(self, directory, tmp_path, capsys):
        """vLLM goes into an override that is itself a config, and replaces everything else."""
        source = directory(llava())
        plan = rope_dist.plan(source, factor=2, strategy="yarn")
        plan.save(tmp_path / "plan.json")
        assert main(["export", "vllm", str(source), "--plan", str(tmp_path / "plan.json")]) == 0
        _, length, _, overrides = shlex.split(capsys.readouterr().out)
        assert int(length) == 128
        config = transformers.AutoConfig.from_pretrained(source)
        for key, value in json.loads(overrides).items():
            assert isinstance(getattr(config, key), transformers.PretrainedConfig)
            getattr(config, key).update(value)
        rotary = transformers.AutoModel.from_config(config.text_config).rotary_emb
        assert torch.equal(rotary.inv_freq, plan.inv_freq)
        assert rotary.attention_scaling == plan.attention_scaling
        found = export.ENGINES["vllm"](config.text_config.to_dict())
        assert found.attention_scaling == plan.attention_scaling

    def test_a_plan_of_another_model(self, llama):
        other = rope_dist.plan(llama, factor=2, strategy="dprope")
        with pytest.raises(ValueError, match="the plan is for head_dim 16"):
            export.vllm_arguments(other, llava())

    def test_a_preset_needs_no_model(self, tmp_path, capsys):
        assert main(["export", "vllm", "llama2-7b", "--target", "8192", "--strategy", "dprope"]) == 0
        printed, remarks = capsys.readouterr()
        assert printed.startswith("--max-model-len 8192 ")
        assert remarks == ""
        rope_dist.plan("llama2-7b", target_length=8192, strategy="dprope").save(tmp_path / "plan.json")
        assert main(["export", "vllm", "--plan", str(tmp_path / "plan.json")]) == 0
        again, remarks = capsys.readouterr()
        assert again == printed
        assert "give MODEL too" in remarks


LLAMA_3_1 = {
    # meta-llama/Llama-3.1-8B as on the hub, what matters here.
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
}


class TestFaults:
    def test_a_preset_plan_is_of_the_models_config(self, directory, tmp_path):
        """Its frequencies are derived twice, and differ in the last bits of float32."""
        source = directory(LLAMA_3_1)
        plan = rope_dist.plan("llama3.1-8b", target_length=262144, strategy="dprope")
        out = hf(source, plan, tmp_path / "out")
        assert all(reason is None for reason in reasons(out, plan).values())

    def test_nothing_is_said_about_keys_for_other_engines(self, directory, tmp_path, caplog):
        source = directory(config_of("Llama"))
        plan = rope_dist.plan(source, factor=2, strategy="auto")
        logging.getLogger("transformers").addHandler(caplog.handler)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_warning()
        try:
            out = hf(source, plan, tmp_path / "out")
            export.verify(out, plan, source=out)
            hf(out, plan, tmp_path / "again")
            assert caplog.text == ""
            transformers.AutoConfig.from_pretrained(out)
            assert "short_mscale" in caplog.text  # There is a warning to leave out.
        finally:
            transformers.logging.set_verbosity(verbosity)
            logging.getLogger("transformers").removeHandler(caplog.handler)

    def test_a_failed_check_names_the_output(self, directory, tmp_path, monkeypatch):
        def without(*arguments):
            return {k: v for k, v in entries(*arguments).items() if k != "rope_scaling"}

        entries = export.config_entries
        monkeypatch.setattr("rope_dist.export.hf_directory.config_entries", without)
        source, out = directory(config_of("Llama")), tmp_path / "out"
        with pytest.raises(
            ValueError, match=f"^{out} does not follow the plan in transformers-4: the factors"
        ):
            hf(source, rope_dist.plan(source, factor=2, strategy="dprope"), out)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]

    def test_a_global_enable_does_not_change_what_stock_computes(self, directory, tmp_path):
        source = directory(config_of("Llama"))
        plan = rope_dist.plan(source, factor=2, strategy="dprope")
        out = hf(source, plan, tmp_path / "out")
        with rope_dist.enable(factor=2):
            assert reasons(out, plan)["transformers"] is None
            assert "factors are missing" in reasons(source, plan)["transformers"]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "no_such_model"}, "no_such_model"),
            ({"model_type": "llama", "text_config": 3}, None),
            ([1], "does not hold a JSON object"),
        ],
    )
    def test_a_config_at_fault(self, config, message, directory, tmp_path, capsys):
        source = tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        rope_dist.plan(config_of("Llama"), factor=2).save(tmp_path / "plan.json")
        arguments = ("export", "hf", source, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message is None or message in error

    def test_a_model_on_the_hub(self, tmp_path, capsys):
        rope_dist.plan(config_of("Llama"), factor=2).save(tmp_path / "plan.json")
        plan = ("--plan", str(tmp_path / "plan.json"))
        assert main(["export", "hf", "owner/name", *plan, "-o", str(tmp_path / "out")]) == 2
        assert "no directory owner/name; a model on the hub has to be downloaded" in capsys.readouterr().err
