"""``rope-dist info``."""

from __future__ import annotations

import json

from . import options


def run(model: options.Source = None, as_json: options.Json = False) -> None:
    """Print what is installed, built and supported.

    Versions, native libraries, the backend of each device and the model families; with a model, what each of its
    layers would run once enabled.

    \b
    Examples:
      rope-dist info
      rope-dist info llama2-7b
      rope-dist info ./my-model --json
    """
    from ..info import info, text

    found = info(model)
    print(json.dumps(found, indent=2) if as_json else text(found))
