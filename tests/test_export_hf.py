"""Exported directories: stock transformers, without this package, computes what the enabled model computes."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import llama_config
from helpers.exports import stock_run

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.export.forms import ROUNDING

# Positions to 120 of a model trained to 64.
IDS = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def llama(make_llama):
    """Weights large enough that a wrong frequency moves the logits by far more than rounding."""
    return make_llama(initializer_range=0.3)


@pytest.fixture
def source(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        '{"model_max_length": 64, "chat_template": "ä"}'
    )
    return tmp_path / "model"


@pytest.fixture
def plan(source):
    return rope_dist.plan(source, factor=2, strategy="dprope")


@torch.no_grad()
def logits(model, ids, start=0):
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(ids, position_ids=positions).logits[:, -32:]


def same_run(model, directory, plan, tmp_path, ids=IDS, path="", start=0, rounding=0.0):
    got = stock_run(directory, ids, tmp_path, path, start)
    torch.testing.assert_close(got["inv_freq"], plan.inv_freq, rtol=rounding, atol=0)
    assert got["scaling"] == pytest.approx(plan.attention_scaling, rel=rounding)
    assert got["class"].startswith("transformers.")
    trained = logits(model, ids, start)
    with rope_dist.enable(model, plan=plan):
        extended = logits(model, ids, start)
    print("transformers", got["version"], "differs by", (extended - got["logits"]).abs().max().item())
    torch.testing.assert_close(got["logits"], extended, rtol=0, atol=1e-4 if rounding else 1e-5)
    assert (trained - extended).abs().max() > 0.1  # The comparison sees the frequencies.


def other_versions():
    """Directories with another transformers (pip install --target), in ROPE_DIST_TRANSFORMERS."""
    found = [p for p in os.environ.get("ROPE_DIST_TRANSFORMERS", "").split(os.pathsep) if p]
    return found or [
        pytest.param(
            "",
            marks=pytest.mark.skip(
                reason="ROPE_DIST_TRANSFORMERS names no directory with another transformers "
                "(pip install --target DIR transformers==4.57.6)"
            ),
        )
    ]


class TestRoundTrip:
    @pytest.mark.parametrize("form", export.FORMS)
    @pytest.mark.parametrize("strategy", ["dprope", "yarn"])
    def test_stock_transformers_gives_the_enabled_models_logits(
        self, llama, source, tmp_path, strategy, form
    ):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        if (strategy, form) == ("dprope", "native"):
            form = None  # it has no native one
        out = export.hf(source, plan, tmp_path / "out", form=form)
        same_run(llama, out, plan, tmp_path, rounding=ROUNDING if form == "native" else 0.0)

    @pytest.mark.parametrize("path", other_versions())
    @pytest.mark.parametrize("strategy", ["dprope", "yarn"])
    def test_in_another_transformers(self, llama, source, tmp_path, strategy, path):
        plan = rope_dist.plan(source, factor=2, strategy=strategy)
        out = export.hf(source, plan, tmp_path / "out")
        same_run(llama, out, plan, tmp_path, path=path, rounding=ROUNDING if strategy == "yarn" else 0.0)

    @pytest.mark.parametrize("path", ["", *other_versions()])
    def test_a_real_model(self, tmp_path, path):
        from rope_dist.evaluation import load_model
        from rope_dist.optional import MissingPackageError

        try:
            model, tokenizer = load_model("smollm2-135m")
        except MissingPackageError as error:
            pytest.skip(str(error))
        plan = rope_dist.plan(model, target_length=16384)
        out = export.hf(model, plan, tmp_path / "out")
        text = Path(export.__file__).read_text()
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :200]
        same_run(model, out, plan, tmp_path, ids, path, start=9000)

    def test_the_naive_config_fails_where_versions_differ(self, llama, plan, tmp_path):
        """What transformers 5 saves by itself is a model without factors for the old schema's readers."""
        with rope_dist.enable(llama, plan=plan):
            llama.save_pretrained(tmp_path / "saved")
        reasons = {c.engine: c.reason for c in export.verify(tmp_path / "saved", plan).checks}
        assert reasons["transformers"] is None
        assert "factors are missing" in reasons["transformers-4"]
        assert "factors are missing" in reasons["mlx"]

    def test_a_model_enabled_or_not_gives_the_same_directory(self, llama, plan, source, tmp_path):
        export.hf(llama, plan, tmp_path / "a")
        with rope_dist.enable(llama, plan=plan):
            export.hf(llama, plan, tmp_path / "b")
        export.hf(source, plan, tmp_path / "c")
        export.hf(tmp_path / "c", plan, tmp_path / "d")  # extended already, by this plan
        a, *others = (json.loads((tmp_path / n / "config.json").read_text()) for n in "abcd")
        assert all(other == a for other in others)


