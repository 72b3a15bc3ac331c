"""Results in a JSON file, so that an interrupted run can be resumed, and several can write one file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..files import folder_lock, write_text
from ..machine import describe
from .memory import explain_out_of_memory
from .variants import Variant


class Record:
    """Measurements of one kind on one model, keyed by their settings.

    The key ``what`` of a measurement is a mapping of JSON values with every setting that the result depends on, so
    results of other settings are kept in the same file. The file is rewritten after every measurement, with those that
    other processes have put there meanwhile: under a lock of its folder, where the system has one.

    Args:
        path: the JSON file; loaded if it exists.
        kind: e.g. ``"perplexity"``.
        model: name and fingerprint of the model, from :func:`rope_dist.evaluation.models.describe`.
        restart: discard an existing file.

    Raises:
        ValueError: the file is not a record of this kind, or belongs to another model.
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
        self._discarded: bytes | None = None
        if self.path.exists():
            if restart:
                self._discarded = self.path.read_bytes() if self.path.is_file() else None
            else:
                self._data = self._read(self.path.read_bytes())
        self._by_what = {_key(m["what"]): m for m in self._data["measurements"]}
        here = describe()
        if here not in self._data["machines"]:
            self._data["machines"].append(here)

    def _read(self, file: bytes) -> dict[str, Any]:
        """The contents of the ``file``, checked to be of the kind and the model of this record."""
        kind, model = self._data["kind"], self._data["model"]
        advice = "give another output, or --restart to begin anew"
        try:
            data = json.loads(file.decode("utf-8"))
        except ValueError:
            raise ValueError(f"{self.path} is not JSON: {advice}") from None
        if not isinstance(data, dict) or data.get("kind") != kind or data.keys() != self._data.keys():
            raise ValueError(f"{self.path} is not a record of {kind} measurements: {advice}")
        for key, value in model.items():
            if data["model"].get(key) != value:
                raise ValueError(
                    f"{self.path} was measured with {key} {data['model'].get(key)!r}, not {value!r}: {advice}"
                )
        return data

    def get(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result with the key ``what``, or None."""
        found = self._by_what.get(_key(what))
        return found and found["result"]

    def put(self, what: Mapping[str, Any], result: Mapping[str, Any], variant: Variant) -> None:
        """Add a result and the plan of its variant, in the place of one with the same key, and write the file.

        What another process has written since the file was read is kept, and part of the record from now on.

        Raises:
            ValueError: another process has put something else in the place of the file.
            OSError: the folder of the file is missing or not writable.
        """
        entry = {"what": dict(what), "result": dict(result)}
        with folder_lock(self.path):
            self._take_up_others()
            self._by_what.pop(_key(what), None)
            self._by_what[_key(what)] = entry
            self._data["measurements"] = list(self._by_what.values())
            if variant.plan is not None:
                # Without the local path of the model.
                plan = variant.plan.with_source(self._data["model"].get("name"))
                self._data["plans"][variant.fingerprint] = plan.to_dict()
            write_text(self.path, _dump(self._data))
            self._discarded = None

    def _take_up_others(self) -> None:
        """Add what the file has and this record has not; of one key the file has the newest result."""
        if not self.path.is_file():
            return
        file = self.path.read_bytes()
        if file == self._discarded:
            return
        data = self._read(file)
        written = {_key(m["what"]): m for m in data["measurements"]}
        own = {key: m for key, m in self._by_what.items() if key not in written}
        self._by_what = own | written
        self._data["plans"] = data["plans"] | self._data["plans"]
        machines = data["machines"]
        self._data["machines"] = machines + [m for m in self._data["machines"] if m not in machines]

    def measure(
        self,
        what: Mapping[str, Any],
        variant: Variant,
        model: PreTrainedModel,
        compute: Callable[[], dict[str, Any]],
        doing: str,
    ) -> tuple[Variant, dict[str, Any], bool]:
        """The measurement with the key ``what``: from the file, or else computed and added to it.

        Args:
            what: the settings; the variant's are added.
            variant: applied to ``model`` during ``compute``.
            model: of a supported family.
            compute: returns the result, to which ``seconds`` is added.
            doing: what ``compute`` does, for the message of an out-of-memory error.

        Returns:
            The variant, ``{"what": ..., "result": ...}``, and whether the result was in the file.
        """
        what = {**what, **variant.identity}
        result = self.get(what)
        if result is not None:
            return variant, {"what": what, "result": result}, True
        began = time.perf_counter()
        with explain_out_of_memory(doing), variant.applied(model):
            result = compute()
        result["seconds"] = round(time.perf_counter() - began, 1)
        self.put(what, result, variant)
        return variant, {"what": what, "result": result}, False

    def __len__(self) -> int:
        return len(self._by_what)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All measurements, as ``{"what": ..., "result": ...}``."""
        return iter(self._by_what.values())


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True, allow_nan=False)


def _dump(data: Mapping[str, Any]) -> str:
    """JSON with one measurement or plan a line, which keeps diffs readable."""
    head = {key: data[key] for key in ("kind", "model", "machines")}
    lines = json.dumps(head, indent=2).removesuffix("\n}")
    plans = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in data["plans"].items())
    measurements = ",\n".join(f"    {json.dumps(m)}" for m in data["measurements"])
    return f'{lines},\n  "plans": {{\n{plans}\n  }},\n  "measurements": [\n{measurements}\n  ]\n}}\n'
