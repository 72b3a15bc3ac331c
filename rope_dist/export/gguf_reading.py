"""The header of a GGUF file, and the rotary embedding that llama.cpp computes from it.

Not read by ``gguf.GGUFReader``, which makes several arrays for each entry of the vocabulary: 6 s and 160 MB for the
49,152 tokens of SmolLM2. The bytes of fields and tensors are kept, to be copied where they do not change.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch

from ..optional import require
from ..strategies import default_inv_freq
from .engines import EngineConfig

FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
SLOTS = ("llama",)
"""Architectures of GGUF whose loader takes the factor tensor and whose graph uses it and ``attn_factor``."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEAD_DIM = 1 << 16  # A damaged number must not become an allocation.
# struct's code by the number of a gguf.GGUFValueType: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Field:
    """A metadata entry: its bytes, key included, and its value (None for an array)."""

    raw: bytes
    value: Any


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry: its bytes, its ``gguf.GGMLQuantizationType``, and the offset and size of its data."""

    raw: bytes
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A file's header.

    Attributes:
        path: of the file.
        version: of the format.
        fields: metadata in the file's order.
        tensors: tensors in the file's order.
        alignment: bytes; every tensor's data starts at a multiple.
        data_start: where the data begins in the file.
    """

    path: Path
    version: int
    fields: dict[str, Field]
    tensors: dict[str, Tensor]
    alignment: int
    data_start: int

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.fields["general.architecture"].value)

    @property
    def data_size(self) -> int:
        """Bytes of data, up to the end of the last tensor."""
        return max(tensor.offset + tensor.size for tensor in self.tensors.values())

    def value(self, key: str, default: Any = None) -> Any:
        """A field of the architecture, e.g. ``"context_length"``."""
        field = self.fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.value

    def engine_config(self, tokens: int | None = None) -> EngineConfig:
        """What llama.cpp computes from the file.

        Args:
            tokens: of the context of a sequence, by which it chooses between short and long factors. None: of any.

        Raises:
            ValueError: it is unknown, or depends on the context.
        """
        if self.architecture not in SLOTS:
            raise ValueError(
                f"llama.cpp has no slot for factors in the architecture {self.architecture!r} that is known to work; "
                f"it has one in {', '.join(SLOTS)}"
            )
        kind = self.value("rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn") and (kind != "longrope" or tokens is None):
            raise ValueError(
                f"its rope.scaling.type is {kind!r}, whose frequencies llama.cpp chooses by the context it is given"
            )
        factors, name = torch.ones(self.head_dim // 2), FACTORS
        if kind == "longrope" and tokens is not None:
            original = self._number("rope.scaling.original_context_length", 0)
            long = tokens > (original or self._number("context_length", 0))
            name = LONG_FACTORS if long else SHORT_FACTORS
        if name in self.tensors:
            factors = self._factors(name)
        scaling = self._number("rope.scaling.attn_factor", 1.0)
        # Zero means not given.
        stretch = self._number("rope.scaling.factor", 0) or self._number("rope.scale_linear", 0) or 1.0
        if kind in ("linear", "longrope"):
            factors = factors * stretch
        elif kind == "yarn":
            factors = factors * self._yarn(stretch)
            # llama.cpp scales by this itself, and by attn_factor on top.
            scaling *= 1 + 0.1 * math.log(stretch) if stretch > 1 else 1.0
        return EngineConfig(
            default_inv_freq(self.theta, self.head_dim, factors),
            scaling,
            int(self.value("context_length", 0)),
        )

    def _yarn(self, stretch: float) -> torch.Tensor:
        """``[head_dim / 2]`` factors of llama.cpp's YaRN (``ggml_rope_yarn_corr_dims``), the same for any context."""
        if self._number("rope.scaling.yarn_ext_factor", 1.0) != 1:
            raise ValueError("its YaRN has an extrapolation factor of its own, which is not known here")
        original = self._number("rope.scaling.original_context_length", 0) or self._number(
            "context_length", 0
        )
        fast = self._number("rope.scaling.yarn_beta_fast", 32.0)
        slow = self._number("rope.scaling.yarn_beta_slow", 1.0)
        if min(original, fast, slow, stretch) <= 0 or self.theta <= 1:
            raise ValueError("its YaRN has settings out of range")

        def dimension(periods: float) -> float:
            """The dimension whose pair has ``periods`` periods within the original length."""
            return self.head_dim * math.log(original / (periods * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(0, math.floor(dimension(fast)))
        high = min(self.head_dim - 1, math.ceil(dimension(slow)))
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64)
        kept = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
        return 1 / (kept + (1 - kept) / stretch)

    def trained_lengths(self) -> tuple[int, ...]:
        """Possible trained lengths in tokens. Converters copy ``context_length`` from a config, where scaled models
        have the length before the scaling as often as the one after it."""
        length, stretch = self._number("context_length", 0), self._number("rope.scaling.factor", 0) or 1.0
        before = self._number("rope.scaling.original_context_length", 0) or length
        return tuple(dict.fromkeys((int(length), round(before * stretch))))

    def _number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"its {self.architecture}.{key} is {value!r}, not a number")
        return float(value)

    @property
    def theta(self) -> float:
        """RoPE base."""
        return self._number("rope.freq_base", 10000.0)

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head, all of them rotated (llama.cpp loads no other LLaMA)."""
        length = self.value("rope.dimension_count") or self.value("attention.key_length")
        if length is None:
            width, heads = self.value("embedding_length"), self.value("attention.head_count")
            if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
                raise ValueError(f"{self.path} does not say how large its attention heads are")
            length = width // heads
        if not isinstance(length, int) or length % 2 or not 2 <= length <= MAX_HEAD_DIM:
            raise ValueError(f"{self.path} has attention heads of {length!r} dimensions")
        return length

    def _factors(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        float32 = require("gguf", "export", "reading GGUF").GGMLQuantizationType.F32
        if tensor.kind != float32 or tensor.shape != (self.head_dim // 2,):
            raise ValueError(f"{name} is not {self.head_dim // 2} float32 numbers, one per rotary pair")
        with open(self.path, "rb") as file:
            file.seek(self.data_start + tensor.offset)
            data = file.read(tensor.size)
        return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))


def read(path: str | os.PathLike[str]) -> GgufFile:
    """The header of a GGUF file, checked against the file's size; ``ValueError`` for anything else."""
    path = Path(path)
    library = require("gguf", "export", "reading GGUF")
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file")
            try:
                found = _header(path, _HeaderReader(file, size, library))
            except (struct.error, EOFError, KeyError, OverflowError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path} is not a whole GGUF file: its header is damaged ({error})"
                ) from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if found.data_start + found.data_size > size:
        raise ValueError(
            f"{path} is not a whole GGUF file: {size} bytes, its header describes {found.data_start + found.data_size}"
        )
    parts = found.fields.get("split.count")
    if parts is not None and parts.value > 1:
        raise ValueError(f"{path} is one of {parts.value} parts: join them (llama-gguf-split --merge) first")
    return found


