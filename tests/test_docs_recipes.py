"""Every command of docs/recipes.md, as it stands on the page, on small random models with the published configs.

``hf download`` makes the small model. What a plan is made from is the real config; what reads a model runs with every
number of tokens, in the config and in the command, divided by 512. Servers are not started: their options are compared
with those that the package prints for them.
"""

import glob
import itertools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer
from helpers.exports import write_gguf
from helpers.published_models import PUBLISHED, config_entries, save_published

import rope_dist
from rope_dist.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n:]+: [^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SHRINK = 512
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LENGTHS = ("--target", "--length", "--lengths", "-c")


def steps(section):
    """Commands of a section, each with the output that the page shows below its block."""
    found = []
    for kind, text in BLOCK.findall(section):
        if kind == "sh":
            found += [[command, ""] for command in text.splitlines()]
        else:
            # Shown below a block is what one of its commands printed.
            found[-1][1] = text
    return found


def shrunk(arguments):
    """The arguments with every number of tokens divided."""
    out, within = [], False
    for argument in arguments:
        within = argument in LENGTHS or (within and argument.isdecimal())
        out.append(str(int(argument) // SHRINK) if within and argument.isdecimal() else argument)
    return out


class Shell:
    """A folder with what the page's commands find there; ``run`` does one of them and returns what it printed."""

    def __init__(self, folder, capsys, monkeypatch):
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        self.tokenizer = letter_tokenizer()
        self.small = folder / "small"
        (folder / "pg19").mkdir()
        for path in (folder / "pg19/a.txt", folder / "book.txt"):
            path.write_text("to be or not to be, that is the question. " * 20)
        (folder / "examples").symlink_to(ROOT / "examples")
        monkeypatch.chdir(folder)

    def run(self, command):
        program, *arguments = shlex.split(command)
        arguments = [
            name
            for given in arguments
            for name in (sorted(glob.glob(given)) or [given] if "*" in given else [given])
        ]
        if program == "hf":
            return self._download(*arguments)
        if program == "rope-dist":
            return self._rope_dist(arguments)
        if program == "accelerate":
            return self._train(arguments)
        return self._check_server([program, *arguments])

    def _download(self, verb, repository, option, directory):
        assert (verb, option) == ("download", "--local-dir")
        model = save_published(repository, self.folder / directory, self.tokenizer)
        save_published(repository, self.small / directory, self.tokenizer, SHRINK)
        self.repository = repository
        return str(model)

    def _rope_dist(self, arguments):
        if arguments[0] == "eval":
            # Read by the model, so by the one that reads few tokens.
            with self.monkeypatch.context() as change:
                change.chdir(self.small)
                Path("book.txt").write_text(Path("../book.txt").read_text())
                return self._main([*shrunk(arguments), "--no-plot", "--device", "cpu"])
        for option, name in itertools.pairwise(arguments):
            if name.endswith(".gguf") and option != "-o":
                self._convert(Path(name))
        return self._main(arguments)

    def _main(self, arguments):
        code = main(arguments)
        captured = self.capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    def _convert(self, path):
        """The GGUF file of the section's model, as llama.cpp's converter would write it."""
        from transformers import AutoModelForCausalLM

        if path.exists():
            return
        directory = next(p for p in self.folder.iterdir() if path.name.startswith(p.name) and p.is_dir())
        model = AutoModelForCausalLM.from_pretrained(directory)
        options = {}
        if config_entries(self.repository)["model_type"] == "mistral":
            options["arch"] = "llama"
        if config_entries(self.repository).get("rope_scaling"):
            options["factors"] = torch.tensor(rope_dist.plan(model, factor=2).pretrained.factors)
        write_gguf(model, path, **options)

    def _train(self, arguments):
        verb, option, config, script, *rest = arguments
        assert (verb, option) == ("launch", "--config_file")
        assert (ROOT / config).exists()
        with self.monkeypatch.context() as change:
            change.chdir(self.small)
            rest = [f"../{name}" if name.startswith("pg19/") else name for name in shrunk(rest)]
            change.setattr(sys, "argv", [script, *rest, "--steps", "1", "--batch", "1"])
            change.syspath_prepend(ROOT / "examples")
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            captured = self.capsys.readouterr()
            assert not ended.value.code, captured.err
        return captured.out

    def _check_server(self, command):
        """It serves what was exported, for no more tokens than that, by options that the package prints, too."""
        printed = runpy.run_path(str(ROOT / "examples/serve.py"))["commands"]("DIR", 1, "HOST", 2)
        known = {"llama-server": ["llama-server", "-m", "FILE", "-c", "1"]}
        known |= {line[0] if line[0] != "python" else line[2]: line for line in printed.values()}
        name = command[2] if command[0] == "python" else command[0]
        options = [argument for argument in command if argument.startswith("-")]
        assert set(options) <= set(known[name]), options
        (target,) = (argument for argument in command if Path(argument).exists() and argument != "examples")
        if name == "llama-server":
            return ""
        config = json.loads((Path(target) / "config.json").read_text())
        for option, value in itertools.pairwise(command):
            if option in ("--max-model-len", "--context-length"):
                assert int(value) == config["max_position_embeddings"]
        return ""


def test_the_page_has_the_models():
    repositories = [re.search(r"hf download (\S+)", text)[1] for text in SECTIONS.values()]
    assert set(repositories) == PUBLISHED.keys() - {"meta-llama/Llama-2-7b-hf"}
    assert BLOCK.findall(PAGE) == [block for text in SECTIONS.values() for block in BLOCK.findall(text)]


@pytest.mark.parametrize("title", SECTIONS, ids=[title.split(":")[0] for title in SECTIONS])
def test_the_commands_of_a_recipe(title, tmp_path, capsys, monkeypatch, stock_again):
    pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    shell = Shell(tmp_path, capsys, monkeypatch)
    printed = []
    for command, shown in steps(SECTIONS[title]):
        printed.append(shell.run(command))
        for line in shown.splitlines():
            assert any(" ".join(line.split()) in " ".join(out.split()) for out in printed), line
