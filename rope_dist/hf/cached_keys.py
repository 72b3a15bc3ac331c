"""What the keys in a cache have of the rotation, read in the source of a stock attention: :func:`cached_keys`.

The rotated tensor is followed from the function that rotates ::

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
    if past_key_values is not None:
        key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

to the cache, through views, concatenations with the part that is not rotated, and conditions. Such keys can be
corrected when the frequencies change (:func:`rope_dist.ops.rerotate_`). What is not understood is refused: a norm of
rotated keys, keys that are rotated after the cache, a second cache.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from .forms import Form, Unsupported, rotating_methods, stock_file
from .source import loaded, may_write, name_of, of_self, stored, takes_a_part


@dataclass(frozen=True)
class CachedKeys:
    """What a layer of a cache has of the rotation of its attention, whose frequencies are R / 2.

    Attributes:
        first: the first R dimensions of each head are the rotated ones; else the last.
        interleaved: pairs are neighbouring dimensions, in the cache; else ``(i, i + R/2)``.
        tensor: of the layer of the cache: ``"keys"``, or ``"values"`` where latent attention keeps there the only
            part of its keys that is rotated.
        test: expression of ``self`` that says whether an attention caches rotated keys; empty where each does.
    """

    first: bool
    interleaved: bool
    tensor: str = "keys"
    test: str = ""

    def cached_by(self, attention: nn.Module) -> bool:
        """Whether ``attention`` caches rotated keys: not a layer without rotation, or one that has another's keys."""
        return not self.test or bool(eval(self.test, {"self": attention}))


def cached_layers(attentions: Iterable[nn.Module]) -> dict[int, tuple[nn.Module, CachedKeys]]:
    """The attention of each layer of a model's cache that has rotated keys, and what they have of its rotation.

    Args:
        attentions: of one model, stock or enabled.

    Raises:
        Unsupported: the cached keys of one of them cannot be corrected.
    """
    known: dict[type[nn.Module], CachedKeys | str] = {}
    layers: dict[int, tuple[nn.Module, CachedKeys]] = {}
    for attention in attentions:
        stock = getattr(type(attention), "stock", type(attention))
        keys = known[stock] = known.get(stock) or cached_keys(stock)
        if isinstance(keys, str):
            raise Unsupported(f"cached keys of {stock.__name__} cannot be corrected: {keys}")
        if keys.cached_by(attention):
            index = attention.layer_idx
            if not isinstance(index, int) or index in layers:
                raise Unsupported(
                    f"cached keys of {stock.__name__} cannot be corrected: layer {index} of a cache is not its own"
                )
            layers[index] = (attention, keys)
    return layers


def cached_keys(stock: type[nn.Module]) -> CachedKeys | str:
    """How cached keys of a stock attention are rotated; a text says why that cannot be told, or not be corrected.

    Args:
        stock: a class of transformers that rotates.
    """
    methods = list(rotating_methods(stock))
    if len(methods) != 1:
        return f"{stock.__name__} rotates in {len(methods)} methods"
    base, method, functions = methods[0]
    file = stock_file(base.__module__)
    try:
        file.check_own_method(base, method)
        forms = {name: file.form(name) for name in functions}
    except Unsupported as error:
        return str(error)
    return followed(file.methods[base.__name__, method], forms, file.functions)


def followed(
    method: ast.FunctionDef, forms: Mapping[str, Form], functions: Mapping[str, ast.FunctionDef]
) -> CachedKeys | str:
    """What ``method`` caches; a text says why that is not known.

    Args:
        forms: of the functions that it calls to rotate.
        functions: of its file.
    """
    reader = _Reader(forms, functions)
    try:
        _check_tables(method)
        reader.run(method.body, {})
        return reader.result()
    except _Refused as error:
        return str(error)


class _Refused(Exception):
    """A text for the user."""


@dataclass(frozen=True)
class _Rotated:
    """A tensor that is rotated, in all dimensions of a head (``whole``) or in the first or last R.

    ``test``: under this condition of ``self``; else it is not rotated.
    """

    interleaved: bool
    first: bool
    whole: bool
    test: str = ""


@dataclass(frozen=True)
class _Lost:
    """What was made from rotated tensors in a way that is not followed."""

    reason: str


