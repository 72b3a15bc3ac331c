"""The site of docs/: links that leave the folder, generated pages, formulas. ``make docs`` builds it."""

import re
from pathlib import Path

import pytest

from rope_dist.cli import app
from tools import docs_pages
from tools.docs_math import drawn, marked

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}


class TestGeneratedPages:
    def test_the_command_line_has_every_command_and_option(self):
        import typer

        page = docs_pages.expand("cli.md", PAGES["cli.md"])
        command = typer.main.get_command(app)
        left = [("rope-dist", command)]
        while left:
            name, one = left.pop()
            section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
            for param in one.params:
                for option in getattr(param, "opts", ()):
                    assert option in section or param.metavar in section, (name, option)
            left += [(f"{name} {sub}", found) for sub, found in getattr(one, "commands", {}).items()]
        # Of one help, as a reader sees it.
        assert "| `--target TOKENS` | Context length to extend to. |" in page
        assert "rope-dist export gguf my-model.gguf --target 16384 -o my-model-16k.gguf\n" in page
        assert "\b" not in page

    def test_the_python_page_has_every_public_name_once(self):
        import importlib

        page = docs_pages.expand("api.md", PAGES["api.md"])
        shown = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
        assert len(shown) == len(set(shown))
        names = {name.rpartition(".")[2] for name in shown}
        for module in docs_pages.MODULES:
            public = set(importlib.import_module(module).__all__) - {"__version__"}
            assert public <= names, module


class TestFormulas:
    def test_they_are_found_outside_money_and_code(self):
        text = marked(r"a pair of $\theta_i$ costs $5 or $6, $$a + b$$")
        assert re.findall("MATH(BLOCK|INLINE)", text) == ["INLINE", "BLOCK"]
        assert "costs $5 or $6" in text

    def test_every_formula_of_the_pages_can_be_drawn(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        formulas = {
            mark[0] for page in PAGES.values() for mark in re.finditer(r"MATH[A-Z]+x[0-9a-f]+x", marked(page))
        }
        picture = drawn(" ".join(sorted(formulas)))
        assert picture.count("<svg ") == len(formulas)
        assert "currentColor" in picture
        assert "MATH" not in picture


class TestLinks:
    @pytest.fixture
    def site(self):
        pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
        from tools import docs_site

        return docs_site

    @pytest.mark.parametrize(
        ("source", "text", "expected"),
        [
            (
                "docs/quality.md",
                "![a](../benchmarks/results/quality.png)",
                "![a](files/benchmarks/results/quality.png)",
            ),
            ("ARCHITECTURE.md", "[a](docs/dynamic.md#caches)", "[a](dynamic.md#caches)"),
            ("ARCHITECTURE.md", '<a href="docs/dynamic.md">', '<a href="dynamic.html">'),
            ("docs/hub.md", "[a](../ARCHITECTURE.md)", "[a](architecture.md)"),
            (
                "docs/hub.md",
                "[a](https://example.org/x.md) [b](#here)",
                "[a](https://example.org/x.md) [b](#here)",
            ),
            ("docs/hub.md", "[a](nowhere.md)", "[a](nowhere.md)"),
        ],
    )
    def test_they_lead_to_what_the_site_has(self, site, source, text, expected):
        class Files:
            have = ("dynamic.md", "architecture.md", "files/benchmarks/results/quality.png")

            def get_file_from_path(self, path):
                return path if path in self.have else None

        page = site.TOP.get(source, source.removeprefix("docs/"))
        assert site._relinked(text, source, page, Files()) == expected

    @pytest.mark.parametrize(("link", "warns"), [("../benchmarks/none.svg", True), ("../examples", False)])
    def test_what_the_repository_does_not_have_is_a_warning(self, site, caplog, link, warns):
        class Nothing:
            def get_file_from_path(self, path):
                return None

        site._relinked(f"![a]({link})", "docs/hub.md", "hub.md", Nothing())
        assert ("does not have" in caplog.text) == warns

    def test_with_a_repository_they_lead_into_it(self, site, monkeypatch):
        class Nothing:
            def get_file_from_path(self, path):
                return None

        monkeypatch.setattr(site, "URL", "https://example.org/owner/name")
        from rope_dist import __version__

        found = site._relinked("[a](../examples/serve.py)", "docs/hub.md", "hub.md", Nothing())
        assert found == f"[a](https://example.org/owner/name/blob/v{__version__}/examples/serve.py)"

    def test_what_a_browser_would_fetch_is_found(self, site):
        offline = (
            '<img src="files/a.png"><a href="https://example.org"></a><script src="assets/a.js"></script>'
        )
        assert site.ASSET.findall(offline) == []
        for asset in (
            '<script src="https://example.org/a.js">',
            '<link rel="stylesheet" href="//example.org/a.css">',
            '<img alt="a" src="https://example.org/a.png">',
        ):
            assert len(site.ASSET.findall(asset)) == 1
