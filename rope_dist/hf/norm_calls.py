"""Takes the norms of queries and keys out of a stock attention's ``forward``: :func:`without_norms`.

Where each of them is the last that is done before the rotation but for views, ::

    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

or the first after it, what is left is a function without them, and :class:`NormCalls` says what they were, so that one
call can do both. What came before stays: projections, gates, fused projections that are cut.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from .source import (
    Rotation,
    find_rotation,
    heads_axis,
    loaded,
    may_write,
    name_of,
    rotated_names,
    stored,
)

HEADS, TRANSPOSED, PROJECTION = "heads", "transposed", "projection"


@dataclass(frozen=True)
class NormCalls:
    """The norms of queries and keys that one method calls.

    Attributes:
        q, k: names of the modules in the attention.
        shape: what stock calls them with: ``"heads"`` ``[B, S, H, D]``, ``"transposed"`` ``[B, H, S, D]``, or
            ``"projection"`` ``[B, S, H * D]``, which takes all heads of a token together.
        after: they follow the rotation.
        test: expression of ``self`` that says whether they are called at all; empty where they always are.
    """

    q: str
    k: str
    shape: str
    after: bool = False
    test: str = ""

    @property
    def joint(self) -> bool:
        """Whether all heads of a token are normalised together."""
        return self.shape == PROJECTION

    def called(self, attention: nn.Module) -> bool:
        """Whether ``attention`` has them."""
        return not self.test or bool(eval(self.test, {"self": attention}))


@dataclass(frozen=True)
class _Call:
    """One norm: where it is called, with what, and the views between it and the rotation (the last comes first)."""

    module: str
    statement: ast.stmt
    call: ast.Call
    views: tuple[str, ...]


def without_norms(
    function: ast.FunctionDef, applies: str, norms: Collection[str]
) -> tuple[ast.FunctionDef, NormCalls] | None:
    """A copy of ``function`` that calls no norm of queries and keys, and what they were; None where there are none.

    Args:
        function: a method of a stock class.
        applies: name of the function of its file that applies the rotation.
        norms: attributes of ``self`` that are norms.
    """
    function = copy.deepcopy(function)
    rotation = find_rotation(function, applies)
    if rotation is None or (names := rotated_names(rotation)) is None:
        return None
    axis = heads_axis(rotation.call)
    if axis not in (1, 2):
        return None
    calls = _before(function, rotation, names, norms, axis) or _after(function, rotation, names, norms, axis)
    return None if calls is None else (function, calls)


def _before(
    function: ast.FunctionDef, rotation: Rotation, names: tuple[str, str], norms: Collection[str], axis: int
) -> NormCalls | None:
    before = function.body[: rotation.index]
    found = [_last_norm(name, before, norms) for name in names]
    if found[0] is None or found[1] is None:
        return None
    q, k = found
    shapes = {_shape(one, axis) for one in (q, k)}
    test = ""
    if isinstance(q.statement, ast.If) or isinstance(k.statement, ast.If):
        if q.statement is not k.statement:
            return None
        test = ast.unparse(q.statement.test)
    if len(shapes) != 1 or None in shapes:
        return None
    if any(name in names for s in rotation.before for name in (*loaded(s), *stored(s))):
        return None
    between = [*before[min(before.index(one.statement) for one in (q, k)) :], *rotation.before]
    for one in (q, k):
        watched = {"self", *names, *loaded(one.call)}
        if any(may_write(s, watched) for s in between):
            return None
    for one in {id(one.statement): one for one in (q, k)}.values():
        _take_out(function, one)
    return NormCalls(q.module, k.module, shapes.pop(), test=test)


def _after(
    function: ast.FunctionDef, rotation: Rotation, names: tuple[str, str], norms: Collection[str], axis: int
) -> NormCalls | None:
    """The two statements after the rotation."""
    if rotation.condition is not None:
        return None
    statements = function.body[rotation.index + 1 : rotation.index + 3]
    modules = dict(filter(None, (_assigned_norm(s, norms) for s in statements)))
    if modules.keys() != set(names):
        return None
    del function.body[rotation.index + 1 : rotation.index + 3]
    q, k = (modules[name] for name in names)
    return NormCalls(q, k, TRANSPOSED if axis == 1 else HEADS, after=True)


def _last_norm(name: str, before: list[ast.stmt], norms: Collection[str]) -> _Call | None:
    """The norm of the variable ``name`` that has nothing but views, of that variable, after it."""
    views: list[str] = []
    for statement in reversed(before):
        if name not in (*loaded(statement), *stored(statement)):
            continue
        if isinstance(statement, ast.If):
            return _conditional(name, statement, norms, tuple(views))
        if not isinstance(statement, ast.Assign) or stored(statement) != [name]:
            return None
        if [name_of(t) for t in statement.targets] != [name]:
            return None
        value = statement.value
        while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            if name_of(value.func.value) == "self":
                break
            views.append(ast.unparse(ast.Call(ast.Name(value.func.attr), value.args, value.keywords)))
            if name in loaded(ast.Tuple([*value.args, *[k.value for k in value.keywords]])):
                return None
            value = value.func.value
        if name_of(value) == name:
            continue
        module = _norm_called(value, norms)
        return None if module is None else _Call(module, statement, value, tuple(views))
    return None


def _conditional(
    name: str, statement: ast.If, norms: Collection[str], views: tuple[str, ...]
) -> _Call | None:
    """``if self.use_qk_norm:`` with the norms of queries and keys and nothing else."""
    assigned = [_assigned_norm(s, norms) for s in statement.body]
    if statement.orelse or set(loaded(statement.test)) != {"self"} or stored(statement.test):
        return None
    if len(assigned) != 2 or None in assigned or len(dict(assigned)) != 2 or name not in dict(assigned):
        return None
    call = next(s.value for s in statement.body if stored(s) == [name])
    return _Call(dict(assigned)[name], statement, call, views)


def _assigned_norm(statement: ast.stmt, norms: Collection[str]) -> tuple[str, str] | None:
    """``(x, norm)`` of ``x = self.norm(x)``."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    module, name = _norm_called(statement.value, norms), name_of(statement.targets[0])
    if module is None or name is None or name_of(statement.value.args[0]) != name:
        return None
    return name, module


