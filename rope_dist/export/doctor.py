"""What each engine computes from a checkpoint of unknown origin, without a plan, and where engines differ.

:func:`doctor` reads a directory, a GGUF file or a model of the hub as ``engines.py``, ``gguf_reading.py`` and the
installed transformers (``stock.py``) do. Sentences about the files themselves are in ``config_faults.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ..defaults import PRESETS
from ..layer_types import extended_layers, layer_typed
from ..strategies import default_inv_freq
from .architectures import VERSIONS, reading, tabled_type
from .config_faults import cause, faults, neighbours
from .engines import ENGINES, TRANSFORMERS_4_KEYS, EngineConfig
from .gguf_reading import read as read_gguf
from .model_card import HUB_ID
from .standard_config import completed
from .stock import StockModel, read_config
from .verification import CONFIG, read_json

TOLERANCE = 5e-7
"""Relative difference of frequencies that is rounding: engines compute them in float32, in different orders."""
GGUF_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """What one engine makes of the checkpoint.

    Attributes:
        engine: its name.
        version: that was read or run.
        short, long: for a text of few tokens and for one of the whole length; the same for most types. None where the
            engine fails, or where it is not known what it does.
        status: "ok"; "ignored": it drops the scaling; "fails"; "unknown", which no comparison counts.
        reason: why the status is not "ok".
    """

    engine: str
    version: str
    short: EngineConfig | None
    long: EngineConfig | None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` found; true if all engines that are known compute the same.

    Attributes:
        source: as it was given.
        theta: RoPE base of the model, to which factors are relative.
        findings: one for each engine.
        differences: a sentence for each engine that differs from the others, and what to do.
        faults: sentences about entries of the files that contradict each other or are missing.
    """

    source: str
    theta: float
    findings: tuple[Finding, ...]
    differences: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def agree(self) -> bool:
        return not self.differences

    def __bool__(self) -> bool:
        return self.agree

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = []
        for found in self.findings:
            name = f"{found.engine} {found.version}".strip()
            for label, read in _stages(found):
                row = (
                    read.rope_type,
                    _factors(read, self.theta),
                    f"{read.attention_scaling:.6g}",
                    read.length,
                )
                rows.append((name + label, *row))
            if found.short is None:
                rows.append((name, f"{found.status}: {found.reason}", "", "", ""))
        table = tabulate(
            rows,
            ("engine", "rope_type", "factors", "cos, sin", "tokens"),
            disable_numparse=True,
            maxcolwidths=70,
        )
        sentences = [*self.differences, *self.faults]
        if self.agree:
            sentences.insert(0, "The engines that are known compute the same.")
        return "\n".join((table, "", *(f"- {sentence}" for sentence in sentences)))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        engines = []
        for found in self.findings:
            entry: dict[str, Any] = {"engine": found.engine, "version": found.version, "status": found.status}
            entry["reason"] = found.reason or None
            for name, read in (("short", found.short), ("long", found.long)):
                entry[name] = read and {
                    "rope_type": read.rope_type,
                    "inv_freq": read.inv_freq.tolist(),
                    "factors": [
                        f if math.isfinite(f) else None for f in _relative(read, self.theta).tolist()
                    ],
                    "attention_scaling": read.attention_scaling,
                    "length": read.length,
                }
            engines.append(entry)
        return {
            "source": self.source,
            "agree": self.agree,
            "theta": self.theta,
            "engines": engines,
            "differences": list(self.differences),
            "faults": list(self.faults),
        }


def doctor(source: str | os.PathLike[str]) -> Diagnosis:
    """What each known engine computes from a checkpoint, and where they differ.

    Args:
        source: a directory with a ``config.json`` (and perhaps GGUF files), a ``config.json``, a GGUF file, or a hub
            id, of which ``config.json`` and small files beside it are read. Weights are not needed.

    Raises:
        ValueError: there is nothing to read, or it is no JSON or no GGUF.
    """
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return _diagnosis(str(source), [_gguf(path, "llama.cpp")], {}, ())
    file_path = _config_path(source)
    file, directory = read_json(file_path), file_path.parent
    model, failure = _stock(file_path)
    text = _text_file(file, model)
    findings = [_installed(model, failure)]
    findings += [_by_formula(engine, text, model) for engine in ENGINES]
    if path.is_dir():
        findings += [_gguf(p, f"llama.cpp, {p.name}:") for p in sorted(path.glob("*.gguf"))]
    notes = (*faults(file, text), *neighbours(directory, text))
    return _diagnosis(str(source), findings, text, notes)


