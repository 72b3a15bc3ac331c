"""Where results are, and which code they measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def hashes(patterns: Sequence[str], root: Path = ROOT) -> dict[str, str]:
    """By file under the repository's root, the beginning of its SHA-256."""
    files = sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()})
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in files
    }


def changed(record: dict, root: Path = ROOT) -> list[str]:
    """Files that differ from those the result was measured with, or came or went since.

    By their contents and not by dates or commits: it is the same in every clone.
    """
    before, now = record["sources"]["files"], hashes(record["sources"]["patterns"], root)
    return sorted(file for file in before.keys() | now.keys() if before.get(file) != now.get(file))
