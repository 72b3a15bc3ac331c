"""Follows Python source that is read and not imported: classes with their bases, and where an argument comes from."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

CONFIG_KEYS = frozenset(("rope_parameters", "rope_scaling"))
"""Entries of a config with the rotary parameters."""

OTHER_PARTS = re.compile(
    "Vision|Visual|Vit|ViT|Audio|Whisper|Siglip|SigLIP|SigLip|CLIP|Clip|Projector|Resampler|Perceiver|Tower|Speech"
    "|Conformer|Image|Video|Talker|Code2Wav|DiT|Indexer|MTP|MultiTokenPredict|Eagle|NextN|Patch|Dspark|DFlash"
)
"""Classes of parts that are no language model, whose rotary embedding is another."""


MODEL_FILES = re.compile(r"\.models?\.|\.architecture\.")
"""Modules that describe models: their classes are followed."""


class Module:
    def __init__(self, package: Package, name: str, path: Path) -> None:
        self.package, self.name, self.path = package, name, path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def names(self) -> dict[str, ast.AST | tuple[str, str | None]]:
        """Name -> its class, function or value, or (module, name) where it is imported."""
        found: dict[str, ast.AST | tuple[str, str | None]] = {}
        pending: list[ast.AST] = list(self.tree.body)
        while pending:
            node = pending.pop(0)
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                pending = [*node.body, *getattr(node, "orelse", ()), *pending]
            elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name] = (self._absolute(node), alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        found[alias.asname] = (alias.name, None)
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + (self.path.name == "__init__.py")]
        return ".".join((*parts, node.module) if node.module else parts)

    def place(self, node: ast.AST) -> str:
        return f"{self.path.name}:{node.lineno}"  # type: ignore[attr-defined]


class Class:
    def __init__(self, module: Module, node: ast.ClassDef) -> None:
        self.module, self.node, self.name = module, node, node.name

    @cached_property
    def bases(self) -> list[Class]:
        found = (self.module.package.find_class(self.module, base) for base in self.node.bases)
        return [base for base in found if base is not None and base is not self]

    @cached_property
    def mro(self) -> list[Class]:
        found = [self]
        for base in self.bases:
            found += [cls for cls in base.mro if cls not in found]
        return found

    @cached_property
    def methods(self) -> list[tuple[Class, Function]]:
        """Every method that an instance may run: an overridden one only where ``super()`` calls it."""
        found: list[tuple[Class, Function]] = []
        hidden: set[str] = set()
        for cls in self.mro:
            for node in cls.node.body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in hidden:
                    found.append((cls, node))
                    if not any(_is_super(call, node.name) for call in calls(node)):
                        hidden.add(node.name)
        return found

    def method(self, name: str) -> tuple[Class, Function] | None:
        return next(((cls, function) for cls, function in self.methods if function.name == name), None)

    @cached_property
    def fields(self) -> dict[str, ast.AST]:
        """Values of the class body, e.g. the defaults of a dataclass."""
        found: dict[str, ast.AST] = {}
        for cls in reversed(self.mro):
            for node in cls.node.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    found[node.targets[0].id] = node.value
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                    found[node.target.id] = node.value
        return found


class Package:
    """The Python files of an unpacked wheel."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}
        self._classes: dict[tuple[str, str], Class] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self.root.joinpath(*name.split("."))
            files = (path.parent / f"{path.name}.py", path / "__init__.py")
            file = next((f for f in files if f.is_file()), None)
            self._modules[name] = None if file is None else Module(self, name, file)
        return self._modules[name]

    def find(self, module: Module, name: str, depth: int = 0) -> tuple[Module, ast.AST] | None:
        """The definition of a name, through imports."""
        found = module.names.get(name)
        if found is None or depth > 8:
            return None
        if not isinstance(found, tuple):
            return module, found
        other = self.module(found[0])
        return None if other is None or found[1] is None else self.find(other, found[1], depth + 1)

    def find_class(self, module: Module, node: ast.AST, depth: int = 0) -> Class | None:
        if isinstance(node, ast.Subscript):  # Generic[...]
            node = node.value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            imported = module.names.get(node.value.id)
            if not isinstance(imported, tuple):
                return None
            other = self.module(imported[0] if imported[1] is None else f"{imported[0]}.{imported[1]}")
            return None if other is None else self.find_class(other, ast.Name(node.attr), depth + 1)
        found = self.find(module, node.id) if isinstance(node, ast.Name) and depth < 8 else None
        if found is None:
            return None
        owner, definition = found
        if isinstance(definition, ast.Name):  # another name of it
            return self.find_class(owner, definition, depth + 1)
        if not isinstance(definition, ast.ClassDef):
            return None
        return self._classes.setdefault((owner.name, definition.name), Class(owner, definition))