class TestFiles:
    def test_weights_keep_their_bytes_and_lengths_follow(self, source, plan, tmp_path):
        (source / "consolidated.00.pth").write_bytes(b"of another format, without the factors")
        out = export.hf(source, plan, tmp_path / "out")
        for name in ("model.safetensors",):
            assert (out / name).read_bytes() == (source / name).read_bytes()
        assert json.loads((out / "tokenizer_config.json").read_text()) == {
            "model_max_length": 128,
            "chat_template": "ä",
        }
        assert not (out / "consolidated.00.pth").exists()
        config = json.loads((out / "config.json").read_text())
        assert config["rope_dist"]["original_length"] == 64
        assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "longrope"
        # vLLM would stop at it.
        assert "original_max_position_embeddings" not in config

    def test_shards_and_links(self, llama, plan, tmp_path):
        llama.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        shards = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
        assert len(shards) > 2
        out = export.hf(tmp_path / "shards", plan, tmp_path / "out", link=True)
        assert all((out / s).samefile(tmp_path / "shards" / s) for s in shards)
        same_run(llama, out, plan, tmp_path)

    def test_the_config_alone(self, source, llama, plan, tmp_path):
        out = export.hf(source, plan, tmp_path / "out", config_only=True)
        assert not list(out.glob("*.safetensors"))
        assert export.verify(out, plan)
        llama.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        shards = export.hf(tmp_path / "shards", plan, tmp_path / "of-shards", config_only=True)
        assert export.verify(shards, plan)
        assert not list(shards.glob("*index*"))
        export.hf(llama, plan, tmp_path / "of-model", config_only=True)
        assert export.verify(tmp_path / "of-model", plan)

    def test_never_over_another_without_force(self, source, plan, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine").write_text("keep")
        with pytest.raises(ValueError, match=r"exists; .*--force"):
            export.hf(source, plan, out)
        assert (out / "mine").read_text() == "keep"
        export.hf(source, plan, out, force=True)
        assert not (out / "mine").exists()
        assert export.verify(out, plan)

    @pytest.mark.parametrize(
        "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
    )
    def test_an_interruption_leaves_nothing(self, source, plan, tmp_path, monkeypatch, failure):
        before = {p.name: p.read_bytes() for p in source.iterdir()}
        out = tmp_path / "out"
        out.mkdir()

        def fail(*arguments):
            raise failure

        monkeypatch.setattr("rope_dist.export.hf_directory.copy_bytes", fail)
        with pytest.raises(type(failure)):
            export.hf(source, plan, out, force=True)
        assert {p.name: p.read_bytes() for p in source.iterdir()} == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
        assert list(out.iterdir()) == []

    def test_a_full_disk(self, source, plan, tmp_path):
        """The limit on file sizes of a process stands for the disk: writes fail with an OSError half way."""
        plan.save(tmp_path / "plan.json")
        code = "import sys; from rope_dist.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "export", "hf", source, "--plan", tmp_path / "plan.json"]
        done = subprocess.run(
            [*map(str, command), "-o", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(rope_dist.__file__).parents[1])},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        )
        assert done.returncode == 2
        assert "File too large" in done.stderr.splitlines()[-1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "plan.json"]


def refused(capsys, tmp_path, *arguments):
    """The one line with which the command line refuses; nothing may have been written."""
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"rope-dist( export hf)?: error: ", error)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return error


