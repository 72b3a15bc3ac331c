"""Error messages of one line, and the nearest name to a misspelt one; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 400
"""Characters of another library's message that are passed on."""

SHORTEST = 30
"""A sentence of fewer is none: an abbreviation, a name."""


def unknown(what: str, name: object, known: Iterable[str], more: str = "") -> str:
    """``unknown strategy 'yran', did you mean yarn? known: extrapolation, pi, ...``

    Args:
        what: what the name is of, e.g. ``"strategy"``.
        name: as it was given.
        known: the names that there are.
        more: what else would be right, put after the known names.
    """
    known = list(known)
    guess = did_you_mean(name, known) or ";"
    return f"unknown {what} {name!r}{guess} known: {', '.join(known)}{more}"


def did_you_mean(name: object, known: Iterable[str], likeness: float = 0.6) -> str:
    """``", did you mean yarn?"``, or nothing where no known name has so much ``likeness`` with ``name``."""
    near = get_close_matches(str(name).lower(), list(known), n=1, cutoff=likeness)
    return f", did you mean {near[0]}?" if near else ""


def one_line(error: BaseException, longest: int = LONGEST) -> str:
    """The message of another library's ``error`` as one line.

    A long one (lists of class names, dumps) is cut after a sentence, or ends in ``...``. The system's errors lose
    their number, and the file's name, which the caller gives.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    text = " ".join(str(error).split())
    if len(text) <= longest:
        return text or type(error).__name__
    end = max(text.rfind(mark, 0, longest) for mark in (". ", "? ", "! ")) + 1
    return text[:end] if end >= SHORTEST else f"{text[: longest - 4].rstrip()} ..."