@functools.cache
def calls(node: ast.AST) -> tuple[ast.Call, ...]:
    return tuple(n for n in ast.walk(node) if isinstance(n, ast.Call))


@functools.cache
def assignments(node: ast.AST) -> tuple[ast.AST, ...]:
    """Without those for GGUF files, which are another format."""
    skipped = {
        id(inner)
        for n in ast.walk(node)
        if isinstance(n, ast.If) and "gguf" in ast.unparse(n.test)
        for statement in n.body
        for inner in ast.walk(statement)
    }
    kinds = (ast.Assign, ast.AnnAssign, ast.NamedExpr)
    return tuple(n for n in ast.walk(node) if isinstance(n, kinds) and id(n) not in skipped)


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def keyword(call: ast.Call, name: str) -> ast.AST | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def _is_super(call: ast.Call, name: str) -> bool:
    return called(call) == name and isinstance(call.func, ast.Attribute) and (
        (isinstance(call.func.value, ast.Call) and called(call.func.value) == "super")
        or (bool(call.args) and isinstance(call.args[0], ast.Name) and call.args[0].id == "self")
    )  # fmt: skip


def parameters(function: Function) -> dict[str, ast.AST | None]:
    """Name -> default, without ``self``."""
    plain = [*function.args.posonlyargs, *function.args.args]
    defaults: list[ast.AST | None] = [None] * (len(plain) - len(function.args.defaults))
    found = dict(zip((a.arg for a in plain), [*defaults, *function.args.defaults], strict=True))
    found.update(zip((a.arg for a in function.args.kwonlyargs), function.args.kw_defaults, strict=True))
    found.pop("self", None)
    return found


def argument(call: ast.Call, function: Function, name: str) -> ast.AST | None:
    """The value that ``call`` gives the parameter ``name``; None where it leaves the default."""
    value = keyword(call, name)
    if value is not None:
        return value
    position = list(parameters(function)).index(name)
    if position < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args):
        return call.args[position]
    return None


class Model:
    """The classes that a model's class builds itself from."""

    def __init__(self, entry: Class) -> None:
        self.entry, self.package = entry, entry.module.package
        self.classes: list[Class] = []
        self._given: set[str] = set()  # parameters that get a class from their caller
        pending = [entry]
        while pending:
            cls = pending.pop(0)
            other = OTHER_PARTS.search(cls.name) or not MODEL_FILES.search(cls.module.name)
            if cls in self.classes or (cls is not entry and other):
                continue
            self.classes.append(cls)
            for value in cls.fields.values():
                target = self.package.find_class(cls.module, value)
                pending += [target] if target else []
            for owner, function in cls.methods:
                if function.name not in ("load_weights", "__getattr__", "sanitize", "remap_weights"):
                    pending += self._used(cls, owner, function)

    def _used(self, cls: Class, owner: Class, function: Function) -> list[Class]:
        found: list[Class] = []
        skipped: set[int] = set()

        def skip(node: ast.AST | None) -> None:
            if node is not None:
                skipped.update(map(id, ast.walk(node)))

        for annotation in ast.walk(function):
            if isinstance(annotation, (ast.arg, ast.AnnAssign)):
                skip(annotation.annotation)
            if isinstance(annotation, ast.Call) and called(annotation) in (
                "isinstance",
                "cast",
                "issubclass",
            ):
                skip(annotation)
            if isinstance(annotation, ast.BoolOp) and getattr(annotation.values[0], "id", "") in self._given:
                skip(annotation.values[1])
        skip(function.returns)
        for name, default in parameters(function).items():
            if name in self._given:
                skip(default)
        for call in calls(function):
            for k in call.keywords:
                if k.arg and self._is_class(k.value, cls, owner, function):
                    self._given.add(k.arg)
            base = next(
                (b for b in cls.mro[1:] if _is_super(call, "__init__") and b.method("__init__")), None
            )
            if base is not None:
                init = base.method("__init__")
                names = list(parameters(init[1])) if init else []
                for name, value in zip(names, call.args, strict=False):
                    if self._is_class(value, cls, owner, function):
                        self._given.add(name)
        for node in ast.walk(function):
            if id(node) in skipped or not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            target = self.package.find_class(owner.module, node)
            if target is not None:
                found.append(target)
            elif isinstance(node, ast.Name):
                value = self.package.find(owner.module, node.id)
                if value is not None and isinstance(value[1], ast.Dict):  # layers by their type
                    found += [c for v in value[1].values if (c := self.package.find_class(value[0], v))]
        return found

    def _is_class(self, node: ast.AST, cls: Class, owner: Class, function: Function) -> bool:
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self":
            node = cls.fields.get(node.attr, node)
        elif isinstance(node, ast.Name):  # a parameter that is passed on
            node = parameters(function).get(node.id) or node
        return self.package.find_class(owner.module, node) is not None

    def callers(
        self, cls: Class, name: str, parameter: str
    ) -> Iterator[tuple[Class, Class, Function, ast.Call]]:
        """(class, owner, method, call) of each call of a method of ``cls``, its ``__init__`` included."""
        for other in self.classes:
            for owner, function in other.methods:
                for call in calls(function):
                    if name != "__init__":
                        matches = called(call) == name and cls in other.mro
                    elif called(call) == "__init__":
                        matches = _is_super(call, name) and cls in owner.mro[1:]
                    else:
                        target = self.package.find_class(owner.module, call.func)
                        method = None if target is None else target.method("__init__")
                        # A class that is given, e.g. attn_layer_type(...), may be this one.
                        matches = (method is not None and method[0] is cls) or (
                            target is None and _is_given(call) and parameter in {k.arg for k in call.keywords}
                        )
                    if matches:
                        yield other, owner, function, call


