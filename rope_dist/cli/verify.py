"""``rope-dist verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options, values
from .options import option


def run(
    artefact: Annotated[str, typer.Argument(metavar="PATH", help="Exported directory or GGUF file.")],
    plan: Annotated[str, option(values.readable_file, "FILE", "Plan, from rope-dist plan -o.")],
    source: Annotated[
        str | None, option(str, "DIR", "Original model: compare the rest of the config.")
    ] = None,
    engine: options.Engines = None,
) -> None:
    """Check that an exported model follows its plan.

    Compares the frequencies, scaling and length that engines read. Exit code 2 and the reason if a required engine
    does not follow the plan.

    \b
    Examples:
      rope-dist verify my-model-16k --plan plan.json
      rope-dist verify my-model-16k --plan plan.json --engine vllm --source ./my-model
    """
    from ..dynamic import load_plan
    from ..export import verify

    result = verify(artefact, load_plan(plan), engines=engine or [], source=source)
    print(result)
    result.raise_for_failure()