def _norm_called(value: ast.expr, norms: Collection[str]) -> str | None:
    """``norm`` of ``self.norm(x)``."""
    if not isinstance(value, ast.Call) or value.keywords or len(value.args) != 1:
        return None
    if isinstance(value.args[0], ast.Starred) or not isinstance(value.func, ast.Attribute):
        return None
    return value.func.attr if name_of(value.func.value) == "self" and value.func.attr in norms else None


def _shape(one: _Call, axis: int) -> str | None:
    """What the norm is called with, by the views after it, where the rotation has its heads on ``axis``."""
    *made, transposed = one.views[::-1] if axis == 1 and one.views else (*one.views[::-1], "")
    if transposed == "transpose(1, 2)" and not made:
        return HEADS
    if transposed == "" and not made:
        return TRANSPOSED if axis == 1 else HEADS
    # A projection that is seen as heads afterwards: what the view is, is looked at where projections are.
    if len(made) == 1 and made[0].startswith(("view(", "reshape(")) and transposed in ("transpose(1, 2)", ""):
        (of,) = one.call.args
        projected = isinstance(of, ast.Call) and isinstance(of.func, ast.Attribute)
        return PROJECTION if projected and name_of(of.func.value) == "self" else None
    return None


def _take_out(function: ast.FunctionDef, one: _Call) -> None:
    """Leave what the norm was called with in its place."""
    (of,) = one.call.args
    if isinstance(one.statement, ast.If) or (
        one.statement.value is one.call and name_of(of) == name_of(one.statement.targets[0])
    ):
        function.body.remove(one.statement)
        return
    for node in ast.walk(one.statement):
        for field, value in ast.iter_fields(node):
            if value is one.call:
                setattr(node, field, of)
                return
