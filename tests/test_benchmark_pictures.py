"""Pictures and tables of results: units, numbers on every axis, one colour an implementation, nothing covered."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def ticks(svg):
    """The numbers along the y axes of a picture."""
    return [
        float(text) for text in re.findall(r'<g id="ytick_\d+">.*?<text[^>]*>([^<]*)</text>', svg, re.DOTALL)
    ]


@pytest.mark.parametrize(
    ("low", "high"),
    [(27.7, 58.1), (5.81, 6.06), (0.68, 0.95), (866, 891), (0.2, 520), (53917, 54876), (9, 110)],
)
def test_an_axis_has_numbers_whatever_its_range(tmp_path, low, high):
    """Within a decade none was written, or one."""
    from rope_dist.plots import Curve, plot_curves

    curve = Curve("a", (1024, 2048), (low, high), (low, high), (low, high))
    plot_curves({"panel": [curve]}, "tokens", "ms", tmp_path / "a.svg")
    found = ticks((tmp_path / "a.svg").read_text())
    assert len(found) >= 2
    assert len(found) <= 13
    # The axis ends a little past its data.
    margin = (high / low) ** 0.1
    assert all(low / margin <= tick <= high * margin for tick in found)


def test_perplexities_of_a_narrow_range_have_numbers(tmp_path):
    from rope_dist.evaluation.perplexity import Bucket
    from rope_dist.plots import plot_perplexity

    curves = {name: [Bucket(i, i + 256, p) for i, p in ((0, 9.1), (256, 9.9))] for name in ("yarn", "auto")}
    plot_perplexity(curves, 256, "title", tmp_path / "a.svg")
    assert len(ticks((tmp_path / "a.svg").read_text())) >= 3


def result(kind, seconds, **more):
    spread = {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.1 * seconds, "quiet": seconds, "rounds": 5}
    return {"kind": kind, "seconds": spread, "to stock": seconds, "peak_bytes": 3 << 20, **more}


def record(question="model_prefill", unit="tokens/s", device="cpu", **results):
    results = results or {"Hugging Face": result("stock", 1.0), "rope_dist.enable": result("ours", 0.5)}
    cases = [
        {"name": f"m, {n}", "model": "m", "dtype": "bf16", "tokens": n, "results": results, "ranking": []}
        for n in (1024, 8192)
    ]
    names = {"processor": "a processor", "gpu": "a GPU", "threads": "2", "torch": "2.13", "transformers": "5"}
    return {
        "question": question,
        "command": f"python -m benchmarks.{question}",
        "commit": "abc",
        "device": device,
        "machine": names | {"triton": "3.6"},
        "sources": {"patterns": [], "files": {}},
        "unit": unit,
        "quick": False,
        "cases": cases,
        "left_out": [],
    }


@pytest.mark.parametrize(("unit", "better"), [("ms", "lower"), ("tokens/s", "higher")])
def test_a_picture_says_what_is_better_and_where_it_was_measured(tmp_path, unit, better):
    from benchmarks import tables

    tables.draw(tmp_path / "a.svg", record(unit=unit))
    text = (tmp_path / "a.svg").read_text()
    assert f"median, {unit} ({better} is better)" in text
    assert "2 threads on a processor, torch 2.13, transformers 5" in text
    tables.draw(tmp_path / "a.svg", record(unit=unit, device="cuda"))
    assert "a GPU, torch 2.13, transformers 5, Triton 3.6" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("question", ["rotary", "attention_block", "planning"])
def test_the_legend_is_beside_the_curves(monkeypatch, tmp_path, question):
    from benchmarks import tables
    from rope_dist import plots

    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, note="": figures.append(figure))
    tables.draw(tmp_path / "a.svg", tables.load(f"{question}-cpu.json"))
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert not any(box.overlaps(axes.get_window_extent()) for axes in panels)
    assert {text.get_text() for text in legend.get_texts()} == {
        line.get_label() for axes in panels for line in axes.get_lines()
    }


def test_an_implementation_has_one_colour_and_its_variants_differ():
    from benchmarks import tables
    from benchmarks.peers import ROTARY_PEERS

    names = {
        name: result["kind"]
        for path in (ROOT / "benchmarks" / "results").glob("*-cpu.json")
        for case in json.loads(path.read_text())["cases"]
        for name, result in case["results"].items()
        if "seconds" in result
    }
    for name in [*(n for n, kind in names.items() if kind != "limit"), *ROTARY_PEERS]:
        assert tables.style(name)[0], f"{name} has no colour of its own"
    assert tables.style("Hugging Face") == tables.style("Hugging Face, sdpa")
    assert (
        tables.style("rope_dist") == tables.style("rope_dist.enable") == tables.style("rope_dist, in place")
    )
    variants = ("in place", "in place, no table", "new tensors", "native library")
    assert len({tables.style(f"rope_dist, {v}") for v in variants}) == len(variants)
    paths = ("rope_dist", *(f"rope_dist, {p}" for p in ("separate", "pointers", "descriptors", "decode")))
    assert len({tables.style(path) for path in paths}) == len(paths)
    compiled = tables.style("torch.compile of rope_dist.enable")[0]
    assert compiled not in (tables.style("torch.compile")[0], tables.style("rope_dist.enable")[0])
    assert tables.style("something else") == (None, "o")
    assert tables.mixed_with_white("#102030", 0.5) == "#889098"


class TestTables:
    def test_peaks_of_memory_stand_where_they_say_something(self):
        from benchmarks import tables

        assert "peak MiB" not in tables.case_table(record())
        assert "peak MiB, rope_dist.enable" in tables.case_table(record(device="cuda"))

    def test_the_footnote_says_the_spread_and_the_versions(self):
        from benchmarks import tables

        liger = result("peer", 2.0, package="liger-kernel 0.8.5", implementation="nvidia-triton")
        found = tables.footnote(
            record(device="cuda", **{"Hugging Face": result("stock", 1.0), "Liger": liger})
        )
        assert "Medians of 5 to 5 interleaved rounds, median spread (p20-p80) 20%." in found
        assert "Packages: Liger: liger-kernel 0.8.5 (nvidia-triton)." in found

    def test_a_machine_is_named_once(self, tmp_path, monkeypatch):
        from benchmarks import report

        first, other = record(), record()
        other["machine"] = {**other["machine"], "processor": "another"}
        for name, content in (("first", first), ("again", first), ("other", other), ("last", first)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        tables = {n: lambda c=c: report.machine(c) for n, c in (("a", first), ("b", first), ("c", other))}
        monkeypatch.setattr(report, "TABLES", tables)
        marks = "".join(f"<!-- table: {name} --><!-- end -->" for name in "abca")
        texts = re.findall(r"-->\n\n(.*?)\n\n<", report.fill(marks))
        named = "2 threads on {}, torch 2.13, transformers 5".format
        assert texts == [
            named("a processor"),
            "2 threads on the same machine",
            named("another"),
            named("a processor"),
        ]
        # Made from what it made: nothing changes.
        assert report.fill(report.fill(marks)) == report.fill(marks)