class TestBadInput:
    @pytest.fixture
    def fails(self, source, plan, tmp_path, capsys):
        plan.save(tmp_path / "plan.json")

        def run(*extra, of=source, plan="plan.json", out="out"):
            arguments = ("export", "hf", of, "--plan", tmp_path / plan, "-o", tmp_path / out, *extra)
            return refused(capsys, tmp_path, *arguments)

        return run

    def test_a_plan_for_another_model(self, fails, tmp_path):
        for name, other in (
            ("theta", rope_dist.plan(llama_config(rope_parameters={"rope_theta": 5e5}), factor=2)),
            ("head_dim", rope_dist.plan("llama2-7b", factor=2)),
            ("trained length", rope_dist.plan(llama_config(max_position_embeddings=32), factor=2)),
        ):
            other.save(tmp_path / "other.json")
            assert f"{name} " in fails(plan="other.json")

    def test_a_missing_shard(self, fails, llama, tmp_path):
        llama.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
        lost.unlink()
        assert lost.name in fails(of=tmp_path / "shards")

    def test_weights_cut_short(self, fails, source):
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "is not whole" in fails()
        weights.write_bytes(b"abc")
        assert "safetensors" in fails()
        weights.unlink()
        assert "has no weights" in fails()

    def test_a_loop_of_links(self, fails, source, tmp_path):
        (source / "a.json").symlink_to(source / "b.json")
        (source / "b.json").symlink_to(source / "a.json")
        assert "symbolic links" in fails()
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        assert "symbolic links" in fails(of=tmp_path / "loop")

    def test_a_target_that_cannot_be_written(self, fails, source):
        assert "not a directory" in fails(out="no/such/folder")
        assert "contains the source" in fails("--force", out="model")
        (source.parent / "loop").symlink_to("loop")
        assert "exists" in fails(out="loop")
        assert "left alone" in fails("--force", out="loop")
        if os.path.isdir("/proc"):
            assert "/proc/out: No such file" in fails(out="/proc/out")  # Not even root makes one there.

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_read_only_target(self, fails, tmp_path):
        (tmp_path / "closed").mkdir(mode=0o555)
        assert "ermission" in fails(out="closed/out")

    def test_no_model(self, fails, tmp_path, source):
        assert f"no directory {tmp_path / 'nothing'}" in fails(of=tmp_path / "nothing")
        (source / "config.json").write_text("{")
        assert "JSON" in fails()

    def test_an_architecture_without_rotary_embedding(self, fails, source):
        (source / "config.json").write_text('{"model_type": "gpt2"}')
        assert "no rotary embedding" in fails()

    def test_an_engine_that_cannot_run_the_plan(self, fails, source, tmp_path):
        rope_dist.plan(source, factor=2, strategy="auto").save(tmp_path / "auto.json")
        assert "mlx does not scale" in fails("--engine", "mlx", plan="auto.json")
        assert "unknown engine" in fails("--engine", "abc")

    def test_verify_says_what_differs(self, source, plan, tmp_path, capsys):
        plan.save(tmp_path / "plan.json")
        error = refused(capsys, tmp_path, "verify", source, "--plan", tmp_path / "plan.json")
        assert "factors are missing" in error
        config = {**json.loads((source / "config.json").read_text()), **export.config_entries(plan)}
        for key, value, reason in (
            ("original_max_position_embeddings", 64, "scaled by 1.08012"),
            ("max_seq_len", 64, "64 tokens"),
            ("rope_scaling", {**config["rope_scaling"], "short_factor": [1.0] * 8}, "factors are missing"),
            (
                "rope_scaling",
                {**config["rope_scaling"], "original_max_position_embeddings": 64},
                "scaled by 1.0",
            ),
        ):
            (source / "config.json").write_text(json.dumps({**config, key: value}))
            vllm = next(c for c in export.verify(source, plan).checks if c.engine == "vllm")
            assert reason in vllm.reason


def test_vllm_arguments_carry_the_plan(capsys, plan, source, tmp_path):
    import shlex

    plan.save(tmp_path / "plan.json")
    assert main(["export", "vllm", "--plan", str(tmp_path / "plan.json")]) == 0
    _, length, _, overrides = shlex.split(capsys.readouterr().out)
    assert int(length) == 128
    config = {**json.loads((source / "config.json").read_text()), **json.loads(overrides)}
    found = export.ENGINES["vllm"](config)
    assert torch.equal(found.inv_freq, plan.inv_freq)
    assert found.length == 128
