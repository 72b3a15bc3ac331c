"""The kernel of tools/hub_kernel, loaded as the kernels library loads it, and its slot without that library."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, ModuleType
from typing import NamedTuple

import torch
import transformers

from rope_dist.hf import forms
from tools import hub_kernel

MODELS = Path(transformers.__file__).parent / "models"
FUNCTION = "apply_rotary_pos_emb"


def variant(repository: Path) -> Path:
    """The build for the installed torch."""
    backend = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    return repository / "build" / f"torch-{backend}"


@functools.cache
def repository() -> Path:
    """Written once a process."""
    folder = tempfile.TemporaryDirectory(prefix="hub-kernel-")
    _kept.append(folder)
    hub_kernel.write(Path(folder.name, "repository"))
    return Path(folder.name, "repository")


_kept: list[tempfile.TemporaryDirectory] = []


@functools.cache
def kernel() -> ModuleType:
    """As ``kernels.importer`` imports it: by its path, under the name that its metadata give."""
    path = variant(repository())
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernelized(function: Callable, layer: type[torch.nn.Module]) -> torch.nn.Module:
    """What ``kernels.use_kernel_forward_from_hub`` and then ``kernels.kernelize`` make of a function."""

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    module = Func()
    module.forward = MethodType(layer.forward, module)
    return module


class StockFunction(NamedTuple):
    """One ``apply_rotary_pos_emb`` of transformers.

    Attributes:
        model: the first of those with the same source.
        is_slot: whether the hub may replace it.
        form: what rope_dist's table says that it does; None: not in it.
    """

    model: str
    is_slot: bool
    function: Callable
    form: forms.Form | None


def stock_functions(parameters: list[str]) -> Iterator[StockFunction]:
    """Those with these parameters, each source once, of their source alone: nothing is imported."""
    seen = set()
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if f"def {FUNCTION}(" not in text:
            continue
        functions = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
        found = functions.get(FUNCTION)
        if found is None or [a.arg for a in found.args.args] != parameters:
            continue
        is_slot = any("rotary_pos_emb" in ast.unparse(decorator) for decorator in found.decorator_list)
        digest = forms.digest(FUNCTION, functions)
        if (digest, is_slot) in seen:
            continue
        seen.add((digest, is_slot))
        for node in functions.values():
            node.decorator_list, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
        names = [FUNCTION]
        for name in names:  # grows by what they use
            used = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)} & functions.keys()
            names += sorted(used - set(names))
        space = {"torch": torch}
        exec(compile(ast.Module([functions[name] for name in names], []), str(file), "exec"), space)
        model = file.stem.removeprefix("modeling_")
        yield StockFunction(model, is_slot, space[FUNCTION], forms.known_forms().get(digest))


def slots() -> list[str]:
    """Modules of the installed transformers whose ``apply_rotary_pos_emb`` has the slot ``rotary_pos_emb``."""
    return [
        f"transformers.models.{file.parent.name}.{file.stem}"
        for file in sorted(MODELS.glob("*/modeling_*.py"))
        if '_from_hub("rotary_pos_emb")' in file.read_text(encoding="utf-8")
    ]
