"""The forms in which models of transformers apply a rotation, recognised by the source of their functions.

Every model file of transformers has its own ``apply_rotary_pos_emb``: halves or neighbouring dimensions, one tensor
or two, tables that hold each value twice or once, real or complex. What a function does is looked up by the normal
form of its source (its syntax tree without names of variables, annotations, docstrings and decorators) in
``rotary_forms.json``. An unknown one is refused, never guessed. ``python -m tools.rotary_forms`` compares the table
with an installed transformers, and tries each entry on numbers.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

FILE = Path(__file__).with_name("rotary_forms.json")
STOCK = "transformers.models."
"""Modules of which a class may be enabled."""

UNDO = "undo what another package did before enable()"

_APPLIES = re.compile(r"apply_(\w+_)?(rotary_|rope)|rotate_")
"""Names of functions that apply a rotation, known or not."""


class Unsupported(ValueError):
    """A model that cannot be enabled."""


class NotRotary(Unsupported):
    """A model without a rotary embedding of transformers."""


@dataclass(frozen=True)
class Form:
    """How a function rotates.

    Attributes:
        layout: ``"half"`` pairs dimensions ``(i, i + R/2)``, ``"interleaved"`` ``(2i, 2i + 1)``;
            ``"interleaved-to-half"`` reads the second and writes the first.
        tables: each value of cos and sin is there ``"twice"`` (in two equal halves), in ``"pairs"`` (two equal
            neighbours) or ``"once"``; ``"complex"`` is one tensor, ``cos + i sin``.
        negative: by the angles' negatives.
        last: the last R dimensions of a head instead of the first.
        heads_axis: of a complex form: the axis of the heads.
        refused: why this package does not apply it; empty where it does.
    """

    layout: str = "half"
    tables: str = "twice"
    negative: bool = False
    last: bool = False
    heads_axis: int = 1
    refused: str = ""

    @property
    def can_be_fused(self) -> bool:
        """Whether the kernels that project rotate in this form."""
        return self.layout in ("half", "interleaved") and self.tables != "complex" and not self.last


@functools.cache
def known_forms() -> dict[str, Form]:
    """Digest of a normal form -> form."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        digest: Form(**{key: value for key, value in entry.items() if key != "example"})
        for digest, entry in entries.items()
    }


def digest(name: str, functions: Mapping[str, ast.FunctionDef]) -> str:
    """Of the normal form of the function ``name`` of a file, together with those of the file that it calls."""
    order = [name]
    texts = []
    for current in order:  # grows as functions are met
        used = [n.id for n in _body(functions[current]) if isinstance(n, ast.Name) and n.id in functions]
        order += [function for function in dict.fromkeys(used) if function not in order]
        texts.append(normal_form(functions[current], order, keep_parameters=current == name))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def globals_used(name: str, functions: Mapping[str, ast.FunctionDef]) -> dict[str, set[str]]:
    """Names that the function ``name`` of a file, and those of the file that it uses, take from elsewhere.

    By the function of the file that takes them; functions of the file are left out, built-in ones too.
    """
    used: dict[str, set[str]] = {}
    order = [name]
    for current in order:
        nodes = list(_body(functions[current]))
        own = {n.arg for n in nodes if isinstance(n, ast.arg)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n is not functions[current]}
        free = {n.id for n in nodes if isinstance(n, ast.Name)} - own - vars(builtins).keys()
        order += [function for function in sorted(free & functions.keys()) if function not in order]
        used[current] = free - functions.keys()
    return used