# What a variable is; None has nothing of a rotated tensor.
_Value = _Rotated | _Lost | tuple["_Value", ...] | None
_Variables = dict[str, _Value]

_CACHED = _Lost("keys are rotated after they were cached")
_NO_TENSOR = ("shape", "dtype", "device", "ndim", "size", "dim")
_KEEPS = ("contiguous", "to", "float", "expand")
_VIEWS = ("transpose(1, 2)", "permute(0, 2, 1, 3)")


class _Reader:
    """Reads statements in their order and remembers what is given to caches."""

    def __init__(self, forms: Mapping[str, Form], functions: Mapping[str, ast.FunctionDef]) -> None:
        self.forms, self.functions = forms, functions
        self.updates: list[tuple[ast.Call, _Value, _Value, tuple[str, ...]]] = []
        self.path: tuple[str, ...] = ()  # conditions of self under which a statement is reached

    def result(self) -> CachedKeys:
        if not self.updates:
            raise _Refused("the method that rotates caches no keys")
        if len(self.updates) > 1:
            raise _Refused("it caches keys in several places")
        ((call, *given, path),) = self.updates
        for value in given:
            if isinstance(value, _Lost):
                raise _Refused(value.reason)
        rotated = [(n, v) for n, v in zip(("keys", "values"), given, strict=True) if isinstance(v, _Rotated)]
        if len(rotated) != 1:
            raise _Refused("keys and values are both rotated" if rotated else "cached keys are not rotated")
        if len(call.args) < 3 or ast.unparse(call.args[2]) != "self.layer_idx":
            raise _Refused(f"its layer of the cache changes: {ast.unparse(call)}")
        ((tensor, value),) = rotated
        return CachedKeys(value.first, value.interleaved, tensor, _both(*path, value.test))

    # --- statements ----------------------------------------------------------------------------

    def run(self, statements: Iterable[ast.stmt], variables: _Variables) -> None:
        """Read ``statements``, and change ``variables`` as they do."""
        for statement in statements:
            if isinstance(statement, ast.If):
                self.condition(statement, variables)
            elif not isinstance(statement, (ast.Raise, ast.Assert, ast.Pass)):
                self.statement(statement, variables)

    def statement(self, statement: ast.stmt, variables: _Variables) -> None:
        known = {name for name, value in variables.items() if value is not None}
        in_place = isinstance(statement, ast.AugAssign) and known & set(stored(statement))
        if in_place or may_write(statement, known):
            self.forget(variables, statement)
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)):
            value = None if statement.value is None else self.value(statement.value, variables)
            if isinstance(statement, ast.Expr) and value is not None and not _updates(statement.value):
                self.forget(variables, statement)
            elif isinstance(statement, ast.Assign):
                for target in statement.targets:
                    self.assign(target, value, variables)
            elif isinstance(statement, ast.AnnAssign):
                self.assign(statement.target, value, variables)
            return
        # A loop, a context, a function.
        if any(self.is_followed(node) for node in ast.walk(statement)):
            raise _Refused(f"keys are rotated or cached in a {type(statement).__name__.lower()} statement")
        value = self.of_names(statement, variables)
        changed = known & set(loaded(statement))
        variables.update(dict.fromkeys([*stored(statement), *changed], value))

    def forget(self, variables: _Variables, statement: ast.stmt) -> None:
        """A rotated tensor may be changed in place; which are views of it is not known."""
        text = ast.unparse(statement)
        if any(variables.get(name) is _CACHED for name in loaded(statement)):
            raise _Refused(f"cached keys are changed in place: {text}")
        variables.update({name: _lost(value, text) for name, value in variables.items()})

    def condition(self, statement: ast.If, variables: _Variables) -> None:
        self.value(statement.test, variables)
        before, outcomes = self.path, []
        for body, test in ((statement.body, statement.test), (statement.orelse, _not(statement.test))):
            self.path, outcome = (*before, *_parts_of_self(test)), dict(variables)
            self.run(body, outcome)
            outcomes.append(outcome)
        self.path, (then, otherwise) = before, outcomes
        for name in then.keys() | otherwise.keys():
            variables[name] = _joined(statement.test, then.get(name), otherwise.get(name))

    def assign(self, target: ast.expr, value: _Value, variables: _Variables) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(value, tuple) or len(value) != len(target.elts):
                value = (_lost(value, ast.unparse(target)),) * len(target.elts)
            for one, part in zip(target.elts, value, strict=True):
                self.assign(one, part, variables)
        elif isinstance(target, ast.Name):
            variables[target.id] = value
        elif value is not None:
            variables.update(dict.fromkeys(loaded(target), _lost(value, ast.unparse(target))))

    # --- expressions ---------------------------------------------------------------------------

    def value(self, node: ast.expr, variables: _Variables) -> _Value:
        if isinstance(node, ast.Name):
            if node.id in self.forms:
                raise _Refused(f"{node.id} is used without being called")
            return variables.get(node.id)
        if isinstance(node, (ast.Tuple, ast.List)):
            values = tuple(self.value(one, variables) for one in node.elts)
            return None if _lost(values, "") is None else values
        if isinstance(node, ast.Attribute) and node.attr in _NO_TENSOR:
            self.value(node.value, variables)
            return None
        if isinstance(node, ast.Compare) and all(isinstance(one, (ast.Is, ast.IsNot)) for one in node.ops):
            self.other(node, variables)
            return None
        if isinstance(node, ast.IfExp):
            self.value(node.test, variables)
            then, otherwise = (self.value(one, variables) for one in (node.body, node.orelse))
            return _joined(node.test, then, otherwise)
        if isinstance(node, ast.Call):
            return self.call(node, variables)
        return self.other(node, variables)

    def call(self, node: ast.Call, variables: _Variables) -> _Value:
        if name_of(node.func) in self.forms:
            return self.rotation(node, variables)
        if ast.unparse(node.func) == "torch.cat":
            return self.concatenation(node, variables)
        if not isinstance(node.func, ast.Attribute):
            return self.other(node, variables)
        of = self.value(node.func.value, variables)
        arguments = [self.value(one, variables) for one in (*node.args, *(k.value for k in node.keywords))]
        if _updates(node) and len(node.args) >= 2:
            self.updates.append((node, *arguments[:2], self.path))
            return (_CACHED, _CACHED)
        if node.func.attr.startswith("update") and (worst := _lost(tuple(arguments), "")) is not None:
            raise _Refused(
                worst.reason if worst is _CACHED else f"it has another cache: {ast.unparse(node.func)}"
            )
        if isinstance(of, _Rotated) and not any(arguments) and _keeps_dimensions(node):
            return of
        return _lost((of, *arguments), ast.unparse(node)) if node.func.attr not in _NO_TENSOR else None

    def rotation(self, node: ast.Call, variables: _Variables) -> _Value:
        function, form = self.functions[node.func.id], self.forms[node.func.id]
        parameters = [argument.arg for argument in function.args.args]
        count = 1 if parameters[0] == "x" else 2
        end = count + (1 if form.tables == "complex" else 2)
        tables = list(zip(node.args[count:end], parameters[count:end], strict=False))
        if len(tables) != end - count or not all(_is_table(*table) for table in tables):
            raise _Refused(f"its tables are not known: {ast.unparse(node)}")
        before = _lost(tuple(self.value(one, variables) for one in node.args[:count]), "")
        if before is not None:
            raise _Refused(before.reason if before is _CACHED else "a tensor is rotated twice")
        if form.negative:
            raise _Refused("keys are rotated by the negatives of the angles")
        whole = not form.last and not takes_a_part(function)
        rotated = _Rotated(form.layout == "interleaved", not form.last, whole)
        return rotated if count == 1 else (rotated, rotated)

    def concatenation(self, node: ast.Call, variables: _Variables) -> _Value:
        """With the part of each head that is not rotated."""
        if not node.args:
            return self.other(node, variables)
        values = self.value(node.args[0], variables)
        axis = [ast.unparse(one) for one in (*node.args[1:], *(keyword.value for keyword in node.keywords))]
        if isinstance(values, tuple) and len(values) == 2 and axis == ["-1"]:
            before, after = values
            if isinstance(before, _Rotated) and before.first and after is None:
                return replace(before, whole=False)
            if isinstance(after, _Rotated) and (after.whole or not after.first) and before is None:
                return replace(after, first=False, whole=False)
        return _lost(values, ast.unparse(node))

    def other(self, node: ast.AST, variables: _Variables) -> _Value:
        """An expression that is not followed."""
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if any(self.is_followed(one) for one in ast.walk(node)):
                raise _Refused(f"keys are rotated or cached in {ast.unparse(node)}")
            return self.of_names(node, variables)
        values = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.expr, ast.keyword)):
                values.append(self.value(child.value if isinstance(child, ast.keyword) else child, variables))
        if isinstance(node, ast.NamedExpr):
            self.assign(node.target, values[-1], variables)
            return values[-1]
        return _lost(tuple(values), ast.unparse(node))

    def of_names(self, node: ast.AST, variables: _Variables) -> _Value:
        names = (*loaded(node), *stored(node))
        return _lost(tuple(variables.get(name) for name in names), ast.unparse(node))

    def is_followed(self, node: ast.AST) -> bool:
        return name_of(node) in self.forms or _updates(node)


