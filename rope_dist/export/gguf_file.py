"""Writes a plan into a copy of a GGUF file: as metadata where that says it, else as factors.

Metadata are ``rope.scaling.type`` ``linear`` or ``yarn``, or another ``rope.freq_base``, which llama.cpp reads in
every architecture of :data:`METADATA`. Of YaRN it reads no betas there (they are 32 and 1, but for flags), and rounds
the ramp to whole pairs.

Other factors are the tensor ``rope_freqs.weight``, where the architecture takes one: llama.cpp divides the angle of
pair ``i`` by element ``i``. The converter writes it for Llama 3's scaling alone and silently ignores the longrope
config of a LLaMA. A dynamic plan becomes the two of a longrope, ``rope_factors_short.weight`` and
``rope_factors_long.weight``, of which llama.cpp takes the second where the context of a sequence is larger than
``rope.scaling.original_context_length``.

cos and sin are multiplied by ``rope.scaling.attn_factor`` whatever the scaling type, and of YaRN by ``1 + 0.1 ln s``
too.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..dynamic import DynamicPlan
from ..files import check_target, copy_bytes, new_file
from ..optional import require
from ..planning import RopePlan
from ..strategies import default_inv_freq
from ..version import __version__
from .engines import check_engines
from .forms import NativeForm, inexact_yarn, native_form, yarn_attention
from .gguf_reading import FACTORS, LONG_FACTORS, MAGIC, SHORT_FACTORS, SLOTS, GgufFile, read
from .verification import verify

METADATA = frozenset((
    "arcee", "baichuan", "bitnet", "command-r", "dots1", "exaone", "falcon-h1", "gemma", "granite", "internlm2",
    "llama", "olmo", "olmoe", "orion", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "smollm3", "starcoder2", "xverse",
))  # fmt: skip
"""Architectures of GGUF all of whose layers rotate by the base and the scaling of the metadata (llama.cpp 0c1e57098,
``src/models``: read; llama, qwen2, qwen3 and gemma: tried)."""
YARN_BETAS = (32.0, 1.0)
"""What llama.cpp takes for ``beta_fast`` and ``beta_slow`` where no flags give others."""


def gguf(
    path: str | os.PathLike[str],
    plan: RopePlan | DynamicPlan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
) -> Path:
    """Copy a GGUF file with the plan's scaling or factors and its length; it is verified before it appears.

    Every other tensor keeps its bytes and every other field its value. The data is streamed, so that memory does not
    grow with the file.

    Args:
        path: a file of the architecture ``llama`` (LLaMA, Mistral, Yi, SmolLM2, ... all convert to it), or for a plan
            by ``yarn``, ``pi`` or ``ntk`` of any of :data:`METADATA`.
        plan: made from this model.
        out: the new file; it appears whole or not at all.
        force: replace ``out`` if it is there.

    Returns:
        The path of the new file.

    Raises:
        ValueError: the file is damaged or has no place for the plan, the plan is of another model, or ``out`` exists; a
            dynamic plan scales cos and sin otherwise than the trained model.
        OSError: the disk is full or not writable. The source is never changed.
        MissingPackageError: ``gguf`` is not installed.
    """
    out = Path(out)
    check_engines(plan)
    source = read(path)
    form = gguf_form(source, plan)
    check_file(source, plan if isinstance(plan, RopePlan) else plan.stages[0])
    check_target(out, force=force, directory=False)
    if out.exists() and os.path.samefile(out, source.path):
        raise ValueError(f"{out} is the source itself: write to another file")
    with new_file(out, force=force) as temporary:
        _write(source, plan, form, temporary)
        dataclasses.replace(verify(temporary, plan), artefact=out).raise_for_failure()
    return out


def gguf_rope(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The numbers that :func:`rope_dist.plan` asks for, from a GGUF file: theta, head_dim and trained length.

    Raises:
        ValueError: the file is damaged, has no place for a plan, or is scaled already (its plan needs its config).
    """
    source = read(path)
    if source.architecture not in METADATA:
        source.check_slot()
    found = source.engine_config()
    plain = default_inv_freq(source.theta, source.head_dim)
    if not _close(found.inv_freq, plain) or found.attention_scaling != 1:
        raise ValueError(
            f"{path} is scaled already: make a plan from its config.json, and give that with --plan"
        )
    return {"theta": source.theta, "head_dim": source.head_dim, "original_length": found.length}


def gguf_form(source: GgufFile, plan: RopePlan | DynamicPlan) -> NativeForm | None:
    """The plan as metadata of a file; None where it has to be factors.

    Raises:
        ValueError: the file has no place for either.
    """
    form = native_form(plan)
    if form is not None and source.architecture in METADATA and FACTORS not in source.tensors:
        if form.rope_type in ("default", "linear"):
            return form
        if form.rope_type == "yarn":
            betas = form.parameters["beta_fast"], form.parameters["beta_slow"]
            if (
                betas == YARN_BETAS
                and inexact_yarn(form, plan.pretrained.theta, plan.pretrained.rotary_dim) is None
            ):
                return form
    if source.architecture in METADATA and source.architecture not in SLOTS:
        raise ValueError(
            f"llama.cpp has no slot for factors in the architecture {source.architecture!r} that is known to work, and "
            f"a file says only yarn (betas 32 and 1), pi and ntk there, not this plan by {plan.strategy}: take one of "
            "these, or auto-yarn by flags (rope-dist export flags llama-server)"
        )
    source.check_slot()
    return None


