"""The header of a GGUF file, and what llama.cpp makes of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..optional import require
from ..strategies import default_inv_freq
from .engines import Reading

FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufFile:
    """A file's header, read whole.

    Attributes:
        path: of the file.
        header: the ``gguf.GGUFReader``; the tensors' data is mapped, not read.
        architecture: ``general.architecture``.
    """

    path: Path
    header: Any
    architecture: str

    def value(self, key: str, default: Any = None) -> Any:
        """A field of the architecture, e.g. ``"context_length"``."""
        field = self.header.fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def reading(self) -> Reading:
        """What llama.cpp computes from the file; ``ValueError`` where it would choose by the context."""
        kind = self.value("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise ValueError(f"its rope.scaling.type is {kind!r}, which changes the frequencies at run time")
        rotary_dim = self.head_dim
        factors = torch.ones(rotary_dim // 2)
        for tensor in self.header.tensors:
            if tensor.name == FACTORS:
                factors = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        if factors.shape != (rotary_dim // 2,):
            raise ValueError(f"{FACTORS} has shape {tuple(factors.shape)} for {rotary_dim // 2} rotary pairs")
        if kind == "linear":
            factors = factors * (self.value("rope.scaling.factor") or self.value("rope.scale_linear") or 1.0)
        return Reading(
            default_inv_freq(self.theta, rotary_dim, factors),
            float(self.value("rope.scaling.attn_factor", 1.0)),
            int(self.value("context_length", 0)),
        )

    @property
    def theta(self) -> float:
        """RoPE base."""
        return float(self.value("rope.freq_base", 10000.0))

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head, all of them rotated (llama.cpp loads no other LLaMA)."""
        length = self.value("rope.dimension_count") or self.value("attention.key_length")
        return int(length or self.value("embedding_length") // self.value("attention.head_count"))


def read(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file, checked against the file's size; ``ValueError`` for anything else."""
    path = Path(path)
    library = require("gguf", "export", "reading GGUF")
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    try:
        header = library.GGUFReader(path)
        architecture = header.fields["general.architecture"].contents()
    except (ValueError, IndexError, KeyError, OverflowError, TypeError):
        raise ValueError(f"{path} is not a whole GGUF file: it ends early or is damaged") from None
    if header.endianess != library.GGUFEndian.LITTLE:
        raise ValueError(f"{path} is big-endian; only little-endian files are read")
    split = header.fields.get("split.count")
    if split is not None and split.contents() > 1:
        raise ValueError(
            f"{path} is one of {split.contents()} parts: join them (llama-gguf-split --merge) first"
        )
    return GgufFile(path, header, architecture)
