"""A Python script run in this process as ``python script.py`` or ``python -m module`` would run it."""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType


@dataclass(frozen=True)
class Script:
    """What to run.

    Attributes:
        target: path of a script, of a directory or zip file with a ``__main__.py``, or the name of a module.
        arguments: its own.
        module: ``target`` is the name of a module.
    """

    target: str
    arguments: Sequence[str] = ()
    module: bool = False

    def check(self) -> None:
        """``ValueError`` unless the script is there."""
        if not self.module:
            if not os.path.exists(self.target):
                raise ValueError(f"there is no script {self.target}")
        # Of the outermost package only: to look further would import it.
        elif (
            importlib.machinery.PathFinder.find_spec(first := self.target.partition(".")[0], self._path())
            is None
        ):
            raise ValueError(f"there is no module {first}")

    def __call__(self) -> int:
        """Run it; what it raises is printed, and ends the process, as if it ran alone. Returns 0."""
        sys.argv[:] = [self.target, *self.arguments]
        sys.path[:] = self._path()
        printed = sys.excepthook

        def without_our_frames(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            trace = own_frames(trace)
            printed(kind, error.with_traceback(trace), trace)

        sys.excepthook = without_our_frames
        if self.module:
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
        elif _has_main(self.target):
            runpy.run_path(self.target, run_name="__main__")
        else:
            # Not by runpy, which takes the module away again before the process ends.
            main = sys.modules["__main__"] = ModuleType("__main__")
            path = os.path.abspath(self.target)
            vars(main).update(__file__=path, __builtins__=builtins, __cached__=None)
            with io.open_code(path) as file:
                code = compile(file.read(), path, "exec", dont_inherit=True)
            exec(code, vars(main))
        return 0

    def _path(self) -> list[str]:
        """``sys.path`` as Python would begin with."""
        if sys.flags.safe_path:
            return list(sys.path)
        if self.module:
            return [os.getcwd(), *sys.path[1:]]
        if _has_main(self.target):
            return sys.path[1:]  # runpy adds it
        return [os.path.dirname(os.path.realpath(self.target)), *sys.path[1:]]


def _has_main(path: str) -> bool:
    """Whether it is a directory or a zip file, whose ``__main__.py`` is run."""
    return os.path.isdir(path) or zipfile.is_zipfile(path)


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback from the script on: what is before is this package's and runpy's."""
    last, at = None, trace
    while at is not None:
        if at.tb_frame.f_code is Script.__call__.__code__:
            last = at
        at = at.tb_next
    if last is None:
        return trace
    at = last.tb_next
    while at is not None and at.tb_frame.f_globals.get("__name__") == "runpy":
        at = at.tb_next
    return at
