"""Calls that make a rotary embedding in an engine's model files, and what they say: for ``engine_models.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .engine_source import (
    CONFIG_KEYS,
    Class,
    Function,
    Model,
    Place,
    Tracer,
    assigned,
    called,
    calls,
    keyword,
)

Entry = dict[str, str]
"""Rope type, "*" for all others -> status, with a colon and the reason where it is not "yes". Or "as" -> "text"."""


@dataclass
class Call:
    """A call that makes a rotary embedding.

    Attributes:
        sources: where its rope parameters come from: "config", "layer" (of a layer's type), "const", "none", ...
        bases: where theta comes from: "theta" (the config), "int" (its whole part), ...
        halves: whether halves of a head are rotated, not neighbours; None where it is not known.
        longrope: status and reason of longrope alone, where the rest of the model decides it.
    """

    place: str
    sources: set[str]
    bases: set[str]
    halves: bool | None
    longrope: str | None = None

    @property
    def entry(self) -> Entry:
        given = self.sources - {"none", "sliding"} or {"none"}
        if given == {"config"}:
            entry = {"*": "yes"}
            if "sliding" in self.sources:
                entry["sliding"] = (
                    f"ignored: {self.place} is given theta alone in layers with a sliding window"
                )
            if self.longrope:
                entry["longrope"] = self.longrope
            elif self.halves is False:
                entry["longrope"] = (
                    f"crash: {self.place} pairs neighbouring dimensions, its longrope halves alone"
                )
            elif self.halves is None:
                entry["longrope"] = f"unknown: {self.place} may pair neighbouring dimensions"
        elif given == {"deepseek"}:
            entry = {"*": f"ignored: {self.place} takes every scaling for DeepSeek's YaRN"}
            entry["yarn"] = f"unknown: {self.place} takes it for DeepSeek's YaRN, which scales by mscale"
            entry["default"] = "yes"
        elif given == {"yarn"}:
            entry = {"*": f"ignored: {self.place} takes every type for yarn", "yarn": "yes"}
        elif given == {"layer"}:
            return {"*": f"unknown: {self.place} reads parameters for each type of layer"}
        elif given <= {"none", "const"}:
            entry = {"*": f"ignored: {self.place} is given theta alone"}
        else:
            return {"*": f"unknown: where the parameters of {self.place} come from"}
        if "int" in self.bases:
            entry["default"] = f"ignored: {self.place} takes the whole part of theta"
        elif given <= {"none", "const"}:
            theta = self.bases & {"theta"} and not self.bases - {"theta", "none"}
            entry["default"] = "yes" if theta else f"unknown: where theta of {self.place} comes from"
        return entry


def combined(found: list[Call]) -> Entry:
    """Of all calls that build a model's rotary embeddings."""
    # Of latent attention and its alternatives, the scaling is one.
    found = [call for call in found if "deepseek" in call.sources] or found
    entries = [call.entry for call in found]
    first = {kind: text.partition(":")[0] for kind, text in entries[0].items()}
    for call, entry in zip(found, entries, strict=True):
        if {kind: text.partition(":")[0] for kind, text in entry.items()} != first:
            places = f"{found[0].place} and {call.place}"
            return {"*": f"unknown: {places} read it in different ways"}
    return entries[0]


def judge(tracer: Tracer, node: ast.AST, at: Place) -> set[str] | None:
    """What a rope parameter or theta is, where the expression itself tells."""
    if isinstance(node, ast.Attribute) and not _is_self(node.value):
        if node.attr in CONFIG_KEYS:
            return {"config"}
        if node.attr == "rope_theta":
            return {"theta"}
    if isinstance(node, ast.Call):
        name = called(node)
        keys = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in ("getattr", "get") and keys:
            if keys[0] in CONFIG_KEYS:
                return {"config"}
            if keys[0] == "rope_theta":
                return {"theta"}
            if name == "get" and isinstance(node.func, ast.Attribute):
                return _item(tracer.trace(node.func.value, at), keys[0])
        if name == "get" and node.args and isinstance(node.func, ast.Attribute):
            return _item(tracer.trace(node.func.value, at), None)
        if name in ("int", "float") and node.args:
            inner = tracer.trace(node.args[0], at)
            return {"int"} if name == "int" and "theta" in inner else inner
    if isinstance(node, ast.Subscript):
        if isinstance(node.value, ast.Call) and called(node.value) == "get_rope_config":
            return {"theta" if getattr(node.slice, "value", None) == 0 else "config"}
        return _item(tracer.trace(node.value, at), getattr(node.slice, "value", None))
    if isinstance(node, ast.DictComp):
        source = node.generators[0].iter
        if isinstance(source, ast.Call) and called(source) == "items":
            return tracer.trace(source.func.value, at)  # type: ignore[attr-defined]
    if isinstance(node, ast.IfExp) and "sliding" in ast.unparse(node.test):
        sides = [tracer.trace(side, at) for side in (node.body, node.orelse)]
        if {"config"} in sides and ({"const"} in sides or {"none"} in sides):
            return {"config", "sliding"}
    if isinstance(node, ast.Dict):
        parts = [tracer.trace(v, at) for k, v in zip(node.keys, node.values, strict=True) if k is None]
        if parts:
            return set().union(*parts)
        kinds = [
            v for k, v in zip(node.keys, node.values, strict=True) if text_of(k) in ("rope_type", "type")
        ]
        if not kinds or text_of(kinds[0]) == "default":
            return {"const"}
        return {text_of(kinds[0])} if text_of(kinds[0]) == "yarn" else {"unknown"}
    return None


def _item(source: set[str], key: Any) -> set[str]:
    if source & {"config", "layer"}:
        if key == "rope_theta":
            return {"theta"}
        return {"layer"} if not isinstance(key, str) or "attention" in key else {"unknown"}
    return {"unknown"}


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def text_of(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@dataclass
class Maker:
    """A function that makes a rotary embedding: its parameters in order, and the three that matter here."""

    order: tuple[str, ...]
    rope: str
    base: str
    halves: str
    inverted: bool = False  # ``halves`` names the opposite

    def value(self, call: ast.Call, name: str) -> ast.AST | None:
        found = keyword(call, name)
        if found is None and name in self.order and self.order.index(name) < len(call.args):
            found = call.args[self.order.index(name)]
        return found


VLLM = Maker(
    ("head_size", "max_position", "is_neox_style", "rope_parameters"), "rope_parameters", "", "is_neox_style"
)
SGLANG = Maker(
    ("head_size", "rotary_dim", "max_position", "base", "is_neox_style", "rope_scaling"),
    "rope_scaling", "base", "is_neox_style",
)  # fmt: skip
MLX = Maker(
    ("dims", "base", "traditional", "scaling_config", "max_position_embeddings"),
    "scaling_config", "base", "traditional", inverted=True,
)  # fmt: skip
MLX_PLAIN = Maker(("dims", "traditional", "base", "scale"), "", "base", "traditional", inverted=True)
MAKERS = {
    "vllm": {"get_rope": VLLM},
    "sglang": {"get_rope": SGLANG, "get_rope_wrapper": SGLANG},
    "mlx": {"initialize_rope": MLX, "RoPE": MLX_PLAIN},
}


def rotary_calls(engine: str, model: Model) -> Iterator[tuple[Call, Class]]:
    """The calls that make a rotary embedding, and the class that makes each."""
    tracer = Tracer(model, judge)
    seen: dict[str, set[str]] = {}
    for cls in model.classes:
        for owner, function in cls.methods:
            for call in calls(function):
                maker = MAKERS[engine].get(called(call))
                if maker is None:
                    continue
                at = Place(cls, owner, function)
                place = owner.module.place(call)
                if any(k.arg is None for k in call.keywords):
                    sources = {"unknown"}
                else:
                    sources = tracer.trace(maker.value(call, maker.rope), at) if maker.rope else {"none"}
                if "config" in sources and _deepseek(model, cls):
                    sources = {"deepseek"}
                bases = tracer.trace(maker.value(call, maker.base), at) if maker.base else {"theta"}
                style = maker.value(call, maker.halves)
                halves = _truth(tracer, style, at)
                if maker.inverted and halves is not None and style is not None:
                    halves = not halves
                if seen.get(place) == sources:
                    continue
                seen[place] = sources
                yield Call(place, sources, bases, halves), cls


def _truth(tracer: Tracer, node: ast.AST | None, at: Place) -> bool | None:
    """The value of a switch that is set in the source; an attribute of the config counts by its default."""
    if node is None:
        return True
    found = Tracer(tracer.model, _switch).trace(node, at)
    if found == {"True"}:
        return True
    return False if found == {"False"} else None


def _switch(tracer: Tracer, node: ast.AST, at: Place) -> set[str] | None:
    if isinstance(node, ast.Call) and called(node) == "getattr" and len(node.args) == 3:
        if text_of(node.args[1]) == "rope_is_neox_style":
            return tracer.trace(node.args[2], at)
        return {"unknown"}
    if isinstance(node, ast.Attribute) and not _is_self(node.value):
        # MLX: args.rope_traditional, a field with a default of the model's arguments.
        found = tracer.model.package.find_class(at.owner.module, ast.Name("ModelArgs"))
        if found is not None and isinstance(found.fields.get(node.attr), ast.Constant):
            return {repr(found.fields[node.attr].value)}  # type: ignore[attr-defined]
        return {"unknown"}
    return None


def _deepseek(model: Model, cls: Class) -> bool:
    """Whether the class, or one that builds it, writes its own rope type over the config's."""
    for other in model.classes:
        related = other in cls.mro or cls in other.mro or any(
            model.package.find_class(owner.module, call.func) is cls
            for owner, function in other.methods for call in calls(function)
        )  # fmt: skip
        for _, function in other.methods if related else ():
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Assign)
                    and isinstance(node.targets[0], ast.Subscript)
                    and text_of(node.targets[0].slice) in ("rope_type", "type")
                    and any((text_of(part) or "").startswith("deepseek") for part in ast.walk(node.value))
                ):
                    return True
    return False


