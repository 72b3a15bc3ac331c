"""What is made of the benchmarks' results: tables, plots, pages, two runs compared."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, report, results, roofline, tables
from benchmarks.baselines import ROTARY
from benchmarks.benchmark import find
from benchmarks.shapes import SHAPES

ROOT = results.ROOT


def rows(*implementations, name="model_prefill", device="cpu", **more):
    """Three cases of made-up implementations ``(name, kind, seconds, more columns)``."""
    implementations = implementations or (
        ("huggingface", "reference", 1.0, {}),
        ("rope_dist", "ours", 0.5, {}),
    )
    run = {
        "benchmark": name,
        "device": device,
        "command": f"python -m benchmarks {name}",
        "commit": "abc",
        "code": find(name).code,
        "quick": False,
        "processor": "a processor",
        "gpu": "a GPU",
        "threads": "2",
        "torch": "2.13",
        "transformers": "5",
        "triton": "3.6",
    }
    return [
        {
            **run,
            "case": f"m, {n}",
            "model": "m",
            "dtype": "bf16",
            "tokens": n,
            "implementation": implementation,
            "kind": kind,
            **({"seconds": s, "p20": 0.9 * s, "p80": 1.1 * s, "rounds": 5, "ratio": s} if s else {}),
            **columns,
            **more,
        }
        for n in (1024, 4096, 8192)
        for implementation, kind, s, columns in implementations
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results and plots in a folder of the test's own."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PLOTS", tmp_path)
    return tmp_path


class TestReport:
    def test_readme_and_plots_are_made_from_the_results(self, capsys):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        assert report.main(["--check"]) == 0, capsys.readouterr().err

    def test_a_result_that_is_missing_is_one_line(self, monkeypatch, capsys):
        def absent(text):
            raise ValueError("there is no result")

        monkeypatch.setattr(report, "fill", absent)
        monkeypatch.setattr(report, "plots", list)
        with pytest.raises(SystemExit, match="2"):
            report.main(["--check"])
        assert capsys.readouterr().err == "benchmarks.report: error: there is no result\n"

    def test_a_number_that_no_result_has_is_found(self):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        assert report.fill(text) == text
        changed = re.sub(r"(table: perplexity -->[^0-9]+\d)", r"\g<1>7", text, count=1)
        assert changed != text
        assert report.fill(changed) == text
        with pytest.raises(ValueError, match="unknown table 'magic'"):
            report.fill("<!-- table: magic --> <!-- end -->")

    def test_a_machine_is_named_where_it_changes(self, monkeypatch):
        made = {"a": ("A.", "first"), "b": ("B.", "first"), "c": ("C.", "other"), "none": ("N.", "")}
        monkeypatch.setattr(report, "tables", lambda: {name: lambda t=t: t for name, t in made.items()})
        marks = "".join(f"<!-- table: {name} --><!-- end -->" for name in ("a", "none", "b", "c", "a"))
        filled = report.fill(marks)
        texts = re.findall(r"-->\n\n(.*?)\n\n<", filled)
        assert texts == ["A. Machine: first.", "N.", "B.", "C. Machine: other.", "A. Machine: first."]
        assert report.fill(filled) == filled

    def test_a_case_in_float32_stands_where_there_is_none_in_bfloat16(self, folder):
        rows = [
            {"benchmark": "decode", "case": "a, bf16", "seconds": 1.0},
            {"benchmark": "decode", "case": "a, fp32", "seconds": 2.0},
            {"benchmark": "decode", "case": "b, bf16", "note": "skipped: not begun within 3 s"},
            {"benchmark": "decode", "case": "b, fp32", "seconds": 3.0},
        ]
        results.replace("decode", "cpu", rows, folder)
        found = {case: results.timed("decode", "cpu", f"{case}, bf16") for case in "abc"}
        assert found == {"a": rows[:1], "b": rows[3:], "c": []}

    def test_a_result_becomes_a_table_and_a_plot(self, folder, monkeypatch):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        arguments = [
            "--device",
            "cpu",
            "--models",
            "tiny-256",
            "--lengths",
            "16",
            "32",
            "64",
            "--dtypes",
            "bf16",
        ]
        benchmark = find("rotary")
        monkeypatch.setattr("rope_dist.timing.MOST_ROUNDS", 4)
        monkeypatch.setattr(figures, "BARS", (("rotary", "tiny-256, 32, bf16"), ("decode", "not measured")))
        assert benchmark.main([*arguments, "--seconds", "60", "--output", str(folder), "--baselines"]) == 0
        found = results.of("rotary", "cpu")
        panels, drawn = figures.bars("cpu")
        assert list(panels) == [f"{benchmark.title}: tiny-256, 32, bf16"]
        path = folder / "speed-cpu.svg"
        figures.draw_bars(path, "cpu")
        assert figures.digest(drawn) in path.read_text()
        text, machine = tables.section("rotary", "cpu")
        median = next(row["seconds"] for row in found if row["implementation"] == "huggingface")
        assert tables.figure(median, "ms", 16) in text
        assert "torch" in machine
        assert "Older than the code" not in text
        drawn[0]["seconds"] *= 2
        assert figures.digest(drawn) not in path.read_text()

    def test_without_a_result_there_is_no_number(self, folder):
        assert tables.section("rotary", "cuda") == ("Not measured on a GPU yet.", "")

    def test_rows_of_other_code_are_marked(self, tmp_path):
        (tmp_path / "code").mkdir()
        file = tmp_path / "code" / "a.py"
        file.write_text("1")
        before = results.code(["code/*.py"], tmp_path)
        os.utime(file)
        assert results.code(["code/*.py"], tmp_path) == before
        (tmp_path / "code" / "new.py").write_text("2")
        assert results.code(["code/*.py"], tmp_path) != before
        assert "Older" not in tables.footnote(find("rotary"), rows(name="rotary"))
        assert "**Older than the code.**" in tables.footnote(find("rotary"), rows(name="rotary", code=before))

    def test_rows_of_one_benchmark_are_replaced(self, tmp_path):
        results.replace("rotary", "cpu", rows(name="rotary"), tmp_path)
        results.replace("decode", "cpu", rows(name="decode"), tmp_path)
        results.replace("rotary", "cpu", rows(name="rotary")[:1], tmp_path)
        assert [row["benchmark"] for row in results.read("cpu", tmp_path)] == ["decode"] * 6 + ["rotary"]

    def test_predictions(self):
        """An H200 that multiplies at 790 TFLOP/s and copies at 4.3 TB/s, as measured for the kernels' design."""
        for model, product, rotary, stock in (
            ("LLaMA2-7B", 1.044, 0.063, 0.312),
            ("Llama-3-8B", 0.522, 0.040, 0.195),
        ):
            parts = roofline.parts(SHAPES[model], 8192)
            found = {name: roofline.seconds(stages, 4.3e12, 790e12) * 1e3 for name, stages in parts.items()}
            assert found["projection with rotary"] == pytest.approx(product, rel=0.01)
            assert found["rotary, one pass"] == pytest.approx(rotary, rel=0.03)
            assert found["rotary of Hugging Face"] == pytest.approx(stock, rel=0.01)
        assert "| projection with rotary, 8k" in roofline.table()


