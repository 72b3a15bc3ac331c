"""Rotary kernels of other packages behind one signature, where they are installed.

Each is written from its package's public interface, is checked like every implementation before it is timed, and is
skipped with a reason where it cannot run. On a CPU only eager and ``torch.compile`` run: the others are
GPU kernels, and Liger's in Triton's interpreter would be a timing of the interpreter.
"""

from __future__ import annotations

import importlib
import os
import site
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rope_dist.bench import Angles, huggingface

from .benchmark import Options
from .harness import Implementation, Skipped

COMPILED = "torch.compile"
"""Of Hugging Face's function."""
LIGER = "Liger"


def _liger(
    module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles, implementation: str | None = None
) -> Callable:
    pin = importlib.import_module("liger_kernel.backends").set_impl if implementation else None

    def call():
        # Otherwise Liger chooses, by what else is installed and by the size of the input.
        if pin:
            pin(implementation)
        a, b = module.liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *angles.huggingface)
        return a.transpose(1, 2), b.transpose(1, 2)

    return call


def _flash_attn(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles) -> Callable:
    # One call a tensor, tables [S, D/2]; quack has the same interface.
    cos, sin = (table[0].to(q.dtype) for table in (angles.cos, angles.sin))

    def call():
        return tuple(module.apply_rotary_emb(x, cos, sin, inplace=True) for x in (q, k))

    return call


def _flat(q: torch.Tensor, k: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, ...]:
    """Positions and ``[tokens, heads * D]`` views: what FlashInfer and vLLM take."""
    return angles.position_ids.flatten(), q.flatten(0, 1).flatten(1), k.flatten(0, 1).flatten(1)


def _flashinfer(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles) -> Callable:
    positions, flat_q, flat_k = _flat(q, k, angles)
    cache = torch.cat((angles.cos[0], angles.sin[0]), -1)

    def call():
        module.apply_rope_with_cos_sin_cache_inplace(
            positions, flat_q, flat_k, q.shape[-1], cache, is_neox=True
        )
        return q, k

    return call


def _vllm(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles) -> Callable:
    positions, flat_q, flat_k = _flat(q, k, angles)
    # As vLLM's own module has it: in the model's type.
    cache = torch.cat((angles.cos[0], angles.sin[0]), -1).to(q.dtype)

    def call():
        module.rotary_embedding(positions, flat_q, flat_k, q.shape[-1], cache, True)
        return q, k

    return call


def _unsloth(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles) -> Callable:
    cos, sin = (table[0] for table in angles.huggingface)

    def call():
        a, b = module.fast_rope_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return a.transpose(1, 2), b.transpose(1, 2)

    return call


def liger_implementations() -> list[str | None]:
    """Names of Liger's kernels that run here, Triton's first; ``[None]`` of a version that has only that one."""
    try:
        backends = importlib.import_module("liger_kernel.backends")
    except ImportError:
        return [None]
    return sorted(backends.available_impls("rope"), key=lambda name: not name.endswith("triton")) or [None]


@dataclass(frozen=True)
class Baseline:
    """A package with a rotary kernel.

    Attributes:
        module: that has the function.
        rotate: from that module and the tensors to the call.
        hopper: it has no code for GPUs before Hopper.
        alters: importing it changes transformers for the whole process: it runs only if named.
    """

    module: str
    rotate: Callable[..., Callable[[], Any]]
    hopper: bool = False
    alters: bool = False


BASELINES = {
    LIGER: Baseline("liger_kernel.transformers.rope", _liger),
    "flash-attn": Baseline("flash_attn.layers.rotary", _flash_attn),
    "FlashInfer": Baseline("flashinfer", _flashinfer),
    "quack": Baseline("quack.rotary", _flash_attn, hopper=True),
    "vLLM": Baseline("vllm._custom_ops", _vllm),
    "Unsloth": Baseline("unsloth.kernels.rope_embedding", _unsloth, alters=True),
}
ROTARY = (COMPILED, *BASELINES)


def unavailable(name: str, options: Options) -> str | None:
    """Why that baseline cannot run here, or None."""
    baseline = BASELINES[name]
    if options.device.type != "cuda":
        return "needs a GPU"
    if baseline.hopper and torch.cuda.get_device_capability(options.device)[0] < 9:
        return "needs Hopper or later"
    if baseline.alters and options.baselines is None:
        return f"importing it changes transformers for the whole process: ask with --baselines {name}"
    return missing(baseline.module)


@cache
def read_path_files() -> None:
    """Take folders in ``PYTHONPATH`` that ``pip install --target`` made as Python takes its own ``site-packages``.

    Python does not read a ``.pth`` file there, which is how nvidia-cutlass-dsl makes ``cutlass`` importable.
    """
    for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if any(Path(folder).glob("*.pth")):
            site.addsitedir(folder)


def missing(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None."""
    read_path_files()
    try:
        importlib.import_module(module)
    except Exception as error:
        # Packages of compiled kernels fail to import in many ways, not only by ImportError.
        return f"{module.partition('.')[0]} cannot be imported: {error}".splitlines()[0][:160]
    return None


def installed(module: str) -> dict[str, str]:
    """``{"package": "liger-kernel 0.8.5"}``: what ``module`` was installed from; empty where nothing says so."""
    top = module.partition(".")[0]
    names = dict.fromkeys(_distributions().get(top, ()))
    return {"package": ", ".join(f"{name} {metadata.version(name)}" for name in names)} if names else {}


def kernel(implementation: str | None) -> dict[str, str]:
    """The column of which of the package's kernels it is."""
    return {"kernel": implementation} if implementation else {}


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def rotary_baselines(options: Options, angles: Angles) -> list[Implementation | Skipped]:
    """torch.compile's and each package's rotation of inputs with ``q`` and ``k`` ``[1, S, H, D]``."""
    found: list[Implementation | Skipped] = []
    if options.wants(COMPILED):
        # Sizes fixed: the best that the compiler can do.
        compiled = torch.compile(huggingface, dynamic=False)
        found.append(
            Implementation(COMPILED, lambda inputs: lambda: compiled(inputs.q, inputs.k, angles), late=True)
        )
    for name, baseline in BASELINES.items():
        if not options.wants(name):
            continue
        reason = unavailable(name, options)
        if reason:
            found.append(Skipped(name, reason))
            continue
        module = importlib.import_module(baseline.module)
        rotate, labels = partial(baseline.rotate, module), installed(baseline.module)
        if name == LIGER:
            # Without gradients its other kernels hand over to Triton's.
            implementation = liger_implementations()[0]
            rotate, labels = partial(rotate, implementation=implementation), labels | kernel(implementation)
        found.append(
            Implementation(
                name, lambda inputs, r=rotate: r(inputs.q, inputs.k, angles), late=True, labels=labels
            )
        )
    return found