def longrope_use(cls: Class) -> str | None:
    """What the class does with its rotary embedding that the longrope class of vLLM and SGLang cannot, or None."""
    cache = None
    # The class itself asks for what the longrope class lacks, with a default.
    asked = any(
        called(c) == "getattr"
        and len(c.args) == 3
        and text_of(c.args[1]) in ("is_neox_style", "cos_sin_cache")
        for _, function in cls.methods
        for c in calls(function)
    )
    for owner, function in cls.methods:
        guarded = (
            asked
            or any(called(c) in ("hasattr", "isinstance") for c in calls(function))
            or any(
                # `if ops is None: return None`, where a kernel is not for this platform
                isinstance(n, ast.If)
                and isinstance(n.body[0], ast.Return)
                and ast.unparse(n.test).endswith("ops is None")
                for n in function.body
            )
        )
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and called(node) == "rotary_emb":
                place = owner.module.place(node)
                names = {k.arg for k in node.keywords if k.arg}
                for k in node.keywords:
                    if k.arg is None and isinstance(k.value, ast.Name):
                        names |= _keys(function, k.value.id)
                if "fused_set_kv_buffer_arg" in names:
                    return f"crash: {place} passes fused_set_kv_buffer_arg, which its longrope class does not take"
                if (
                    len(node.args) > 2
                    and isinstance(node.args[2], ast.Constant)
                    and node.args[2].value is None
                ):
                    return f"crash: {place} rotates queries alone, which its longrope class refuses"
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "cos_sin_cache"
                and "rotary_emb" in ast.unparse(node.value)
                and not guarded
                and not any(part in function.name for part in ("npu", "aiter", "hip", "rocm", "xpu", "cpu"))
            ):
                cache = f"unknown: {owner.module.place(node)} may read cos_sin_cache, which its longrope class lacks"
    return cache


def style_set_later(model: Model) -> str | None:
    """A model that tells its rotary embeddings to pair neighbours, which the longrope class does not hear."""
    for cls in model.classes:
        for owner, function in cls.methods:
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Assign)
                    and isinstance(node.targets[0], ast.Attribute)
                    and ast.unparse(node.targets[0]).endswith("rotary_emb.is_neox_style")
                    and ast.unparse(node.value) == "False"
                ):
                    place = owner.module.place(node)
                    return f"ignored: {place} pairs neighbouring dimensions, its longrope halves alone"
    return None


def _keys(function: Function, name: str) -> set[str]:
    """Constant keys that a function puts into a local dictionary."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Subscript) and getattr(target.value, "id", None) == name:
                found.add(text_of(target.slice) or "")
    for value in assigned(function, name):
        if isinstance(value, ast.Dict):
            found |= {text_of(k) or "" for k in value.keys}
        found |= {k.arg or "" for c in calls(value) for k in c.keywords}
        found |= {text_of(k) or "" for n in ast.walk(value) if isinstance(n, ast.Dict) for k in n.keys}
    return found
