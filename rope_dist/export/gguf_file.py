"""GGUF: the factor tensor of llama.cpp, ``rope_freqs.weight``, put into a file that has been converted already.

llama.cpp divides the angle of pair ``i`` by element ``i`` of that tensor, and multiplies cos and sin by
``rope.scaling.attn_factor`` whatever the scaling type. The converter writes the tensor for Llama 3's scaling alone and
leaves a longrope config of a LLaMA out without a word.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..files import check_target, copy_bytes, new_file
from ..optional import require
from ..planning import RopePlan
from ..version import __version__
from .gguf_reading import FACTORS, GgufFile, read
from .verification import verify

SLOTS = ("llama",)
"""Architectures of GGUF whose loader takes the factor tensor and whose graph uses it and ``attn_factor``."""


def gguf(
    path: str | os.PathLike[str], plan: RopePlan, out: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Copy a GGUF file with the plan's factors, length and scaling; it is verified before it appears.

    Every other tensor keeps its bytes and every other field its value. The data is streamed, so that memory does not
    grow with the file.

    Args:
        path: a file of the architecture ``llama`` (LLaMA, Mistral, Yi, SmolLM2, ... all convert to it).
        plan: made from this model.
        out: the new file; it appears whole or not at all.
        force: replace ``out`` if it is there.

    Returns:
        The path of the new file.

    Raises:
        ValueError: the file is damaged or has no slot for factors, the plan is of another model, or ``out`` exists.
        OSError: the disk is full or not writable. The source is never changed.
        MissingPackageError: ``gguf`` is not installed.
    """
    out = Path(out)
    source = read(path)
    if source.architecture not in SLOTS:
        raise ValueError(
            f"llama.cpp has no slot for factors in the architecture {source.architecture!r} that is known to work; it "
            f"has one in {', '.join(SLOTS)}"
        )
    _check_plan(source, plan)
    check_target(out, force=force, directory=False)
    if out.exists() and os.path.samefile(out, source.path):
        raise ValueError(f"{out} is the source itself: write to another file")
    with new_file(out, force=force) as temporary:
        _write(source, plan, temporary)
        verify(temporary, plan).raise_for_failure()
    return out


def _check_plan(source: GgufFile, plan: RopePlan) -> None:
    reading = source.reading()
    for what, planned, own in (
        ("head_dim", plan.head_dim, source.head_dim),
        ("rotary_dim", plan.rotary_dim, source.head_dim),
        # The file keeps float32.
        ("theta", float(np.float32(plan.theta)), float(np.float32(source.theta))),
    ):
        if planned != own:
            raise ValueError(f"the plan is for {what} {planned}, {source.path} has {own}")
    if _close(reading.inv_freq, plan.inv_freq) and reading.length == plan.target_length:
        return  # Exported by this plan before.
    if reading.length != plan.original_length:
        raise ValueError(
            f"the plan is for a trained length of {plan.original_length}, {source.path} has {reading.length}"
        )
    if not _close(reading.inv_freq, plan.pretrained.inv_freq):
        raise ValueError(
            f"the plan and {source.path} start from different frequencies (one of them is scaled already): make the "
            "plan from this model, or take the file before it was extended"
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # A converter computes Llama 3's factors in its own way.
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=0.0)


def _write(source: GgufFile, plan: RopePlan, target: Path) -> None:
    library = require("gguf", "export", "writing GGUF")
    kinds = library.GGUFValueType
    prefix = f"{source.architecture}."
    new = {
        f"{prefix}context_length": (plan.target_length, kinds.UINT32),
        "rope_dist.version": (__version__, kinds.STRING),
        "rope_dist.strategy": (plan.strategy, kinds.STRING),
        "rope_dist.original_length": (plan.original_length, kinds.UINT32),
    }
    if plan.attention_scaling != 1:
        new[f"{prefix}rope.scaling.attn_factor"] = (plan.attention_scaling, kinds.FLOAT32)
    writer = library.GGUFWriter(target, source.architecture)
    writer.data_alignment = source.header.alignment
    for key, field in source.header.fields.items():
        # The reader's own count of things, and what the writer has written already.
        if key.startswith("GGUF.") or key == "general.architecture" or key in new:
            continue
        if key.startswith((f"{prefix}rope.scaling.", f"{prefix}rope.scale_linear")):
            continue  # All of the trained scaling is in the plan's factors.
        _copy_field(writer, key, field, kinds)
    for key, (value, kind) in new.items():
        writer.add_key_value(key, value, kind)
    tensors = [tensor for tensor in source.header.tensors if tensor.name != FACTORS]
    factors = np.array(plan.factors, dtype="<f4")
    writer.add_tensor_info(FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.n_bytes, tensor.tensor_type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        total = sum(tensor.n_bytes for tensor in tensors)
        with (
            open(source.path, "rb") as old,
            tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=None, leave=False) as bar,
        ):
            writer.write_padding(file, file.tell())
            file.write(factors.tobytes())
            writer.write_padding(file, factors.nbytes)
            for tensor in tensors:
                # Not through the reader's map, whose pages would count as this process's memory.
                old.seek(tensor.data_offset)
                copy_bytes(old, file, tensor.n_bytes, bar.update)
                writer.write_padding(file, tensor.n_bytes)
    finally:
        writer.close()


def _copy_field(writer: Any, key: str, field: Any, kinds: Any) -> None:
    kind, *inner = field.types
    if kind != kinds.ARRAY:
        writer.add_key_value(key, field.contents(), kind)
    elif len(inner) == 1:
        # Tokens as bytes: not all of them are UTF-8.
        values = (
            [field.parts[i].tobytes() for i in field.data] if inner[0] == kinds.STRING else field.contents()
        )
        writer.add_key_value(key, values, kind, sub_type=inner[0])
    elif inner:
        raise ValueError(f"the field {key} is an array of arrays, which the gguf package does not read")
    # An empty array has no type that could be written, and says nothing.