def _lost(value: _Value, by: str) -> _Lost | None:
    """What is known of something that is made of ``value`` by the expression ``by``; None if nothing is rotated."""
    if isinstance(value, tuple):
        return next((found for one in value if (found := _lost(one, by)) is not None), None)
    return _Lost(f"more is done after the rotation: {by}") if isinstance(value, _Rotated) else value


def _joined(test: ast.expr, then: _Value, otherwise: _Value) -> _Value:
    """After a condition."""
    if then == otherwise:
        return then
    if isinstance(then, tuple) and isinstance(otherwise, tuple) and len(then) == len(otherwise):
        return tuple(_joined(test, *pair) for pair in zip(then, otherwise, strict=True))
    for value in (then, otherwise):
        if isinstance(value, (_Lost, tuple)):
            return _lost(value, ast.unparse(test))
    if then is not None and otherwise is not None:
        if replace(then, whole=False) == replace(otherwise, whole=False):
            return replace(then, whole=False)
        return _Lost(f"how keys are rotated depends on {ast.unparse(test)}")
    test = test if otherwise is None else _not(test)
    value = then if otherwise is None else otherwise
    if not of_self(test):
        return _Lost(f"whether keys are rotated depends on {ast.unparse(test)}")
    return replace(value, test=_both(ast.unparse(test), value.test))


