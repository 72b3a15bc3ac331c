"""``rope-dist info``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..defaults import PRESETS
from . import values

DESCRIPTION = (
    "Print the versions, the native libraries with their compilers, the backend of each device with its reason, and "
    "the model families that are supported; with a model, what each of its layers would do once enabled."
)
EXAMPLES = """examples:
  rope-dist info
  rope-dist info llama2-7b
  rope-dist info ./my-model --json"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "info", help="print what is installed, built and supported", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=values.model,
        metavar="MODEL",
        help=f"a preset ({', '.join(PRESETS)}), a directory with a config.json, or a hub id (owner/name)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..info import info, text

    found = info(parsed.model)
    print(json.dumps(found, indent=2) if parsed.json else text(found))
