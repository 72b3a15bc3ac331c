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
from .rope_types import yarn_mscale

FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
SLOTS = ("llama",)
"""Architectures of GGUF whose loader takes the factor tensor and whose graph uses it and ``attn_factor``: tried."""
TAKES_FACTORS = frozenset((
    "apertus", "arcee", "bailingmoe", "cohere2", "cohere2moe", "deci", "deepseek", "eagle3", "exaone", "exaone-moe",
    "exaone4", "granite", "granite-hybrid", "granite-swa", "granite-switch", "hunyuan-moe", "hunyuan-vl", "hy-v3",
    "llama", "llama4", "minicpm3", "mistral3", "nanbeige", "phi3", "phimoe", "step35",
))  # fmt: skip
"""Architectures whose graph in llama.cpp (0c1e57098) uses factor tensors: read."""
BASES_OF_LAYERS = frozenset(("gemma3", "gemma3n", "gemma4", "laguna"))
"""Architectures whose sliding layers have a base of their own and the scale 1 (``get_rope_freq_base`` and
``get_rope_freq_scale`` of llama.cpp): a scaling changes nothing in them but the factor of cos and sin."""
YARN_SETTINGS = {
    "ext_factor": ("grok",),
    "attn_factor": ("grok",),
    "beta_fast": ("grok", "mistral3"),
    "beta_slow": ("grok", "mistral3"),
    "log_multiplier": ("deepseek2", "deepseek32", "mistral3"),
}
"""``rope.scaling.yarn_...`` -> architectures that read it of the file. For all others they are arguments only, and
``attn_factor`` is without effect beside YaRN: ``rope.scaling.attn_factor``, which all read, is the one to write."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEAD_DIM = 1 << 16  # A damaged number must not become an allocation.
# struct's code by the number of a gguf.GGUFValueType: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def bases_of_layers(name: str) -> str:
    """Why there is no plan in llama.cpp for a model or an architecture (``name``) with a base per type of layer."""
    return (
        f"{name} has a rotary embedding per layer type, and it is not known that llama.cpp's flags or metadata extend "
        "its full-attention layers alone (they scale cos and sin of every layer): write the extended model with "
        "rope-dist export hf, and run it in transformers"
    )


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

    def check_slot(self) -> None:
        """``ValueError`` unless llama.cpp has a slot for factors in this architecture that is known to work."""
        if self.architecture in BASES_OF_LAYERS:
            raise ValueError(bases_of_layers(self.architecture))
        if self.architecture not in SLOTS:
            raise ValueError(
                f"llama.cpp has no slot for factors in the architecture {self.architecture!r} that is known to work; "
                f"it has one in {', '.join(SLOTS)}"
            )

    def engine_config(self, tokens: int | None = None) -> EngineConfig:
        """What llama.cpp computes from the file with its default arguments.

        Read in its commit 0c1e57098, which llama-cpp-python 0.3.36 has.

        Args:
            tokens: of the context of a sequence, by which it chooses between short and long factors. None: of any.

        Raises:
            ValueError: it is unknown, or depends on the context.
        """
        kind = self.value("rope.scaling.type", "linear")
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise ValueError(f"its rope.scaling.type is {kind!r}, which llama.cpp does not know")
        factors = self._factor_tensor(tokens)
        # Zero means not given.
        stretch = self._number("rope.scaling.factor", 0) or self._number("rope.scale_linear", 0) or 1.0
        if kind == "none":
            stretch = 1.0
        scaling = self._number("rope.scaling.attn_factor", 1.0)
        mixed = self._yarn_setting("ext_factor", -1.0)
        if mixed < 0:
            mixed = 1.0 if kind == "yarn" else 0.0
        if mixed:
            factors = factors * self._yarn(stretch, mixed)
            scaling *= self._yarn_mscale(stretch)
        else:
            factors = factors * stretch
            scaling *= self._yarn_setting("attn_factor", 1.0)
        length = int(self._number("context_length", 0))
        read_as = kind if stretch != 1 or kind == "longrope" else "default"
        return EngineConfig(
            default_inv_freq(self.theta, self.head_dim, factors),
            scaling,
            length,
            f"{read_as}, factors" if FACTORS in self.tensors else read_as,
        )

    def _factor_tensor(self, tokens: int | None) -> torch.Tensor:
        """``[head_dim / 2]``: of the tensor that llama.cpp takes for a context of ``tokens``, or ones."""
        name = FACTORS
        if SHORT_FACTORS in self.tensors or LONG_FACTORS in self.tensors:
            if tokens is None and not self._factors_agree():
                raise ValueError(
                    "it has factors for short and long contexts, which llama.cpp chooses by the context it is given"
                )
            original = self._number("rope.scaling.original_context_length", 0)
            long = tokens is None or tokens > (original or self._number("context_length", 0))
            name = LONG_FACTORS if long else SHORT_FACTORS
        if FACTORS in self.tensors:
            name = FACTORS
        if name not in self.tensors:
            return torch.ones(self.head_dim // 2)
        if self.architecture not in TAKES_FACTORS:
            raise ValueError(
                f"it has {name}, which the graph of the architecture {self.architecture!r} does not use"
            )
        return self._factors(name)

    def _factors_agree(self) -> bool:
        names = (SHORT_FACTORS, LONG_FACTORS)
        return all(name in self.tensors for name in names) and torch.equal(*map(self._factors, names))

    def _yarn_setting(self, name: str, default: float) -> float:
        """``rope.scaling.yarn_NAME``, which few architectures read; for the others it is an argument only."""
        if self.architecture not in YARN_SETTINGS.get(name, ()):
            return default
        return self._number(f"rope.scaling.yarn_{name}", default)

    def _yarn_mscale(self, stretch: float) -> float:
        """The scaling of cos and sin, beside ``rope.scaling.attn_factor``."""
        multiplier = self._yarn_setting("log_multiplier", 0.0)
        if not multiplier:
            return yarn_mscale(stretch)
        all_dim = multiplier if self.architecture == "mistral3" else multiplier / 0.1
        mscale = all_dim if self.architecture == "deepseek2" and all_dim != 1 else 1.0
        return yarn_mscale(stretch, mscale) / yarn_mscale(stretch, all_dim)

    def _yarn(self, stretch: float, mixed: float) -> torch.Tensor:
        """``[head_dim / 2]`` factors of llama.cpp's YaRN (``ggml_rope_yarn_corr_dims``), the same for any context."""
        original = self._number("rope.scaling.original_context_length", 0) or self._number(
            "context_length", 0
        )
        fast, slow = self._yarn_setting("beta_fast", 32.0), self._yarn_setting("beta_slow", 1.0)
        if min(original, fast, slow, stretch) <= 0 or self.theta <= 1:
            raise ValueError("its YaRN has settings out of range")

        def dimension(periods: float) -> np.float32:
            """The dimension whose pair has ``periods`` periods within the original length."""
            logarithm = np.log(np.float32(original) / (np.float32(periods) * 2 * np.float32(math.pi)))
            return self.head_dim * logarithm / (2 * np.log(np.float32(self.theta)))

        low = max(0, math.floor(dimension(fast)))
        high = min(self.head_dim - 1, math.ceil(dimension(slow)))
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float64)
        kept = (1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)) * mixed
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
