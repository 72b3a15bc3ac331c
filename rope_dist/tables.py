"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def text_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> str:
    """A table whose first ``left`` columns are aligned to the left and the others to the right.

    Cells are printed as they are: numbers are formatted by the caller.
    """
    align = ("left",) * left + ("right",) * (len(headers) - left)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)
