"""Which models a global ``enable()`` enables: those whose construction has ended and that are no part of another.

The frames of the stack say so: a constructor that fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType

from transformers import PreTrainedModel

_LOCAL = threading.local()


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Context manager: a global ``enable()`` does not enable what this thread builds."""
    before, _LOCAL.left_alone = is_left_alone(), True
    try:
        yield
    finally:
        _LOCAL.left_alone = before


def is_left_alone() -> bool:
    """Whether this thread is within :func:`left_alone`."""
    return getattr(_LOCAL, "left_alone", False)


def constructors(frame: FrameType | None) -> Iterator[tuple[PreTrainedModel, CodeType]]:
    """The models whose ``__init__`` is running, innermost first, and the code of each ``__init__``."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            model = frame.f_locals.get(code.co_varnames[0])
            if isinstance(model, PreTrainedModel):
                yield model, code
        frame = frame.f_back


def is_part() -> bool:
    """Whether a model is being constructed now, of which another is a part."""
    return any(True for _ in constructors(sys._getframe(1)))


def ends_construction(model: PreTrainedModel) -> bool:
    """Whether a call of ``model.post_init`` is the last of its construction, and ``model`` no part of another.

    transformers calls it at the end of each class's ``__init__``, so of one with a base class several times.
    """
    running = list(constructors(sys._getframe(1)))
    if not running or any(other is not model for other, _ in running):
        return False
    caller = running[0][1]
    for cls in type(model).__mro__:
        code = getattr(inspect.unwrap(cls.__dict__.get("__init__", object.__init__)), "__code__", None)
        if code is caller:
            return True
        if code is not None and "post_init" in code.co_names:
            return False  # that class calls it again
    return False
