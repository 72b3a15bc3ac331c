"""Extend a model and serve it.

    python examples/serve.py --model meta-llama/Llama-2-7b-hf --factor 4 --output llama2-16k
    python examples/serve.py --model meta-llama/Llama-2-7b-hf --factor 4 --dynamic
    python examples/serve.py --dry-run          # only the commands

The server is that of transformers (pip install 'transformers[serving]'). The extended model is exported to a
directory, which needs nothing of this package: vLLM and SGLang serve it by the commands that are printed.

With --dynamic nothing is exported: the server's process extends the model, by a plan that grows with the text. It
also keeps the key/value cache of the last conversation, which transformers' server does not do by itself: a request
that goes on from it reads its new tokens only, and cached keys are corrected where it outgrows a stage of the plan.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.import_utils import is_serve_available

import rope_dist
from rope_dist import export
from rope_dist.cli import options, values
from rope_dist.cli.options import flag, option
from rope_dist.cli.runner import quieten, run_script
from rope_dist.defaults import DEFAULT_STRATEGY, PACKAGED_MODEL_NAMES
from rope_dist.evaluation import load_model
from rope_dist.evaluation.models import cache_option, packaged_model
from rope_dist.optional import MissingPackageError
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


class Conversation:
    """The tokens of the last answered request and their key/value cache."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.cache: DynamicCache | None = None

    def take(self, model: PreTrainedModel, prompt: torch.Tensor) -> tuple[DynamicCache, int]:
        """The cache for a prompt ``[S]``, and how many of its first tokens are in it.

        It belongs to the caller, until :meth:`keep`: a request that fails leaves none.
        """
        tokens, cache = self.tokens, self.cache
        self.cache = None
        if cache is not None:
            most = min(len(tokens), len(prompt) - 1)  # the last is read for its logits
            same = int((tokens[:most] == prompt[:most]).int().cumprod(0).sum())
            # Layers of other types may not go back to a shorter text.
            croppable = all(type(layer) is DynamicLayer for layer in cache.layers)
            if same and (same == len(tokens) or croppable):
                if same < len(tokens):
                    cache.crop(same - len(tokens))
                return cache, same
        return DynamicCache(config=model.config), 0

    def keep(self, tokens: torch.Tensor, cache: DynamicCache) -> None:
        """Keep the cache of the sequence ``tokens [S]``, whose last token is not in it."""
        self.tokens, self.cache = tokens[: cache.get_seq_length()], cache


@contextmanager
def kept_conversation() -> Iterator[None]:
    """Inside, ``model.generate`` of the one model that is served goes on with the cache of its last call."""
    stock, conversation = GenerationMixin.generate, Conversation()

    @functools.wraps(stock)
    def generate(self: PreTrainedModel, **request: Any) -> Any:
        config = request["generation_config"]
        plain = {"input_ids", "attention_mask", "generation_config", "streamer", "tokenizer"}
        if (
            not plain.issuperset(request)
            or (config.num_beams or 1) > 1
            or (config.num_return_sequences or 1) > 1
            or config.cache_implementation
            or config.return_dict_in_generate
        ):
            return stock(self, **request)
        (prompt,) = request["input_ids"]
        cache, cached = conversation.take(self, prompt)
        print(f"prompt of {len(prompt)} tokens, {cached} of them in the cache", flush=True)
        sequences = stock(self, **request, **cache_option(self, cache))
        conversation.keep(sequences[0], cache)
        return sequences

    GenerationMixin.generate = generate
    try:
        yield
    finally:
        GenerationMixin.generate = stock


def serve_dynamic(model: str, extension: dict[str, Any], host: str, port: int, dry_run: bool) -> int:
    """Serve ``model``, extended in this process."""
    source = load_config(model) if packaged_model(model) is None else model
    plan = rope_dist.dynamic_plan(source, **extension)
    print(f"{plan!r}\n")
    if dry_run:
        print(f"would serve {model} at http://{host}:{port}/v1")
        return 0
    if not is_serve_available():
        raise MissingPackageError("transformers serve is not installed: pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    with tempfile.TemporaryDirectory() as directory:
        if packaged_model(model) is not None:
            # The server reads no model out of a Python package.
            for part in load_model(model):
                part.save_pretrained(directory)
            model = directory
        with rope_dist.enable(plan=plan), kept_conversation():
            Serve(model, host=host, port=port)  # until it is interrupted
    return 0


def main(
    model: options.Weights = PACKAGED_MODEL_NAMES[0],
    factor: options.Factor = None,
    target: options.Target = None,
    strategy: options.Strategy = DEFAULT_STRATEGY,
    output: Annotated[
        str | None,
        option(str, "DIR", "Folder for the extended model (default: extended-model).", "-o", "--output"),
    ] = None,
    host: Annotated[str, option(str, "NAME", "Host of the server.")] = "localhost",
    port: Annotated[int, option(values.whole(1), "N", "Port of the server.")] = 8000,
    dynamic: Annotated[
        bool, flag("--dynamic", "Extend the model in the server, by a plan that grows with the text.")
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Print the commands, save and start nothing.")] = False,
) -> int:
    quieten()
    extension = options.extension(target, factor, strategy)
    if dynamic:
        if output is not None:
            raise ValueError("--output is for an exported model: with --dynamic nothing is exported")
        return serve_dynamic(model, extension, host, port, dry_run)
    output = output or "extended-model"
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder: choose another --output")
    loaded, tokenizer = load_model(model, "cpu")
    plan = rope_dist.plan(loaded, **extension)
    print(f"{plan!r}\n")
    if not dry_run:
        if packaged_model(model) is None:
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