def _body(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes that a function computes with, in the order of ``ast.walk``: not its decorators and annotations."""
    nodes: list[ast.AST] = [function]
    for node in nodes:  # grows
        yield node
        for key, value in ast.iter_fields(node):
            if key not in _LEFT_OUT:
                nodes += [
                    n for n in (value if isinstance(value, list) else [value]) if isinstance(n, ast.AST)
                ]


def normal_form(function: ast.FunctionDef, files_own: list[str], *, keep_parameters: bool) -> str:
    """The text of a function without what does not matter: names of variables, annotations, docstrings, decorators.

    Args:
        files_own: functions of its file that it calls, whose names do not matter either.
        keep_parameters: the names of its parameters matter.
    """
    names = {other: f"function {i}" for i, other in enumerate(files_own)}
    # The parameters of the function itself stay: callers name them.
    own = {a.arg for a in function.args.args + function.args.kwonlyargs} if keep_parameters else set()
    for node in ast.walk(function):
        found = None
        if isinstance(node, ast.arg):
            found = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found = node.id
        elif isinstance(node, ast.FunctionDef) and node is not function:
            found = node.name
        if found is not None and found not in own:
            names.setdefault(found, f"variable {len(names)}")
    return _text(function, names)


# None of these changes what a function computes.
_LEFT_OUT = {
    "annotation",
    "returns",
    "decorator_list",
    "type_params",
    "type_comment",
    "ctx",
    "kind",
    "simple",
}
# Identifiers that are no variables: attributes (``x.shape``) and the names of arguments in calls (``dim=-1``).
_NO_VARIABLE = {(ast.Attribute, "attr"), (ast.keyword, "arg"), (ast.Constant, "value")}


def _text(node: Any, names: Mapping[str, str]) -> str:
    """A syntax tree as text, the same in every version of Python (``ast.dump`` and ``ast.unparse`` are not)."""
    if isinstance(node, list):
        return f"[{', '.join(_text(one, names) for one in node if not _is_docstring(one))}]"
    if not isinstance(node, ast.AST):
        return repr(names.get(node, node) if isinstance(node, str) else node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign([node.target], node.value)
    parts = []
    for key, value in ast.iter_fields(node):
        if key not in _LEFT_OUT and value is not None and value != []:
            text = repr(value) if (type(node), key) in _NO_VARIABLE else _text(value, names)
            parts.append(f"{key}={text}")
    return f"{type(node).__name__}({', '.join(parts)})"


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@dataclass
class StockFile:
    """One file of models: its module, and the syntax tree of its source.

    Attributes:
        module: the imported file.
        functions: its module-level functions.
        methods: of its classes, ``(class, method)`` -> syntax tree.
    """

    module: ModuleType
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    methods: dict[tuple[str, str], ast.FunctionDef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            source = inspect.getsource(self.module)
        except OSError as error:
            raise Unsupported(
                f"the source of {self.module.__name__} is not installed: how it rotates cannot be told"
            ) from error
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        self.methods[node.name, method.name] = method

    def form(self, name: str) -> Form:
        """Of the function ``name``.

        Raises:
            Unsupported: it is not known, known as one that this package does not apply, or not the file's own
                any more.
        """
        where = f"{name} of {self.module.__name__}"
        if name not in self.functions:
            raise Unsupported(
                f"{where} is not defined in that file: only functions of the model's file are known"
            )
        self.check_own(name)
        form = known_forms().get(digest(name, self.functions))
        if form is None:
            raise Unsupported(
                f"{where} is not a form of rotation that is known (rope_dist/hf/rotary_forms.json)"
            )
        if form.refused:
            raise Unsupported(f"{where} cannot be replaced: {form.refused}")
        return form

    def check_own(self, name: str) -> None:
        """:class:`Unsupported` unless ``name``, and what it uses, are what the source of the file says."""
        for used, elsewhere in globals_used(name, self.functions).items():
            function, node = self.function(used), self.functions[used]
            if not self._is_compiled(function, node):
                raise Unsupported(f"{used} of {self.module.__name__} has been replaced: {UNDO}")
            if foreign := [n for n in sorted(elsewhere) if getattr(self.module, n, None) is not torch]:
                raise Unsupported(
                    f"{used} of {self.module.__name__} computes with {', '.join(foreign)}, of which the source "
                    "is not known"
                )

    def function(self, name: str) -> Callable[..., Any]:
        """The function ``name`` itself, without what the kernels library may have put around it."""
        return _own(getattr(self.module, name, None))

    def check_own_method(self, cls: type, name: str) -> None:
        """:class:`Unsupported` unless a method of a class of the file is what its source says, perhaps wrapped."""
        node = self.methods.get((cls.__name__, name))
        if node is None or not self._is_compiled(inspect.unwrap(vars(cls)[name]), node):
            raise Unsupported(f"{cls.__name__}.{name} of {self.module.__name__} has been replaced: {UNDO}")

    def _is_compiled(self, function: Any, node: ast.FunctionDef) -> bool:
        if not isinstance(function, FunctionType) or function.__globals__ is not vars(self.module):
            return False
        first = min(part.lineno for part in (node, *node.decorator_list))
        return (function.__code__.co_name, function.__code__.co_firstlineno) == (node.name, first)

    @property
    def path(self) -> str:
        return self.module.__file__ or ""


def _own(function: Any) -> Any:
    """What is inside of the wrappers of torch, transformers and the kernels library; others stay around it."""
    while True:
        inside = _inside(function)
        if inside is None:
            return function
        function = inside


def _inside(wrapper: Any) -> Any:
    if isinstance(wrapper, nn.Module):
        # Of use_kernel_forward_from_hub: its forward calls the function, which is in its closure.
        module, closure = type(wrapper).__module__, getattr(type(wrapper).forward, "__closure__", None) or ()
        found = [cell.cell_contents for cell in closure if isinstance(cell.cell_contents, FunctionType)]
        inside = found[0] if len(found) == 1 else None
    else:
        inside = getattr(wrapper, "__wrapped__", None)
        module = getattr(wrapper, "__globals__", {}).get("__name__", "")
    return inside if _WRAPS.match(module) and not module.startswith(STOCK) else None


_WRAPS = re.compile(r"(torch|transformers|kernels)(\.|$)")


@functools.cache
def stock_file(module: str) -> StockFile:
    """The file of a module of transformers that is imported."""
    return StockFile(sys.modules[module])


def rotating_methods(cls: type) -> Iterator[tuple[type, str, list[str]]]:
    """``(class, method, functions)`` of every method of a stock class that calls functions which apply a rotation.

    A method that another package has replaced counts too, by the source of the one that it replaces.
    """
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(STOCK):
            continue
        for name, function in vars(base).items():
            if name in seen or not isinstance(function, FunctionType):
                continue
            seen.add(name)
            functions = functions_called(function, base, name)
            if functions:
                yield base, name, functions


def functions_called(function: FunctionType, cls: type, method: str) -> list[str]:
    """Names of functions of the file that apply a rotation, in a function or in what its decorators wrap.

    One that calls such a function is one too: it is not copied with the method, and will not be known.
    """
    file = vars(sys.modules[cls.__module__])
    function = inspect.unwrap(function)
    if isinstance(function, FunctionType) and function.__globals__ is file:
        names = _names(function.__code__)
    else:
        node = stock_file(cls.__module__).methods.get((cls.__name__, method))
        names = [n.id for n in _body(node) if isinstance(n, ast.Name)] if node is not None else []
    return [name for name in dict.fromkeys(names) if name in file and _applies(name, file)]


def _applies(name: str, file: Mapping[str, Any]) -> bool:
    if _APPLIES.search(name):
        return True
    function = file[name]
    return (
        isinstance(function, FunctionType)
        and function.__globals__ is file
        and any(_APPLIES.search(inner) and inner in file for inner in _names(function.__code__))
    )


def _names(code: CodeType) -> list[str]:
    """Globals and attributes that a function and those within it use."""
    found = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _names(constant)
    return found
