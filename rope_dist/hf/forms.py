"""The forms in which models of transformers apply a rotation, recognised by the source of their functions.

Every model file of transformers has its own ``apply_rotary_pos_emb``: halves or neighbouring dimensions, one tensor
or two, tables that hold each value twice or once, real or complex. What a function does is looked up by the normal
form of its source (its syntax tree without names of variables, annotations, docstrings and decorators) in
``rotary_forms.json``. An unknown one is refused, never guessed. ``python -m tools.rotary_forms`` compares the table
with an installed transformers, and tries each entry on numbers.
"""

from __future__ import annotations

import ast
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

from torch import nn

FILE = Path(__file__).with_name("rotary_forms.json")
STOCK = "transformers.models."
"""Modules of which a class may be enabled."""

_APPLIES = re.compile(r"apply_(\w+_)?rotary_")
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
    for current in order:  # grows as calls are met
        called = [
            node.func.id
            for node in ast.walk(functions[current])
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions
        ]
        order += [function for function in dict.fromkeys(called) if function not in order]
        texts.append(_normal_form(functions[current], order, keep_parameters=current == name))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _normal_form(function: ast.FunctionDef, files_own: list[str], *, keep_parameters: bool) -> str:
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
        for node in ast.parse(inspect.getsource(self.module)).body:
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
        if name not in self.functions or self.function(name).__module__ != self.module.__name__:
            raise Unsupported(f"{where} has been replaced by another package's: undo that before enable()")
        form = known_forms().get(digest(name, self.functions))
        if form is None:
            raise Unsupported(
                f"{where} is not a form of rotation that is known (rope_dist/hf/rotary_forms.json)"
            )
        if form.refused:
            raise Unsupported(f"{where} cannot be replaced: {form.refused}")
        return form

    def function(self, name: str) -> Callable[..., Any]:
        """The function ``name`` itself, without what the kernels library may have put around it."""
        return _own(getattr(self.module, name))

    @property
    def path(self) -> str:
        return self.module.__file__ or ""


def _own(function: Any) -> Any:
    """The function inside what the kernels library made of it (a module that calls it)."""
    if isinstance(function, nn.Module):
        function = type(function).forward
    return inspect.unwrap(function)


@functools.cache
def stock_file(module: str) -> StockFile:
    """The file of a module of transformers that is imported."""
    return StockFile(sys.modules[module])


def rotating_methods(cls: type) -> Iterator[tuple[type, str, list[str]]]:
    """``(class, method, functions)`` of every method of a stock class that calls functions which apply a rotation."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(STOCK):
            continue
        for name, function in vars(base).items():
            if name in seen or not isinstance(function, FunctionType):
                continue
            seen.add(name)
            functions = _functions_called(function, base.__module__)
            if functions:
                yield base, name, functions


def _functions_called(function: FunctionType, module: str) -> list[str]:
    """Names of functions of the file that apply a rotation, in a function or in what its decorators wrap."""
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function.__globals__["__name__"] != module:
        return []
    return list(dict.fromkeys(name for name in _applying(function.__code__) if name in function.__globals__))


def _applying(code: CodeType) -> list[str]:
    found = [name for name in code.co_names if _APPLIES.search(name)]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += _applying(constant)
    return found
