"""What is read in, and made of, the source of a stock attention's method."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from types import CodeType


@dataclass(frozen=True)
class Rotation:
    """The only statement of a method that rotates.

    Attributes:
        index: of the statement of the method that it is, or that holds it.
        condition: that statement, where it is an ``if`` without an ``else``.
        statement: assigns what the call returns.
        call: of the function that applies the rotation.
    """

    index: int
    condition: ast.If | None
    statement: ast.Assign
    call: ast.Call

    @property
    def before(self) -> list[ast.AST]:
        """What the condition does before the rotation."""
        if self.condition is None:
            return []
        body = self.condition.body
        return [self.condition.test, *body[: body.index(self.statement)]]


def find_rotation(function: ast.FunctionDef, applies: str) -> Rotation | None:
    """The only rotation of a function; None where there are none or several, or where it stands deeper."""
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
                return Rotation(index, condition, inner, inner.value)
    return None


def rotated_names(rotation: Rotation) -> tuple[str, str] | None:
    """``q`` and ``k`` of ``q, k = apply(q, k, cos, sin)``; None where it is called in another way."""
    if len(rotation.call.args) != 4 or len(rotation.statement.targets) != 1:
        return None
    q, k = (name_of(argument) for argument in rotation.call.args[:2])
    if q is None or k is None or q == k or any(isinstance(a, ast.Starred) for a in rotation.call.args):
        return None
    return (q, k) if [name_of(t) for t in _targets(rotation.statement)] == [q, k] else None


def condition(function: ast.FunctionDef, applies: str) -> CodeType | None:
    """The expression of ``self`` that decides whether a method rotates; None where none does."""
    where = find_rotation(function, applies)
    if where is None or where.condition is None or not of_self(where.condition.test):
        return None
    return compile(ast.Expression(where.condition.test), "<condition>", "eval")


def of_self(test: ast.expr) -> bool:
    """Whether a condition depends on the module alone, and not on whether it trains."""
    names = {*loaded(test)} - {"hasattr", "getattr"}
    return (
        names == {"self"}
        and not stored(test)
        and not any(getattr(n, "attr", "") == "training" for n in ast.walk(test))
    )


def takes_a_part(function: ast.FunctionDef) -> bool:
    """Whether a function that rotates takes the part of each head that its tables are for: ``q[..., :rotary_dim]``."""
    bounds = [b for n in ast.walk(function) if isinstance(n, ast.Slice) for b in (n.lower, n.upper)]
    return any(isinstance(getattr(bound, "operand", bound), ast.Name) for bound in bounds)


def needs_its_class(function: ast.FunctionDef) -> bool:
    """Whether a function means something else outside of its class: ``super()``, ``__class__``, ``self.__private``."""
    names = [
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(function)
        if hasattr(n, "id") or hasattr(n, "attr")
    ]
    return any(n in ("super", "__class__") or (n.startswith("__") and not n.endswith("__")) for n in names)


def may_write(node: ast.AST, names: set[str]) -> bool:
    """Whether a statement may change something of ``names`` in place."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Subscript, ast.Attribute)) and not isinstance(part.ctx, ast.Load):
            if names & set(loaded(part.value)):
                return True
        elif isinstance(part, ast.Call) and names & set(loaded(part)):
            called = part.func.attr if isinstance(part.func, ast.Attribute) else name_of(part.func) or ""
            if called.endswith("_") or any(keyword.arg in ("out", "inplace") for keyword in part.keywords):
                return True
    return False


def heads_axis(call: ast.Call) -> int | None:
    axes = [k.value for k in call.keywords if k.arg == "unsqueeze_dim"]
    if len(axes) != len(call.keywords):
        return None
    return (
        ast.literal_eval(axes[0]) if axes and isinstance(axes[0], ast.Constant) else 1 if not axes else None
    )


def _targets(statement: ast.Assign) -> list[ast.expr]:
    target = statement.targets[0]
    return target.elts if isinstance(target, ast.Tuple) else [target]


def name_of(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def stored(node: ast.AST) -> list[str]:
    """Names that a statement assigns or deletes."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]


def loaded(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]


def compiled(function: ast.FunctionDef, filename: str) -> CodeType:
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