class TestTables:
    def test_medians_speedups_and_the_roofline(self):
        bound = ("copy", "roofline", 0.25, {})
        ours = ("rope_dist", "ours", 0.5, {"roofline": 0.5})
        found = tables.wide(find("rotary"), rows(("huggingface", "reference", 1.0, {}), ours, bound))
        cells = [cell.strip() for cell in found.splitlines()[2].split("|")[1:-1]]
        assert cells == ["m, 1024", "1000", "500 (2.00x)", "250 (50%)"]
        found = tables.wide(find("model_prefill"), rows())
        assert "2048 (2.00x)" in found, "tokens/s"
        assert "| rope_dist        |" in tables.long(find("host_time"), rows(name="host_time"))

    def test_a_table_with_too_many_columns_is_turned(self):
        """Five strategies and three cases: a row a strategy. Nothing is left out; eleven cases would not fit."""
        others = [(f"strategy {n}", "baseline", 1 / n, {}) for n in (1, 2, 4, 5)]
        found = rows(("two candidates", "reference", 1.0, {}), *others, ("angles", "roofline", 0.25, {}))
        lines = tables.wide(find("planning"), found).splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert cells[0] == ["", "m, 1024", "m, 4096", "m, 8192"]
        assert cells[2] == ["two candidates", "1000", "1000", "1000"]
        assert cells[5] == ["strategy 4", *["250 (4.00x)"] * 3]
        assert cells[-1] == ["roofline", "250", "250", "250"]
        assert len(cells) == 2 + len(others) + 2
        assert len(tables.wide(find("planning"), found[1:]).splitlines()[0].split("|")) - 2 == 4
        many = [row | {"case": f"{row['case']}, {n}"} for row in found for n in range(4)]
        assert tables.wide(find("planning"), many).count("\n") == 1 + 12

    def test_peaks_of_memory_are_those_of_a_model_on_a_gpu_and_those_that_a_case_measured(self):
        peak = (("rope_dist", "ours", 0.5, {"peak_bytes": 3 << 20}),)
        assert "peak MiB" not in tables.wide(find("model_prefill"), rows())
        assert "peak MiB, rope_dist" in tables.wide(find("model_prefill"), rows(*peak, device="cuda"))
        assert "peak MiB" not in tables.wide(find("rotary"), rows(*peak, device="cuda"))
        assert "peak MiB, rope_dist" in tables.wide(find("window"), rows(*peak))

    def test_the_footnote_names_spread_packages_and_what_was_skipped(self):
        liger = ("Liger", "baseline", 2.0, {"package": "liger-kernel 0.8.5", "kernel": "nvidia-triton"})
        skipped = [(name, "baseline", None, {"note": "skipped: needs a GPU"}) for name in ("quack", "vLLM")]
        found = tables.footnote(find("rotary"), rows(("huggingface", "reference", 1.0, {}), liger, *skipped))
        assert "5 to 5 rounds, median spread (p20-p80) 20 %." in found
        assert "Packages: Liger: liger-kernel 0.8.5 (nvidia-triton)." in found
        assert "Skipped: quack, vLLM (needs a GPU)." in found


