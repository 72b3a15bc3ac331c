"""Finished measurements in a JSON file, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from ..machine import describe
from .variants import Variant


class Record:
    """Measurements of one kind on one model, each under everything that determines it.

    A measurement is asked for by ``what``: a mapping of JSON values that names all its settings. One made
    under other settings has another ``what``, stays in the file and is never taken for it. The file is
    written whole after every measurement.

    Args:
        path: the JSON file; read if it is there.
        kind: e.g. ``"perplexity"``.
        model: what the model is called and what tells it from others, as from
            :func:`rope_dist.evaluation.models.describe`.
        restart: begin anew although the file is there.

    Raises:
        ValueError: the file is not such a record, or is of another model.
        OSError: the folder of ``path`` is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, model: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.path = Path(path)
        self._data: dict[str, Any] = {
            "kind": kind,
            "model": dict(model),
            "machines": [],
            "plans": {},
            "measurements": [],
        }
        if self.path.exists() and not restart:
            self._data = self._read(kind, model)
        self._by_what = {_key(m["what"]): m for m in self._data["measurements"]}
        here = describe()
        if here not in self._data["machines"]:
            self._data["machines"].append(here)

    def _read(self, kind: str, model: Mapping[str, Any]) -> dict[str, Any]:
        advice = "give another output, or --restart to begin anew"
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{self.path} is not JSON: {advice}") from None
        if not isinstance(data, dict) or data.get("kind") != kind or data.keys() != self._data.keys():
            raise ValueError(f"{self.path} holds no {kind} measurements: {advice}")
        for key, value in model.items():
            if data["model"].get(key) != value:
                raise ValueError(
                    f"{self.path} was measured with {key} {data['model'].get(key)!r}, not {value!r}: {advice}"
                )
        return data

    def get(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished measurement under ``what``, or None."""
        found = self._by_what.get(_key(what))
        return found and found["result"]

    def put(self, what: Mapping[str, Any], result: Mapping[str, Any], variant: Variant) -> None:
        """Add a measurement, and the variant's plan, and write the file."""
        entry = {"what": dict(what), "result": dict(result)}
        self._by_what[_key(what)] = entry
        self._data["measurements"].append(entry)
        if variant.plan is not None:
            # Where the model lies on this machine is no result.
            plan = {**variant.plan.to_dict(), "source": self._data["model"].get("name")}
            self._data["plans"][variant.fingerprint] = plan
        write_text(self.path, _dump(self._data))

    def __len__(self) -> int:
        return len(self._by_what)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every measurement in the file, as ``{"what": ..., "result": ...}``."""
        return iter(self._by_what.values())


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True, allow_nan=False)


def _dump(data: Mapping[str, Any]) -> str:
    """JSON with one measurement and one plan a line: readable, and a changed line is a changed result."""
    head = {key: data[key] for key in ("kind", "model", "machines")}
    lines = json.dumps(head, indent=2).removesuffix("\n}")
    plans = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in data["plans"].items())
    measurements = ",\n".join(f"    {json.dumps(m)}" for m in data["measurements"])
    return f'{lines},\n  "plans": {{\n{plans}\n  }},\n  "measurements": [\n{measurements}\n  ]\n}}\n'
