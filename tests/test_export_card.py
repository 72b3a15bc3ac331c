"""Model cards of exported directories, and their upload: what is written, what is sent, and when nothing is."""

import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

import rope_dist
from rope_dist import export
from rope_dist.cli import main

CARD = """---
license: llama3.2
language: [en, de]
tags: [chat]
base_model: org/grandparent
model-index:
- name: m
  results: []
---
# My model

It says *things*.
"""


@pytest.fixture
def source(make_llama, tmp_path):
    make_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plan(source):
    return rope_dist.plan(str(source), factor=2, strategy="yarn")


@pytest.fixture(autouse=True)
def requests(monkeypatch):
    """Every request of the client is an error, but for those that a test replaces; the names of both."""
    sent = []

    def refuse(name):
        def method(self, *args, **kwargs):
            sent.append(name)
            raise ConnectionError(f"no network for {name}")

        return method

    for name in ("create_repo", "upload_folder", "model_info", "upload_file", "create_commit", "repo_info"):
        monkeypatch.setattr(HfApi, name, refuse(name))
    return sent


def card_of(directory):
    text = (directory / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---")[1]), text.split("---", 2)[2]


def test_a_card_keeps_the_sources_and_says_what_was_changed(source, plan, tmp_path, requests):
    (source / "README.md").write_text(CARD, encoding="utf-8")
    out = export.hf(source, plan, tmp_path / "out", base_model="org/parent", link=True)
    data, text = card_of(out)
    assert data == {
        "license": "llama3.2",
        "language": ["en", "de"],
        "tags": ["chat", "long-context", "rope-scaling", "rope_dist"],
        "base_model": "org/parent",
        "base_model_relation": "finetune",
        "library_name": "transformers",
    }
    assert "from 64 to 128 tokens" in text
    assert "Strategy: `yarn`" in text
    assert str(export.verify(out, plan)) in text
    assert text.index("## The source's card") < text.index("# My model\n\nIt says *things*.")
    # Nothing was measured.
    assert "erplexity" not in text
    assert ModelCard.load(out / "README.md").data.base_model == "org/parent"
    assert (source / "README.md").read_text(encoding="utf-8") == CARD
    assert requests == []


def test_without_a_card_nothing_is_claimed(source, plan, tmp_path):
    data, text = card_of(export.hf(source, plan, tmp_path / "out"))
    assert data.keys() == {"library_name", "tags"}
    assert "source's card" not in text


def test_of_an_unknown_source_its_own_parent_stays(source, plan, tmp_path):
    (source / "README.md").write_text(CARD, encoding="utf-8")
    data, _ = card_of(export.hf(source, plan, tmp_path / "out"))
    assert data["base_model"] == "org/grandparent"
    assert "base_model_relation" not in data


def test_the_cache_of_the_hub_tells_the_source(source, plan, tmp_path):
    cached = tmp_path / "models--org--my-model" / "snapshots" / "abc"
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    data, _ = card_of(export.hf(cached, plan, tmp_path / "out"))
    assert data["base_model"] == "org/my-model"


@pytest.mark.parametrize("head", ["a: [1", "- a\n- b", "a: b: c"])
def test_a_broken_card_costs_its_metadata_only(source, plan, tmp_path, head):
    (source / "README.md").write_bytes(f"---\n{head}\n---\nMine \xe9".encode("latin-1"))
    data, text = card_of(export.hf(source, plan, tmp_path / "out"))
    assert data.keys() == {"library_name", "tags"}
    assert "metadata could not be read" in text
    assert "Mine" in text


class TestEvaluation:
    @pytest.fixture
    def record(self, source, plan, tmp_path):
        other = rope_dist.plan(str(source), factor=2, strategy="pi")
        what = {"method": "whole", "text": "emma", "piece": 0, "tokens": 128, "digest": "0"}
        rows = [("stock", "stock", 3.0), ("yarn", "f1", 2.0), ("pi", "f2", 1.0)]
        data = {
            "kind": "perplexity",
            "model": {"name": "tiny", "fingerprint": "f"},
            "machines": [],
            "plans": {"f1": plan.to_dict(), "f2": other.to_dict()},
            "measurements": [
                {"what": {**what, "variant": v, "frequencies": f}, "result": {"nll": nll, "predicted": 127}}
                for v, f, nll in rows
            ],
        }
        path = tmp_path / "perplexity.json"
        path.write_text(json.dumps(data))
        return path

    def test_the_measured_perplexity_of_this_plan(self, source, plan, record, tmp_path):
        _, text = card_of(export.hf(source, plan, tmp_path / "out", evaluation=record))
        # e ** 3 and e ** 2; e ** 1 is of another plan.
        assert "| emma | whole | 128 | 20.09 | 7.39 |" in text
        assert "2.72" not in text

    def test_of_another_plan_or_no_record(self, source, record, tmp_path):
        ntk = rope_dist.plan(str(source), factor=2, strategy="ntk")
        with pytest.raises(ValueError, match="has no perplexity of ntk"):
            export.hf(source, ntk, tmp_path / "out", evaluation=record)
        for text in ("{}", "[", '{"kind": "passkey"}'):
            record.write_text(text)
            with pytest.raises(ValueError, match="record of"):
                export.hf(source, ntk, tmp_path / "out", evaluation=record)
        assert not (tmp_path / "out").exists()

    def test_a_dynamic_plan_is_another_when_exported(self, source, record, tmp_path):
        dynamic = rope_dist.dynamic_plan(
            str(source), factor=2, strategy="yarn", settings={"attention_factor": 1}
        )
        with pytest.raises(ValueError, match="give no evaluation"):
            export.hf(source, dynamic, tmp_path / "out", evaluation=record)


class TestPush:
    @pytest.fixture
    def hub(self, monkeypatch):
        """What is sent to a hub on which ``public`` is a public repository."""
        sent = []

        def create_repo(self, repo_id, **options):
            sent.append(("create", repo_id, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            files = sorted(path.name for path in folder_path.iterdir())
            sent.append(("upload", repo_id, files))

        def model_info(self, repo_id, **options):
            return type("Info", (), {"private": not repo_id.endswith("public")})

        for function in (create_repo, upload_folder, model_info):
            monkeypatch.setattr(HfApi, function.__name__, function)
        return sent

    def test_the_whole_directory_and_nothing_else(self, source, tmp_path, hub, capsys):
        arguments = [
            "export",
            "hf",
            str(source),
            "--factor",
            "2",
            "--strategy",
            "yarn",
            "-o",
            str(tmp_path / "out"),
        ]
        assert main([*arguments, "--push-to-hub", "me/long", "--private"]) == 0
        (create, name, options), upload = hub
        assert (create, name) == ("create", "me/long")
        assert options == {"private": True, "repo_type": "model", "exist_ok": True}
        assert upload == (
            "upload",
            "me/long",
            ["README.md", "config.json", "generation_config.json", "model.safetensors"],
        )
        assert 'from_pretrained("me/long"' in (tmp_path / "out" / "README.md").read_text()
        assert capsys.readouterr().out.endswith("uploaded to me/long\n")

    def test_nothing_private_goes_to_a_public_repository(self, source, plan, tmp_path, hub):
        with pytest.raises(OSError, match="it exists and is public"):
            export.hf(source, plan, tmp_path / "out", push_to_hub="me/public", private=True)
        assert [kind for kind, *_ in hub] == ["create"]

    def test_a_failure_is_one_line_and_the_directory_stays(self, source, tmp_path, capsys, requests):
        out = tmp_path / "out"
        arguments = ["export", "hf", str(source), "--factor", "2", "--strategy", "yarn", "-o", str(out)]
        assert main([*arguments, "--push-to-hub", "me/long"]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1] == (
            f"rope-dist: error: {out} is written, but not uploaded to me/long: no network for create_repo"
        )
        assert "Traceback" not in error
        assert requests == ["create_repo"]
        assert (out / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("more", "reason"),
        [
            (["--push-to-hub", "a/b/c"], "no repository such as user/name"),
            (["--private"], "--private goes with"),
        ],
    )
    def test_a_mistake_writes_nothing(self, source, tmp_path, capsys, more, reason):
        out = tmp_path / "out"
        assert main(["export", "hf", str(source), "--factor", "2", "-o", str(out), *more]) == 2
        assert reason in capsys.readouterr().err
        assert not out.exists()
