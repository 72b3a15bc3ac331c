"""The generated pages of the site: the command line from its own parsers, and every public name of the package.

docs/cli.md and docs/api.md have a comment where the text goes, so that no file holds what may be out of date.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "<!-- generated: commands -->"
NAMES = re.compile(r"<!-- generated: names of (?P<module>[\w.]+) -->")
MODULES = ("rope_dist", "rope_dist.ops", "rope_dist.export", "rope_dist.evaluation")


def expand(uri: str, markdown: str) -> str:
    """The page with its generated parts in place of their comments."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_line()))
    return NAMES.sub(lambda found: names(found["module"]), markdown)


def public(module: str) -> list[str]:
    """``__all__`` of a module, read without importing it."""
    source = (ROOT / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    (found,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and [getattr(t, "id", None) for t in node.targets] == ["__all__"]
    )
    return [name for name in ast.literal_eval(found) if not name.startswith("__")]


@functools.cache
def identifiers() -> dict[str, str]:
    """Public name -> its full name; where two modules have it, that of the first."""
    return {name: f"{module}.{name}" for module in reversed(MODULES) for name in public(module)}


def names(module: str) -> str:
    """The directives of mkdocstrings for the public names of a module."""
    shown = [
        name for name in sorted(public(module), key=str.lower) if identifiers()[name] == f"{module}.{name}"
    ]
    return "\n\n".join(f"::: {module}.{name}" for name in shown)


def command_line() -> Iterator[str]:
    """Sections of Markdown, one for each command of ``rope-dist``."""
    import typer

    from rope_dist.cli import app

    command = typer.main.get_command(app)
    yield from _sections(command.make_context("rope-dist", ["--help"], resilient_parsing=True), command)


def _sections(context: Any, command: Any) -> Iterator[str]:
    text, _, examples = (command.help or "").partition("\b\nExamples:\n")
    yield f"## {context.command_path}\n"
    yield f"{text.strip()}\n"
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"```text\n{usage}\n```\n"
    if examples:
        lines = [line.strip() for line in examples.strip().splitlines()]
        yield "\n".join(["```sh", *lines, "```", ""])
    yield "| | |\n|---|---|"
    for param in command.get_params(context):
        name, text = param.get_help_record(context)
        if param.param_type_name == "argument":
            name, text = param.metavar, param.help
        yield f"| `{name}` | {text} |".replace("\n", " ")
    yield ""
    for name, sub in getattr(command, "commands", {}).items():
        inner = type(context)(sub, info_name=name, parent=context)
        yield from _sections(inner, sub)
