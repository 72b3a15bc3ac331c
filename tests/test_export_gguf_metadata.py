"""GGUF by metadata: llama.cpp computes what the enabled model computes, also in architectures without a factor slot."""

import shlex

import pytest
import torch
from helpers.exports import LlamaCpp, write_gguf

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.flags import llama_server_arguments
from rope_dist.export.gguf_file import METADATA
from rope_dist.export.gguf_reading import read

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'rope-dist[export]'")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma")


def tiny(architecture):
    """A random model of two layers that was trained to 64 tokens, with weights that a wrong frequency would show in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def compare(model, engine, ids, count=64):
    """Greedy tokens past the trained length, and the largest difference of their log-probabilities."""
    special = (0, 1, 2)
    tokens, values = engine.greedy(ids, count, special)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double()
    got = logits.log_softmax(-1)[torch.arange(count), torch.tensor(tokens)]
    logits[:, list(special)] = -torch.inf
    return logits.argmax(-1).tolist() == tokens, (got - torch.tensor(values)).abs().max().item()


IDS = torch.randint(3, 128, (62,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("strategy", ["yarn", "pi", "ntk"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestArchitectures:
    def test_metadata_say_the_plan(self, architecture, strategy, tmp_path):
        model = tiny(architecture)
        source = write_gguf(model, tmp_path / "model.gguf")
        plan = rope_dist.plan(model, factor=2, strategy=strategy)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        assert export.verify(out, plan)
        assert [t.name for t in gguf.GGUFReader(out).tensors] == [
            t.name for t in gguf.GGUFReader(source).tensors
        ]
        again = export.gguf(out, plan, tmp_path / "again.gguf")
        assert again.read_bytes() == out.read_bytes()

    def test_llama_cpp_runs_the_plan(self, architecture, strategy, tmp_path):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
        model = tiny(architecture)
        source = write_gguf(model, tmp_path / "model.gguf")
        settings = {"attention_factor": 1.3} if strategy == "yarn" else {}
        plan = rope_dist.plan(model, factor=2, strategy=strategy, **settings)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        with rope_dist.enable(model, plan=plan):
            same, difference = compare(model, LlamaCpp(out, 192), IDS)
            assert same
            # llama.cpp looks Gemma's GELU up in a table of float16.
            assert difference < (5e-3 if architecture == "gemma" else 1e-3)
            # Both see the frequencies and the scaling.
            plain = write_gguf(model, tmp_path / "plain.gguf", context_length=128)
            assert compare(model, LlamaCpp(plain, 192), IDS)[1] > 0.05


@pytest.mark.parametrize("strategy", ["yarn", "auto-yarn", "pi", "ntk"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_llama_server_flags_run_the_plan(architecture, strategy, tmp_path, capsys):
    """The printed flags, set as llama-server's parser sets them, on the unchanged file."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    model = tiny(architecture)
    source = write_gguf(model, tmp_path / "model.gguf")
    plan = rope_dist.plan(model, factor=2, strategy=strategy)
    arguments = ["export", "flags", "llama-server", str(source), "--factor", "2", "--strategy", strategy]
    assert main(arguments) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words == shlex.split(llama_server_arguments(plan, architecture))
    assert words[:2] == ["-c", "128"]
    flags, overrides = words[2:], {}
    while "--override-kv" in flags:
        i = flags.index("--override-kv")
        _, entry = flags[i : i + 2]
        del flags[i : i + 2]
        key, kind, value = entry.replace("=", ":").split(":")
        overrides[key] = {"int": int, "float": float}[kind](value)
    # The binding has no overrides: a file with these entries is what llama.cpp makes of them.
    assert overrides.pop(f"{architecture}.context_length") == 128
    fields = {k.replace(".", "__"): (v, gguf.GGUFValueType.FLOAT32) for k, v in overrides.items()}
    assert bool(fields) == (strategy == "auto-yarn")
    file = write_gguf(model, tmp_path / "overridden.gguf", context_length=128, **fields)
    with rope_dist.enable(model, plan=plan):
        same, difference = compare(model, LlamaCpp(file, 192, flags=flags), IDS)
        assert same
        assert difference < 1e-3
        plain = write_gguf(model, tmp_path / "plain.gguf", context_length=128)
        assert compare(model, LlamaCpp(plain, 192), IDS)[1] > 0.05


class TestRefusals:
    def test_factors_have_no_place_in_qwen(self, tmp_path):
        model = tiny("qwen2")
        source = write_gguf(model, tmp_path / "model.gguf")
        for plan in (
            rope_dist.plan(model, factor=2, strategy="dprope"),
            rope_dist.plan(model, factor=2, strategy="yarn", beta_fast=4),  # which a file cannot say
            rope_dist.plan(model, factor=2, strategy="yarn", truncate=False),
        ):
            with pytest.raises(ValueError, match=r"only yarn .betas 32 and 1., pi and ntk"):
                export.gguf(source, plan, tmp_path / "out.gguf")
        assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]

    def test_an_architecture_that_was_not_read(self, tmp_path):
        model = tiny("llama")
        for arch, reason in (
            ("plamo2", "'plamo2' that is known to work"),
            ("gemma3", "gemma3 has a rotary .* per"),
        ):
            source = write_gguf(model, tmp_path / f"{arch}.gguf", arch=arch)
            assert arch not in METADATA
            with pytest.raises(ValueError, match=reason):
                export.gguf(source, rope_dist.plan(model, factor=2, strategy="pi"), tmp_path / "out.gguf")

    def test_a_llama_takes_factors_where_metadata_do_not_say_them(self, tmp_path):
        model = tiny("llama")
        source = write_gguf(model, tmp_path / "model.gguf")
        plan = rope_dist.plan(model, factor=2, strategy="yarn", beta_fast=4)
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        assert "rope_freqs.weight" in read(out).tensors
        assert export.verify(out, plan)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--strategy", "dprope"), "cannot express the factors of dprope"),
            (("--strategy", "llama3"), "cannot express the factors of llama3"),
            (("--strategy", "yarn", "--set", "truncate=false"), "truncate=true"),
        ],
    )
    def test_what_flags_of_llama_server_cannot_say(self, tmp_path, capsys, options, reason):
        source = write_gguf(tiny("llama"), tmp_path / "model.gguf")
        assert main(["export", "flags", "llama-server", str(source), "--factor", "2", *options]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert len(error.strip().splitlines()) == 1
