"""Continue a text that is longer than the model was trained on.

python examples/generate.py --quick                    # a short prompt, under a minute on a CPU
python examples/generate.py                            # 10240 tokens, past SmolLM2's 8192
python examples/generate.py --model meta-llama/Llama-2-7b-hf --factor 4 --text book.txt --tokens 16000
"""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import torch
from transformers import TextStreamer

import rope_dist
from rope_dist.cli import options, values
from rope_dist.cli.options import flag, option
from rope_dist.cli.runner import quieten, run_script
from rope_dist.defaults import CORPUS_NAMES, DEFAULT_STRATEGY, PACKAGED_MODEL_NAMES
from rope_dist.evaluation import load_model, load_text
from rope_dist.evaluation.memory import explain_out_of_memory


class TimedStreamer(TextStreamer):
    """Prints the continuation as it comes and notes when each token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)


def main(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    factor: options.Factor = None,
    target: options.Target = None,
    strategy: options.Strategy = DEFAULT_STRATEGY,
    text: options.Text = CORPUS_NAMES[0],
    tokens: Annotated[
        int | None, option(values.whole(1), "N", "Prompt length (default: 1.25 x trained length).")
    ] = None,
    new_tokens: Annotated[int | None, option(values.whole(1), "N", "Longest answer (default: 64).")] = None,
    temperature: Annotated[float, option(values.not_negative, "T", "0: greedy decoding.")] = 0.0,
    seed: Annotated[int, option(values.seed, "N", "Seed of sampling.")] = 0,
    device: options.Device = None,
    quick: Annotated[bool, flag("--quick", "256 tokens and 16 new ones.")] = False,
) -> None:
    quieten()
    extension = options.extension(target, factor, strategy)
    title, content = load_text(text)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load_model(model, device)
    plan = rope_dist.enable(loaded, **extension).plan

    tokens = tokens or (256 if quick else plan.original_length * 5 // 4)
    new_tokens = new_tokens or (16 if quick else 64)
    if tokens + new_tokens > plan.target_length:
        raise ValueError(
            f"{tokens} tokens and {new_tokens} new ones are more than the target of {plan.target_length}: "
            "give fewer, or a larger --factor"
        )
    ids = tokenizer(content, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(
            f"{title} has only {ids.shape[1]} tokens of the {tokens} to read: give a longer --text"
        )

    print(f"{plan!r}\n\n{tokens} tokens of {title}; the model was trained on {plan.original_length}:\n")
    print(f"... {tokenizer.decode(ids[0, -32:])}[continues here]", end="", flush=True)
    torch.manual_seed(seed)
    streamer = TimedStreamer(tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = ids.to(device)
    begin = time.perf_counter()
    with explain_out_of_memory(f"reading {tokens} tokens", "give fewer --tokens, or another --device"):
        loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=streamer, **sampling
        )
    first, *others = streamer.times
    print(
        f"\nread {tokens} tokens in {first - begin:.1f} s ({tokens / (first - begin):.0f} tokens/s)", end=""
    )
    if others:
        print(f", wrote {len(others) + 1} at {len(others) / (others[-1] - first):.1f} tokens/s", end="")
    print()


if __name__ == "__main__":
    sys.exit(run_script(main))
