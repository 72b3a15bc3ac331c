"""Files are written whole or not at all: to a temporary name beside the target, then renamed over it.

A symbolic link stays one: its target is what is written. A pipe or a device is written to, and is never replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

CHUNK = 16 << 20
"""Bytes that are held at a time while a large file is copied."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``; a file already there keeps its mode, and its content if anything goes wrong.

    Raises:
        OSError: the folder is missing or not writable, ``path`` is a directory, the disk is full. It names ``path``.
    """
    names_directory = os.fspath(path).endswith(os.sep)
    path = Path(path)
    with _errors_name(path):
        found = _stat(path)
        if names_directory or (found is not None and stat.S_ISDIR(found.st_mode)):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if (found is not None and not stat.S_ISREG(found.st_mode)) or _is_descriptor(path):
            with open(path, "wb") as file:
                file.write(data)
            return
        target = Path(os.path.realpath(path))
        handle, temporary = _temporary(target, tempfile.mkstemp)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            _give_mode(temporary, 0o666, found)
            os.replace(temporary, target)
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
        ValueError: ``path`` is not a regular file, or exists and ``force`` is False.
        OSError: the folder is missing or not writable, the disk is full. Nothing is left behind.
    """
    path = Path(path)
    check_target(path, force=force, directory=False)
    target = Path(os.path.realpath(path))
    with _terminated_cleanly():
        with _errors_name(path):
            handle, name = _temporary(target, tempfile.mkstemp)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            check_target(path, force=force, directory=False)
            with _errors_name(path):
                _give_mode(temporary, 0o666, _stat(target))
                sync(temporary)
                os.replace(temporary, target)
                sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """:func:`new_file` for a directory; with ``force`` one already there is removed once the new one is in place."""
    path = Path(path)
    check_target(path, force=force, directory=True)
    target = Path(os.path.realpath(path))
    with _terminated_cleanly():
        with _errors_name(path):
            temporary = Path(_temporary(target, tempfile.mkdtemp))
        try:
            yield temporary
            check_target(path, force=force, directory=True)
            with _errors_name(path):
                _give_mode(temporary, 0o777, _stat(target))
                for folder, _, names in os.walk(temporary):
                    for name in (*names, "."):
                        sync(Path(folder, name))
                _put_in_place(temporary, target)
                sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: Path, *, force: bool, directory: bool) -> None:
    """``ValueError`` unless ``path`` may be written: nothing is there, or ``force`` and a thing of the same kind.

    A symbolic link counts as what it points to.
    """
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: {path.parent} is not a directory")
    if os.path.lexists(path):
        if not force:
            raise ValueError(f"{path} exists; force (--force) replaces it")
        kind = "directory" if directory else "regular file"
        try:
            found = _stat(path)
        except OSError as error:
            raise ValueError(f"{path} is not a {kind} ({error.strerror}); it is left alone") from None
        if found is not None and not (stat.S_ISDIR if directory else stat.S_ISREG)(found.st_mode):
            raise ValueError(f"{path} is not a {kind}; it is left alone")
        if directory and (os.path.ismount(path) or Path.cwd().is_relative_to(os.path.realpath(path))):
            raise ValueError(f"{path} is a mount point or holds the current directory; it is left alone")
        if not Path(os.path.realpath(path)).parent.is_dir():
            raise ValueError(f"cannot write {path}: it is a link into a directory that does not exist")


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


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(temporary, target)
        return
    # Directories cannot be exchanged in one step: the old one steps aside, and back if that fails.
    aside = Path(_temporary(target, tempfile.mkdtemp))
    try:
        os.replace(target, aside)
    except BaseException:
        os.rmdir(aside)
        raise
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)


def _temporary(target: Path, make: Callable[..., Any]) -> Any:
    # The whole name would make a long one too long.
    return make(prefix=f".{target.name[:32]}.", dir=target.parent)


def _stat(path: Path) -> os.stat_result | None:
    """Of what ``path`` leads to, or None where nothing is there (a link may point to nothing yet)."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_descriptor(path: Path) -> bool:
    """Whether ``path`` leads to an open file of a process (``/dev/stdout``): renaming over it would lose the rest."""
    for _ in range(40):  # the system's own limit on links
        if not path.is_symlink():
            return False
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / os.readlink(path)
    return False


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    # The name in the system's message may be that of a temporary, which the user has never heard of.
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _give_mode(path: str | Path, mode: int, before: os.stat_result | None) -> None:
    # mkstemp and mkdtemp make private things; give what was there before, or what open() and mkdir() would.
    if before is not None:
        if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
            with suppress(PermissionError):  # only root gives files away
                os.chown(path, before.st_uid, before.st_gid)
        os.chmod(path, stat.S_IMODE(before.st_mode))
        return
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, mode & ~mask)


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporaries go, unless the program handles it itself."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
