"""``rope-dist doctor``: configs as real families write them, and the differences of engines that are known."""

import json

import pytest
from helpers.exports import write_gguf

import rope_dist
from rope_dist import export
from rope_dist.cli import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 256,
    "intermediate_size": 64,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2 = dict(LLAMA, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
QWEN3 = dict(LLAMA, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
CONFIGS = {
    "llama31_v4": dict(LLAMA, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama31_v5": dict(
        LLAMA, max_position_embeddings=131072, rope_parameters=dict(LLAMA3, rope_theta=500000.0)
    ),
    "qwen25": dict(
        QWEN2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "qwen3_v5": dict(
        QWEN3,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    "phi3": dict(
        LLAMA,
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        hidden_size=3072,
        head_dim=96,
        num_key_value_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=1e4,
        pad_token_id=0,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0 + i / 100 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)],
        },
    ),
    "dsv3": dict(
        LLAMA,
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        kv_lora_rank=512,
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        head_dim=64,
        max_position_embeddings=163840,
        rope_theta=10000,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    ),
    "gptoss": dict(
        LLAMA,
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        hidden_size=2880,
        num_attention_heads=64,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=150000,
        rope_scaling={
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
    ),
    "mistral": dict(
        LLAMA,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        max_position_embeddings=32768,
        rope_theta=1e6,
        sliding_window=None,
    ),
    "mixtral": dict(
        LLAMA,
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        max_position_embeddings=32768,
        rope_theta=1e6,
        num_local_experts=2,
    ),
    "gemma3": dict(
        LLAMA,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        head_dim=256,
        max_position_embeddings=131072,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["full_attention"],
    ),
    "qwen2vl": dict(
        QWEN2,
        architectures=["Qwen2VLForConditionalGeneration"],
        model_type="qwen2_vl",
        max_position_embeddings=32768,
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    ),
    "linear": dict(
        LLAMA, max_position_embeddings=4096, rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "dynamic": dict(
        LLAMA, max_position_embeddings=4096, rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 2.0}
    ),
    "yarn_att": dict(
        LLAMA,
        max_position_embeddings=16384,
        rope_theta=1e4,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.0,
        },
    ),
    "lost": dict(
        LLAMA,
        max_position_embeddings=16384,
        rope_theta=1e4,
        rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 4096},
    ),
    "contra": dict(
        LLAMA,
        max_position_embeddings=16384,
        rope_theta=1e4,
        rope_scaling=None,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 5e5,
            "original_max_position_embeddings": 4096,
        },
    ),
}


@pytest.fixture
def diagnose(tmp_path):
    def run(config, **files):
        config = CONFIGS[config] if isinstance(config, str) else config
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return export.doctor(tmp_path)

    return run


def said(diagnosis, engine):
    """The sentences about an engine."""
    return [sentence for sentence in diagnosis.differences if sentence.startswith(f"{engine} ")]


def engine(diagnosis, name):
    return next(found for found in diagnosis.findings if found.engine == name)


@pytest.mark.parametrize("name", ["llama31_v4", "dsv3", "mistral", "mixtral", "qwen2vl"])
def test_engines_that_agree(diagnose, name):
    found = diagnose(name)
    assert found, found
    assert not found.faults
    for name in ("transformers", "vllm", "sglang"):
        assert engine(found, name).short is not None


def test_the_new_schema_alone_loses_the_scaling_in_old_readers(diagnose):
    """vllm 42624, unsloth 6197: a file of transformers 5 in a reader of the old keys."""
    found = diagnose("llama31_v5")
    for name in ("transformers-4", "mlx"):
        (sentence,) = said(found, name)
        assert "drops the llama3 scaling" in sentence
        assert "does not read rope_parameters" in sentence
        assert "export hf" in sentence
    assert not said(found, "vllm")
    assert engine(found, "transformers").short.length == 131072
    # mlx-lm's Qwen3 reads the new schema; transformers 4 does not.
    found = diagnose("qwen3_v5")
    assert not said(found, "mlx")
    assert len(said(found, "transformers-4")) == 1


def test_a_yarn_whose_length_was_not_raised(diagnose):
    """Qwen2.5's model card adds YaRN to a config of 32768 tokens."""
    found = diagnose("qwen25")
    (sentence,) = said(found, "exllamav3")
    assert "max_position_embeddings / original_max_position_embeddings" in sentence
    assert len(found.differences) == 1
    assert any("factor 4 x original length 32768 131072" in fault for fault in found.faults)


def test_two_sets_of_factors(diagnose):
    found = diagnose("phi3")
    assert len(found.differences) == 1
    assert len(said(found, "mlx")) == 1  # the long factors for every text
    assert any("--max-model-len" in fault for fault in found.faults)


def test_a_ramp_that_is_not_rounded(diagnose):
    found = diagnose("gptoss")
    assert [s.split()[0] for s in found.differences] == ["mlx"]
    assert "does not read truncate" in found.differences[0]


def test_parameters_per_layer_type(diagnose):
    """Gemma 3 as transformers 5 writes it; the full layers are compared."""
    found = diagnose("gemma3")
    assert engine(found, "transformers").short.rope_type == "linear"
    assert "drops the linear scaling" in said(found, "transformers-4")[0]
    assert engine(found, "vllm").status == "unknown"


def test_an_old_linear(diagnose):
    """vicuna-16k: vLLM and SGLang multiply the length, others do not."""
    found = diagnose("linear")
    assert [s.split()[0] for s in found.differences] == ["vllm", "sglang"]
    assert all("allows 16384 tokens" in sentence for sentence in found.differences)


