"""Extend a model, export it as a directory that stock engines read, and serve that.

    python examples/serve.py --model meta-llama/Llama-2-7b-hf --factor 4 --output llama2-16k
    python examples/serve.py --dry-run          # only the commands

The server is that of transformers (pip install 'transformers[serving]'). The directory needs nothing of this
package: vLLM and SGLang serve it by the commands that are printed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from command_line import Parser, at_least_one, extension, quieten, run
from transformers.utils.import_utils import is_serve_available

import rope_dist
from rope_dist import export
from rope_dist.evaluation import PACKAGED_MODELS, load_model
from rope_dist.planning import load_config


def build_parser() -> Parser:
    parser = Parser("Extend a model, export it as a directory that stock engines read, and serve that.")
    parser.add_argument(
        "-o", "--output", default="extended-model", metavar="DIR", help="for the model (default: %(default)s)"
    )
    parser.add_argument("--host", default="localhost", help="default: %(default)s")
    parser.add_argument("--port", type=at_least_one, default=8000, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, save and start nothing")
    return parser


def commands(directory: str, length: int, host: str, port: int) -> dict[str, list[str]]:
    """What serves the directory, by engine."""
    where = ["--host", host, "--port", str(port)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", directory]
    return {
        "transformers": ["transformers", "serve", directory, *where],
        "vLLM": ["vllm", "serve", directory, "--max-model-len", str(length), *where],
        "SGLang": [*sglang, "--context-length", str(length), *where],
    }


def main(parsed: argparse.Namespace) -> int:
    quieten()
    output = Path(parsed.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already and not an empty folder: choose another --output")
    model, tokenizer = load_model(parsed.model, "cpu")
    plan = rope_dist.plan(model, **extension(parsed))
    print(f"{plan!r}\n")
    if not parsed.dry_run:
        if parsed.model not in PACKAGED_MODELS:
            # Read on a CPU the weights are float32: written back as they were, they keep their size.
            model.to(load_config(parsed.model).dtype or model.dtype)
        # An empty folder may be there.
        export.hf(model, plan, output, force=True)
        tokenizer.model_max_length = max(tokenizer.model_max_length, plan.target_length)
        tokenizer.save_pretrained(output)
        print(f"exported to {output}")

    serving = commands(parsed.output, plan.target_length, parsed.host, parsed.port)
    for engine, command in serving.items():
        print(f"{engine + ':':14}{shlex.join(command)}")
    if parsed.dry_run:
        return 0
    if not is_serve_available():
        print("transformers serve is not installed: pip install 'transformers[serving]'")
        return 0
    # The server of this interpreter, wherever its command is.
    return subprocess.call(
        [sys.executable, "-m", "transformers.cli.transformers", *serving["transformers"][1:]]
    )


if __name__ == "__main__":
    run(main, build_parser())