def _config_path(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path / CONFIG
    if path.exists():
        return path
    if str(source) in PRESETS:
        raise ValueError(
            f"{source} is a preset, not a checkpoint: give its directory, or {PRESETS[str(source)][0]}"
        )
    if not HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise ValueError(f"there is no file or directory {source}")
    from transformers.utils import cached_file

    try:
        found = cached_file(str(source), CONFIG)
        for name in ("tokenizer_config.json", "generation_config.json"):
            cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot read {CONFIG} of {source} from the hub or its cache: {reason}") from None
    return Path(str(found))


def _stock(path: Path) -> tuple[StockModel | None, str]:
    """The model as the installed transformers reads it, or why it does not."""
    try:
        model = StockModel(read_config(path))
        _ = model.text.rope_parameters
        return model, ""
    except (ValueError, AttributeError) as error:
        return None, str(error).removeprefix(f"{path} is not a config that transformers reads: ")


def _text_file(file: Mapping[str, Any], model: StockModel | None) -> dict[str, Any]:
    """The entries of the language model's config, with defaults of its class and parameters of its full layers."""
    try:
        part = None if model is None else model.part
    except ValueError:
        part = None
    text = file.get(part or "text_config")
    text = dict(text if isinstance(text, Mapping) else file)
    if model is None:
        return text
    text = completed("", text, model.text)
    given = text.get("rope_parameters")
    if isinstance(given, Mapping) and layer_typed(given):
        layers = extended_layers(model.text)
        text["rope_parameters"] = given.get(layers) if layers else None
    return text


def _installed(model: StockModel | None, failure: str) -> Finding:
    import transformers

    version = transformers.__version__
    if model is None:
        return Finding("transformers", version, None, None, "fails", failure)

    kind = model.parameters.get("rope_type", "default")

    def read(config: Mapping[str, Any], tokens: int | None = None) -> EngineConfig:
        found = model.engine_config(tokens)
        return EngineConfig(found.inv_freq, found.attention_scaling, found.length, kind)

    config = {"max_position_embeddings": model.text.max_position_embeddings, "rope_scaling": model.parameters}
    return _read("transformers", version, read, config)


def _by_formula(engine: str, text: Mapping[str, Any], model: StockModel | None) -> Finding:
    config, version = dict(text), VERSIONS[engine]
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, Mapping):
            return Finding(engine, version, None, None, "fails", f"its {key} is {config[key]!r:.80}")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    status, reason = "ok", ""
    if model is not None:
        config = completed(engine, config, model.text)
        tabled = reading(engine, model, tabled_type(kind))
        reason = tabled.reason
        by_formula = engine == "transformers-4" and model.text.model_type in TRANSFORMERS_4_KEYS
        by_formula |= engine == "mlx" and "old key `type`" in reason and "type" in rope
        by_formula |= engine == "transformers-4" and model.layer_typed
        by_formula |= (
            kind == "yarn" and config.get("kv_lora_rank") is not None
        )  # DeepSeek's formula is known.
        if not by_formula and tabled.how == "unknown":
            return Finding(engine, version, None, None, "unknown", reason)
        if not by_formula and tabled.how == "crash" and kind != "default":
            return Finding(engine, version, None, None, "fails", reason)
        if not by_formula and tabled.how == "ignored" and kind != "default":
            status = "ignored"
            theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
            config.update(rope_scaling=None, rope_parameters=None, rope_theta=theta)
    found = _read(engine, version, ENGINES[engine], config)
    return found if status == "ok" or found.short is None else replace(found, status=status, reason=reason)


