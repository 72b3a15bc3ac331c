"""``rope-dist export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..defaults import DEFAULT_STRATEGY, PRESETS
from . import options, values
from .options import flag, option
from .runner import Command, make_app

PlanFile = Annotated[str | None, option(values.readable_file, "FILE", "Plan, from rope-dist plan -o.")]
Strategy = Annotated[
    str | None, option(values.strategy, "NAME", f"Strategy, without a plan (default: {DEFAULT_STRATEGY}).")
]
Output = Annotated[str, option(str, "PATH", "Path to write.", "-o", "--output")]
Force = Annotated[bool, flag("--force", "Replace the output if it exists.")]

app = make_app()


@app.callback()
def _export() -> None:
    """Write the extended model for vLLM, llama.cpp, ...

    The engines do not need this package. A file or directory appears whole, verified and never over another without
    --force; the source is not changed.

    \b
    Examples:
      rope-dist export hf ./my-model --target 16384 -o my-model-16k
      rope-dist export gguf my-model.gguf --target 16384 -o my-model-16k.gguf
    """


@app.command("hf", cls=Command)
def _hf(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Directory with config.json and weights.")],
    output: Output,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
    force: Force = False,
    config_only: Annotated[bool, flag("--config-only", "Write everything but the weights.")] = False,
    link: Annotated[bool, flag("--link", "Make hard links to the weights instead of copies.")] = False,
    engine: options.Engines = None,
) -> None:
    """Write a Hugging Face directory (transformers, vLLM, SGLang).

    \b
    Examples:
      rope-dist export hf ./my-model --target 16384 -o my-model-16k
      rope-dist export hf ./my-model --plan plan.json --engine vllm --link -o my-model-16k
    """
    made = _plan(source, plan, target, factor, strategy)

    from ..export import hf, verify

    out = hf(source, made, output, config_only=config_only, link=link, engines=engine or [], force=force)
    print(f"{verify(out, made)}\n\nwrote {out}")


@app.command("gguf", cls=Command)
def _gguf(
    source: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file, of any quantisation.")],
    output: Output,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
    force: Force = False,
) -> None:
    """Write a copy of a GGUF file with the plan's factors, for llama.cpp.

    \b
    Examples:
      rope-dist export gguf my-model.gguf --target 16384 -o my-model-16k.gguf
    """
    made = _plan(source, plan, target, factor, strategy, gguf=True)

    from ..export import gguf, verify

    out = gguf(source, made, output, force=force)
    print(f"{verify(out, made)}\n\nwrote {out}")


@app.command("vllm", cls=Command)
def _vllm(
    source: options.Source = None,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
) -> None:
    """Print arguments for vllm serve; no file is written.

    \b
    Examples:
      rope-dist export vllm --plan plan.json
      rope-dist export vllm ./my-model --factor 4
    """
    made = _plan(source, plan, target, factor, strategy)

    from ..export import vllm_arguments
    from ..export.stock import read_config

    if source is None:
        print("not checked against a model: give MODEL too", file=sys.stderr)
    config = None if source is None or source in PRESETS else read_config(Path(source))
    print(vllm_arguments(made, config))


def _plan(
    source: Any,
    path: str | None,
    target: int | None,
    factor: float | None,
    strategy: str | None,
    gguf: bool = False,
) -> Any:
    """The plan of the file, or a new one of the model; ``ValueError`` for neither or both, without torch."""
    options.at_most_one(True, plan=path, target=target, factor=factor)
    if path is None and source is None:
        raise ValueError("give a MODEL to plan from, or --plan FILE")
    if path is not None and strategy is not None:
        raise ValueError("--strategy goes with --target and --factor; a plan has its own")

    from ..export import gguf_rope
    from ..planning import RopePlan, plan

    if path is not None:
        return RopePlan.load(path)
    rope = gguf_rope(source) if gguf else {"source": source}
    return plan(target_length=target, factor=factor, strategy=strategy or DEFAULT_STRATEGY, **rope)
