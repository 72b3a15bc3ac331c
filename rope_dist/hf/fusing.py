"""Rewrites a stock attention's ``forward`` so that projections, norms and rotation are one call: :func:`fused`.

Where nothing stands between the projections of queries, keys and values and the rotation but views, ::

    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

becomes ::

    cos, sin = position_embeddings
    query_states, key_states, value_states = project_and_apply_rotary_pos_emb(
        self, hidden_states, self.head_dim, cos, sin
    )

and all else stays stock's. Norms of queries and keys are in the call too (``norm_calls.py``); where something stands
between the projections and them, the call is of norms and rotation alone. A rotation under a condition (``if
self.use_rope:``) keeps the stock lines in the ``else``. What does not match is not rewritten.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import CodeType, MappingProxyType

from .forms import Form
from .norm_calls import PROJECTION, NormCalls, without_norms
from .source import (
    compiled,
    find_rotation,
    heads_axis,
    loaded,
    may_write,
    name_of,
    needs_its_class,
    rotated_names,
    stored,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Fused:
    """A rewritten function.

    Attributes:
        code: of the function, with the parameters of stock's.
        call: name of the one call in it.
        transposed: whether the call returns heads before tokens (``[B, H, S, D]``).
        norms: of queries and keys, where they are in the call.
        projects: whether the projections are in the call.
    """

    code: CodeType
    call: str
    transposed: bool
    norms: NormCalls | None = None
    projects: bool = True


@dataclass(frozen=True)
class _Chain:
    """How a variable was made: ``self.<projection>(x)``, seen as heads of ``head_dim``, transposed or not."""

    projection: str
    x: str
    head_dim: str
    transposed: bool


def fused(
    function: ast.FunctionDef, applies: str, filename: str, norms: Collection[str] = ()
) -> Fused | None:
    """``function`` with the rotation by ``applies`` in one call with what comes before it; None where that is nothing.

    Args:
        function: a method of a stock class.
        applies: name of the function of its file that applies the rotation.
        filename: of the file, for tracebacks.
        norms: attributes of ``self`` that are RMS norms.
    """
    if needs_its_class(function):
        return None
    taken = without_norms(function, applies, norms)
    if taken is None:
        return _projecting(copy.deepcopy(function), function, applies, filename, None)
    rest, calls = taken
    return _projecting(rest, function, applies, filename, calls) or _normalising(
        rest, applies, filename, calls
    )


def _projecting(
    function: ast.FunctionDef, stock: ast.FunctionDef, applies: str, filename: str, norms: NormCalls | None
) -> Fused | None:
    """``function``, which is ``stock`` without ``norms``, with the projections in the call."""
    where = find_rotation(function, applies)
    rotated = where and rotated_names(where)
    if where is None or rotated is None:
        return None
    tables = [name_of(argument) for argument in where.call.args[2:]]
    if None in tables:
        return None
    before = function.body[: where.index]
    values = {
        name for s in before for name in stored(s) if (c := _chain(name, before)) and c.projection == "v_proj"
    }
    if len(values) != 1:
        return None
    names = (*rotated, values.pop())
    chains = [_chain(name, before) for name in names]
    if any(chain is None for chain in chains) or [chain.projection for chain in chains] != list(PROJECTIONS):
        return None
    first = chains[0]
    if any((c.x, c.head_dim, c.transposed) != (first.x, first.head_dim, first.transposed) for c in chains):
        return None
    if heads_axis(where.call) != (1 if first.transposed else 2):
        return None
    chain_statements = _storing(before, names)
    others = [s for s in before if s not in chain_statements]
    between = [*others, *where.before]
    if any(name in names for s in between for name in (*loaded(s), *stored(s))):
        return None
    # Sizes may have been taken from x at any time before.
    if any(first.x in stored(s) for s in before):
        return None
    # The statements between now come first: what the projections read must not change in them.
    begin = before.index(chain_statements[0])
    moved = [s for s in between if s not in before[:begin]]
    read = {name for s in chain_statements for name in loaded(s)} - {*names, "self"}
    if any(read & set(stored(s)) or may_write(s, {first.x, "self"}) for s in moved):
        return None
    if where.condition is not None and (in_stock := find_rotation(stock, applies)) is not None:
        where.condition.orelse = copy.deepcopy(_storing(stock.body[: in_stock.index], names))
    arguments = [
        ast.Name("self", ast.Load()),
        ast.Name(first.x, ast.Load()),
        ast.parse(first.head_dim, mode="eval").body,
        *where.call.args[2:],
    ]
    where.statement.targets = [ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())]
    name = f"project_{'' if norms is None else 'normalise_'}and_{applies}"
    where.statement.value = _call(name, arguments, norms)
    function.body[: where.index] = others
    return Fused(compiled(function, filename), name, first.transposed, norms)


def _normalising(function: ast.FunctionDef, applies: str, filename: str, norms: NormCalls) -> Fused | None:
    """``function``, which is stock's without ``norms``, with them in the call."""
    where = find_rotation(function, applies)
    # Where there is no rotation the norms would be missing, and without its projection no one knows the heads.
    if where is None or where.condition is not None or norms.shape == PROJECTION:
        return None
    name = f"normalise_and_{applies}"
    where.statement.value = _call(name, [ast.Name("self", ast.Load()), *where.call.args], norms)
    return Fused(compiled(function, filename), name, heads_axis(where.call) == 1, norms, projects=False)


def _call(name: str, arguments: list[ast.expr], norms: NormCalls | None) -> ast.Call:
    if norms is not None and norms.test:
        arguments = [*arguments, ast.parse(norms.test, mode="eval").body]
    return ast.Call(ast.Name(name, ast.Load()), arguments, [])


