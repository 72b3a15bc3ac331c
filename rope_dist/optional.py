"""Optional dependencies: imported where they are used; the error for a missing one names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingPackageError(ImportError):
    """An optional package or corpus is not installed; the message says how to install it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: what to import, e.g. ``"matplotlib.figure"``.
        extra: the extra of rope-dist that installs it.
        purpose: what needs it, the subject of the error message.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'rope-dist[{extra}]'"
        ) from None
