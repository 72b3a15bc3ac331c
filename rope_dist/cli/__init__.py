"""``rope-dist``: every command, a file each, reads its arguments and makes one call into the package.

Nothing here or at the top of those files needs torch: help and errors in the arguments come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ..version import __version__
from . import bench, compare, demo, doctor, eval, export, info, plan, verify
from . import run as run_script
from .runner import Command, make_app, run
from .script import Script

app = make_app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rope-dist {__version__}")
        raise typer.Exit


@app.callback()
def _rope_dist(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Plan, compare, export and evaluate context extensions of LLaMA-like models.

    \b
    Examples:
      rope-dist plan llama2-7b --target 16384
      rope-dist export hf ./my-model --target 16384 -o my-model-16k
      rope-dist COMMAND --help
    """


app.command("plan", cls=Command)(plan.run)
app.command("compare", cls=Command)(compare.run)
app.command("verify", cls=Command)(verify.run)
app.command("doctor", cls=Command)(doctor.run)
app.command("bench", cls=Command)(bench.run)
app.command("demo", cls=Command)(demo.run)
app.command("info", cls=Command)(info.run)
app.command("run", cls=run_script.RunCommand)(run_script.run)
app.add_typer(export.app, name="export")
app.add_typer(eval.app, name="eval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (engines differ), 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    done = run(app, arguments or ["--help"], "rope-dist")
    # A user's script runs out here, where its errors are its own.
    return done() if isinstance(done, Script) else done
