"""``rope-dist demo``."""

from __future__ import annotations

from typing import Annotated

from ..defaults import CORPUS_NAMES, DEMO_STRATEGIES, PACKAGED_MODEL_NAMES
from . import options, values
from .options import option


def run(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    text: options.Text = CORPUS_NAMES[0],
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    minutes: Annotated[float, option(values.positive, "M", "Approximate duration.")] = 4.0,
    tokens: Annotated[
        int | None, option(values.tokens, "N", "Text length (default: 1.5, or 1.375 x trained length).")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        option(
            values.stock_or_strategy,
            "NAME...",
            f"stock and strategies (default: {' '.join(DEMO_STRATEGIES)}, the last if there is time).",
        ),
    ] = None,
    factor: Annotated[
        float, option(values.scaling_factor, "S", "Scaling factor: target / trained length.")
    ] = 2.0,
    output: Annotated[
        str, option(str, "DIR", "Folder for the plot and the results.", "-o", "--output")
    ] = "rope-dist-demo",
) -> None:
    """Evaluate a small real model past its trained length.

    Prints the paper's Table 3, then perplexity by position with the model's own frequencies, with auto and with
    DPRoPE. The text length follows from the speed of the machine.

    \b
    Examples:
      rope-dist demo
      rope-dist demo --model ./my-model --text book.txt --tokens 16384 --factor 4 -o results
    """
    from ..demo import run as demo

    demo(
        model_name=model,
        text=text,
        tokens=tokens,
        strategies=strategies or None,
        factor=factor,
        minutes=minutes,
        output=output,
        device=device,
        dtype=dtype,
    )
