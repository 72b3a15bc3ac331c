"""Optional dependencies: imported where they are used; the error for a missing one names the extra to install."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
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


HF = ("transformers", "tabulate", "tqdm")
"""What the extra ``hf`` installs beside the command line's typer: ``rope_dist.ops`` alone runs without."""


def require_hf(purpose: str) -> None:
    """``MissingPackageError`` where a package of the extra ``hf`` is not installed; none is imported.

    Args:
        purpose: what needs them, the subject of the error message.
    """
    for module in HF:
        # A module that is set to None is one that cannot be imported.
        if module in sys.modules and sys.modules[module] is not None:
            continue
        if module in sys.modules or find_spec(module) is None:
            require(module, "hf", purpose)
