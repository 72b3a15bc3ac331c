"""Reads an exported artefact as its engines do and compares it with the plan."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from ..dynamic import DynamicPlan
from ..planning import RopePlan
from ..strategies import default_inv_freq
from .architectures import reading, tabled_type, unextendable
from .engines import ENGINES, EngineConfig, check_engines, unable
from .forms import ROUNDING
from .gguf_reading import read as read_gguf
from .standard_config import completed
from .stock import StockModel, changed, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG = "config.json"


@dataclass(frozen=True)
class Check:
    """The result for one engine.

    Attributes:
        engine: its name.
        reason: None if it follows the plan, else what differs or, where ``known`` is false, what is not known.
        required: whether the verification fails with it.
        known: false where it is not known what the engine does.
        version: of the engine that was read, tried or run; empty where none was.
        note: what the engine needs to follow the plan, e.g. a flag.
        flag: that flag, after a space.
    """

    engine: str
    reason: str | None
    required: bool = True
    known: bool = True
    version: str = field(default="", compare=False)
    note: str = field(default="", compare=False)
    flag: str = field(default="", compare=False)

    @property
    def state(self) -> str:
        """ "as planned", "no: ..." or "unknown: ..."."""
        if self.reason is None:
            return f"as planned; {self.note}" if self.note else "as planned"
        return f"{'no' if self.known else 'unknown'}: {self.reason}"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; true if every required engine runs the plan."""

    artefact: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.reason is None for check in self.checks if check.required)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rows = [(f"{c.engine} {c.version}".strip(), c.state) for c in self.checks]
        return tabulate(rows, ("engine", "frequencies, scaling, length"), disable_numparse=True)

    def raise_for_failure(self) -> None:
        """``ValueError`` with the first required check that failed."""
        for check in self.checks:
            if not check.required or check.reason is None:
                continue
            if check.known:
                raise ValueError(
                    f"{self.artefact} does not follow the plan in {check.engine}: {check.reason}"
                )
            raise ValueError(
                f"it is not known whether {self.artefact} follows the plan in {check.engine}: {check.reason}"
            )


def verify(
    artefact: str | os.PathLike[str],
    plan: RopePlan | DynamicPlan,
    *,
    engines: Iterable[str] = (),
    source: PretrainedConfig | str | os.PathLike[str] | None = None,
) -> Verification:
    """Read ``artefact`` again as its engines do and compare frequencies, scaling and length with ``plan``.

    Args:
        artefact: a Hugging Face directory or a GGUF file.
        plan: the plan that it was exported with. A dynamic one is compared at both sides of the trained length, at
            which its engines change the frequencies, and at its target.
        engines: engines of :data:`ENGINES` that must run it. All engines are checked, but only a failure of those
            named here is one of the verification, be it "no" or "unknown"; one that cannot represent the plan at all
            is refused.
        source: the model before the extension, a directory or its config: then what else the model had is compared
            too, e.g. the scaling of its softmax. Not for GGUF.

    Returns:
        A check for each engine: "as planned", "no" with what differs, or "unknown" with what is not known, e.g. where
        nobody read the engine's model of this architecture. Frequencies of a longrope are compared bit for bit, those
        of a native form to the rounding of float32, those of a GGUF file to 1e-6 (llama.cpp multiplies its own).

    Raises:
        ValueError: the artefact cannot be read: missing, truncated, without one of its shards.
    """
    path = Path(artefact)
    if path.is_dir():
        return Verification(path, tuple(_directory(path, plan, tuple(engines), source)))
    check = compared(read_gguf(path).engine_config, plan, Check("llama.cpp", None), relative=1e-6)
    return Verification(path, (check,))


def check_weights(directory: Path) -> None:
    """``ValueError`` if weights are missing or cut short; a directory without any is refused too."""
    names = sorted(path.name for path in directory.iterdir())
    whole = [n for n in names if n.endswith(".safetensors")]
    if not whole and not any(n.startswith("pytorch_model") and n.endswith(".bin") for n in names):
        raise ValueError(f"{directory} has no weights (*.safetensors or pytorch_model*.bin)")
    for index in (n for n in names if n.endswith((".safetensors.index.json", ".bin.index.json"))):
        try:
            shards = set(json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{directory / index} is not an index of shards") from None
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise ValueError(
                f"{directory} lacks {len(missing)} of {len(shards)} shards, the first {missing[0]}"
            )
    for name in whole:
        _check_safetensors(directory / name)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``ValueError`` says what is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {path}: {reason}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a whole JSON file: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return data


def _check_safetensors(path: Path) -> None:
    # The format: the header's length in 8 bytes, the header as JSON, the data that it describes.
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < size else {}
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} is not a safetensors file") from None
    if not ends or 8 + length + max(ends) != size:
        raise ValueError(
            f"{path} is not whole: {size} bytes, its header describes {8 + length + max(ends, default=0)}"
        )


