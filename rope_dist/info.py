"""What is installed and built, and which backend serves each device: ``rope-dist info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import defaults
from .export.architectures import reading, unextendable
from .export.engines import ENGINES
from .export.stock import StockModel
from .hf import enable, report, summary, supported
from .hf.forms import Unsupported
from .machine import describe
from .model_names import known_name
from .ops import autotune, dispatch, native
from .planning import load_config
from .presets import PRESETS
from .version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def info(model: str | None = None, *, models: bool = False) -> dict[str, dict[str, str]]:
    """Versions, native libraries, and the backend of each device with its reason.

    Args:
        model: a preset, a directory with a ``config.json`` or a hub id: adds what each layer would do once the
            model is enabled on this machine's first device, and which engines read an extension of it. No weight is
            read; of a preset, nothing is downloaded.
        models: add what ``enable()`` does with every model type of the installed transformers (some seconds).

    Returns:
        Sections of named texts, in the order in which :func:`text` prints them.

    Raises:
        ValueError: no such model.
    """
    here = describe()
    return {
        "versions": {
            "rope_dist": __version__,
            **{k: here[k] for k in ("python", "torch", "transformers", "triton")},
        },
        "machine": {k: here[k] for k in ("system", "processor", "threads", "gpu") if k in here},
        "native libraries": {"CPU library": _built("cpu"), "CUDA library": _built("cuda")},
        "backends": {str(device): _backends(device) for device in (torch.device("cpu"), *_gpus())},
        "autotune cache": _autotuned(),
        **({"models": _types()} if models else {}),
        **({model: _model(model)} if model is not None else {}),
    }


def text(found: dict[str, dict[str, str]]) -> str:
    """What :func:`info` returns, for reading."""
    lines = []
    for section, entries in found.items():
        lines.append(section)
        width = max(len(name) for name in entries)
        lines += [f"  {name:<{width}}  {value}" for name, value in entries.items()]
    return "\n".join(lines)


def _types() -> dict[str, str]:
    return {
        name: f"{one.path}{f' ({one.reason})' if one.reason else ''}" for name, one in supported().items()
    }


def _model(model: str) -> dict[str, str]:
    if known_name(model, PRESETS) is not None:
        return _preset(model)
    config = load_config(model)
    return _layers(config, getattr(config.get_text_config(), "dtype", None) or torch.get_default_dtype())


def _preset(name: str) -> dict[str, str]:
    """The published rotary embedding, and what a layer does; the number of layers is the model's own."""
    from transformers import CONFIG_MAPPING

    rope = PRESETS[name]
    repository, model_type = defaults.PRESETS[name]
    scaled = "" if rope.factors is None else f", scaled by {min(rope.factors):g} to {max(rope.factors):g}"
    # One layer of the type's default shape, with the preset's heads.
    config = CONFIG_MAPPING[model_type](num_hidden_layers=1, head_dim=rope.rotary_dim)
    return {
        "repository": repository,
        "rotary embedding": f"theta {rope.theta:g}, head_dim {rope.rotary_dim}, {rope.length} tokens{scaled}",
        **_layers(config, torch.bfloat16),
    }


def _layers(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, str]:
    with torch.device("meta"):
        empty = _model_class(config)._from_config(config)
    device = (_gpus() or [torch.device("cpu")])[0]
    where = f"{str(dtype).removeprefix('torch.')} on {device}"
    try:
        enable(empty)
    except Unsupported as error:
        return {where: f"refused ({error})"}
    layers = report(empty, dtype=dtype, device=device)
    return {where: summary(layers).replace("\n", "; "), "extensions": _engines(config)}


def _engines(config: PretrainedConfig) -> str:
    """Which engines run an extension of a model, as far as is known, and why the others do not."""
    model = StockModel(config)
    nothing = unextendable(model)
    if nothing is not None:
        return nothing
    able, others = [], []
    for engine in ("transformers", *ENGINES):
        how, version, reason = reading(engine, model)
        name = f"{engine} {version}".strip()
        if how in ("yes", "flag"):
            able.append(name if how == "yes" else f"{name} ({reason})")
        else:
            others.append(f"{'unknown for' if how == 'unknown' else 'not'} {name}: {reason}")
    return "; ".join([", ".join(able), *others])


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that the config names, else the one that transformers generates text with."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(f"transformers has no model that generates text for a {type(config).__name__}")


def _built(name: str) -> str:
    found = native.load(name)
    if isinstance(found, str):
        return found
    if not found.architectures:
        return f"yes, {found.build}"
    numbers = ", ".join(str(number) for number in found.architectures)
    return f"yes, {found.build}, for compute capabilities {numbers} (PTX of {found.architectures[-1]})"


def _autotuned() -> dict[str, str]:
    """The fastest path of each projection and rotation that was timed, kept by ``ops/autotune.py``."""
    kept = autotune.cache()
    rows = {}
    for row in kept.rows():
        shape = f"{row['rows']} tokens, {row['depth']} to {row['widths']}, {row['dtype']} {row['form']}"
        times = ", ".join(f"{path} {ms:.4g} ms" for path, ms in row.get("milliseconds", {}).items())
        rows[f"{row['device']}, {shape.strip()}"] = f"{row['choice']} ({times})"
    if rows:
        return rows
    return {
        "projection": f"nothing yet: the first call on a GPU measures, and keeps the result in {kept.folder}"
    }


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _backends(device: torch.device) -> str:
    """The backend of each dtype on ``device``, and why those before it in the list do not serve."""
    # Empty tensors ask the very function that chooses for the real ones.
    dtypes: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        choice = dispatch.choose(torch.empty(0, dtype=dtype, device=device))
        dtypes.setdefault(choice.backend.name, []).append(str(dtype).removeprefix("torch."))
        for name, reason in choice.skipped.items():
            reasons.setdefault(name, reason)
    serving = "; ".join(f"{name} for {', '.join(of)}" for name, of in dtypes.items())
    return "; ".join([serving, *(f"not {name}: {reason}" for name, reason in reasons.items())])
