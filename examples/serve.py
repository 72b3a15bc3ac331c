"""Extend a model, export it as a directory that stock engines load, and serve that.

    python examples/serve.py --model meta-llama/Llama-2-7b-hf --factor 4 --output llama2-16k
    python examples/serve.py --dry-run          # only the commands

The server is that of transformers (pip install 'transformers[serving]'). The directory needs nothing of this
package: vLLM and SGLang serve it by the commands that are printed.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from transformers.utils.import_utils import is_serve_available

import rope_dist
from rope_dist import export
from rope_dist.cli import options, values
from rope_dist.cli.options import flag, option
from rope_dist.cli.runner import quieten, run_script
from rope_dist.defaults import DEFAULT_STRATEGY, PACKAGED_MODEL_NAMES
from rope_dist.evaluation import load_model
from rope_dist.planning import load_config


def commands(directory: str, length: int, host: str, port: int) -> dict[str, list[str]]:
    """What serves the directory, by engine."""
    where = ["--host", host, "--port", str(port)]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", directory]
    return {
        "transformers": ["transformers", "serve", directory, *where],
        "vLLM": ["vllm", "serve", directory, "--max-model-len", str(length), *where],
        "SGLang": [*sglang, "--context-length", str(length), *where],
    }


def main(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    factor: options.Factor = None,
    target: options.Target = None,
    strategy: options.Strategy = DEFAULT_STRATEGY,
    output: Annotated[
        str, option(str, "DIR", "Folder for the extended model.", "-o", "--output")
    ] = "extended-model",
    host: Annotated[str, option(str, "NAME", "Host of the server.")] = "localhost",
    port: Annotated[int, option(values.whole(1), "N", "Port of the server.")] = 8000,
    dry_run: Annotated[bool, flag("--dry-run", "Print the commands, save and start nothing.")] = False,
) -> int:
    quieten()
    extension = options.extension(target, factor, strategy)
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: choose another --output")
    loaded, tokenizer = load_model(model, "cpu")
    plan = rope_dist.plan(loaded, **extension)
    print(f"{plan!r}\n")
    if not dry_run:
        if model not in PACKAGED_MODEL_NAMES:
            # Loaded on a CPU the weights are float32: saved as they were, they keep their size.
            loaded.to(load_config(model).dtype or loaded.dtype)
        # An empty folder may be there.
        export.hf(loaded, plan, folder, force=True)
        tokenizer.model_max_length = max(tokenizer.model_max_length, plan.target_length)
        tokenizer.save_pretrained(folder)
        print(f"exported to {output}")

    serving = commands(output, plan.target_length, host, port)
    for engine, command in serving.items():
        print(f"{engine + ':':14}{shlex.join(command)}")
    if dry_run:
        return 0
    if not is_serve_available():
        print("transformers serve is not installed: pip install 'transformers[serving]'")
        return 0
    # The server of this interpreter, wherever its command is.
    return subprocess.call(
        [sys.executable, "-m", "transformers.cli.transformers", *serving["transformers"][1:]]
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
