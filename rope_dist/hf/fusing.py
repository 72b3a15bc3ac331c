"""Rewrites a stock attention's ``forward`` so that projections and rotation are one call: :func:`fused`.

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

and all else stays stock's. A rotation under a condition (``if self.use_rope:``) keeps the stock lines in the
``else``. What does not match is not rewritten.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from types import CodeType

from .forms import Form

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Fused:
    """A rewritten function.

    Attributes:
        code: of the function, with the parameters of stock's.
        call: name of the one call in it.
        transposed: whether the call returns heads before tokens (``[B, H, S, D]``).
    """

    code: CodeType
    call: str
    transposed: bool


@dataclass(frozen=True)
class _Chain:
    """How a variable was made: ``self.<projection>(x)``, seen as heads of ``head_dim``, transposed or not."""

    projection: str
    x: str
    head_dim: str
    transposed: bool


def fused(function: ast.FunctionDef, applies: str, filename: str) -> Fused | None:
    """``function`` with projections and the rotation by ``applies`` in one call; None where it does not match.

    Args:
        function: a method of a stock class.
        applies: name of the function of its file that applies the rotation.
        filename: of the file, for tracebacks.
    """
    function = copy.deepcopy(function)
    if "super" in _loaded(function):  # needs the class that the stock function was written in
        return None
    where = _rotation(function, applies)
    if where is None:
        return None
    index, condition, rotation = where
    call = rotation.value
    q, k, *tables = [_name(argument) for argument in call.args]
    if (
        None in (q, k, *tables)
        or len(tables) != 2
        or q == k
        or [_name(t) for t in _targets(rotation)] != [q, k]
    ):
        return None
    before = function.body[:index]
    values = {
        name
        for s in before
        for name in _stored(s)
        if (c := _chain(name, before)) and c.projection == "v_proj"
    }
    if len(values) != 1:
        return None
    names = (q, k, values.pop())
    chains = [_chain(name, before) for name in names]
    if any(chain is None for chain in chains) or [chain.projection for chain in chains] != list(PROJECTIONS):
        return None
    first = chains[0]
    if any((c.x, c.head_dim, c.transposed) != (first.x, first.head_dim, first.transposed) for c in chains):
        return None
    if _heads_axis(call) != (1 if first.transposed else 2):
        return None
    chain_statements = [s for s in before if set(_stored(s)) & set(names)]
    others = [s for s in before if s not in chain_statements]
    begin = before.index(chain_statements[0])
    if any(name in names for s in others for name in _loaded(s)):
        return None
    if any(first.x in _stored(s) for s in before[begin:]):
        return None
    arguments = [
        ast.Name("self", ast.Load()),
        ast.Name(first.x, ast.Load()),
        ast.parse(first.head_dim, mode="eval").body,
    ]
    arguments += [ast.Name(t, ast.Load()) for t in tables]
    rotation.targets = [ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())]
    name = f"project_and_{applies}"
    rotation.value = ast.Call(ast.Name(name, ast.Load()), arguments, [])
    if condition is not None:
        condition.orelse = copy.deepcopy(chain_statements)
    function.body[:index] = others
    return Fused(_compiled(function, filename), name, first.transposed)


def _rotation(function: ast.FunctionDef, applies: str) -> tuple[int, ast.If | None, ast.Assign] | None:
    """Where the only rotation of a function stands: the statement's index, its condition, the assignment."""
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == applies]
    if len(calls) != 1:
        return None
    for index, statement in enumerate(function.body):
        condition = statement if isinstance(statement, ast.If) and not statement.orelse else None
        for inner in condition.body if condition is not None else [statement]:
            if (
                isinstance(inner, ast.Assign)
                and isinstance(inner.value, ast.Call)
                and inner.value.func is calls[0]
            ):
                return index, condition, inner
    return None


def condition(function: ast.FunctionDef, applies: str) -> CodeType | None:
    """The expression of ``self`` that decides whether a method rotates; None where none does."""
    where = _rotation(function, applies)
    if where is None or where[1] is None or set(_loaded(where[1].test)) != {"self"}:
        return None
    return compile(ast.Expression(where[1].test), "<condition>", "eval")


