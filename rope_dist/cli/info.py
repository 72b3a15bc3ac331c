"""``rope-dist info``."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from . import options


def run(
    model: options.Source = None,
    models: Annotated[bool, Option("--models", help="Add what enable() does with each model type.")] = False,
    as_json: options.Json = False,
) -> None:
    """Print what is installed, built and supported.

    Versions, native libraries and the backend of each device; with a model, what each of its layers would run once
    enabled, and which engines read an extension of it.

    \b
    Examples:
      rope-dist info
      rope-dist info llama2-7b
      rope-dist info --models
      rope-dist info ./my-model --json
    """
    from ..info import info, text

    found = info(model, models=models)
    print(json.dumps(found, indent=2) if as_json else text(found))