def _is_given(call: ast.Call) -> bool:
    """Whether the class that is called is a parameter or an entry of a dictionary."""
    return called(call).endswith(("_type", "_cls", "_class")) or isinstance(call.func, ast.Subscript)


Judge = Callable[["Tracer", ast.AST, "Place"], "set[str] | None"]


@dataclass(frozen=True)
class Place:
    """A method as an instance of ``cls`` runs it."""

    cls: Class
    owner: Class
    function: Function


class Tracer:
    """Where a value comes from: a set of the answers of ``judge``, "none", "unknown" and Python's constants."""

    def __init__(self, model: Model, judge: Judge) -> None:
        self.model, self.judge = model, judge
        self._open: set[tuple[int, int]] = set()

    def trace(self, node: ast.AST | None, at: Place) -> set[str]:
        if node is None:
            return {"none"}
        key = (id(node), id(at.cls))
        if key in self._open or len(self._open) > 60:
            return set()
        self._open.add(key)
        try:
            return self._trace(node, at)
        finally:
            self._open.discard(key)

    def _trace(self, node: ast.AST, at: Place) -> set[str]:
        answer = self.judge(self, node, at)
        if answer is not None:
            return answer
        if isinstance(node, ast.Constant):
            return {"none"} if node.value is None else {repr(node.value)}
        if isinstance(node, ast.IfExp):
            return self.trace(node.body, at) | self.trace(node.orelse, at)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.trace(value, at) for value in node.values))
        if isinstance(node, ast.Call) and called(node) in ("dict", "copy", "deepcopy"):
            inner = node.args[0] if node.args else getattr(node.func, "value", None)
            return self.trace(inner, at)
        if isinstance(node, ast.Name):
            return self._name(node.id, at)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._attribute(node.attr, at)
        return {"unknown"}

    def _name(self, name: str, at: Place) -> set[str]:
        found: set[str] = set()
        for value in assigned(at.function, name):
            found |= self.trace(value, at)
        if found:
            return found
        if name not in parameters(at.function):
            return {"unknown"}
        default = parameters(at.function)[name]
        sites = self.model.callers(at.owner, at.function.name, name)
        for cls, owner, function, call in sites:
            if any(k.arg is None for k in call.keywords) and keyword(call, name) is None:
                found |= {"unknown"}
                continue
            value = argument(call, at.function, name)
            found |= self.trace(default if value is None else value, Place(cls, owner, function))
        return found or {"unknown"}

    def _attribute(self, name: str, at: Place) -> set[str]:
        found: set[str] = set()
        for owner, function in at.cls.methods:
            for value in assigned(function, name, attribute=True):
                found |= self.trace(value, Place(at.cls, owner, function))
        if not found and name in at.cls.fields:
            found = self.trace(at.cls.fields[name], at)
        return found or {"unknown"}


def assigned(function: Function, name: str, *, attribute: bool = False) -> Iterator[ast.AST]:
    """Values that a function assigns to a local name or an attribute of ``self``; ``value[i]`` of a tuple."""

    def is_it(target: ast.AST) -> bool:
        if attribute:
            return isinstance(target, ast.Attribute) and target.attr == name and (
                isinstance(target.value, ast.Name) and target.value.id == "self"
            )  # fmt: skip
        return isinstance(target, ast.Name) and target.id == name

    for node in assignments(function):
        if isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and is_it(node.target) and node.value:
            yield node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if is_it(target):
                yield node.value
            elif isinstance(target, ast.Tuple):
                for index, part in enumerate(target.elts):
                    if is_it(part):
                        if isinstance(node.value, ast.Tuple):
                            yield node.value.elts[index]
                        else:
                            yield ast.Subscript(node.value, ast.Constant(index), ast.Load())
