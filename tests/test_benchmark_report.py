"""What is made of the benchmarks' results: the README's tables, pictures, the roofline page, two runs compared."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class TestReport:
    def test_readme_roofline_and_pictures_are_made_from_the_results(self, monkeypatch, capsys):
        from benchmarks import report

        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        assert report.main() == 0, capsys.readouterr().err

    def test_a_result_that_is_not_there_is_one_line(self, monkeypatch, capsys):
        from benchmarks import report

        def absent(text):
            raise ValueError("there is no result")

        monkeypatch.setattr(report, "fill", absent)
        monkeypatch.setattr(report, "pictures", list)
        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        assert report.main() == 2
        assert capsys.readouterr().err == "benchmarks.report: error: there is no result\n"

    def test_a_figure_that_no_result_holds_is_found(self):
        from benchmarks import report

        text = (ROOT / "README.md").read_text(encoding="utf-8")
        assert report.fill(text) == text
        changed = re.sub(r"(table: perplexity -->[^0-9]+\d)", r"\g<1>7", text, count=1)
        assert changed != text
        assert report.fill(changed) == text
        with pytest.raises(ValueError, match="unknown table 'magic'"):
            report.fill("<!-- table: magic --> <!-- end -->")

    def test_a_result_becomes_a_table_a_picture_and_a_roofline(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        from benchmarks import report, roofline, rotary, tables
        from rope_dist import timing

        for module in (report, roofline, tables):
            monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(tables, "PLOTS", tmp_path)
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        # Enough time for a busy machine, which a few rounds do not use up.
        monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
        arguments = ["--device", "cpu", "--models", "four heads", "--lengths", "16", "64", "--dtypes", "bf16"]
        arguments += ["--seconds", "600", "--output", str(tmp_path), "--peers"]
        assert rotary.QUESTION.main(arguments) == 0
        record = tables.load("rotary-cpu.json")
        ((path, _),) = report.pictures()
        assert not tables.plot_is_current(path, record)
        tables.draw(path, record)
        assert tables.plot_is_current(path, record)
        record["cases"][0]["results"]["copy"]["seconds"]["p50"] *= 2
        assert not tables.plot_is_current(path, record)

        section = tables.figures("rotary", "cpu")
        assert f"]({path.name})" in section
        median = tables.load("rotary-cpu.json")["cases"][0]["results"]["Hugging Face"]["seconds"]["p50"]
        assert tables.three_digits(median * 1e3) in section
        assert "Older than the code" not in section
        assert "four heads, 64, bf16" in roofline.page()
        assert "nothing measured" in roofline.page()

    def test_without_a_result_no_figure_is_shown(self, tmp_path, monkeypatch):
        from benchmarks import tables

        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        assert tables.figures("rotary", "cuda") == "No figure: this has not been measured on a GPU yet."

    def test_a_figure_older_than_its_code_is_marked(self, tmp_path):
        from benchmarks.sources import changed, hashes

        (tmp_path / "code").mkdir()
        file = tmp_path / "code" / "a.py"
        file.write_text("1")
        patterns = ["code/*.py"]
        record = {"sources": {"patterns": patterns, "files": hashes(patterns, tmp_path)}}
        os.utime(file)
        assert changed(record, tmp_path) == []
        (tmp_path / "code" / "new.py").write_text("2")
        file.write_text("3")
        assert changed(record, tmp_path) == ["code/a.py", "code/new.py"]

    def test_predictions_are_the_design_pages(self):
        """An H200 that multiplies at 790 TFLOP/s and copies at 4.3 TB/s, as measured for the kernels' design."""
        from benchmarks.roofline import Gpu, parts
        from benchmarks.shapes import SHAPES

        gpu = Gpu("H200, measured", 4.3e12, 790e12)
        for model, product, rotary, stock in (
            ("LLaMA2-7B", 1.044, 0.063, 0.312),
            ("Llama-3-8B", 0.522, 0.040, 0.195),
        ):
            by_name = {part.name: part.seconds(gpu) * 1e3 for part in parts(SHAPES[model], 8192)}
            assert by_name["projection, rotary within it"] == pytest.approx(product, rel=0.01)
            assert by_name["rotary alone, one pass"] == pytest.approx(rotary, rel=0.03)
            assert by_name["rotary of Hugging Face"] == pytest.approx(stock, rel=0.01)


class TestAgreement:
    """Two runs beside each other."""

    @staticmethod
    def folder(path, share):
        path.mkdir()
        results = {"rope_dist, in place": {"to stock": share}, "copy": {"seconds": {"p50": 1.0}}}
        record = {"cases": [{"name": "Llama-3-8B, 8k, bf16", "results": results}]}
        (path / "rotary-cpu.json").write_text(json.dumps(record))
        return str(path)

    @pytest.mark.parametrize(("second", "status"), [(0.052, 0), (0.06, 1)])
    def test_ratios_farther_apart_than_a_tenth_are_found(self, tmp_path, capsys, second, status):
        from benchmarks.agreement import main

        folders = [self.folder(tmp_path / "a", 0.05), self.folder(tmp_path / "b", second)]
        assert main(folders) == status
        printed = capsys.readouterr().out
        assert f"{1 - status} of 1 ratios agree within 10%" in printed
        assert "20.00" in printed

    def test_nothing_in_common_is_one_line(self, tmp_path, capsys):
        from benchmarks.agreement import main

        assert main([self.folder(tmp_path / "a", 0.05), str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
