"""Packages that only a part of rope_dist needs: imported where used, and missed in words."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingPackageError(ImportError):
    """A package or data set that this part needs is not installed; the message says how to install it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``; :class:`MissingPackageError` names the extra that installs it otherwise."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'rope-dist[{extra}]'"
        ) from None
