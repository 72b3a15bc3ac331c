"""Atomic writes: to a temporary file in the same directory, which is then renamed to the target.

Symbolic links are followed, so that the link stays. Pipes and devices are written to in place and never replaced.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform != "win32":
    import fcntl

CHUNK = 16 << 20
"""Bytes copied at a time."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace ``path`` by a file of ``data``; an existing file keeps its mode, and on an error its content.

    Raises:
        OSError: the folder is missing or not writable, ``path`` is a directory, the disk is full. It names ``path``.
    """
    names_directory = os.fspath(path).endswith(os.sep)
    path = Path(path)
    with _report_path(path):
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
            _set_permissions(temporary, 0o666, found)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def folder_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other blocks with a lock of the folder of ``path`` waiting, in this process or another, until this one ends.

    The lock is on the folder itself (``flock``), so that no file has to be made for it, and ends with the process. It
    is advisory, and there is none on Windows and on file systems that cannot lock a folder.

    Raises:
        OSError: the folder is missing.
    """
    if sys.platform == "win32":
        yield
        return
    with _report_path(Path(path)):
        handle = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary file to write to, synced and renamed to ``path`` if the block raises nothing.

    Raises:
        ValueError: ``path`` is not a regular file, or exists and ``force`` is False.
        OSError: the folder is missing or not writable, the disk is full. The temporary file is removed.
    """
    path = Path(path)
    check_target(path, force=force, directory=False)
    target = Path(os.path.realpath(path))
    with _unwind_on_sigterm():
        with _report_path(path):
            handle, name = _temporary(target, tempfile.mkstemp)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            check_target(path, force=force, directory=False)
            with _report_path(path):
                _set_permissions(temporary, 0o666, _stat(target))
                sync(temporary)
                os.replace(temporary, target)
                sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """:func:`new_file` for a directory; with ``force`` an existing one is removed after the new one is in place."""
    path = Path(path)
    check_target(path, force=force, directory=True)
    target = Path(os.path.realpath(path))
    with _unwind_on_sigterm():
        with _report_path(path):
            temporary = Path(_temporary(target, tempfile.mkdtemp))
        try:
            yield temporary
            check_target(path, force=force, directory=True)
            with _report_path(path):
                _set_permissions(temporary, 0o777, _stat(target))
                for folder, _, names in os.walk(temporary):
                    for name in (*names, "."):
                        sync(Path(folder, name))
                _replace_directory(temporary, target)
                sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(path: Path, *, force: bool, directory: bool) -> None:
    """``ValueError`` unless nothing exists at ``path``, or ``force`` and a file (directory) that may be replaced.

    Symbolic links are followed.
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
    """Copy the next ``count`` bytes, :data:`CHUNK` at a time; ``ValueError`` if ``source`` has fewer."""
    while count:
        data = source.read(min(count, CHUNK))
        if not data:
            raise ValueError(f"{getattr(source, 'name', 'the file')} ends {count} bytes too early")
        target.write(data)
        count -= len(data)
        if progress is not None:
            progress(len(data))


def sync(path: Path) -> None:
    """``fsync`` a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_directory(temporary: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(temporary, target)
        return
    # There is no portable atomic exchange of directories: rename the old one away, and back on an error.
    backup = Path(_temporary(target, tempfile.mkdtemp))
    try:
        os.replace(target, backup)
    except BaseException:
        os.rmdir(backup)
        raise
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(backup, target)
        raise
    shutil.rmtree(backup)


def _temporary(target: Path, make: Callable[..., Any]) -> Any:
    # Cut, so that a long name stays below the limit of the file system.
    return make(prefix=f".{target.name[:32]}.", dir=target.parent)


def _stat(path: Path) -> os.stat_result | None:
    """``os.stat``, or None where nothing exists (also for a dangling link)."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_descriptor(path: Path) -> bool:
    """Whether ``path`` is an open file of a process (``/dev/stdout``), which must not be renamed over."""
    for _ in range(40):  # the system's own limit on links
        if not path.is_symlink():
            return False
        if os.path.realpath(path.parent).startswith("/proc/"):
            return True
        path = path.parent / os.readlink(path)
    return False


@contextmanager
def _report_path(path: Path) -> Iterator[None]:
    # Name the target in errors, not the temporary file.
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _set_permissions(path: str | Path, mode: int, before: os.stat_result | None) -> None:
    # mkstemp and mkdtemp create private files: restore the owner and mode of the old one, or apply the umask.
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
def _unwind_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that temporary files are removed, unless the program has a handler."""
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