class _HeaderReader:
    """Reads the entries of a header; ``EOFError`` where the file ends early."""

    def __init__(self, file: BinaryIO, size: int, library: ModuleType) -> None:
        self.file, self.size = file, size
        self.types = library.GGUFValueType
        self.quantizations = library.GGML_QUANT_SIZES

    def read_exact(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise EOFError("it ends early")
        return self.file.read(count)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.read_exact(struct.calcsize(form)))

    def read_text(self) -> bytes:
        (length,) = self.unpack("<Q")
        return self.read_exact(length)

    def read_value(self, kind: int) -> Any:
        """A value of the type ``kind``; an array is skipped and gives None."""
        if kind in SCALARS:
            return self.unpack(f"<{SCALARS[kind]}")[0]
        if kind == self.types.STRING:
            return self.read_text().decode(errors="replace")
        if kind != self.types.ARRAY:
            raise EOFError(f"a field is of the unknown type {kind}")
        inner, count = self.unpack("<IQ")
        if inner in SCALARS:
            end = self.file.tell() + count * struct.calcsize(f"<{SCALARS[inner]}")
            if end > self.size:
                raise EOFError("it ends early")
            self.file.seek(end)
        else:
            for _ in range(count):
                self.read_value(inner)
        return None

    def reread(self, start: int) -> bytes:
        """The bytes from ``start`` to the current position."""
        end = self.file.tell()
        self.file.seek(start)
        return self.file.read(end - start)


def _header(path: Path, reader: _HeaderReader) -> GgufFile:
    """The header after the four bytes of ``MAGIC``."""
    file = reader.file
    (version,) = reader.unpack("<I")
    if version & 0xFFFF == 0:
        raise ValueError(f"{path} is big-endian; only little-endian files are read")
    if version not in VERSIONS:
        raise ValueError(f"{path} is GGUF version {version}; {' and '.join(map(str, VERSIONS))} are read")
    tensor_count, field_count = reader.unpack("<QQ")
    fields: dict[str, Field] = {}
    for _ in range(field_count):
        start = file.tell()
        key = reader.read_text().decode()
        value = reader.read_value(*reader.unpack("<I"))
        fields[key] = Field(reader.reread(start), value)
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        start = file.tell()
        name = reader.read_text().decode()
        (dimensions,) = reader.unpack("<I")
        shape = reader.unpack(f"<{dimensions}Q")
        kind, offset = reader.unpack("<IQ")
        block, block_bytes = reader.quantizations[kind]
        size = math.prod(shape) // block * block_bytes
        tensors[name] = Tensor(reader.reread(start), kind, shape, offset, size)
    if "general.architecture" not in fields or not tensors:
        raise ValueError(f"{path} is a GGUF file without a model")
    alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path} has the alignment {alignment!r}")
    return GgufFile(path, version, fields, tensors, alignment, -(-file.tell() // alignment) * alignment)