def _read(engine: str, version: str, read: Callable[..., EngineConfig], config: Mapping[str, Any]) -> Finding:
    try:
        if _changing(config):
            length = int(config["max_position_embeddings"])
            short, long = read(config, tokens=1), read(config, tokens=2 * length)
        else:
            short = long = read(config)
        if not bool(torch.isfinite(short.inv_freq).all()):
            raise ValueError("its frequencies are not finite")
        return Finding(engine, version, short, long)
    except KeyError as error:
        return Finding(engine, version, None, None, "fails", f"its config has no {error.args[0]!r}")
    except (ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        return Finding(engine, version, None, None, "fails", " ".join(str(error).split())[:300])


def _changing(config: Mapping[str, Any]) -> bool:
    """Whether frequencies change with the length in some engines."""
    for rope in (config.get("rope_scaling"), config.get("rope_parameters")):
        if isinstance(rope, Mapping):
            kind = rope.get("rope_type", rope.get("type"))
            if kind == "dynamic" or rope.get("short_factor") != rope.get("long_factor"):
                return True
    return False


def _gguf(path: Path, name: str) -> Finding:
    file = read_gguf(path)
    try:
        try:
            short = long = file.engine_config()
        except ValueError as error:
            if "chooses by the context" not in str(error):
                raise
            length = max(2, int(file.value("context_length", 2)))
            short, long = file.engine_config(1), file.engine_config(length)
        return Finding(name, file.architecture, short, long)
    except (ValueError, TypeError, ArithmeticError) as error:
        return Finding(name, file.architecture, None, None, "fails", str(error))


def _stages(found: Finding) -> list[tuple[str, EngineConfig]]:
    if found.short is None or found.long is None:
        return []
    if torch.equal(found.short.inv_freq, found.long.inv_freq):
        return [("", found.short)]
    return [(", short texts", found.short), (", long texts", found.long)]


def _relative(read: EngineConfig, theta: float) -> torch.Tensor:
    """``[rotary_dim / 2]`` float64 factors relative to ``theta``; infinite for a pair that does not rotate."""
    plain = default_inv_freq(theta, 2 * read.inv_freq.numel()).double()
    return plain / read.inv_freq.double()


def _factors(read: EngineConfig, theta: float) -> str:
    """The range of an embedding's factors and the number of scaled pairs."""
    factors = _relative(read, theta)
    turning = factors[torch.isfinite(factors)]
    scaled = int(((factors - 1).abs() > 1e-4).sum())
    if not scaled:
        return f"none of {factors.numel()} pairs scaled"
    low, high, still = float(turning.min()), float(turning.max()), factors.numel() - turning.numel()
    rest = f", {still} do not rotate" if still else ""
    return f"{low:.4g} to {high:.4g}, {scaled} of {factors.numel()} pairs scaled{rest}"


def _theta(text: Mapping[str, Any], findings: list[Finding]) -> float:
    for rope in (text.get("rope_scaling"), text.get("rope_parameters"), text):
        theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        if isinstance(theta, (int, float)) and theta > 1:
            return float(theta)
    read = next((found.short for found in findings if found.short is not None), None)
    if read is not None and read.inv_freq.numel() > 1 and read.inv_freq[1] > 0:
        # The fastest pairs are scaled by no type but linear.
        return float((read.inv_freq[0] / read.inv_freq[1]).double() ** read.inv_freq.numel())
    return 10000.0


def _diagnosis(
    source: str, findings: list[Finding], text: Mapping[str, Any], notes: tuple[str, ...]
) -> Diagnosis:
    differences = []
    reference = _reference(findings)
    if reference is None:
        differences.append(f"No engine reads it. {findings[0].engine}: {findings[0].reason.strip('.')}.")
    else:
        for found in findings:
            if found is reference or found.status == "unknown":
                continue
            said = _difference(found, reference)
            if said is not None:
                hint = cause(found.engine, text)
                differences.append(f"{found.engine} {said}." + (f" {hint}" if hint else ""))
    for found in findings:
        read = found.long
        if read is not None and read.table_length is not None and read.table_length < read.length:
            differences.append(
                f"{found.engine} accepts {read.length} tokens and has cos and sin for {read.table_length}: start it "
                f"with at most that many (--max-model-len {read.table_length})."
            )
    return Diagnosis(source, _theta(text, findings), tuple(findings), tuple(differences), notes)


def _reference(findings: list[Finding]) -> Finding | None:
    """The installed transformers where it reads the config, else the first engine that does."""
    return next((found for found in findings if found.short is not None and found.status == "ok"), None)


def _difference(found: Finding, reference: Finding) -> str | None:
    name = f"{reference.engine} {reference.version}"
    if found.short is None or found.long is None or reference.short is None or reference.long is None:
        reason = found.reason.strip('".')
        return f"fails on it: {reason}"
    relative = GGUF_TOLERANCE if found.engine.startswith("llama.cpp") else TOLERANCE
    for text, mine, other in (
        ("", found.short, reference.short),
        (" for long texts", found.long, reference.long),
    ):
        said = _compared(mine, other, name, relative)
        if said is not None:
            ignored = f" ({found.reason})" if found.status == "ignored" else ""
            return said + text + ignored
    if found.long.length != reference.long.length:
        return f"allows {found.long.length} tokens, {name} {reference.long.length}"
    return None


def _compared(mine: EngineConfig, other: EngineConfig, name: str, relative: float) -> str | None:
    if mine.inv_freq.shape != other.inv_freq.shape:
        return f"rotates {mine.inv_freq.numel()} pairs of a head, {name} {other.inv_freq.numel()}"
    found, expected = mine.inv_freq.double(), other.inv_freq.double()
    if not torch.allclose(found, expected, rtol=relative, atol=1e-30):
        ratios = (found / expected).nan_to_num(1.0).clamp(min=1e-30)
        pair = int(ratios.log().abs().argmax())
        numbers = f"{float(found[pair]):.6g} radians per token, {float(expected[pair]):.6g} there"
        if mine.rope_type == "default" != other.rope_type:
            return f"drops the {other.rope_type} scaling of {name}: the frequency of pair {pair} is {numbers}"
        return f"computes other frequencies than {name}, most in pair {pair}: {numbers}"
    if not math.isclose(mine.attention_scaling, other.attention_scaling, rel_tol=1e-6):
        return f"scales cos and sin by {mine.attention_scaling:.6g}, {name} by {other.attention_scaling:.6g}"
    return None
