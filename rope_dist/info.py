"""What is installed and built, and which backend serves each device: ``rope-dist info``."""

from __future__ import annotations

import torch

from .ops import dispatch, native, tuning
from .planning import load_config
from .timing import machine
from .transformers import enable, report, summary
from .transformers.families import FAMILIES
from .transformers.reporting import FUSED, ROTARY
from .version import __version__


def info(model: str | None = None) -> dict[str, dict[str, str]]:
    """Versions, native libraries, the backend of each device with its reason, and the model families.

    Args:
        model: a directory with a ``config.json`` or a hub id: what each layer would do once the model is
            enabled on this machine's first device is told too. No weight is read.

    Returns:
        Sections of named texts, in the order in which :func:`text` prints them.

    Raises:
        ValueError: no such model, or none that can be enabled.
    """
    here = machine()
    return {
        "versions": {
            "rope_dist": __version__,
            **{k: here[k] for k in ("python", "torch", "transformers", "triton")},
        },
        "machine": {k: here[k] for k in ("system", "processor", "threads", "gpu") if k in here},
        "built": {"CPU library": _built("cpu"), "CUDA library": _built("cuda")},
        "used": {"cpu": _used(torch.device("cpu")), **{str(d): _used(d) for d in _gpus()}},
        "measured": _choices(),
        "models": _families(),
        **({model: _layers(model)} if model is not None else {}),
    }


def text(found: dict[str, dict[str, str]]) -> str:
    """What :func:`info` returns, for reading."""
    lines = []
    for section, entries in found.items():
        lines.append(section)
        width = max(len(name) for name in entries)
        lines += [f"  {name:<{width}}  {value}" for name, value in entries.items()]
    return "\n".join(lines)


def _families() -> dict[str, str]:
    ways: dict[str, list[str]] = {FUSED: [], ROTARY: []}
    for family in FAMILIES:
        ways[FUSED if family.attention.between is None else ROTARY].append(family.name)
    return {way: ", ".join(names) for way, names in ways.items()}


def _layers(model: str) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    enable(empty)
    device = (_gpus() or [torch.device("cpu")])[0]
    dtype = config.dtype or torch.get_default_dtype()
    layers = report(empty, dtype=dtype, device=device)
    return {f"{str(dtype).removeprefix('torch.')} on {device}": summary(layers).replace("\n", "; ")}


def _built(name: str) -> str:
    found = native.load(name)
    if isinstance(found, str):
        return found
    if not found.architectures:
        return f"yes, {found.build}"
    numbers = ", ".join(str(number) for number in found.architectures)
    return f"yes, {found.build}, for compute capabilities {numbers} (PTX of {found.architectures[-1]})"


def _choices() -> dict[str, str]:
    """What was fastest where projection and rotation were timed, kept by ``ops/tuning.py``."""
    kept = tuning.choices()
    rows = {}
    for row in kept.rows():
        shape = f"{row['rows']} tokens, {row['depth']} to {row['widths']}, {row['dtype']} {row['form']}"
        times = ", ".join(f"{way} {ms:.4g} ms" for way, ms in row.get("milliseconds", {}).items())
        rows[f"{row['device']}, {shape.strip()}"] = f"{row['choice']} ({times})"
    return rows or {"projection": f"nothing yet; the first call on a GPU is, into {kept.folder}"}


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _used(device: torch.device) -> str:
    # Empty tensors ask the very function that chooses for the real ones.
    choices: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        backend = dispatch.rotary_backend(torch.empty(0, dtype=dtype, device=device))
        choices.setdefault(backend.name, []).append(str(dtype).removeprefix("torch."))
    reasons = {
        name: dispatch.rotary_backend(torch.empty(0, dtype=getattr(torch, dtypes[0]), device=device)).reason
        for name, dtypes in choices.items()
    }
    return "; ".join(f"{name} for {', '.join(choices[name])}: {reasons[name]}" for name in choices)
