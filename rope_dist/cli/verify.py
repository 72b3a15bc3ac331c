"""``rope-dist verify``."""

from __future__ import annotations

import argparse
from typing import Any

from .export import add_engines

DESCRIPTION = (
    "Read a Hugging Face directory or a GGUF file as its engines do and compare frequencies, scaling and length with a "
    "plan. Exit code 2 and the reason if a required engine does not follow it."
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser("verify", help="does an artefact follow the plan", description=DESCRIPTION)
    parser.add_argument("artefact", metavar="PATH", help="a directory or a GGUF file")
    parser.add_argument("--plan", required=True, metavar="FILE", help="as rope-dist plan -o writes it")
    parser.add_argument(
        "--source", metavar="DIR", help="the model before the extension: what else it had is compared too"
    )
    add_engines(parser)
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> None:
    from ..export import verify
    from ..planning import RopePlan

    plan = RopePlan.load(parsed.plan)
    result = verify(parsed.artefact, plan, engines=parsed.engine, source=parsed.source)
    print(result)
    result.raise_for_failure()
