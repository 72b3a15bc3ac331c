"""``rope-dist verify``."""

from __future__ import annotations

import argparse
from typing import Any

from . import values
from .export import add_engines

DESCRIPTION = (
    "Read a Hugging Face directory or a GGUF file as its engines do and compare frequencies, scaling and length with a "
    "plan. Exit code 2 and the reason if a required engine does not follow it."
)
EXAMPLES = """examples:
  rope-dist verify my-model-16k --plan plan.json
  rope-dist verify my-model-16k --plan plan.json --engine vllm --source ./my-model"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "verify",
        help="check that an exported model follows its plan",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("artefact", metavar="PATH", help="an exported directory or a GGUF file")
    parser.add_argument(
        "--plan",
        type=values.readable_file,
        required=True,
        metavar="FILE",
        help="plan to compare with, as rope-dist plan -o writes it",
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        help="directory of the model before the extension: what else its config had is compared too",
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
