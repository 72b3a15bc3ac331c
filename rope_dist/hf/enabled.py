"""Enabled classes: a stock attention whose own methods call this package's rotation instead of its file's.

An enabled attention is a subclass of the stock class. Its methods that apply a rotation are copies of stock's with
other globals: those of the stock file, but for the functions that apply the rotation. What stands before and after it
(norms, gates, sinks, windows, caches) stays stock's, and so do ``__init__``, parameters, buffers and the name in the
module tree: checkpoints, sharding plans and hooks go on finding what they look for.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

from torch import nn

from .applying import replacement
from .forms import STOCK, UNDO, Form, Unsupported, functions_called, rotating_methods, stock_file
from .fusing import fused, why_separate
from .norm_calls import NormCalls
from .norm_forms import Known, norms_of
from .projecting import one_call
from .rotary_embedding import EnabledModule, EnabledRotaryEmbedding
from .source import condition


class EnabledAttention(EnabledModule):
    """Mixin of a stock attention, or of another module that rotates (an indexer).

    Attributes:
        forms: of the functions that its methods call to rotate.
        why_separate: why projections and rotation are not one call in its methods; empty where they are.
        norms: the norms that are one call with the rotation; None where there are none.
        norm_forms: of their classes.
        conditions: expressions of ``self`` that say whether a method rotates.
        copied: stock's methods.
    """

    _rope_dist_rounded = False
    """Whether the tables are rounded to the model's dtype; set on the instance."""

    forms: tuple[Form, ...] = ()
    why_separate: str = ""
    norms: NormCalls | None = None
    norm_forms: Mapping[type, Known] = MappingProxyType({})
    conditions: tuple[CodeType, ...] = ()
    copied: Mapping[tuple[type, str], FunctionType] = MappingProxyType({})

    @classmethod
    def rotates(cls, module: nn.Module) -> bool:
        """Whether ``module``, enabled or not, has a rotary embedding at all (SmolLM3 leaves it out of some layers)."""
        return all(eval(test, {"self": module}) for test in cls.conditions)


@functools.cache
def stock_class(cls: type) -> type[nn.Module] | None:
    """The class of transformers that ``cls`` is or is made from, if it is a rotary embedding or rotates; else None."""
    for base in cls.__mro__:
        if base.__module__.startswith(STOCK) and (is_rotary_embedding(base) or any(rotating_methods(base))):
            return base
    return None


def is_rotary_embedding(cls: type) -> bool:
    """Whether ``cls`` makes the tables of a rotary embedding: transformers says so in the names of such classes."""
    return issubclass(cls, nn.Module) and "RotaryEmbedding" in cls.__name__


def check_unchanged(enabled: type[EnabledAttention]) -> None:
    """:class:`Unsupported` where somebody has replaced a stock method or function since ``enabled`` was made.

    What else has been replaced in the stock file (an attention function, say) is what ``enabled`` calls from now on.
    """
    for (base, method), function in enabled.copied.items():
        file = stock_file(base.__module__)
        if vars(base)[method] is not function:
            raise Unsupported(f"{base.__name__}.{method} of {base.__module__} has been replaced: {UNDO}")
        for name in functions_called(function, base, method):
            file.check_own(name)
        copied_globals(base.__module__).update(_others(base.__module__))


@functools.cache
def enabled_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The enabled class of a class that :func:`stock_class` returned; it names the class it replaces as ``stock``.

    Raises:
        Unsupported: a function that rotates is not of a known form.
    """
    body: dict[str, Any] = {
        "__module__": _copy_name(stock.__module__),
        "__doc__": f"``{stock.__name__}`` that runs this package's rotary embedding.",
        "stock": stock,
    }
    if is_rotary_embedding(stock):
        body["tables_of"] = inspect.unwrap(stock.forward)
        return type(f"Enabled{stock.__name__}", (EnabledRotaryEmbedding, stock), body)
    forms: dict[str, Form] = {}
    copied: dict[tuple[type, str], FunctionType] = {}
    conditions, reasons = [], []
    attributes, body["norm_forms"] = norms_of(stock)
    of_known = {name for name, classes in attributes.items() if body["norm_forms"].keys() >= set(classes)}
    unknown = {name: classes[0].__name__ for name, classes in attributes.items() if name not in of_known}
    for base, method, functions in rotating_methods(stock):
        file = stock_file(base.__module__)
        file.check_own_method(base, method)
        forms.update({name: file.form(name) for name in functions})
        copies = copied_globals(base.__module__)  # kept: not of a file that somebody else has changed
        for name in functions:
            copies[name] = replacement(forms[name], file.function(name))
            _REPLACED[base.__module__].add(name)
        code, fusion, tree = None, None, file.methods[base.__name__, method]
        if len(functions) == 1:
            (name,) = functions
            conditions.append(condition(tree, name))
            fusion = fused(tree, name, file.path, of_known) if forms[name].can_be_fused else None
            if fusion is not None:
                call = one_call(fusion, forms[name], file.function(name))
                if copies.setdefault(fusion.call, call).args == call.args and "norms" not in body:
                    code, body["norms"] = fusion.code, fusion.norms
        if code is None or not fusion.projects:
            reasons.append(why_separate(tree, functions[0], [forms[name] for name in functions], unknown))
        body[method] = copied_method(vars(base)[method], copies, code)
        copied[base, method] = vars(base)[method]
    body["copied"] = copied
    body["forms"] = tuple(forms.values())
    body["conditions"] = tuple(test for test in conditions if test is not None)
    body["why_separate"] = reasons[0] if reasons else ""
    return type(f"Enabled{stock.__name__}", (EnabledAttention, stock), body)


def _copy_name(module: str) -> str:
    return f"{__name__}.{module.removeprefix(STOCK)}"


_REPLACED: dict[str, set[str]] = defaultdict(set)
"""Names of functions of each stock file in whose place copies call this package's."""


@functools.cache
def copied_globals(stock_module: str) -> dict[str, Any]:
    """The globals for copies of a stock file's functions.

    They belong to a module that can be imported by its name, which is how torch.compile finds them.
    """
    copies = ModuleType(_copy_name(stock_module))
    vars(copies).update(
        _others(stock_module), __builtins__=builtins, __file__=sys.modules[stock_module].__file__
    )
    sys.modules[copies.__name__] = copies
    return vars(copies)


def _others(stock_module: str) -> dict[str, Any]:
    """What copies have of the globals of their stock file."""
    mine = _REPLACED[stock_module]
    stock = vars(sys.modules[stock_module])
    return {name: value for name, value in stock.items() if not name.startswith("__") and name not in mine}


def copied_method(function: FunctionType, copies: dict[str, Any], code: CodeType | None) -> FunctionType:
    """A copy of a method with the globals ``copies``, and the code ``code`` if given; its decorators stay around it."""
    inside = getattr(function, "__wrapped__", None)
    new_inside = None if inside is None else copied_method(inside, copies, code)
    if inside is None:
        new_code, own, closure = code or function.__code__, copies, None if code else function.__closure__
    else:
        cells = function.__closure__ or ()
        if not any(_contents(cell) is inside for cell in cells):
            raise Unsupported(
                f"a decorator of {function.__qualname__} keeps what it wraps where it is not found"
            )
        new_code, own = function.__code__, function.__globals__
        closure = tuple(CellType(new_inside) if _contents(cell) is inside else cell for cell in cells)
    new = FunctionType(new_code, own, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    if inside is None:
        del new.__wrapped__
    else:
        new.__wrapped__ = new_inside
    return new


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled
        return None
