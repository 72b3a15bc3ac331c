"""Files are written whole or not at all: to a temporary name beside the target, then renamed over it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 16 << 20
"""Bytes that are held at a time while a large file is copied."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``; a file already there stays as it was if anything goes wrong.

    Raises:
        OSError: the folder is missing or not writable, the disk is full.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        _give_mode(temporary, 0o666)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it once the block has ended well and the data is on the disk.

    Raises:
        ValueError: ``path`` is a directory, or exists and ``force`` is False.
        OSError: the folder is missing or not writable, the disk is full. Nothing is left behind.
    """
    path = Path(path)
    check_target(path, force=force, directory=False)
    with _said_of(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _give_mode(temporary, 0o666)
        sync(temporary)
        check_target(path, force=force, directory=False)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """:func:`new_file` for a directory; with ``force`` one already there is removed once the new one is in place."""
    path = Path(path)
    check_target(path, force=force, directory=True)
    with _said_of(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _give_mode(temporary, 0o777)
        for folder, _, names in os.walk(temporary):
            for name in (*names, "."):
                sync(Path(folder, name))
        check_target(path, force=force, directory=True)
        if path.is_dir():
            # Directories cannot be exchanged in one step: the old one steps aside, and back if that fails.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(aside, path)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: Path, *, force: bool, directory: bool) -> None:
    """``ValueError`` unless ``path`` may be written: nothing is there, or ``force`` and a thing of the same kind."""
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a directory")
    if os.path.lexists(path):
        if not force:
            raise ValueError(f"{path} exists; force (--force) replaces it")
        if path.is_dir() != directory or path.is_symlink():
            raise ValueError(f"{path} is not a {'directory' if directory else 'file'}; it is left alone")


def copy_bytes(
    source: BinaryIO, target: BinaryIO, count: int, progress: Callable[[int], object] | None = None
) -> None:
    """Copy ``count`` bytes from where ``source`` stands, at most :data:`CHUNK` in memory; ``ValueError`` if it ends."""
    while count:
        data = source.read(min(count, CHUNK))
        if not data:
            raise ValueError(f"{getattr(source, 'name', 'the file')} ends {count} bytes too early")
        target.write(data)
        count -= len(data)
        if progress is not None:
            progress(len(data))


def sync(path: Path) -> None:
    """Wait until what was written to a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    # The name in the system's message is that of a temporary, which the user has never heard of.
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _give_mode(path: str | Path, mode: int) -> None:
    # mkstemp and mkdtemp make private things; give the mode that open() and mkdir() would have.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)
