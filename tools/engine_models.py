"""Writes ``rope_dist/export/engine_models.json``: how each model file of the engines reads its rotary parameters.

    python -m tools.engine_models WHEELS [--check]

WHEELS is a folder with wheels of vLLM, SGLang, mlx-lm and ExLlamaV3 (``pip download --no-deps``). Their Python files
are read, never imported: from the engine's registry to the class of each architecture, to the attention that it builds,
to the call that makes its rotary embedding, and from there back to where its arguments come from. What cannot be
followed is "unknown".
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from .engine_calls import (
    MLX,
    Entry,
    combined,
    longrope_use,
    rotary_calls,
    style_set_later,
    text_of,
)
from .engine_source import CONFIG_KEYS, Class, Model, Module, Package, called, calls, keyword

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "rope_dist" / "export" / "engine_models.json"

WHEELS = {"vllm": "vllm", "sglang": "sglang", "mlx": "mlx_lm", "exllamav3": "exllamav3"}
"""Engine -> its distribution."""

READ = re.compile("models?/|/layers/|^mlx_lm/|/architecture/")
"""Files that matter."""

EAGER = "flag: start it with --enforce-eager: it runs transformers' own model, whose longrope compiles from 5.21 on"


def served(engine: str, cls: Class | None, architecture: str) -> Entry:
    """The entry of an architecture of vLLM or SGLang, by the class that runs it."""
    if cls is None:
        return {"*": f"unknown: its class was not found in {engine}'s files"}
    model = Model(cls)
    inner = _inner(model)
    if inner is not None:
        return inner
    found = []
    for call, maker in rotary_calls(engine, model):
        call.longrope = longrope_use(maker) or style_set_later(model)
        found.append(call)
    return (
        combined(found)
        if found
        else {"*": f"unknown: {cls.module.path.name} makes no rotary embedding that was found"}
    )


def _inner(model: Model) -> Entry | None:
    """The entry of a model with parts whose language model is another architecture."""
    for owner, function in model.entry.methods:
        for call in calls(function):
            if called(call) == "init_vllm_registered_model":
                names = keyword(call, "architectures")
                if isinstance(names, ast.List) and len(names.elts) == 1 and text_of(names.elts[0]):
                    return {"as": text_of(names.elts[0]) or ""}
                if names is None or ast.unparse(names).endswith("text_config.architectures"):
                    return {"as": "text"}
                return {"*": f"unknown: {owner.module.place(call)} chooses the language model"}
            if (
                called(call) == "_get_sgl_model_cls"
                and call.args
                and "text_config" in ast.unparse(call.args[0])
            ):
                return {"as": "text"}
    return None


def vllm(package: Package) -> dict[str, Entry]:
    models = "vllm.model_executor.models"
    registry = package.module(f"{models}.registry")
    assert registry is not None
    found: dict[str, Entry] = {}
    for table in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"):
        names = ast.literal_eval(registry.names[table])  # type: ignore[arg-type]
        for architecture, (file, cls) in names.items():
            if file == "transformers":
                found[architecture] = {"*": "yes", "longrope": EAGER}
                continue
            module = package.module(file if file.startswith("vllm.") else f"{models}.{file}")
            target = None if module is None else package.find_class(module, ast.Name(cls))
            found[architecture] = served("vllm", target, architecture)
    return found


def sglang(package: Package) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in sorted((package.root / "sglang/srt/models").glob("*.py")):
        module = package.module(f"sglang.srt.models.{path.stem}")
        entry = None if module is None else module.names.get("EntryClass")
        if module is None or not isinstance(entry, ast.AST) or path.stem == "transformers":
            continue
        for node in entry.elts if isinstance(entry, (ast.List, ast.Tuple)) else [entry]:
            target = package.find_class(module, node)
            found[ast.unparse(node).rpartition(".")[2]] = served("sglang", target, ast.unparse(node))
    return found


def mlx(package: Package) -> dict[str, Entry]:
    utils = package.module("mlx_lm.utils")
    assert utils is not None
    found: dict[str, Entry] = {}
    for path in sorted((package.root / "mlx_lm/models").glob("*.py")):
        module = package.module(f"mlx_lm.models.{path.stem}")
        if module is not None and {"Model", "ModelArgs"} <= set(module.names):
            found[path.stem] = _mlx_model(package, module)
    renamed = ast.literal_eval(utils.names["MODEL_REMAPPING"])  # type: ignore[arg-type]
    for name, other in renamed.items():
        if other in found:
            found[name] = found[other]
    return found


def _mlx_model(package: Package, module: Module) -> Entry:
    entry = package.find_class(module, ast.Name("Model"))
    arguments = package.find_class(module, ast.Name("ModelArgs"))
    if entry is None or arguments is None:
        return {"*": f"unknown: {module.path.name} takes its model from another file"}
    if "text_config" in ast.unparse(arguments.node):
        return {"*": f"unknown: what {module.path.name} does with a language model inside another"}
    refused = _mlx_refusal(arguments)
    if refused is not None:
        return {"*": refused}
    model = Model(entry)
    found = [call for call, _ in rotary_calls("mlx", model)]
    lacking = [
        cls.module.place(call)
        for cls in model.classes
        for _, function in cls.methods
        for call in calls(function)
        if called(call) == "initialize_rope" and MLX.value(call, "max_position_embeddings") is None
    ]
    own = next(
        (
            cls.module.place(call)
            for cls in model.classes
            for _, function in cls.methods
            for call in calls(function)
            if ast.unparse(call.func).endswith(("fast.rope", "SuScaledRoPE", "YarnRoPE"))
            or (called(call).endswith(("RoPE", "RotaryEmbedding")) and called(call) != "RoPE")
        ),
        None,
    )
    if own is not None:
        return {"*": f"unknown: {own} is a rotary embedding of its own"}
    if not found:
        return {"*": f"unknown: {module.path.name} makes no rotary embedding that was found"}
    for call in found:
        # SuScaledRoPE has no `traditional`.
        if call.halves is False:
            call.longrope = f"ignored: {call.place} pairs neighbouring dimensions, its longrope halves"
    result = combined(found)
    result.setdefault("longrope", result["*"])
    if result["longrope"] == "yes" and lacking:
        result["longrope"] = f"crash: {lacking[0]} gives its longrope no max_position_embeddings"
    if result["longrope"] == result["*"]:
        del result["longrope"]
    fields = {n.target.id for c in arguments.mro for n in c.node.body if isinstance(n, ast.AnnAssign)
              and isinstance(n.target, ast.Name)}  # fmt: skip
    if result["*"] == "yes" and not fields & CONFIG_KEYS:
        return {"*": f"ignored: {module.path.name} has no rope_scaling among its arguments"}
    return result


def _mlx_refusal(arguments: Class) -> str | None:
    """Why ``__post_init__`` refuses or drops a longrope, or None."""
    method = arguments.method("__post_init__")
    for node in ast.walk(method[1]) if method else ():
        if isinstance(node, ast.Set) and "type" in {text_of(e) for e in node.elts}:
            return f"crash: {arguments.module.place(node)} wants the old key `type`"
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotIn):
            allowed = {text_of(e) for e in getattr(node.comparators[0], "elts", ())}
            if "linear" in allowed and "longrope" not in allowed:
                return f"crash: {arguments.module.place(node)} accepts linear and dynamic alone"
    return None


def exllamav3(package: Package) -> dict[str, Entry]:
    module = package.module("exllamav3.architecture.architectures")
    assert module is not None
    table = module.names["ARCHITECTURES"]
    assert isinstance(table, ast.DictComp)
    found: dict[str, Entry] = {}
    for node in table.generators[0].iter.elts:  # type: ignore[attr-defined]
        model = package.find_class(module, node)
        config = (
            None
            if model is None
            else package.find_class(model.module, model.fields.get("config_class", node))
        )
        name = None if config is None else text_of(config.fields.get("arch_string"))
        if config is None or name is None:
            continue
        found[name] = _exllamav3_config(config)
    return found


def _exllamav3_config(config: Class) -> Entry:
    entries = []
    for owner, function in config.methods:
        for call in calls(function):
            if called(call) != "read_rope_settings_default" or function.name == called(call):
                continue
            place = owner.module.place(call)
            source = keyword(call, "config_dict")
            where = "" if source is None else ast.unparse(source)
            other = {k.arg for k in call.keywords} & {"override_type", "theta_key"}
            if where == "{}":
                entries.append(("const", place))
            elif other or (where and "text_config'" not in where):
                entries.append(("unknown", place))
            else:
                entries.append(("config", place))
    kinds = {kind for kind, _ in entries}
    if kinds == {"config"}:
        return {"*": "yes"}
    if not entries:
        return {"*": f"unknown: {config.module.path.name} reads no rotary parameters in a known way"}
    return {"*": f"unknown: {entries[0][1]} reads parameters for each type of layer"}


READERS = {"vllm": vllm, "sglang": sglang, "mlx": mlx, "exllamav3": exllamav3}


def unpack(wheels: Path, engine: str, target: Path) -> tuple[Package, str] | None:
    """The Python files of an engine's wheel and its version; None where the folder has none."""
    files = sorted(wheels.glob(f"{WHEELS[engine]}-*.whl"))
    if not files:
        return None
    with zipfile.ZipFile(files[-1]) as wheel:
        names = [n for n in wheel.namelist() if n.endswith(".py") and READ.search(n)]
        wheel.extractall(target, names)
    return Package(target), files[-1].name.split("-")[1]


