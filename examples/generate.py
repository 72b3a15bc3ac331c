"""Continue a text that is longer than the model was trained on.

python examples/generate.py --quick                                    # a short prompt, under a minute on a CPU
python examples/generate.py                                            # 10240 tokens, past SmolLM2's 8192
python examples/generate.py --model meta-llama/Llama-2-7b-hf --factor 4 --text book.txt --tokens 16000
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from command_line import Parser, at_least_one, extension, quieten, run
from transformers import TextStreamer

import rope_dist
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


def build_parser() -> Parser:
    parser = Parser("Continue a text that is longer than the model was trained on.")
    parser.add_argument(
        "--text", default="python", metavar="NAME", help="corpus or text file (default: the Python reference)"
    )
    parser.add_argument(
        "--tokens", type=at_least_one, help="of the text to read (default: 1.25 times the trained length)"
    )
    parser.add_argument("--new-tokens", type=at_least_one, help="to write at most (default: 64)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", help="e.g. cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="read 256 tokens and write 16")
    return parser


def main(parsed: argparse.Namespace) -> None:
    quieten()
    if parsed.temperature < 0:
        raise ValueError(f"--temperature must be at least 0, got {parsed.temperature:g}")
    title, text = load_text(parsed.text)
    device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(parsed.model, device)
    plan = rope_dist.enable(model, **extension(parsed)).plan

    tokens = parsed.tokens or (256 if parsed.quick else plan.original_length * 5 // 4)
    new_tokens = parsed.new_tokens or (16 if parsed.quick else 64)
    if tokens + new_tokens > plan.target_length:
        raise ValueError(
            f"{tokens} tokens and {new_tokens} new ones are more than the target of {plan.target_length}: "
            "give fewer, or a larger --factor"
        )
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(
            f"{title} has only {ids.shape[1]} tokens of the {tokens} to read: give a longer --text"
        )

    print(f"{plan!r}\n\n{tokens} tokens of {title}; the model was trained on {plan.original_length}:\n")
    print(f"... {tokenizer.decode(ids[0, -32:])}[continues here]", end="", flush=True)
    torch.manual_seed(parsed.seed)
    streamer = TimedStreamer(tokenizer)
    sampling = (
        {"do_sample": True, "temperature": parsed.temperature} if parsed.temperature else {"do_sample": False}
    )
    ids = ids.to(device)
    begin = time.perf_counter()
    with explain_out_of_memory(f"reading {tokens} tokens", "give fewer --tokens, or another --device"):
        model.generate(
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
    run(main, build_parser())
