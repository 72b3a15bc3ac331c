"""Presets and packaged models, and directories of the same names."""

import json
import warnings
from pathlib import Path

import pytest

import rope_dist
from rope_dist.cli import main
from rope_dist.comparison import compare
from rope_dist.evaluation import load_model
from rope_dist.presets import PRESETS

BOTH = "llama2-7b is a directory with a model here, and the name of a preset: the directory is taken"


@pytest.fixture
def directory(make_llama, tmp_path, monkeypatch):
    """A model that was trained to 64 tokens, in a directory with the name of a preset."""
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("llama2-7b")
    return tmp_path / "llama2-7b"


@pytest.mark.parametrize("name", ["llama2-7b", Path("llama2-7b")])
def test_a_directory_with_a_model_comes_first_and_that_is_said(directory, name):
    with pytest.warns(UserWarning, match=BOTH):
        assert rope_dist.plan(name, factor=2).original_length == 64
    with pytest.warns(UserWarning, match=BOTH):
        assert rope_dist.dynamic_plan(name, factor=2).original_length == 64
    with pytest.warns(UserWarning, match=BOTH):
        (made,) = compare(name, target_lengths=[128], strategies=["pi"])
    assert made.original_length == 64


@pytest.mark.parametrize("path", ["./llama2-7b", "{}", "llama2-7b/config.json"])
def test_a_path_says_nothing_of_presets(directory, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rope_dist.plan(path.format(directory), factor=2).original_length == 64


def test_a_directory_without_a_model_does_not_hide_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama2-7b").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rope_dist.plan("llama2-7b", factor=2).original_length == PRESETS["llama2-7b"].length == 4096
    with pytest.raises(
        ValueError, match=r"no config of a model at \./llama2-7b: the directory has no config"
    ):
        rope_dist.plan("./llama2-7b", factor=2)


def test_command_line(directory, capsys):
    with pytest.warns(UserWarning, match=BOTH):
        assert main(["plan", "llama2-7b", "--factor", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["original_length"] == 64
    with pytest.warns(UserWarning, match=BOTH):
        assert main(["info", "llama2-7b"]) == 0
    assert "meta-llama" not in capsys.readouterr().out
    with pytest.warns(UserWarning, match=BOTH):
        assert main(["export", "flags", "vllm", "llama2-7b", "--factor", "2", "--strategy", "pi"]) == 0
    assert "--max-model-len 128" in capsys.readouterr().out


def test_a_packaged_model(make_llama, letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("smollm2-135m")
    letters.save_pretrained("smollm2-135m")
    with pytest.warns(UserWarning, match="the name of a packaged model: the directory is taken"):
        model, _ = load_model("smollm2-135m")
    assert model.config.max_position_embeddings == 64
