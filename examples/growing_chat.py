"""A chat that grows through the trained length: how well and how fast each turn is read, by several plans.

python examples/growing_chat.py --quick              # 256 tokens, all within the trained length: does it run?
python examples/growing_chat.py --dtype bfloat16     # SmolLM2 from 6144 to 12288 tokens, past its 8192
python examples/growing_chat.py --model meta-llama/Llama-2-7b-hf --factor 4 --text book.txt --tokens 12000

The text comes in turns, as the messages of a user do, and each model keeps its key/value cache from one to the next:
the unchanged model, a static plan for the target length, a dynamic plan, which corrects cached keys where the text
outgrows a stage, and Hugging Face's dynamic NTK scaling, which leaves them as they are.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import rope_dist
from rope_dist.cli import options, values
from rope_dist.cli.options import flag, option
from rope_dist.cli.runner import quieten, run_script
from rope_dist.defaults import CORPUS_NAMES, DEFAULT_STRATEGY, PACKAGED_MODEL_NAMES
from rope_dist.evaluation import load_model, load_text
from rope_dist.evaluation.memory import check_memory, explain_out_of_memory
from rope_dist.evaluation.models import cache_option
from rope_dist.evaluation.progress import Progress, work

COLUMNS = ("stock", "static", "dynamic", "HF dynamic")
OPENING = 1024
"""Tokens a forward pass of the opening."""


@dataclass(frozen=True)
class Turn:
    """A forward pass over the tokens ``start <= i < end``.

    Attributes:
        nll: sum of the losses of the tokens that follow each of them, nats.
        seconds: of the forward pass.
    """

    start: int
    end: int
    nll: float
    seconds: float


@torch.inference_mode()
def read(model: PreTrainedModel, ids: torch.Tensor, opening: int, turn: int) -> Iterator[Turn]:
    """Read ``ids [1, S]`` with one key/value cache: ``opening`` tokens, then ``turn`` at a time."""
    cache = DynamicCache(config=model.config)
    starts = [*range(0, opening, OPENING), *range(opening, ids.shape[1] - 1, turn)]
    for start, end in zip(starts, [*starts[1:], ids.shape[1] - 1], strict=True):
        begin = time.perf_counter()
        # Logits take more memory than anything else: of the opening, which is not scored, only one.
        logits = model(
            ids[:, start:end],
            **cache_option(model, cache),
            use_cache=True,
            logits_to_keep=end - start if start >= opening else 1,
        ).logits[0]
        following = ids[0, end - logits.shape[0] + 1 : end + 1]
        nll = torch.nn.functional.cross_entropy(logits.float(), following, reduction="sum").item()
        yield Turn(start, end, nll, time.perf_counter() - begin)


def hf_dynamic(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """The same weights with Hugging Face's dynamic NTK scaling in the config."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic", "factor": factor}
    made = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    return made.eval()


def tables(turns: dict[str, list[Turn]], opening: int, width: int) -> str:
    """Perplexity and tokens a second, a row for each ``width`` tokens past the opening."""
    end = next(iter(turns.values()))[-1].end
    perplexity, speed = [], []
    for start in range(opening, end, width):
        row = {
            name: [t for t in read if max(start, opening) <= t.start < start + width]
            for name, read in turns.items()
        }
        tokens = {name: sum(t.end - t.start for t in part) for name, part in row.items()}
        label = f"{start} - {max(t.end for part in row.values() for t in part)}"
        losses = {name: sum(t.nll for t in part) / tokens[name] for name, part in row.items()}
        perplexity.append((label, *(f"{math.exp(loss):.2f}" for loss in losses.values())))
        seconds = {name: sum(t.seconds for t in part) for name, part in row.items()}
        speed.append((label, *(f"{tokens[name] / seconds[name]:.0f}" for name in row)))

    def table(rows: list[Any]) -> str:
        align = ["right"] * (len(turns) + 1)
        return tabulate(rows, ("tokens", *turns), disable_numparse=True, colalign=align)

    return f"perplexity of the new tokens\n\n{table(perplexity)}\n\ntokens read a second\n\n{table(speed)}"


def main(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    factor: options.Factor = None,
    target: options.Target = None,
    strategy: options.Strategy = DEFAULT_STRATEGY,
    text: options.Text = CORPUS_NAMES[0],
    opening: Annotated[
        int | None,
        option(values.whole(0), "N", "Tokens before the first turn (default: 0.75 x trained length)."),
    ] = None,
    turn: Annotated[int | None, option(values.whole(1), "N", "Tokens a turn (default: 256).")] = None,
    tokens: Annotated[
        int | None, option(values.whole(2), "N", "Tokens in all (default: 1.5 x trained length).")
    ] = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    quick: Annotated[bool, flag("--quick", "256 tokens in turns of 64.")] = False,
) -> None:
    quieten()
    extension = options.extension(target, factor, strategy)
    title, content = load_text(text)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load_model(model, device, dtype)
    plan = rope_dist.plan(loaded, **extension)
    dynamic = rope_dist.dynamic_plan(loaded, **extension)

    trained = plan.original_length
    tokens = tokens or (256 if quick else min(trained * 3 // 2, plan.target_length))
    turn = turn or (64 if quick else 256)
    opening = (0 if quick else min(trained * 3 // 4, tokens - 2)) if opening is None else opening
    if tokens > plan.target_length:
        raise ValueError(
            f"{tokens} tokens are more than the target of {plan.target_length}: give fewer, or a larger --factor"
        )
    if opening > tokens - 2:
        raise ValueError(f"no turn follows an opening of {opening} tokens in {tokens}: give more --tokens")
    ids = tokenizer(content, return_tensors="pt").input_ids[:, :tokens].to(device)
    if ids.shape[1] < tokens:
        raise ValueError(
            f"{title} has only {ids.shape[1]} tokens of the {tokens} to read: give a longer --text"
        )
    check_memory(loaded, tokens, max(turn, OPENING))

    print(f"{plan!r}\n{dynamic!r}\n")
    print(f"{tokens} tokens of {title} in turns of {turn} after {opening}; trained on {trained}\n")
    turns: dict[str, list[Turn]] = {}
    for name, applied in zip(COLUMNS, (None, plan, dynamic, None), strict=True):
        reader = hf_dynamic(loaded, plan.scale) if name == COLUMNS[-1] else loaded
        with (
            rope_dist.enable(loaded, plan=applied) if applied else nullcontext(),
            Progress(f"reading, {name}", work(loaded, 0, tokens - 1)) as progress,
            explain_out_of_memory(
                f"reading {tokens} tokens", "give fewer --tokens, or another --device or --dtype"
            ),
        ):
            turns[name] = []
            for done in read(reader, ids, opening, turn):
                progress.update(work(loaded, done.start, done.end))
                if done.start >= opening:
                    turns[name].append(done)
    print(tables(turns, opening, max(turn, (tokens - opening) // 8 // turn * turn)))


if __name__ == "__main__":
    sys.exit(run_script(main))