def test_dynamic(diagnose):
    found = diagnose("dynamic")
    assert not said(found, "transformers-4")
    assert not said(found, "mlx")
    assert "for long texts" in said(found, "vllm")[0]
    assert "cos and sin for 4096" in said(found, "vllm")[1]
    assert "for long texts" not in said(found, "sglang")[0]
    assert said(found, "exllamav3") == ["exllamav3 fails on it: it knows no rope_type 'dynamic'."]


def test_an_attention_factor(diagnose):
    """prime-rl 2802: SGLang drops it."""
    found = diagnose("yarn_att")
    assert [s.split()[0] for s in found.differences] == ["sglang", "mlx", "tensorrt-llm"]
    assert all("1.13863" in s and "attention_factor" in s for s in found.differences)
    rope = CONFIGS["yarn_att"]["rope_scaling"]
    # mscale is what the others read.
    assert diagnose({**CONFIGS["yarn_att"], "rope_scaling": {**rope, "mscale": 0.0, "mscale_all_dim": 0}})


def test_contradictions(diagnose):
    found = diagnose("contra")
    assert any("rope_scaling is null beside rope_parameters" in fault for fault in found.faults)
    assert any("rope_theta is 10000.0 at the top level and 500000.0" in fault for fault in found.faults)
    assert "rope_theta of the top level" in said(found, "exllamav3")[0]
    both = {**CONFIGS["contra"], "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    assert any("factor 2.0 and 4.0" in fault for fault in diagnose(both).faults)
    found = diagnose("lost")
    assert any("factor of yarn is lost" in fault for fault in found.faults)
    assert len(said(found, "vllm")) == 1
    rope = {"rope_type": "yarn", "type": "linear", "factor": 4.0}
    found = diagnose({**CONFIGS["llama31_v4"], "rope_scaling": rope})
    assert any("its type is 'linear' and its rope_type 'yarn'" in fault for fault in found.faults)
    assert any("original_max_position_embeddings is missing" in fault for fault in found.faults)


def test_files_beside_the_config(diagnose):
    found = diagnose(
        "mistral", tokenizer_config={"model_max_length": 4096}, generation_config={"max_length": 8192}
    )
    assert any("model_max_length of tokenizer_config.json is 4096" in fault for fault in found.faults)
    assert any("max_length of generation_config.json is 8192" in fault for fault in found.faults)


def test_an_own_export(make_llama, tmp_path):
    model = make_llama()
    plan = rope_dist.plan(model, factor=2, strategy="dprope")
    found = export.doctor(export.hf(model, plan, tmp_path / "out", config_only=True))
    assert found, found


def test_gguf(make_llama, tmp_path, diagnose):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rope-dist[export]'")
    model = make_llama()
    model.config.save_pretrained(tmp_path)
    kinds = gguf.GGUFValueType
    fields = {
        "llama__rope__scaling__type": ("yarn", kinds.STRING),
        "llama__rope__scaling__factor": (4.0, kinds.FLOAT32),
    }
    path = write_gguf(model, tmp_path / "model.gguf", **fields)
    alone = export.doctor(path)
    assert alone
    assert alone.findings[0].short.rope_type == "yarn"
    assert alone.findings[0].short.attention_scaling == pytest.approx(1.138629)
    beside = export.doctor(tmp_path)
    (sentence,) = beside.differences
    assert sentence.startswith("llama.cpp, model.gguf:")


class TestCommandLine:
    def run(self, capsys, *arguments):
        code = main(["doctor", *map(str, arguments)])
        return code, capsys.readouterr()

    def test_exit_codes(self, diagnose, tmp_path, capsys):
        diagnose("mistral")
        code, printed = self.run(capsys, tmp_path)
        assert code == 0
        assert "compute the same" in printed.out
        diagnose("llama31_v5")
        code, printed = self.run(capsys, tmp_path, "--json")
        assert code == 1
        data = json.loads(printed.out)
        assert data["agree"] is False
        assert {e["engine"] for e in data["engines"]} == {"transformers", *export.ENGINES}
        factors = data["engines"][0]["short"]["factors"]
        assert len(factors) == 64
        assert factors[-1] == pytest.approx(8)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', "\x00"])
    def test_bad_json_is_one_line(self, tmp_path, capsys, text):
        (tmp_path / "config.json").write_text(text)
        code, printed = self.run(capsys, tmp_path)
        assert code == 2
        assert printed.err.count("\n") == 1
        assert "config.json" in printed.err

    def test_nothing_there(self, tmp_path, capsys, monkeypatch):
        code, printed = self.run(capsys, tmp_path / "no" / "such")
        assert code == 2
        assert "no file or directory" in printed.err
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, printed = self.run(capsys, "nobody/no-such-model")
        assert code == 2
        assert printed.err.count("\n") == 1
        assert "from the hub or its cache" in printed.err


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("./nothing-here", "there is no file or directory ./nothing-here"),
        ("../nothing/here", "there is no file or directory"),
        ("nothing.gguf", "there is no file or directory nothing.gguf"),
        ("llama3-8b", "is a preset, not a checkpoint: give its directory, or meta-llama/Meta-Llama-3-8B"),
    ],
)
def test_what_is_not_there(source, reason, capsys):
    assert main(["doctor", source]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("file", [{"model_type": "clip"}, {**LLAMA, "rope_scaling": "yarn"}])
def test_what_no_engine_reads(file, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(file))
    assert main(["doctor", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "No engine reads it. transformers: " in out
    assert "compute the same" not in out
