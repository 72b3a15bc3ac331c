"""``rope-dist info``."""

from __future__ import annotations

import argparse
import json
from typing import Any

DESCRIPTION = (
    "Print versions, the native libraries with their compilers, the backend of each device with its reason, and "
    "the model families; with a model, what each of its layers would do once enabled."
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "info", help="what is built, and what serves each device and model", description=DESCRIPTION
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory with a config.json, or a hub id"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..info import info, text

    found = info(parsed.model)
    print(json.dumps(found, indent=2) if parsed.json else text(found))