class TestPlots:
    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    @staticmethod
    def ticks(path):
        """The numbers along the y axes of a plot."""
        texts = re.findall(r'<g id="ytick_\d+">.*?<text[^>]*>([^<]*)</text>', path.read_text(), re.DOTALL)
        return [float(text) for text in texts]

    @pytest.mark.parametrize(
        ("low", "high"),
        [(27.7, 58.1), (5.81, 6.06), (0.68, 0.95), (866, 891), (0.2, 520), (53917, 54876), (9, 110)],
    )
    def test_an_axis_has_numbers_whatever_its_range(self, tmp_path, low, high):
        """Within a decade none was written, or one."""
        from rope_dist.evaluation.perplexity import Bucket
        from rope_dist.plots import plot_perplexity

        curve = [Bucket(0, 256, low), Bucket(256, 512, high)]
        plot_perplexity({"auto": curve}, 256, "title", tmp_path / "a.svg")
        found = self.ticks(tmp_path / "a.svg")
        assert 2 <= len(found) <= 13
        # The axis ends a little past its data.
        margin = (high / low) ** 0.1
        assert all(low / margin <= tick <= high * margin for tick in found)

    def test_perplexities_of_a_narrow_range_have_numbers(self, tmp_path):
        from rope_dist.evaluation.perplexity import Bucket
        from rope_dist.plots import plot_perplexity

        curves = {
            name: [Bucket(i, i + 256, p) for i, p in ((0, 9.1), (256, 9.9))] for name in ("yarn", "auto")
        }
        plot_perplexity(curves, 256, "title", tmp_path / "a.svg")
        assert len(self.ticks(tmp_path / "a.svg")) >= 3

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_bars_have_times_speedups_and_the_machine(self, folder, monkeypatch, device):
        bound = ("copy", "roofline", 0.25, {})
        slow = ("huggingface", "reference", 1.0, {})
        ours = ("rope_dist, in place", "ours", 0.5, {})
        monkeypatch.setattr(figures, "BARS", (("rotary", "m, 4096"), ("norm_rotary", "not measured")))
        results.replace("rotary", device, rows(ours, bound, slow, name="rotary", device=device), folder)
        panels, drawn = figures.bars(device)
        (bars,) = panels.values()
        assert [bar.label for bar in bars] == ["huggingface", "rope_dist, in place", "roofline: copy"]
        assert [bar.text for bar in bars] == ["1000 ms", "500 ms, 2.0x", "250 ms"]
        assert [bar.value for bar in bars] == [1000, 500, 250]
        assert bars[0].colour == figures.COLOURS["huggingface"]
        figures.draw_bars(folder / "a.svg", device)
        text = (folder / "a.svg").read_text()
        assert "lower is better" in text
        assert figures.digest(drawn) in text
        assert {"cpu": "a processor, torch 2.13, transformers 5", "cuda": "a GPU, torch 2.13"}[device] in text

    def test_nothing_measured_is_not_drawn(self, folder):
        assert figures.bars("cpu") == ({}, [])

    def test_an_implementation_has_one_colour_and_its_variants_differ(self):
        drawn = [row for device in results.DEVICES for row in figures.bars(device)[1]]
        of_packages = [row["implementation"] for row in drawn if "package" in row or row["kind"] == "ours"]
        for name in [*of_packages, *ROTARY]:
            assert figures.style(name) != figures.OTHER, f"{name} has no colour of its own"
        assert figures.style("huggingface") == figures.style("huggingface, sdpa")
        assert figures.style("rope_dist") == figures.style("rope_dist, in place")
        variants = ("in place", "in place, no table", "new tensors", "native library")
        assert len({figures.style(f"rope_dist, {v}") for v in variants}) == len(variants)
        paths = ("rope_dist", *(f"rope_dist, {p}" for p in ("separate", "triton", "triton_tma", "decode")))
        assert len({figures.style(path) for path in paths}) == len(paths)
        assert figures.style("something else") == figures.OTHER
        assert figures.mixed_with_white("#102030", 0.5) == "#889098"


class TestAgreement:
    @staticmethod
    def folder(path, ratio):
        path.mkdir()
        found = rows(("rope_dist", "ours", ratio, {}), ("copy", "roofline", 1.0, {}), name="rotary")
        results.replace("rotary", "cpu", found[:2], path)
        return str(path)

    @pytest.mark.parametrize(("second", "status"), [(0.052, 0), (0.06, 1)])
    def test_speedups_farther_apart_than_a_tenth_are_found(self, tmp_path, capsys, second, status):
        folders = [self.folder(tmp_path / "a", 0.05), self.folder(tmp_path / "b", second)]
        assert report.main(["--compare", folders[0], "--with", folders[1]]) == status
        printed = capsys.readouterr().out
        assert f"{1 - status} of 1 speedups agree within 10%" in printed
        assert "20.00" in printed

    def test_nothing_in_common_is_one_line(self, tmp_path, capsys):
        with pytest.raises(SystemExit, match="2"):
            report.main(["--compare", self.folder(tmp_path / "a", 0.05), "--with", str(tmp_path)])
        assert capsys.readouterr().err.count("\n") == 1
