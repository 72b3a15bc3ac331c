"""Rotary kernels of other packages behind one signature, where they are installed.

Each is written from its package's public interface, is checked like every implementation before it is timed, and is
skipped with a reason where it cannot run. On a CPU only eager and ``torch.compile`` run: the others are GPU kernels,
and Liger's in Triton's interpreter would be a timing of the interpreter.
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
Pair = tuple[torch.Tensor, torch.Tensor]


def _heads_first(
    function: Callable, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any
) -> Callable[[], Pair]:
    """Of a function that takes ``[B, H, S, D]``."""

    def call() -> Pair:
        a, b = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return a.transpose(1, 2), b.transpose(1, 2)

    return call


def _liger(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles, kernel: str | None = None):
    pin = importlib.import_module("liger_kernel.backends").set_impl if kernel else None

    def rotate(*tensors: torch.Tensor) -> Pair:
        # Otherwise Liger chooses, by what else is installed and by the size of the input.
        if pin:
            pin(kernel)
        return module.liger_rotary_pos_emb(*tensors)

    return _heads_first(rotate, q, k, *angles.huggingface)


def _unsloth(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    return _heads_first(module.fast_rope_embedding, q, k, *(table[0] for table in angles.huggingface))


def _flash_attn(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    # One call a tensor, tables [S, D/2]; quack has the same interface.
    cos, sin = (table[0].to(q.dtype) for table in (angles.cos, angles.sin))
    return lambda: tuple(module.apply_rotary_emb(x, cos, sin, inplace=True) for x in (q, k))


def _flat(rotate: Callable, dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    """Of a function that changes ``[tokens, heads * D]`` and takes positions and one table of cos and sin."""
    flat = angles.position_ids.flatten(), *(x.flatten(0, 1).flatten(1) for x in (q, k))
    table = torch.cat((angles.cos[0], angles.sin[0]), -1).to(dtype)

    def call() -> Pair:
        rotate(*flat, q.shape[-1], table)
        return q, k

    return call


def _flashinfer(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    rotate = partial(module.apply_rope_with_cos_sin_cache_inplace, is_neox=True)
    return _flat(rotate, torch.float32, q, k, angles)


def _vllm(module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    # Its table is in the model's type, as in vLLM's own module.
    return _flat(lambda *tensors: module.rotary_embedding(*tensors, True), q.dtype, q, k, angles)


@dataclass(frozen=True)
class Baseline:
    """A package with a rotary kernel.

    Attributes:
        module: that has the function.
        rotate: from that module, queries, keys and angles to the call.
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
    """Read the ``.pth`` files of folders in ``PYTHONPATH`` that ``pip install --target`` made.

    Python reads them in its own ``site-packages`` only; nvidia-cutlass-dsl needs its to make ``cutlass`` importable.
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


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def installed(module: str, kernel: str | None = None) -> dict[str, str]:
    """Columns ``package`` (``"liger-kernel 0.8.5"``) and ``kernel``, which of the package's it is; where known."""
    names = dict.fromkeys(_distributions().get(module.partition(".")[0], ()))
    package = {"package": ", ".join(f"{name} {metadata.version(name)}" for name in names)} if names else {}
    return package | ({"kernel": kernel} if kernel else {})


def liger_kernels() -> list[str | None]:
    """Names of Liger's kernels that run here, Triton's first; ``[None]`` of a version that has only that one."""
    try:
        backends = importlib.import_module("liger_kernel.backends")
    except ImportError:
        return [None]
    return sorted(backends.available_impls("rope"), key=lambda name: not name.endswith("triton")) or [None]


def rotary_baselines(options: Options, angles: Angles) -> list[Implementation | Skipped]:
    """torch.compile's and each package's rotation of inputs with ``q`` and ``k`` ``[1, S, H, D]``."""
    found: list[Implementation | Skipped] = []
    if options.wants(COMPILED):
        # Sizes fixed: the best that the compiler can do.
        compiled = torch.compile(huggingface, dynamic=False)
        found.append(Implementation(COMPILED, lambda x: lambda: compiled(x.q, x.k, angles), late=True))
    for name, baseline in BASELINES.items():
        if not options.wants(name):
            continue
        if reason := unavailable(name, options):
            found.append(Skipped(name, reason))
            continue
        rotate, kernel = partial(baseline.rotate, importlib.import_module(baseline.module)), None
        if name == LIGER:
            # Without gradients its other kernels hand over to Triton's.
            kernel = liger_kernels()[0]
            rotate = partial(rotate, kernel=kernel)
        labels = installed(baseline.module, kernel)
        found.append(Implementation(name, lambda x, r=rotate: r(x.q, x.k, angles), late=True, labels=labels))
    return found