def _not(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _parts_of_self(test: ast.expr) -> list[str]:
    """The parts of a condition that an attention decides itself."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return [ast.unparse(part) for part in parts if of_self(part)]


def _both(*tests: str) -> str:
    """One expression of several; empty ones are true."""
    different = [test for test in dict.fromkeys(tests) if test]
    return different[0] if len(different) == 1 else " and ".join(f"({test})" for test in different)


def _updates(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"


def _keeps_dimensions(call: ast.Call) -> bool:
    """Whether a method of a tensor leaves the dimensions of each head in their order."""
    name = call.func.attr
    if name == "expand" and (call.keywords or not call.args or ast.unparse(call.args[-1]) != "-1"):
        return False
    return name in _KEEPS or ast.unparse(call).endswith(tuple(f".{view}" for view in _VIEWS))


def _is_table(node: ast.expr, parameter: str) -> bool:
    """Whether it is ``cos``, ``sin`` or, of a complex form, ``position_embeddings``, perhaps on another device."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        node = node.func.value
    return name_of(node) == (_TABLES if parameter == "freqs_cis" else parameter)


_TABLES = "position_embeddings"


def _check_tables(method: ast.FunctionDef) -> None:
    """:class:`_Refused` unless cos and sin are those of the rotary embedding."""
    names = ("cos", "sin", _TABLES)
    made = [node for node in ast.walk(method) if isinstance(node, ast.Assign) and _makes_tables(node)]
    if sum(name in names for name in stored(method)) != 2 * len(made):
        raise _Refused("cos and sin are not, or not only, those of the rotary embedding")


def _makes_tables(statement: ast.Assign) -> bool:
    """``cos, sin = position_embeddings``, perhaps of a type of layers, or of a rotary embedding of its own."""
    value = statement.value.value if isinstance(statement.value, ast.Subscript) else statement.value
    own = isinstance(value, ast.Call) and ast.unparse(value.func) == "self.rotary_emb"
    targets = [ast.unparse(target).strip("()") for target in statement.targets]
    return targets == ["cos, sin"] and (own or name_of(value) == _TABLES)