def _directory(
    path: Path,
    plan: RopePlan | DynamicPlan,
    engines: tuple[str, ...],
    source: PretrainedConfig | str | os.PathLike[str] | None,
) -> list[Check]:
    file = read_json(path / CONFIG)
    model = StockModel(read_config(path))
    nothing = unextendable(model)
    kind = "longrope" if nothing is not None else model.parameters.get("rope_type", "default")
    form = "longrope" if kind == "longrope" else "native"
    check_engines(plan, engines, form)
    if any(n.name.endswith((".safetensors", ".index.json", ".bin")) for n in path.iterdir()):
        check_weights(path)
    if isinstance(source, (str, os.PathLike)):
        before: PretrainedConfig | None = read_config(source)
    else:
        before = source
    checks = []
    for engine in ("transformers", *ENGINES):
        required = engine in ("transformers", *engines)
        if nothing is not None:
            checks.append(Check(engine, nothing, required))
            continue
        found = reading(engine, model, tabled_type(kind))
        check = Check(engine, None, required, version=found.version)
        reason = None if found.how in ("yes", "flag") else found.reason
        reason = reason or unable(engine, plan, form)
        if reason is not None:
            checks.append(dataclasses.replace(check, reason=reason, known=found.how != "unknown"))
            continue
        if engine == "transformers":
            read = functools.partial(_installed_transformers, model, before)
        else:
            read = functools.partial(by_formula, engine, file, model)
        # Two formulas for the same frequencies differ by roundings, the factors of a longrope do not.
        relative = 0.0 if form == "longrope" else ROUNDING
        # A longrope is for all; what an engine leaves out of a native form (MLX truncate) counts where it is named.
        check = dataclasses.replace(check, required=required or form == "longrope")
        check = compared(read, plan, check, relative=relative)
        if check.reason is None and found.how == "flag":
            check = dataclasses.replace(check, note=found.reason, flag=found.flag)
        checks.append(check)
    return checks


def _installed_transformers(
    model: StockModel, source: PretrainedConfig | None, tokens: int | None = None
) -> EngineConfig:
    reason = None if source is None else changed(StockModel(source), model)
    if reason is not None:
        raise ValueError(reason)
    return model.engine_config(tokens)


def by_formula(
    engine: str,
    file: Mapping[str, Any],
    model: StockModel,
    tokens: int | None = None,
) -> EngineConfig:
    """What ``engine`` computes from a file of this model, by its formula."""
    if model.part is not None:
        file = file.get(model.part, file)
    options = {} if tokens is None else {"tokens": tokens}
    return ENGINES[engine](completed(engine, file, model.text), **options)


def compared(
    read: Callable[..., EngineConfig],
    plan: RopePlan | DynamicPlan,
    check: Check,
    *,
    relative: float = 0.0,
) -> Check:
    """``check`` with what differs."""
    try:
        if isinstance(plan, RopePlan):
            reason = _difference(read(), plan, relative)
        else:
            reason = _difference_at_lengths(read, plan, relative)
    except KeyError as error:
        reason = f"its config has no {error.args[0]!r}"
    except (ValueError, TypeError, ZeroDivisionError) as error:
        reason = str(error)
    return dataclasses.replace(check, reason=reason)


def _difference_at_lengths(
    read: Callable[..., EngineConfig], plan: DynamicPlan, relative: float
) -> str | None:
    first, last = plan.stages[0], plan.stages[-1]
    original = plan.original_length
    # Back to a short text in the end: what an engine keeps from a long one must not stay.
    for tokens, stage in ((original, first), (original + 1, last), (plan.target_length, last), (1, first)):
        reason = _difference(read(tokens=tokens), stage, relative)
        if reason is not None:
            return f"with {tokens} tokens {reason}"
    return None


def _difference(engine: EngineConfig, plan: RopePlan, relative: float) -> str | None:
    found, planned = engine.inv_freq.double(), plan.inv_freq.double()
    if found.shape != planned.shape:
        return f"it has {found.numel()} rotary pairs, the plan {planned.numel()}"
    if not torch.allclose(found, planned, rtol=relative, atol=0.0):
        trained = default_inv_freq(plan.theta, plan.rotary_dim).double()
        if torch.allclose(found, trained, rtol=1e-6, atol=0.0):
            return "the factors are missing: it has the plain frequencies"
        # 0 / 0 is a pair that rotates in neither.
        pair = int((found / planned).nan_to_num(1.0, posinf=math.inf).log().abs().argmax())
        return (
            f"the frequencies differ, most in pair {pair}: {found[pair]:.6g} radians per token, "
            f"planned {planned[pair]:.6g}"
        )
    if not math.isclose(engine.attention_scaling, plan.attention_scaling, rel_tol=relative):
        return (
            f"cos and sin are scaled by {engine.attention_scaling:.6g}, planned {plan.attention_scaling:.6g}"
        )
    if engine.length < plan.target_length:
        return f"it reads {engine.length} tokens, planned {plan.target_length}"
    return None