def read(wheels: Path) -> dict[str, dict[str, Any]]:
    """Engine -> its version and models, for each engine whose wheel is in the folder."""
    sys.setrecursionlimit(10000)
    found: dict[str, dict[str, Any]] = {}
    for engine, reader in READERS.items():
        with tempfile.TemporaryDirectory() as folder:
            unpacked = unpack(wheels, engine, Path(folder))
            if unpacked is None:
                continue
            package, version = unpacked
            models = reader(package)
        found[engine] = {"version": version, "models": _resolved(models)}
    return found


def _resolved(models: dict[str, Entry]) -> dict[str, Entry]:
    """Without names of other architectures, sorted."""
    for name, entry in models.items():
        other = entry.get("as", "text")
        if other != "text":
            models[name] = models.get(other, {"*": f"unknown: its language model is {other}"})
    return dict(sorted(models.items()))


def text(table: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each model."""
    engines = []
    for engine, found in table.items():
        lines = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in found["models"].items())
        engines.append(
            f' "{engine}": {{\n  "version": {json.dumps(found["version"])},\n  "models": {{\n{lines}\n  }}\n }}'
        )
    return "{\n" + ",\n".join(engines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the table, write nothing")
    arguments = parser.parse_args()
    new = text(read(arguments.wheels))
    if arguments.check:
        return int(new != TABLE.read_text(encoding="utf-8"))
    TABLE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
