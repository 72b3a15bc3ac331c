"""``rope-dist run``."""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import Annotated, Any

import typer

from ..defaults import DEFAULT_STRATEGY, TABLES
from . import options, values
from .options import choice, flag, option
from .runner import Command
from .script import Script


class RunCommand(Command):
    """A command whose options end at its first argument, or after ``-m``: what follows is the script's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {
            n: p for p in self.get_params(ctx) for n in (*p.opts, *p.secondary_opts) if n.startswith("-")
        }
        own, rest = [], deque(args)
        while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
            own.append(rest.popleft())
            if own[-1] == "-m":
                break
            if (param := known.get(own[-1])) is not None and not getattr(param, "is_flag", False) and rest:
                own.append(rest.popleft())
        if rest and rest[0] == "--":
            rest.popleft()
        return super().parse_args(ctx, [*own, "--", *rest])


def run(
    script: Annotated[
        list[str], typer.Argument(metavar="SCRIPT [ARGS]...", help="Script and its arguments.")
    ],
    module: Annotated[bool, flag("-m", "SCRIPT is the name of a module, as after python -m.")] = False,
    target: options.Target = None,
    factor: options.Factor = None,
    plan: Annotated[
        str | None, option(values.readable_file, "FILE", "Plan, from rope-dist plan -o, instead of those.")
    ] = None,
    original: Annotated[
        int | None,
        option(values.tokens, "TOKENS", "Trained context length, where the config says it wrongly."),
    ] = None,
    strategy: Annotated[
        str | None, option(values.strategy, "NAME", f"Strategy of the plan (default: {DEFAULT_STRATEGY}).")
    ] = None,
    settings: options.Settings = None,
    dynamic: Annotated[
        bool | None,
        typer.Option(
            "--dynamic/--static",
            help="A plan that grows with each text, or one for all lengths (default: dynamic where it can be).",
        ),
    ] = None,
    stages: Annotated[
        Any, option(values.lengths, "LENGTHS", "Lengths of the stages of a dynamic plan, as 8192,16384.")
    ] = None,
    tables: Annotated[
        str, choice(TABLES, "Dtype of cos and sin; model: that of the activations, as vLLM rotates.")
    ] = TABLES[0],
) -> Script:
    """Run a Python script in which every transformers model is built enabled.

    The script is run as python SCRIPT ARGS would, after rope_dist.enable(). Without --target, --factor or --plan models
    keep their frequencies, and only the kernels are swapped.

    \b
    Examples:
      rope-dist run --factor 2 train.py --learning_rate 1e-5
      python -m rope_dist run --target 16384 --strategy yarn --set beta_fast=16 -m my.trainer --epochs 1
      torchrun --nproc-per-node 8 -m rope_dist run --plan plan.json --tables model train.py
      accelerate launch -m rope_dist run --factor 4 --static train.py
    """
    made = Script(script[0], script[1:], module)
    made.check()
    options.at_most_one(target=target, factor=factor, plan=plan)
    options.at_most_one(stages=stages, plan=plan)
    of_a_new_plan = {"strategy": strategy, "set": settings or None, "original": original}
    given = [f"--{name}" for name, value in of_a_new_plan.items() if value is not None]
    if given and target is None and factor is None and stages is None:
        raise ValueError(f"give --target or --factor with {', '.join(given)}")
    checked = options.settings(strategy or DEFAULT_STRATEGY, settings)

    from ..dynamic import load_plan
    from ..hf import enable

    enable(
        target_length=target,
        factor=factor,
        plan=load_plan(plan) if plan else None,
        original_length=original,
        strategy=strategy or DEFAULT_STRATEGY,
        settings=checked,
        dynamic=dynamic,
        stages=stages,
        tables=tables,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"rope-dist: enables every model that {made.target} builds", file=sys.stderr)
    return made