def check_file(source: GgufFile, plan: RopePlan, *, exported: bool = True) -> None:
    """``ValueError`` if ``plan`` is of another model than the file's, or it is scaled already.

    Args:
        source: the file.
        plan: a static one, or the first stage of a dynamic one.
        exported: whether it may be a file that was written by this plan.
    """
    found = source.engine_config()
    exported = (
        exported and found.inv_freq.shape == plan.inv_freq.shape and _close(found.inv_freq, plan.inv_freq)
    )
    if exported and found.length == plan.target_length:
        return  # By this plan before.
    for what, planned, own in (
        ("head_dim", plan.head_dim, source.head_dim),
        ("rotary_dim", plan.rotary_dim, source.head_dim),
        # A file stores float32.
        ("theta", float(np.float32(plan.theta)), float(np.float32(source.theta))),
    ):
        if planned != own:
            raise ValueError(f"the plan is for {what} {planned}, {source.path} has {own}")
    if plan.original_length not in source.trained_lengths():
        # A converter keeps the target length of an exported config, but not its factors.
        hint = (
            "; convert the model as it was before the extension" if found.length == plan.target_length else ""
        )
        raise ValueError(
            f"the plan is for a trained length of {plan.original_length}, {source.path} has {found.length}{hint}"
        )
    if not _close(found.inv_freq, plan.pretrained.inv_freq):
        raise ValueError(
            f"the plan and {source.path} start from different frequencies (one of them is scaled already): make the "
            "plan from this model, or take the file before it was extended"
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # The converter's Llama 3 factors differ from transformers' by roundings.
    return torch.allclose(a.double(), b.double(), rtol=1e-5, atol=0.0)


def _metadata(form: NativeForm, library: ModuleType) -> dict[str, bytes]:
    """Entries of the architecture, packed."""
    types = library.GGUFValueType
    if form.rope_type == "default":
        return {"rope.freq_base": struct.pack("<If", types.FLOAT32, form.theta)}
    entries = {
        "rope.scaling.type": struct.pack("<I", types.STRING) + _pack_text(form.rope_type),
        "rope.scaling.factor": struct.pack("<If", types.FLOAT32, form.parameters["factor"]),
    }
    if form.rope_type == "yarn":
        original = form.parameters["original_max_position_embeddings"]
        entries["rope.scaling.original_context_length"] = struct.pack("<II", types.UINT32, original)
    return entries


def _write(source: GgufFile, plan: RopePlan | DynamicPlan, form: NativeForm | None, target: Path) -> None:
    library = require("gguf", "export", "writing GGUF")
    types = library.GGUFValueType
    prefix = f"{source.architecture}."
    new = {
        f"{prefix}context_length": struct.pack("<II", types.UINT32, plan.target_length),
        "rope_dist.version": struct.pack("<I", types.STRING) + _pack_text(__version__),
        "rope_dist.strategy": struct.pack("<I", types.STRING) + _pack_text(plan.strategy),
        "rope_dist.original_length": struct.pack("<II", types.UINT32, plan.original_length),
    }
    last = plan if isinstance(plan, RopePlan) else plan.stages[-1]
    attn_factor, sets = last.attention_scaling, {FACTORS: last}
    if form is not None:
        attn_factor, sets = yarn_attention(form, last.attention_scaling), {}
        new.update({f"{prefix}{key}": value for key, value in _metadata(form, library).items()})
    if attn_factor != 1:
        new[f"{prefix}rope.scaling.attn_factor"] = struct.pack("<If", types.FLOAT32, attn_factor)
    if isinstance(plan, DynamicPlan):
        sets = {SHORT_FACTORS: plan.stages[0], LONG_FACTORS: last}
        kind, length = f"{prefix}rope.scaling.type", f"{prefix}rope.scaling.original_context_length"
        new[kind] = struct.pack("<I", types.STRING) + _pack_text("longrope")
        new[length] = struct.pack("<II", types.UINT32, plan.original_length)
    fields = {
        key: field.raw
        for key, field in source.fields.items()
        # The plan's factors include the scaling that the model was trained with.
        if not key.startswith((f"{prefix}rope.scaling.", f"{prefix}rope.scale_linear"))
    }
    fields.update({key: _pack_text(key) + value for key, value in new.items()})
    tensors = {name: tensor.raw for name, tensor in source.tensors.items()}
    end = _aligned(source.data_size, source.alignment)
    # The first set overwrites the old factors, if any, and others are appended: no other tensor's data moves.
    slot, places = source.tensors.get(FACTORS), {}
    for name, stage in sets.items():
        data, place, entry = np.array(stage.factors, dtype="<f4").tobytes(), end, name
        if slot is None:
            end += _aligned(len(data), source.alignment)
        else:
            place, slot, entry = slot.offset, None, FACTORS
        float32 = library.GGMLQuantizationType.F32
        # Entries are in the order of their data.
        tensors[entry] = _pack_text(name) + struct.pack("<IQIQ", 1, len(stage.factors), float32, place)
        places[place] = data
    header = MAGIC + struct.pack("<IQQ", source.version, len(tensors), len(fields))
    header += b"".join((*fields.values(), *tensors.values()))
    start = _aligned(len(header), source.alignment)
    with (
        open(source.path, "rb") as old,
        open(target, "wb") as file,
        tqdm(
            total=source.data_size, unit="B", unit_scale=True, desc="copying", disable=None, leave=False
        ) as bar,
    ):
        file.write(header.ljust(start, b"\0"))
        old.seek(source.data_start)
        copy_bytes(old, file, source.data_size, bar.update)
        file.write(bytes(end - source.data_size))
        for place, factors in places.items():
            file.seek(start + place)
            file.write(factors)


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
