"""The recipes of CONTRIBUTING.md, applied to a copy of the repository: what they promise comes true."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("rope_dist", "tests", "benchmarks", "tools", "csrc", "examples")
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^\*\*`(?P<path>[^`]+)`\*\* \((?P<place>[^)]+)\)\n\n```python\n(?P<code>.*?)^```$", re.M | re.S
)
COMMANDS = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


def section(title: str) -> str:
    found = re.search(rf"^### {title}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert found, f"CONTRIBUTING.md has no recipe {title!r}"
    return found[1]


class Recipe:
    """A recipe applied to a copy of the repository.

    Attributes:
        changed: the files that it touched, relative to the copy.
        commands: the lines of its console blocks, without the prompt.
    """

    def __init__(self, title: str, folder: Path) -> None:
        text = section(title)
        self.folder = folder
        self.blocks = [(m["path"], m["place"], m["code"]) for m in BLOCK.finditer(text)]
        self.changed = sorted(path for path, _, _ in self.blocks)
        self.commands = [
            line.removeprefix("$ ").strip()
            for commands in COMMANDS.findall(text)
            for line in commands.splitlines()
        ]
        # Every block of Python is applied: one whose heading is mistyped would be left out silently.
        assert len(self.blocks) == text.count("```python")
        assert self.commands
        for path, place, code in self.blocks:
            self._apply(folder / path, place, code)
        new = [path for path, place, _ in self.blocks if place == "new file"]
        if new and importlib.util.find_spec("ruff"):
            self.run(shlex.join(["python", "-m", "ruff", "check", *new]))
            self.run(shlex.join(["python", "-m", "ruff", "format", "--check", *new]))

    def _apply(self, path: Path, place: str, code: str) -> None:
        if place == "new file":
            assert not path.exists(), f"{path.name} is there already"
            path.write_text(code, encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        if place == "at the end":
            text = f"{text}\n\n{code}"
        else:
            found = re.fullmatch(r"(first entry|entry) of `(\w+)`", place)
            assert found, place
            lines = [line for line in code.splitlines(keepends=True) if line.strip()]
            imports = [line for line in lines if line.startswith(("from ", "import "))]
            entry = "".join(lines[len(imports) :])
            text = _with_entry(text, found[2], entry, first=found[1] == "first entry")
            if imports:
                text = _with_imports(text, "".join(imports))
        path.write_text(text, encoding="utf-8")

    def run(self, command: str, **names: Path) -> str:
        """Run one of the commands in the copy, with ``names`` in place of its words."""
        words = [str(names.get(word, word)) for word in shlex.split(command)]
        start = {"rope-dist": [sys.executable, "-m", "rope_dist"], "python": [sys.executable]}[words[0]]
        done = subprocess.run(
            [*start, *words[1:]],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "ROPE_DIST_NATIVE_DIR": ""},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


def _with_entry(text: str, name: str, entry: str, *, first: bool) -> str:
    """``text`` with ``entry`` in the dictionary, list or tuple that is assigned to ``name``."""
    (value,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and name
        in [getattr(t, "id", None) for t in getattr(node, "targets", [getattr(node, "target", None)])]
    )
    lines = text.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
    begin = starts[value.lineno - 1] + value.col_offset + 1
    end = starts[value.end_lineno - 1] + value.end_col_offset - 1
    inside = text[begin:end].rstrip()
    if first:
        return f"{text[:begin]}\n{entry}{text[begin:].lstrip()}"
    comma = "" if inside.endswith(",") else ","
    return f"{text[:begin]}{inside}{comma}\n{entry}{text[end:]}"


def _with_imports(text: str, imports: str) -> str:
    last = max(
        node.end_lineno for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    lines = text.splitlines(keepends=True)
    return "".join((*lines[:last], imports, *lines[last:]))


@pytest.fixture
def copy(tmp_path):
    """The sources, with the libraries that are built."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "results", "plots")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_a_strategy(copy, tmp_path, make_llama):
    recipe = Recipe("Add a strategy", copy)
    assert recipe.changed == [
        "rope_dist/defaults.py",
        "rope_dist/strategies/power.py",
        "tests/test_strategies.py",
    ]
    tests, plan, compare, export = recipe.commands
    assert re.search(r"^\d+ passed", recipe.run(tests).splitlines()[-1])
    assert re.search(r"^ *0-63 +1\.41421 ", recipe.run(plan), re.M)  # 4 ** 0.25
    assert re.search(r"^power +[\d.]+ +128$", recipe.run(compare), re.M)
    make_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    recipe.run(export, MODEL=tmp_path / "model", EXTENDED=tmp_path / "extended")
    # Stock transformers, which knows nothing of the strategy, runs its frequencies.
    import transformers

    rope = transformers.AutoConfig.from_pretrained(tmp_path / "extended").rope_parameters
    assert rope["long_factor"] == pytest.approx([2**0.5] * 8)


