"""Copies of transformers' llama file, changed, as a model file of transformers of another name."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

# Without what the kernels library makes of the function, where it is installed.
SOURCE = re.sub(
    r'^@use_kernel\w*\(("rotary_pos_emb"|apply_rotary_pos_emb)\)\n',
    "",
    Path(modeling_llama.__file__).read_text(encoding="utf-8"),
    flags=re.M,
)
_NUMBER = itertools.count()


def changed(source: str, *changes: tuple[str, str]) -> str:
    """``source`` with the first of each pair replaced by the second; it has to be there."""
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source


def stock_copy(folder: Path, *changes: tuple[str, str]):
    """The changed copy, imported below ``transformers.models``; the caller takes it out of ``sys.modules``."""
    source = changed(SOURCE, *changes)
    source = re.sub(r"^from \.\.\.", "from transformers.", source, flags=re.M)
    source = re.sub(
        r"^from \.configuration", "from transformers.models.llama.configuration", source, flags=re.M
    )
    name = f"copy{next(_NUMBER)}"
    file = folder / f"modeling_{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"transformers.models.{name}.modeling_{name}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(module) -> torch.nn.Module:
    """A model of two layers of the LLaMA class of ``module``."""
    torch.manual_seed(0)
    return module.LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            intermediate_size=32, vocab_size=64, max_position_embeddings=64, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