def _storing(statements: list[ast.stmt], names: Collection[str]) -> list[ast.stmt]:
    return [s for s in statements if set(stored(s)) & set(names)]


def why_separate(
    function: ast.FunctionDef,
    applies: str,
    forms: list[Form],
    unknown: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Why :func:`fused` does not take the projections of a method, for a report.

    Args:
        function: a method of a stock class.
        applies: a function that it calls to rotate.
        forms: of all functions that it calls to rotate.
        unknown: attribute -> class of the norms that are not known.
    """
    attributes = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    if any("kv_lora" in name or "kv_a_" in name for name in attributes):
        return "multi-head latent attention: only a part of each head is rotated"
    if not set(PROJECTIONS) <= attributes:
        return "queries, keys and values are not three projections"
    if classes := dict.fromkeys(unknown[name] for name in sorted(attributes & unknown.keys())):
        return f"queries and keys are normalised by {' and '.join(classes)}, which is not a known RMS norm"
    if not all(form.can_be_fused for form in forms):
        return "the kernels that project do not rotate in the model's form"
    if sum(isinstance(n, ast.Name) and n.id == applies for n in ast.walk(function)) > 1:
        return "queries and keys are rotated one after the other"
    return "the model computes with queries, keys or values before the rotation"


def _chain(name: str, statements: list[ast.stmt]) -> _Chain | None:
    """How the variable ``name`` is made by ``statements``; None where by more than a projection and views."""
    steps: list[ast.Call] = []  # from the last to the first
    made = [s for s in statements if name in stored(s)]
    for statement in reversed(made):
        if not isinstance(statement, ast.Assign) or [name_of(t) for t in statement.targets] != [name]:
            return None
        if stored(statement) != [name]:  # a walrus inside
            return None
        value = statement.value
        while (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and name_of(value.func.value) != "self"
        ):
            steps.append(value)
            value = value.func.value
        if name_of(value) == name:
            continue
        if (
            statement is not made[0]
            or not isinstance(value, ast.Call)
            or value.keywords
            or len(value.args) != 1
        ):
            return None
        x = name_of(value.args[0])
        if not isinstance(value.func, ast.Attribute) or x is None:
            return None
        shape = _views(steps, x, statements)
        return None if shape is None else _Chain(value.func.attr, x, *shape)
    return None


def _views(steps: list[ast.Call], x: str, statements: list[ast.stmt]) -> tuple[str, bool] | None:
    """The head size and whether heads come first, of ``.view(B, S, H, head_dim)`` and perhaps ``.transpose(1, 2)``.

    B and S have to be those of ``x``.
    """
    methods = [step.func.attr for step in reversed(steps)]
    if methods not in (["view"], ["view", "transpose"], ["reshape"], ["reshape", "transpose"]):
        return None
    view = steps[-1]
    shape = view.args
    if len(shape) == 1 and isinstance(shape[0], ast.Starred):
        shape = [shape[0].value]
    if len(shape) == 1 and isinstance(shape[0], ast.Name):
        shape = [_assigned(shape[0].id, statements)]
    if len(shape) == 1 and isinstance(shape[0], ast.Tuple):
        shape = shape[0].elts
    *tokens, heads, head_dim = [_resolved(size, statements) for size in shape] if len(shape) > 2 else [""] * 3
    of_x = (
        [f"*{x}.shape[:-1]"],
        [f"*{x}.shape[:2]"],
        [f"{x}.shape[0]", f"{x}.shape[1]"],
        [f"{x}.shape[0]", "-1"],
    )
    if view.keywords or tokens not in of_x or ("-1" in tokens and heads == "-1"):
        return None
    if (heads != "-1" and not _is_attribute(heads)) or not _is_attribute(head_dim):
        return None
    if len(methods) == 2 and ast.unparse(steps[0]).rpartition(".")[2] != "transpose(1, 2)":
        return None
    return head_dim, len(methods) == 2


def _is_attribute(text: str) -> bool:
    """Of ``self``, such as ``self.head_dim`` and ``self.config.head_dim``."""
    first, *rest = text.split(".")
    return first == "self" and bool(rest) and all(part.isidentifier() for part in rest)


def _assigned(name: str, statements: list[ast.stmt]) -> ast.expr | None:
    """The expression of a variable that is assigned once in all."""
    made = [s for s in statements if name in stored(s)]
    if len(made) != 1 or not isinstance(made[0], ast.Assign) or stored(made[0]).count(name) != 1:
        return None
    (target, *more), value = made[0].targets, made[0].value
    if more:
        return None
    if name_of(target) == name:
        return value
    # bsz, q_len, _ = hidden_states.size()
    if not isinstance(target, ast.Tuple) or any(name_of(t) is None for t in target.elts):
        return None
    index = [name_of(t) for t in target.elts].index(name)
    return ast.parse(f"{_shape(ast.unparse(value))}[{index}]", mode="eval").body


def _resolved(size: ast.expr, statements: list[ast.stmt]) -> str:
    """The text of one entry of a shape, with the expression of a variable in its place."""
    starred = isinstance(size, ast.Starred)
    value = size.value if starred else size
    if isinstance(value, ast.Name):
        value = _assigned(value.id, statements) or value
    return "*" * starred + _shape(ast.unparse(value))


def _shape(text: str) -> str:
    """``x.size()`` and ``x.size(0)`` as ``x.shape`` and ``x.shape[0]``."""
    return re.sub(r"\.size\((\d?)\)", lambda m: ".shape" + (f"[{m[1]}]" if m[1] else ""), text)