def test_a_release_of_transformers(copy):
    """An entry that is missing, as that of a new model is, is found again, and the model is as stock."""
    table = copy / "rope_dist/hf/rotary_forms.json"
    before = table.read_text(encoding="utf-8")
    forms = json.loads(before)
    (entry,) = (digest for digest, form in forms.items() if form["example"].startswith("nanochat."))
    del forms[entry]
    table.write_text(json.dumps(forms), encoding="utf-8")
    recipe = Recipe("Take up a new release of transformers", copy)
    write, tests = recipe.commands
    assert "nanochat.apply_rotary_pos_emb: new, Form(" in recipe.run(write)
    assert table.read_text(encoding="utf-8") == before
    last = recipe.run(tests).splitlines()[-1]
    assert int(re.match(r"(\d+) passed", last)[1]) >= 5, last


def test_a_backend(copy):
    recipe = Recipe("Add a backend", copy)
    assert recipe.changed == [
        "rope_dist/ops/backend_float64.py",
        "rope_dist/ops/dispatch.py",
        "tests/test_ops.py",
    ]
    (tests,) = recipe.commands
    assert recipe.run(tests).splitlines()[-1].startswith("1 passed")


def test_a_benchmark(copy):
    recipe = Recipe("Add a benchmark", copy)
    assert recipe.changed == ["benchmarks/frequencies.py"]
    (command,) = recipe.commands
    assert re.search(r"^rope_dist +[\d.]+ ", recipe.run(command), re.M)


class TestFiles:
    """The metadata beside the recipes."""

    def test_the_citation_names_this_version(self):
        yaml = pytest.importorskip("yaml")
        from rope_dist import __version__

        data = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
        # The required keys of the Citation File Format 1.2.0, of the file and of a reference.
        assert {"cff-version", "message", "title", "authors"} <= data.keys()
        assert (data["cff-version"], data["version"], data["license"]) == (
            "1.2.0",
            __version__,
            "Apache-2.0",
        )
        for reference in data["references"]:
            assert {"type", "title", "authors"} <= reference.keys()
            assert all({"family-names", "given-names"} <= author.keys() for author in reference["authors"])

    def test_a_bug_report_asks_for_info(self):
        yaml = pytest.importorskip("yaml")
        text = (ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text(encoding="utf-8")
        fields = {field["id"]: field for field in yaml.safe_load(text)["body"]}
        assert "rope-dist info" in fields["info"]["attributes"]["description"]
        assert fields["info"]["validations"]["required"]

    @pytest.mark.parametrize("name", ["ci", "release"])
    def test_the_commands_of_a_workflow_exist(self, name):
        yaml = pytest.importorskip("yaml")
        flow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))
        # YAML 1.1 reads the key "on" as a truth value.
        assert {"name", True, "permissions", "jobs"} <= flow.keys()
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        versions = re.search(
            r"^VERSIONS = \((.*?)\)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.M | re.S
        )
        sessions = {f"transformers-{version}" for version in re.findall(r'"([^"]+)"', versions[1])}
        known = {"make", "pip", "nox", "cibuildwheel", "python"}
        for job in flow["jobs"].values():
            assert set(job.get("needs", ())) <= flow["jobs"].keys()
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                words = shlex.split(re.sub(r"\$\{\{ (\S+) \}\}", r"{\1}", step.get("run", "make test")))
                assert words[0] in known
                if words[0] == "make":
                    assert words[1] in targets
                if words[0] == "nox":
                    matrix = job["strategy"]["matrix"]["version"]
                    assert {words[2].replace("{matrix.version}", one) for one in matrix} <= sessions
                if words[:2] == ["python", "-m"]:
                    assert words[2] == "build"

    def test_what_wheels_are_tested_with_is_there(self):
        tomllib = pytest.importorskip("tomllib")
        wheels = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
        program, script = wheels["test-command"].split()
        assert program == "python"
        assert Path(script.format(project=ROOT)).exists()

    def test_the_commands_of_the_page_exist(self):
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert set(re.findall(r"`make ([\w-]+)", PAGE)) <= targets

    @pytest.mark.parametrize("page", ["CONTRIBUTING.md", "ARCHITECTURE.md"])
    def test_the_files_that_a_page_names_exist(self, page):
        text = (ROOT / page).read_text(encoding="utf-8")
        made = {path for path, place, _ in BLOCK.findall(text) if place == "new file"}
        named = set(re.findall(r"`((?:rope_dist|tests|benchmarks|tools|csrc|examples)/[\w./-]+)`", text))
        assert named
        assert [path for path in sorted(named - made) if not (ROOT / path).exists()] == []
