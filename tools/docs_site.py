"""What mkdocs makes of docs/: links that leave the folder, pages of the repository's top, and pages that are generated.

A hook of ``mkdocs.yml``. Pages of docs/ are written for GitHub, whose relative links lead anywhere in the repository.
On the site a link leads to the page, if the site has it; a picture is copied; anything else is a link into the
repository that ``ROPE_DIST_URL`` names, as in the metadata of the package, or without it to a copy of the file.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rope_dist.version import __version__  # noqa: E402
from tools import docs_pages  # noqa: E402
from tools.docs_math import drawn, marked  # noqa: E402

URL = os.environ.get("ROPE_DIST_URL", "").rstrip("/")
TOP = {f"{name.upper()}.md": f"{name}.md" for name in ("architecture", "contributing", "changelog")}
"""Pages at the top of the repository, and their names on the site."""
PICTURES = (".svg", ".png", ".jpg", ".gif", ".webp")
# Of [text](target), ![text](target), src="target" and href="target"; not those to other sites or sections.
LINK = re.compile(
    r"""(?P<before>\]\(\s*|\b(?:src|srcset|href)=")(?P<path>(?![a-z]+:|/|\#)[^\s)"\#]+)(?P<anchor>\#[^\s)"]*)?""",
    re.IGNORECASE,
)
# Code keeps what looks like a link.
CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
ASSET = re.compile(
    r"<(?:script|img|source|iframe)\b[^>]*\bsrc(?:set)?=\"?(?:https?:)?//[^\s\">]+"
    r"|<link\b(?=[^>]*\brel=\"?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=\"?(?:https?:)?//[^\s\">]+"
)
log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config: Any) -> Any:
    config.repo_url = URL or None
    return config


def on_files(files: Any, config: Any) -> Any:
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in files.documentation_pages():
        for path in _linked(page.content_string, _place(page.src_uri)):
            if files.get_file_from_path(_on_site(path)) is None and _is_copied(path):
                files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = _place(page.file.src_uri)
    markdown = docs_pages.expand(page.file.src_uri, markdown)
    return _outside_code(lambda text: marked(_relinked(text, source, page.file.src_uri, files)), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return drawn(html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A page that a browser fetches something else for is a warning, and so an error."""
    for asset in ASSET.findall(output):
        log.warning("%s is not offline: %s", page.file.src_uri, asset)
    return output


def _place(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return next((source for source, page in TOP.items() if page == uri), f"docs/{uri}")


def _on_site(path: str) -> str:
    """The path on the site of a file of the repository."""
    return TOP.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")


def _is_copied(path: str) -> bool:
    return (ROOT / path).is_file() and (path.endswith(PICTURES) or not URL)


def _linked(markdown: str, source: str) -> list[str]:
    found: list[str] = []

    def look(text: str) -> str:
        found.extend(_target(match["path"], source) for match in LINK.finditer(text))
        return text

    _outside_code(look, markdown)
    return found


def _target(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _relinked(text: str, source: str, page: str, files: Any) -> str:
    def replace(match: re.Match[str]) -> str:
        path, anchor = _target(match["path"], source), match["anchor"] or ""
        if files.get_file_from_path(_on_site(path)) is not None:
            here = posixpath.relpath(_on_site(path), posixpath.dirname(page) or ".")
            if not match["before"].startswith("]") and here.endswith(".md"):
                here = here.removesuffix(".md") + ".html"  # mkdocs leaves HTML as it is
            return f"{match['before']}{here}{anchor}"
        if (ROOT / path).exists() and (URL or (ROOT / path).is_dir()):
            # A folder has no page of its own; without a repository the link is to the page's top.
            target = f"{URL}/blob/v{__version__}/{path}{anchor}" if URL else "#"
            return f"{match['before']}{target}"
        if not path.startswith("docs/"):  # of those mkdocs warns itself
            log.warning("%s has a link to what the repository does not have: %s", source, path)
        return match[0]

    return LINK.sub(replace, text)


def _outside_code(change: Any, markdown: str) -> str:
    """``markdown`` with ``change`` applied to what is between fenced blocks and code spans."""
    parts, at = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, change(markdown[at:])])