def why_separate(function: ast.FunctionDef, forms: list[Form]) -> str:
    """Why :func:`fused` does not take a method, for a report."""
    attributes = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
    if any("kv_lora" in name or "kv_a_" in name for name in attributes):
        return "multi-head latent attention: only a part of each head is rotated"
    if not set(PROJECTIONS) <= attributes:
        return "queries, keys and values are not three projections"
    if any("norm" in name for name in attributes):
        return "queries and keys are normalised before the rotation"
    if not all(form.can_be_fused for form in forms):
        return "the kernels that project do not rotate in the model's form"
    return "the model computes with queries, keys or values before the rotation"


def _chain(name: str, statements: list[ast.stmt]) -> _Chain | None:
    """How the variable ``name`` is made by ``statements``; None where by more than a projection and views."""
    steps: list[ast.Call] = []  # from the last to the first
    for statement in reversed([s for s in statements if name in _stored(s)]):
        if not isinstance(statement, ast.Assign) or [_name(t) for t in statement.targets] != [name]:
            return None
        value = statement.value
        while (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and _name(value.func.value) != "self"
        ):
            steps.append(value)
            value = value.func.value
        if _name(value) == name:
            continue
        if not isinstance(value, ast.Call) or value.keywords or len(value.args) != 1:
            return None
        if not isinstance(value.func, ast.Attribute) or _name(value.args[0]) is None:
            return None
        shape = _views(steps, statements)
        return None if shape is None else _Chain(value.func.attr, _name(value.args[0]), *shape)
    return None


def _views(steps: list[ast.Call], statements: list[ast.stmt]) -> tuple[str, bool] | None:
    """The head size and whether heads come first, of ``.view(..., head_dim)`` and perhaps ``.transpose(1, 2)``."""
    methods = [step.func.attr for step in reversed(steps)]
    if methods not in (["view"], ["view", "transpose"], ["reshape"], ["reshape", "transpose"]):
        return None
    view = steps[-1]
    shape = view.args
    if len(shape) == 1 and isinstance(shape[0], ast.Starred):
        shape = [shape[0].value]
    if len(shape) == 1:
        assigned = [
            s.value
            for s in statements
            if isinstance(s, ast.Assign) and _name(s.targets[0]) == _name(shape[0])
        ]
        if len(assigned) != 1 or not isinstance(assigned[0], ast.Tuple):
            return None
        shape = assigned[0].elts
    head_dim = ast.unparse(shape[-1])
    if (
        view.keywords
        or not all(part.isidentifier() for part in head_dim.split("."))
        or not head_dim.startswith("self.")
    ):
        return None
    if len(methods) == 2 and ast.unparse(steps[0]).rpartition(".")[2] != "transpose(1, 2)":
        return None
    return head_dim, len(methods) == 2


def _heads_axis(call: ast.Call) -> int | None:
    axes = [k.value for k in call.keywords if k.arg == "unsqueeze_dim"]
    if len(axes) != len(call.keywords):
        return None
    return (
        ast.literal_eval(axes[0]) if axes and isinstance(axes[0], ast.Constant) else 1 if not axes else None
    )


def _targets(statement: ast.Assign) -> list[ast.expr]:
    target = statement.targets[0]
    return target.elts if isinstance(target, ast.Tuple) else [target]


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _stored(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _loaded(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]


def _compiled(function: ast.FunctionDef, filename: str) -> CodeType:
    """The code of a function, without its decorators and annotations (they are evaluated in stock's)."""
    function.decorator_list, function.returns = [], None
    parameters = function.args
    for argument in (*parameters.args, *parameters.kwonlyargs, parameters.vararg, parameters.kwarg):
        if argument is not None:
            argument.annotation = None
    parameters.defaults = [
        ast.Constant(None) for _ in parameters.defaults
    ]  # stock's are given to the function
    parameters.kw_defaults = [None if d is None else ast.Constant(None) for d in parameters.kw_defaults]
    module = ast.fix_missing_locations(ast.Module([function], []))
    code = compile(module, filename, "exec")
    return next(c for c in code.co_consts if isinstance(c, CodeType))
