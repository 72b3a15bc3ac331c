"""``rope-dist export``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..defaults import DEFAULT_STRATEGY, FLAG_ENGINES, FORM_NAMES, PRESETS
from ..model_names import known_name
from . import options, values
from .options import flag, option
from .runner import Command, make_app

PlanFile = Annotated[str | None, option(values.readable_file, "FILE", "Plan, from rope-dist plan -o.")]
Strategy = Annotated[
    str | None, option(values.strategy, "NAME", f"Strategy, without a plan (default: {DEFAULT_STRATEGY}).")
]
Dynamic = Annotated[
    bool, flag("--dynamic", "Write the trained frequencies too, for texts of up to the trained length.")
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
    settings: options.Settings = None,
    dynamic: Dynamic = False,
    force: Force = False,
    config_only: Annotated[bool, flag("--config-only", "Write everything but the weights.")] = False,
    link: Annotated[bool, flag("--link", "Make hard links to the weights instead of copies.")] = False,
    engine: options.Engines = None,
    form: Annotated[
        str | None,
        option(
            values.one_of("form", FORM_NAMES),
            "FORM",
            "native (yarn, linear, llama3, a new base) or longrope (default: native where it is one).",
        ),
    ] = None,
    force_engine: Annotated[
        bool, flag("--force-engine", "Write it even where an --engine does not follow the plan.")
    ] = False,
    push_to_hub: Annotated[
        str | None, option(str, "USER/NAME", "Upload the directory to this repository on the hub.")
    ] = None,
    private: Annotated[bool, flag("--private", "Make that repository a private one.")] = False,
    base_model: Annotated[
        str | None,
        option(str, "USER/NAME", "Hub id of the source, for the model card, where DIR does not tell."),
    ] = None,
    evaluation: Annotated[
        str | None,
        option(
            values.readable_file, "FILE", "perplexity.json of rope-dist eval perplexity, for the model card."
        ),
    ] = None,
) -> None:
    """Write a Hugging Face directory (transformers, vLLM, SGLang), with a model card.

    Nothing is uploaded without --push-to-hub; the token is that of hf auth login.

    \b
    Examples:
      rope-dist export hf ./my-model --target 16384 -o my-model-16k
      rope-dist export hf ./my-model --plan plan.json --engine vllm --link -o my-model-16k
      rope-dist export hf ./my-model --dynamic --target 16384 --set attention_factor=1 -o my-model-16k
    """
    if private and push_to_hub is None:
        raise ValueError("--private goes with --push-to-hub")
    if source.endswith(".gguf"):
        raise ValueError(f"{source} is a GGUF file: rope-dist export gguf writes these")
    made = _plan(source, plan, target, factor, strategy, settings, dynamic=dynamic)

    from ..export import hf, verify

    written: dict[str, Any] = {
        "config_only": config_only,
        "link": link,
        "force": force,
        "force_engine": force_engine,
        "form": form,
    }
    card: dict[str, Any] = {
        "push_to_hub": push_to_hub,
        "private": private,
        "base_model": base_model,
        "evaluation": evaluation,
    }
    out = hf(source, made, output, engines=engine or [], **written, **card)
    print(f"{verify(out, made)}\n\nwrote {out}{_remark(made)}")
    if push_to_hub is not None:
        print(f"uploaded to {push_to_hub}")


@app.command("gguf", cls=Command)
def _gguf(
    source: Annotated[str, typer.Argument(metavar="FILE", help="GGUF file, of any quantisation.")],
    output: Output,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
    settings: options.Settings = None,
    dynamic: Dynamic = False,
    force: Force = False,
) -> None:
    """Write a copy of a GGUF file with the plan, for llama.cpp.

    \b
    Examples:
      rope-dist export gguf my-model.gguf --target 16384 -o my-model-16k.gguf
    """
    made = _plan(source, plan, target, factor, strategy, settings, dynamic=dynamic, gguf=True)

    from ..export import gguf, verify

    out = gguf(source, made, output, force=force)
    print(f"{verify(out, made)}\n\nwrote {out}{_remark(made)}")


@app.command("flags", cls=Command)
def _flags(
    engine: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE",
            help=f"One of {', '.join(FLAG_ENGINES)}.",
            parser=values.one_of("engine", FLAG_ENGINES),
        ),
    ],
    source: options.Source = None,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
    settings: options.Settings = None,
) -> None:
    """Print the flags with which an engine serves the unchanged model; no file is written.

    For llama-server MODEL is the GGUF file, or the directory that it was converted from.

    \b
    Examples:
      rope-dist export flags vllm ./my-model --factor 4
      rope-dist export flags sglang ./my-model --plan plan.json
      rope-dist export flags llama-server my-model.gguf --target 16384 --strategy auto-yarn
    """
    _print_flags(engine, source, plan, target, factor, strategy, settings)


@app.command("vllm", cls=Command)
def _vllm(
    source: options.Source = None,
    plan: PlanFile = None,
    target: options.Target = None,
    factor: options.Factor = None,
    strategy: Strategy = None,
    settings: options.Settings = None,
) -> None:
    """Print arguments for vllm serve: the same as export flags vllm.

    \b
    Examples:
      rope-dist export vllm --plan plan.json
      rope-dist export vllm ./my-model --factor 4
    """
    _print_flags("vllm", source, plan, target, factor, strategy, settings)


def _print_flags(
    engine: str,
    source: Any,
    plan: str | None,
    target: int | None,
    factor: float | None,
    strategy: str | None,
    settings: Iterable[tuple[str, Any]] | None,
) -> None:
    gguf = str(source).endswith(".gguf")
    if gguf and engine != "llama-server":
        raise ValueError(
            f"flags of {engine} are for a directory with a config.json, and {source} is a GGUF file"
        )
    made = _plan(source, plan, target, factor, strategy, settings, gguf=gguf)

    from ..export import flags
    from ..export.flags import GGUF_NAMES
    from ..export.stock import read_config

    if source is None and engine != "llama-server":
        print("not checked against a model: give MODEL too", file=sys.stderr)
    config = architecture = None
    if source is not None and known_name(source, PRESETS) is not None:
        architecture = GGUF_NAMES.get(PRESETS[source][1])
    elif source is not None and not gguf:
        config = read_config(Path(source))
    print(flags(engine, made, config, architecture=architecture, gguf=source if gguf else None))


def _plan(
    source: Any,
    path: str | None,
    target: int | None,
    factor: float | None,
    strategy: str | None,
    settings: Iterable[tuple[str, Any]] | None,
    *,
    dynamic: bool = False,
    gguf: bool = False,
) -> Any:
    """The plan of the file, or a new one of the model; ``ValueError`` for neither or both, without torch."""
    options.at_most_one(True, plan=path, target=target, factor=factor)
    if path is None and source is None:
        raise ValueError("give a MODEL to plan from, or --plan FILE")
    for name, given in (("strategy", strategy), ("set", settings)):
        if path is not None and given:
            raise ValueError(f"--{name} goes with --target and --factor; a plan has its own")
    strategy = strategy or DEFAULT_STRATEGY
    checked = options.settings(strategy, settings)

    from ..dynamic import DynamicPlan, dynamic_plan, load_plan
    from ..export import gguf_rope
    from ..planning import plan

    if path is not None:
        loaded = load_plan(path)
        if dynamic and not isinstance(loaded, DynamicPlan):
            raise ValueError(f"{path} is a static plan: make a dynamic one with rope-dist plan --dynamic")
        last = loaded.stages[-1] if isinstance(loaded, DynamicPlan) else loaded
        for note in last.notes:
            print(f"note: {note}", file=sys.stderr)
        return loaded
    rope = gguf_rope(source) if gguf else {"source": source}
    make: Callable[..., Any] = dynamic_plan if dynamic else plan
    return make(target_length=target, factor=factor, strategy=strategy, settings=checked, **rope)


def _remark(made: Any) -> str:
    """What a dynamic plan becomes in stock engines."""
    first, *_, last = getattr(made, "stages", None) or (made, made)
    if first is last:
        return ""
    return (
        f": as trained up to {first.target_length} tokens, past it by the plan for {last.target_length}; docs/export.md"
        " says when each engine changes"
    )
