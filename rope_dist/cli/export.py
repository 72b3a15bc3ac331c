"""``rope-dist export``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..defaults import DEFAULT_STRATEGY, ENGINE_NAMES
from . import values
from .options import add_length, add_strategy

DESCRIPTION = (
    "Write the extended model for engines that do not have this package. A file or directory appears whole, verified "
    "and never over another without --force; the source is not changed."
)
HF_EXAMPLES = """examples:
  rope-dist export hf ./my-model --target 16384 -o my-model-16k
  rope-dist export hf ./my-model --plan plan.json --engine vllm --link -o my-model-16k"""
GGUF_EXAMPLES = """examples:
  rope-dist export gguf my-model.gguf --target 16384 -o my-model-16k.gguf"""
VLLM_EXAMPLES = """examples:
  rope-dist export vllm --plan plan.json
  rope-dist export vllm ./my-model --factor 4"""
EXAMPLES = "\n".join(["examples:", *HF_EXAMPLES.splitlines()[1:2], *GGUF_EXAMPLES.splitlines()[1:]])


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export",
        help="write the extended model for transformers, vLLM, llama.cpp, ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", parser_class=type(parser))
    hf = formats.add_parser(
        "hf",
        help="write a Hugging Face directory",
        description="Write a directory for transformers, vLLM, SGLang, ...",
        epilog=HF_EXAMPLES,
    )
    hf.add_argument("source", metavar="DIR", help="the model's directory (config.json and weights)")
    _add_plan(hf)
    _add_output(hf)
    hf.add_argument("--config-only", action="store_true", help="write everything but the weights")
    hf.add_argument("--link", action="store_true", help="make hard links to the weights instead of copies")
    add_engines(hf)
    hf.set_defaults(run=_hf, check=_check)
    gguf = formats.add_parser(
        "gguf",
        help="write a GGUF file for llama.cpp",
        description="Write a copy of a GGUF file with the plan's factors.",
        epilog=GGUF_EXAMPLES,
    )
    gguf.add_argument("source", metavar="FILE", help="the model as GGUF, of any quantisation")
    _add_plan(gguf)
    _add_output(gguf)
    gguf.set_defaults(run=_gguf, check=_check)
    vllm = formats.add_parser(
        "vllm",
        help="print arguments for vllm serve",
        description="Print arguments of vllm serve; no file is written.",
        epilog=VLLM_EXAMPLES,
    )
    vllm.add_argument(
        "source",
        metavar="MODEL",
        nargs="?",
        type=values.model,
        help="what to plan from and to check: a preset, a directory or a hub id (may be left out with --plan)",
    )
    _add_plan(vllm)
    vllm.set_defaults(run=_vllm, check=_check)


def add_engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        action="append",
        type=values.engine,
        default=[],
        metavar="NAME",
        help=f"refuse what this engine cannot represent ({', '.join(ENGINE_NAMES)}); repeatable",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--plan",
        type=values.readable_file,
        metavar="FILE",
        help="plan to export, as rope-dist plan -o writes it",
    )
    add_length(given)
    add_strategy(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="path to write")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def _check(parsed: argparse.Namespace) -> None:
    if parsed.plan is None and parsed.source is None:
        raise ValueError("give a MODEL to plan from, or --plan FILE")
    if parsed.plan is not None and parsed.strategy is not None:
        raise ValueError("--strategy goes with --target and --factor; a plan has its own")


def _plan(parsed: argparse.Namespace, **model: Any) -> Any:
    from ..planning import RopePlan, plan

    if parsed.plan is not None:
        return RopePlan.load(parsed.plan)
    return plan(
        target_length=parsed.target,
        factor=parsed.factor,
        strategy=parsed.strategy or DEFAULT_STRATEGY,
        **model or {"source": parsed.source},
    )


def _hf(parsed: argparse.Namespace) -> None:
    from ..export import hf, verify

    plan = _plan(parsed)
    out = hf(
        parsed.source,
        plan,
        parsed.output,
        config_only=parsed.config_only,
        link=parsed.link,
        engines=parsed.engine,
        force=parsed.force,
    )
    print(f"{verify(out, plan)}\n\nwrote {out}")


def _gguf(parsed: argparse.Namespace) -> None:
    from ..export import gguf, gguf_rope, verify

    plan = _plan(parsed, **({} if parsed.plan else gguf_rope(parsed.source)))
    out = gguf(parsed.source, plan, parsed.output, force=parsed.force)
    print(f"{verify(out, plan)}\n\nwrote {out}")


def _vllm(parsed: argparse.Namespace) -> None:
    from ..export import vllm_arguments
    from ..export.stock import read_config
    from ..presets import PRESETS

    plan = _plan(parsed)
    known = parsed.source is not None and parsed.source not in PRESETS
    if parsed.source is None:
        print("not checked against a model: give MODEL too", file=sys.stderr)
    print(vllm_arguments(plan, read_config(parsed.source) if known else None))
