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
import re
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
    if _needs_its_class(function):
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
        or len(rotation.targets) != 1
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
    between = list(others)
    if condition is not None:
        between += [condition.test, *condition.body[: condition.body.index(rotation)]]
    if any(name in names for s in between for name in (*_loaded(s), *_stored(s))):
        return None
    # Sizes may have been taken from x at any time before.
    if any(first.x in _stored(s) for s in before):
        return None
    # The statements between now come first: what the projections read must not change in them.
    begin = before.index(chain_statements[0])
    moved = [s for s in between if s not in before[:begin]]
    read = {name for s in chain_statements for name in _loaded(s)} - {*names, "self"}
    if any(read & set(_stored(s)) or _may_write(s, {first.x, "self"}) for s in moved):
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


def _needs_its_class(function: ast.FunctionDef) -> bool:
    """Whether a function means something else outside of its class: ``super()``, ``__class__``, ``self.__private``."""
    names = [
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(function)
        if hasattr(n, "id") or hasattr(n, "attr")
    ]
    return any(n in ("super", "__class__") or (n.startswith("__") and not n.endswith("__")) for n in names)


def _may_write(node: ast.AST, names: set[str]) -> bool:
    """Whether a statement may change something of ``names`` in place."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Subscript, ast.Attribute)) and not isinstance(part.ctx, ast.Load):
            if names & set(_loaded(part.value)):
                return True
        elif isinstance(part, ast.Call) and names & set(_loaded(part)):
            called = part.func.attr if isinstance(part.func, ast.Attribute) else _name(part.func) or ""
            if called.endswith("_") or any(keyword.arg in ("out", "inplace") for keyword in part.keywords):
                return True
    return False


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
    if any(getattr(n, "attr", "") == "training" for n in ast.walk(where[1].test)):  # it changes
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
    made = [s for s in statements if name in _stored(s)]
    for statement in reversed(made):
        if not isinstance(statement, ast.Assign) or [_name(t) for t in statement.targets] != [name]:
            return None
        if _stored(statement) != [name]:  # a walrus inside
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
        if (
            statement is not made[0]
            or not isinstance(value, ast.Call)
            or value.keywords
            or len(value.args) != 1
        ):
            return None
        x = _name(value.args[0])
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
    made = [s for s in statements if name in _stored(s)]
    if len(made) != 1 or not isinstance(made[0], ast.Assign) or _stored(made[0]).count(name) != 1:
        return None
    (target, *more), value = made[0].targets, made[0].value
    if more:
        return None
    if _name(target) == name:
        return value
    # bsz, q_len, _ = hidden_states.size()
    if not isinstance(target, ast.Tuple) or any(_name(t) is None for t in target.elts):
        return None
    index = [_name(t) for t in target.elts].index(name)
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
    """Names that a statement assigns or deletes."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]


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
