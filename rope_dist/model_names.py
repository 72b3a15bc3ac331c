"""Names of models that are no paths: presets and packaged models. Nothing here needs torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection
from pathlib import Path


def known_name(source: str | os.PathLike[str], names: Collection[str], what: str = "preset") -> str | None:
    """The one of ``names`` that ``source`` is; None where it is none, or the path of a model.

    As in ``from_pretrained``, a directory that is there comes first: one with a ``config.json`` is taken, with a
    warning, and so is any path that is no bare name (``./llama2-7b``).

    Args:
        source: what the user gave as a model.
        names: the names that there are.
        what: what they are names of, for the warning.
    """
    name = os.fspath(source)
    if name not in names:
        return None
    if not (Path(name) / "config.json").is_file():
        return name
    # One place, so that it is said once however often the name is looked up.
    warnings.warn(
        f"{name} is a directory with a model here, and the name of a {what}: the directory is taken",
        stacklevel=1,
    )
    return None
