"""Sphinx roles of docstrings (:func:`rope_dist.plan`) as links of the site: an extension of griffe, for mkdocs.yml."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.docs_pages import identifiers

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?([^`]+)`")


def link(role: re.Match[str]) -> str:
    """A link to what the Python page has, code for anything else."""
    name = role[1]
    known = identifiers().get(name.rpartition(".")[2], name)
    return f'<autoref optional identifier="{known}"><code>{name}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites the roles in every docstring."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
