"""``rope-dist doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import options
from .runner import quieten


def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Directory, config.json, GGUF file, or hub id.")
    ],
    as_json: options.Json = False,
) -> None:
    """Show what each engine computes from a checkpoint, and where engines differ.

    No plan is needed: the rotary type as read, its factors, the scaling of cos and sin, and the context length, in
    transformers 4 and 5, vLLM, SGLang, mlx-lm, TensorRT-LLM, ExLlamaV3 and llama.cpp. Exit code 0 if all that are known
    compute the same, 1 if they differ, 2 for bad input.

    \b
    Examples:
      rope-dist doctor ./my-model
      rope-dist doctor Qwen/Qwen3-8B --json
      rope-dist doctor model.gguf
    """
    from ..export import doctor

    quieten()
    found = doctor(source)
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else found)
    if not found.agree:
        raise typer.Exit(1)
