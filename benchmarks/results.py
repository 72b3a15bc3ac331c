"""Results as one flat table a device, ``benchmarks/results/cpu.jsonl``: a JSON line, and so a row, a measurement.

    pandas.read_json("benchmarks/results/cpu.jsonl", lines=True)

Columns are those of :func:`benchmarks.harness.measure` and of the run: command, commit, machine, a hash of the code
that was measured. Tables of several machines or runs are joined with ``cat``.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rope_dist.files import folder_lock, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}

Rows = list[dict[str, Any]]


def read(device: str, folder: Path | None = None) -> Rows:
    """The rows of ``cpu`` or ``cuda``; none where nothing was measured."""
    path = (folder or RESULTS) / f"{device}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def of(benchmark: str, device: str, folder: Path | None = None) -> Rows:
    """The rows of one benchmark."""
    return [row for row in read(device, folder) if row["benchmark"] == benchmark]


def timed(benchmark: str, device: str, case: str) -> Rows:
    """The rows with a time of one case; of the same in float32 where the processor has no products in bfloat16."""
    rows = [row for row in of(benchmark, device) if "seconds" in row]
    found = [row for row in rows if row["case"] == case]
    return found or [row for row in rows if row["case"] == case.replace("bf16", "fp32")]


def replace(benchmark: str, device: str, rows: Rows, folder: Path) -> None:
    """Put ``rows`` in the place of those of that benchmark: whole or not at all, others stay as they are."""
    path = folder / f"{device}.jsonl"
    with folder_lock(path):
        kept = [row for row in read(device, folder) if row["benchmark"] != benchmark]
        lines = []
        for row in sorted(kept + rows, key=lambda row: row["benchmark"]):
            rounded = {key: float(f"{value:.5g}") for key, value in row.items() if isinstance(value, float)}
            lines.append(json.dumps(row | rounded) + "\n")
        write_text(path, "".join(lines))


def place(row: dict[str, Any]) -> tuple:
    """Where a row stands: by model, dtype, pass and length."""
    return row.get("model", ""), row.get("dtype", ""), row.get("pass", ""), row.get("tokens", 0)


def code(patterns: Sequence[str], root: Path = ROOT) -> str:
    """A hash of the files under the repository's root: by their contents, the same in every clone."""
    found = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in root.glob(pattern) if file.is_file()}):
        found.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]
