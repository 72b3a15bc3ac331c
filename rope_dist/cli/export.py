"""``rope-dist export``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

DESCRIPTION = (
    "Write the extended model for engines that do not have this package. A file or directory appears whole, verified "
    "and never over another without --force; the source is not changed."
)


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "export", help="the extended model for transformers, vLLM, llama.cpp, ...", description=DESCRIPTION
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", parser_class=type(parser))
    hf = formats.add_parser(
        "hf", help="a Hugging Face directory", description="A directory for transformers, vLLM, SGLang, ..."
    )
    hf.add_argument("source", metavar="DIR", help="the model's directory (config.json and weights)")
    _add_plan(hf)
    _add_output(hf)
    hf.add_argument("--config-only", action="store_true", help="everything but the weights")
    hf.add_argument("--link", action="store_true", help="hard links to the weights in place of copies")
    add_engines(hf)
    hf.set_defaults(run=_hf)
    gguf = formats.add_parser(
        "gguf", help="a GGUF file for llama.cpp", description="A copy of a GGUF file with the plan's factors."
    )
    gguf.add_argument("source", metavar="FILE", help="the model as GGUF, of any quantisation")
    _add_plan(gguf)
    _add_output(gguf)
    gguf.set_defaults(run=_gguf)
    vllm = formats.add_parser(
        "vllm",
        help="arguments for vllm serve",
        description="Print arguments of vllm serve; no file is written.",
    )
    vllm.add_argument(
        "source", metavar="MODEL", nargs="?", help="to plan from and to check: a directory or a hub id"
    )
    _add_plan(vllm)
    vllm.set_defaults(run=_vllm)


def add_engines(parser: argparse.ArgumentParser) -> None:
    from ..export import ENGINES

    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME",
        help=f"it is for this engine: refuse what that cannot represent ({', '.join(ENGINES)}); repeatable",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--plan", metavar="FILE", help="as rope-dist plan -o writes it")
    given.add_argument("--target", type=int, metavar="TOKENS", help="or plan: length to read")
    given.add_argument("--factor", type=float, help="or plan: its multiple of the trained length")
    parser.add_argument("--strategy", metavar="NAME", help="of --target and --factor (default: dprope)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="what to write")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")


def _plan(parsed: argparse.Namespace, **model: Any) -> Any:
    from ..planning import RopePlan, plan

    if parsed.plan is not None:
        if parsed.strategy is not None:
            raise ValueError("--strategy is of --target and --factor; a plan has its own")
        return RopePlan.load(parsed.plan)
    return plan(
        target_length=parsed.target,
        factor=parsed.factor,
        strategy=parsed.strategy or "dprope",
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
