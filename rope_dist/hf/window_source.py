"""The call of the attention function in the source of a stock attention, and the class that answers it by a window."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from .cached_keys import CachedKeys, cached_keys
from .enabled import EnabledAttention, copied_globals, copied_method, enabled_class
from .forms import Unsupported, rotating_methods, stock_file
from .source import name_of, stored
from .window_calls import attend

INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""The table of attention functions in every model file of transformers."""

_KNOWN = {
    "attention_mask",
    "dropout",
    "scaling",
    "sliding_window",
    "is_causal",
    "position_ids",
    "output_attentions",
}
"""Arguments of an attention function that change no logit."""

_REASONS = {
    "s_aux": "its attention has sinks",
    "sinks": "its attention has sinks",
    "softcap": "its logits are capped (softcap)",
    "position_bias": "its logits have a bias by position",
    "indices": "its attention is sparse",
    "block_indices": "its attention is sparse",
}


class WindowedAttention(EnabledAttention):
    """Mixin of an enabled attention that calls :func:`attend` for its attention function.

    Attributes:
        keys: what its cached keys have of the rotation.
        sliding: expression of ``self``: the sliding window of its layer, or None.
    """

    keys: CachedKeys
    sliding: Any = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *rest = nn.Module.__reduce_ex__(self, protocol)
        return (_blank, (self.stock,), *rest)

    @classmethod
    def sees_all(cls, module: nn.Module) -> bool:
        """Whether the layer of ``module``, enabled or not, sees whole texts, not a sliding window of them."""
        return cls.sliding is None or eval(cls.sliding, {"self": module}) is None


def _blank(stock: type[nn.Module]) -> nn.Module:
    cls = windowed_class(stock)
    return cls.__new__(cls)


@functools.cache
def windowed_class(stock: type[nn.Module]) -> type[WindowedAttention]:
    """The enabled class of a stock attention whose attention function is :func:`attend`.

    Raises:
        Unsupported: the attention does more than the two rotations can hold.
    """
    enabled = enabled_class(stock)
    keys = cached_keys(stock)
    if isinstance(keys, str):
        raise Unsupported(f"{stock.__name__} cannot have a window: {keys}")
    if keys.tensor != "keys":
        raise Unsupported(f"{stock.__name__} cannot have a window: only a part of its keys is cached")
    ((base, method, functions),) = rotating_methods(stock)
    try:
        sliding = _sliding(stock_file(base.__module__).methods[base.__name__, method], functions)
    except Unsupported as error:
        raise Unsupported(f"{stock.__name__} cannot have a window: {error}") from None
    body = {
        "__module__": _copies_of(base.__module__)["__name__"],
        "__doc__": f"``{stock.__name__}`` with exact distances in a window.",
        "keys": keys,
        "sliding": None if sliding is None else compile(ast.Expression(sliding), "<sliding window>", "eval"),
        method: copied_method(vars(enabled)[method], _copies_of(base.__module__), None),
    }
    return type(f"Windowed{stock.__name__}", (WindowedAttention, enabled), body)


def _sliding(method: ast.FunctionDef, functions: Any) -> ast.expr | None:
    """The expression of the sliding window in the call of the attention function; None where there is none.

    Raises:
        Unsupported: there is no such call, or it does more than attention by queries, keys and a mask.
    """
    gets = [
        node
        for node in ast.walk(method)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == f"{INTERFACES}.get_interface"
    ]
    uses = [node for node in ast.walk(method) if isinstance(node, ast.Name) and node.id == INTERFACES]
    if len(gets) != 1 or len(uses) != 1:
        raise Unsupported("it does not call an attention function of transformers")
    (name,) = stored(gets[0])
    calls = [n for n in ast.walk(method) if isinstance(n, ast.Call) and name_of(n.func) == name]
    if len(calls) != 1 or len(calls[0].args) < 4:
        raise Unsupported("how it calls its attention function is not known")
    call = calls[0]
    for keyword in call.keywords:
        if keyword.arg is not None and keyword.arg not in _KNOWN:
            reason = _REASONS.get(keyword.arg, f"its attention function takes {keyword.arg}")
            raise Unsupported(reason)
    _check_keys(method, call)
    return next((keyword.value for keyword in call.keywords if keyword.arg == "sliding_window"), None)


def _check_keys(method: ast.FunctionDef, call: ast.Call) -> None:
    """:class:`Unsupported` unless the attention function is given the keys as the cache returns them."""
    query, key, value = (name_of(argument) for argument in call.args[1:4])
    updates = [
        node
        for node in ast.walk(method)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "update"
    ]
    if len(updates) != 1 or stored(updates[0]) != [key, value]:
        raise Unsupported("its attention function is not given the keys of the cache")
    for node in ast.walk(method):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.lineno > updates[0].lineno:
            changed = {query, key, value} & set(stored(node))
            if changed and node.lineno < call.lineno:
                raise Unsupported(f"its {changed.pop()} change between the cache and the attention function")


class _Interfaces:
    """In place of transformers' table of attention functions in one model file."""

    def __init__(self, stock_module: str) -> None:
        self.stock_module = stock_module

    def get_interface(self, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        stock = vars(sys.modules[self.stock_module])[INTERFACES].get_interface(implementation, default)
        return functools.partial(attend, stock, implementation)


@functools.cache
def _copies_of(stock_module: str) -> dict[str, Any]:
    """The globals of enabled copies of a stock file's functions, with another table of attention functions."""
    copies = copied_globals(stock_module)
    module = ModuleType(f"{copies['__name__']}.windowed")
    vars(module).update({**copies, "__name__": module.__name__, INTERFACES: _Interfaces(stock_module)})
    sys.modules[module.__name__] = module
    return vars(module)
