"""Rotary kernels of other packages behind one signature, where they are installed.

Each is written from its package's public interface, is checked like every implementation before it is timed, and is
skipped with a reason where it cannot run. On a CPU only eager and ``torch.compile`` run: the others are GPU kernels,
and Liger's in Triton's interpreter would be a timing of the interpreter.
"""

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


def _heads_first(rotate: Callable, q: torch.Tensor, k: torch.Tensor, angles: Angles, index: Any = ...):
    """Of a function that takes ``[B, H, S, D]`` and Hugging Face's tables, or that index of their batch."""
    tables = [table[index] for table in angles.huggingface]
    return lambda: [x.transpose(1, 2) for x in rotate(q.transpose(1, 2), k.transpose(1, 2), *tables)]


def _one_tensor(rotate: Callable, q: torch.Tensor, k: torch.Tensor, angles: Angles):
    """Of a function that changes one tensor by tables ``[S, D/2]``."""
    tables = [table[0].to(q.dtype) for table in (angles.cos, angles.sin)]
    return lambda: [rotate(x, *tables, inplace=True) for x in (q, k)]


def _flat(rotate: Callable, q: torch.Tensor, k: torch.Tensor, angles: Angles, dtype: Any = None):
    """Of a function that changes ``[tokens, heads * D]``; positions, one table of cos and sin in the model's type."""
    flat = angles.position_ids.flatten(), *(x.flatten(0, 1).flatten(1) for x in (q, k))
    table = torch.cat((angles.cos[0], angles.sin[0]), -1).to(dtype or q.dtype)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        rotate(*flat, q.shape[-1], table, is_neox=True)
        return q, k

    return call


@dataclass(frozen=True)
class Baseline:
    """A package with a rotary kernel.

    Attributes:
        module, function: where it is.
        adapter: from the function, queries, keys and angles to the call.
        hopper: it has no code for GPUs before Hopper.
        alters: importing it changes transformers for the whole process: it runs only if named.
    """

    module: str
    function: str
    adapter: Callable[..., Callable[[], Any]]
    hopper: bool = False
    alters: bool = False

    def rotate(
        self, module: ModuleType, q: torch.Tensor, k: torch.Tensor, angles: Angles, kernel: str | None = None
    ) -> Callable[[], Any]:
        """The call; of Liger with the kernel of that name, which it else chooses by size and what is installed."""
        function = getattr(module, self.function)
        if kernel is None:
            return self.adapter(function, q, k, angles)
        pin = importlib.import_module("liger_kernel.backends").set_impl
        return self.adapter(lambda *tensors: (pin(kernel), function(*tensors))[1], q, k, angles)


in_float32 = partial(_flat, dtype=torch.float32)
without_batch = partial(_heads_first, index=0)
BASELINES = {
    LIGER: Baseline("liger_kernel.transformers.rope", "liger_rotary_pos_emb", _heads_first),
    "flash-attn": Baseline("flash_attn.layers.rotary", "apply_rotary_emb", _one_tensor),
    "FlashInfer": Baseline("flashinfer", "apply_rope_with_cos_sin_cache_inplace", in_float32),
    "quack": Baseline("quack.rotary", "apply_rotary_emb", _one_tensor, hopper=True),
    "vLLM": Baseline("vllm._custom_ops", "rotary_embedding", _flat),
    "Unsloth": Baseline("unsloth.kernels.rope_embedding", "fast_rope_embedding", without_batch, alters=True),
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


distributions = cache(metadata.packages_distributions)


def installed(module: str, kernel: str | None = None) -> dict[str, str]:
    """Columns ``package`` (``"liger-kernel 0.8.5"``) and ``kernel``, which of the package's it is; where known."""
    names = dict.fromkeys(distributions().get(module.partition(".")[0], ()))
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
        # Without gradients Liger's other kernels hand over to Triton's.
        kernel = liger_kernels()[0] if name == LIGER else None
        rotate = partial(baseline.rotate, importlib.import_module(baseline.module), kernel=kernel)
        labels = installed(baseline.module, kernel)
        found.append(Implementation(name, lambda x, r=rotate: r(x.q, x.k, angles), late=True, labels=labels))
    return found
