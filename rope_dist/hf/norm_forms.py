"""The RMS norms of queries and keys in models of transformers, recognised by the source of their classes.

As ``forms.py`` does for rotations: every model file has a norm of its own, and what it computes is looked up by the
normal form of its ``forward`` (and of the methods that this calls) in ``norm_forms.json``. One that is not in the table
is called as the module that it is. ``python -m tools.rotary_forms`` compares this table, too, with an installed
transformers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .forms import STOCK, Unsupported, globals_used, normal_form, stock_file

FILE = Path(__file__).with_name("norm_forms.json")


@dataclass(frozen=True)
class NormForm:
    """What a norm computes: ``x / sqrt(mean(x^2) + eps) * (weight + offset)``.

    Attributes:
        eps: its attribute.
        weight: its attribute; empty where it has none.
        scaled: attribute that says whether it has a weight; empty where it always has.
        offset: added to the weights.
        promotes: the result has the dtype of a product with the weight, and not that of ``x``.
        autocast: autocast may change the dtype of the result.
    """

    eps: str
    weight: str = ""
    scaled: str = ""
    offset: float = 0.0
    promotes: bool = False
    autocast: bool = False


OF_TORCH = NormForm("eps", "weight", promotes=True, autocast=True)
"""Of ``torch.nn.RMSNorm``."""

Known = tuple[NormForm, Callable[..., Any]]
"""A form, and the ``forward`` that was recognised."""


@functools.cache
def known_norms() -> dict[str, NormForm]:
    """Digest of a normal form -> form."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        digest: NormForm(**{key: value for key, value in entry.items() if key != "example"})
        for digest, entry in entries.items()
    }


def methods_used(methods: Mapping[str, ast.FunctionDef]) -> list[str]:
    """``forward``, and the methods of its class that it calls."""
    order = ["forward"]
    for current in order:  # grows as methods are met
        called = [
            n.attr
            for n in ast.walk(methods[current])
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
        ]
        order += [name for name in dict.fromkeys(called) if name in methods and name not in order]
    return order


def norm_digest(methods: Mapping[str, ast.FunctionDef]) -> str:
    """Of the normal form of a class that has ``forward`` among its ``methods``."""
    texts = [normal_form(methods[name], [], keep_parameters=False) for name in methods_used(methods)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def methods_of(cls: type) -> dict[str, ast.FunctionDef]:
    """Of a class of a model file of transformers."""
    methods = stock_file(cls.__module__).methods
    return {name: node for (owner, name), node in methods.items() if owner == cls.__name__}


def norm_form(cls: type) -> NormForm | None:
    """What the norm ``cls`` computes; None where that is not known, or where its methods have been replaced."""
    if cls is nn.RMSNorm:
        return OF_TORCH
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    if not owner.__module__.startswith(STOCK):
        return None
    try:
        file, methods = stock_file(owner.__module__), methods_of(owner)
        if "forward" not in methods:
            return None
        used = methods_used(methods)
        for name in used:
            file.check_own_method(owner, name)
            if getattr(cls, name) is not vars(owner)[name] or _elsewhere(name, methods, vars(file.module)):
                return None
    except Unsupported:
        return None
    return known_norms().get(norm_digest(methods))


def _elsewhere(name: str, methods: Mapping[str, ast.FunctionDef], module: Mapping[str, Any]) -> list[str]:
    """What a method computes with that is neither torch nor its class."""
    used = set().union(*globals_used(name, methods).values())
    return [n for n in used if module.get(n) is not torch]


def module_classes(cls: type) -> dict[str, list[type]]:
    """Attribute -> classes of the modules that the ``__init__`` of a stock class may assign to it.

    From the source: no model is built.
    """
    found: dict[str, list[type]] = {}
    for base in cls.__mro__:
        if not base.__module__.startswith(STOCK):
            continue
        init = methods_of(base).get("__init__")
        module = vars(stock_file(base.__module__).module)
        for statement in ast.walk(init) if init is not None else ():
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                made = [c for c in _called(statement.value, module) if issubclass(c, nn.Module)]
                for target in targets:
                    if made and isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        found.setdefault(target.attr, []).extend(made)
    return found


def _called(value: ast.expr, module: Mapping[str, Any]) -> list[type]:
    """Classes of which an expression makes an object."""
    names = [ast.unparse(n.func).split(".") for n in ast.walk(value) if isinstance(n, ast.Call)]
    found = [
        functools.reduce(lambda o, attribute: getattr(o, attribute, None), rest, module.get(first))
        for first, *rest in names
    ]
    return [one for one in found if isinstance(one, type)]


def norms_of(cls: type) -> tuple[dict[str, list[type]], dict[type, Known]]:
    """The modules of a stock class that may be norms: classes by attribute, and the known ones among them.

    An attribute that may also be something else than a norm that is known is not among the first.
    """
    attributes = {
        name: classes
        for name, classes in module_classes(cls).items()
        if any("Norm" in one.__name__ for one in classes)
    }
    known: dict[type, Known] = {nn.RMSNorm: (OF_TORCH, nn.RMSNorm.forward)}
    for one in {one for classes in attributes.values() for one in classes}:
        form = norm_form(one)
        if form is not None:
            known[one] = form, one.forward
    return attributes, known
