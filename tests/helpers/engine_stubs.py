"""Modules of an engine outside the files that are read, for scripts that load parts of its wheel."""

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path

import torch


class _AnyAttribute(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *a, **k: lambda wrapped: wrapped  # CustomOp.register("...") and the like


class Stand(torch.nn.Module, metaclass=_AnyAttribute):
    """A base class, a decorator or a function that answers no."""

    def __init__(self, *a, **k):
        super().__init__()

    def __bool__(self):
        return False

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *a, **k: None


class StubModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stand


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stub modules of the package ``engine`` but those that begin with ``real``, which are in ``tree``."""

    def __init__(self, engine, real, tree):
        self.engine, self.real, self.tree = engine, real, tree

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != self.engine or name.startswith(self.real):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(Path(self.tree, *name.split(".")))]
        return spec

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


def install(engine, real, tree):
    sys.meta_path.insert(0, Stubs(engine, real, tree))
