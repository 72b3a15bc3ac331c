"""``rope-dist bench``."""

from __future__ import annotations

import json
from typing import Annotated

from . import options, values
from .options import choice, option

LENGTHS = [8192, 16384]


def run(
    device: options.Device = None,
    tokens: Annotated[list[int], option(values.whole(1), "N...", "Sequence lengths.")] = LENGTHS,
    dtype: Annotated[
        str, choice(("bfloat16", "float16", "float32"), "Dtype of queries and keys.")
    ] = "bfloat16",
    seconds: Annotated[float, option(values.positive, "S", "Approximate duration.")] = 30.0,
    as_json: options.Json = False,
) -> None:
    """Benchmark the rotary embedding against Hugging Face's.

    Times one Llama-3-8B layer on this machine, and a copy of the same bytes.

    \b
    Examples:
      rope-dist bench
      rope-dist bench --device cuda:0 --tokens 4096 32768 --dtype float16
    """
    from ..bench import bench, text

    result = bench(tokens=tokens, dtype=dtype, device=device, seconds=seconds)
    print(json.dumps(result, indent=2) if as_json else text(result))
