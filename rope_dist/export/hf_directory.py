"""Export to a Hugging Face directory, with the plan in both schemas of ``config.json``."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..checking import warn_of_window
from ..dynamic import DynamicPlan, check_trained, trained_config
from ..files import check_target, copy_bytes, new_directory
from ..layer_types import extended_layers, layer_typed, rope_parameters
from ..planning import RopePlan, check_plan
from ..trained_length import LENGTH_KEYS
from .architectures import check_names, reading, unextendable
from .engines import check_engines
from .forms import FORMS, NATIVE_STRATEGIES, Form, check_form, native_entries, native_form
from .model_card import check_repository, hub_id, measured_perplexity, push, write_card
from .stock import StockModel, changed, read_config
from .verification import CONFIG, Verification, check_weights, read_json, verify

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model*.bin.index.json")
# Other formats of the same model would not follow the plan, and some engines prefer them to config.json.
OTHER_FORMATS = ("consolidated*", "params.json", "*.gguf", "*.onnx*", "*.msgpack", "*.h5", "*.pth")
FOLDERS = ("additional_chat_templates",)
FORCED = "; --force-engine (force_engine=True) writes it all the same"


def config_entries(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None = None, form: Form | None = None
) -> dict[str, Any]:
    """Top-level entries of a ``config.json`` from which transformers 4 and 5 and the engines compute the plan.

    ``rope_parameters`` is read by transformers 5, ``rope_theta`` with ``rope_scaling`` by transformers 4 (which would
    silently take a file with the former alone for a model without scaling). Rotary parameters per layer type have no
    form but the former. Where the scaling of cos and sin of a longrope is not what vLLM and SGLang derive,
    ``short_mscale`` and ``long_mscale`` repeat ``attention_factor``, which they do not read.

    Of a dynamic plan the short factors are the trained model's, the long ones the last stage's, and the original
    length, at which engines change from one to the other, is the trained one. Stages between have no place there.

    Args:
        plan: the extension.
        config: of the language model that is extended; its other rotary parameters are kept.
        form: see :func:`hf`.

    Raises:
        ValueError: stock cannot compute the plan from ``config``, or the plan has no native form and ``form`` asks for
            it.
    """
    entries = _overrides(plan, config, form)
    if layer_typed(entries["rope_parameters"]):
        return entries
    rope = entries["rope_parameters"] = dict(entries["rope_parameters"])
    if rope["rope_type"] == "longrope":
        # PhiMoE's config requires them.
        derived = (
            rope["attention_factor"] == 1 and rope["original_max_position_embeddings"] == plan.target_length
        )
        if not derived or getattr(config, "model_type", None) == "phimoe":
            rope["short_mscale"] = rope["long_mscale"] = rope["attention_factor"]
    entries["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        entries["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling != {"rope_type": "default"}:
        entries["rope_scaling"] = scaling
    return entries


def _overrides(
    plan: RopePlan | DynamicPlan, config: PretrainedConfig | None, form: Form | None
) -> dict[str, Any]:
    """Entries of a transformers 5 config."""
    if form != "longrope":
        native = native_entries(plan, config)
        if native is not None:
            return native
        if form == "native":
            raise ValueError(
                f"the plan has no native form: the frequencies of {_name(plan)} are no published scaling's in this "
                f"model (those of {', '.join(NATIVE_STRATEGIES)} are in most that were trained without a scaling); "
                "leave the form out, or take longrope"
            )
    if isinstance(plan, RopePlan):
        return plan.config_overrides(config)
    config = config if config is None else trained_config(config)
    first, last = plan.stages[0], plan.stages[-1]
    entries = last.config_overrides(config)
    layers = None
    if config is not None:
        text = config.get_text_config(decoder=True)
        layers, own = extended_layers(text), rope_parameters(text)
        scaled = own.get("original_max_position_embeddings") if own.get("llama_4_scaling_beta") else None
        if scaled not in (None, plan.original_length):
            raise ValueError(
                f"{text.model_type} scales its queries by an original_max_position_embeddings of {scaled}, and engines "
                f"would change frequencies at that length too, not at {plan.original_length}: export a static plan"
            )
    rope = entries["rope_parameters"] if layers is None else entries["rope_parameters"][layers]
    rope = {
        **rope,
        "short_factor": list(first.factors),
        "original_max_position_embeddings": plan.original_length,
    }
    if layers is None:
        # transformers 4 and Phi3 read the length there alone.
        entries["original_max_position_embeddings"] = plan.original_length
        entries["rope_parameters"] = rope
    else:
        entries["rope_parameters"] = {**entries["rope_parameters"], layers: rope}
    return plan.recorded(entries, config)


def _name(plan: RopePlan | DynamicPlan) -> str:
    return plan.strategy if isinstance(plan, RopePlan) else f"a dynamic plan by {plan.strategy}"


def hf(  # noqa: PLR0913
    model_or_dir: PreTrainedModel | str | os.PathLike[str],
    plan: RopePlan | DynamicPlan,
    out: str | os.PathLike[str],
    *,
    config_only: bool = False,
    link: bool = False,
    engines: Iterable[str] = (),
    form: Form | None = None,
    force: bool = False,
    force_engine: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    base_model: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the extended model as a directory that stock engines load; it is verified before it appears.

    Args:
        model_or_dir: a directory with ``config.json`` and weights, or a model (enabled or not) to save.
        plan: made from this model. A dynamic one is written as a config from which engines take the trained frequencies
            up to the trained length and those of its last stage past it, each in its own way (``docs/export.md``).
        out: the new directory. It appears whole or not at all.
        config_only: everything but the weights.
        link: hard links in place of copies of the weights (the same file system only).
        engines: names of :data:`ENGINES` that must run it exactly; those that cannot are refused.
        form: ``"native"`` writes the published scaling that the plan is (``yarn``, ``linear``, ``llama3`` or a new
            ``rope_theta``), within the rounding of float32; ``"longrope"`` its factors, bit for bit. None: native where
            it is one and ``engines`` run it so, else longrope.
        force: replace ``out`` if it is there.
        force_engine: write it even where one of ``engines`` is not known to follow the plan, or known not to.
        push_to_hub: ``"user/name"``: upload the directory there, after it is written. Nothing is uploaded without.
        private: create that repository as a private one; it is not uploaded to a public one.
        base_model: hub id of the source, for the model card; by default as far as the source or the plan tells.
        evaluation: ``perplexity.json`` of ``rope-dist eval perplexity``, for the model card.

    Returns:
        The path of the directory. Its ``README.md`` is a model card with the text of the source's.

    Raises:
        ValueError: the plan is of another model, an engine cannot run it, the source is not whole, or ``out`` exists;
            the plan has no native form and ``form`` asks for it; a dynamic plan scales cos and sin otherwise than the
            trained model.
        OSError: the disk is full or not writable, or the directory is written, but not uploaded. The source is never
            changed.
    """
    out, engines = Path(out), tuple(engines)
    check_form(form)
    check_names(engines)
    if force_engine:
        engines = ()
    likely = "native" if form is None and native_form(plan) else form or "longrope"
    check_engines(plan, engines, likely, hint=FORCED)
    check_target(out, force=force, directory=True)
    if private and push_to_hub is None:
        raise ValueError("private goes with push_to_hub")
    for name in (push_to_hub, base_model):
        if name is not None:
            check_repository(name)
    measured = [] if evaluation is None else measured_perplexity(evaluation, plan)

    def describe(
        directory: Path, verification: Verification, *sources: str | os.PathLike[str] | None
    ) -> None:
        base = base_model or hub_id(
            *sources, plan.stages[-1].source if isinstance(plan, DynamicPlan) else plan.source
        )
        name = push_to_hub or Path(os.path.abspath(out)).name
        write_card(directory, plan, verification, name=name, base_model=base, measured=measured)

    if isinstance(model_or_dir, (str, os.PathLike)):
        source = Path(model_or_dir)
        if not source.exists() and not source.is_symlink():
            raise ValueError(f"there is no directory {source}; a model on the hub has to be downloaded first")
        file = read_json(source / CONFIG)
        files = _files(source, config_only)
        config = _start(read_config(source), plan)
        check_model(StockModel(config), plan, engines, form, hint=FORCED)
        real = source.resolve()
        if out.resolve() == real or out.resolve() in real.parents:
            raise ValueError(f"{out} contains the source {source}: write to another directory")
        if not config_only:
            check_weights(source)
        with new_directory(out, force=force) as temporary:
            _write_config(temporary, file, plan, engines, form, config, out)
            _copy(files, source, temporary, link)
            found = _finish(temporary, plan, engines, config, out)
            describe(temporary, found, source, file.get("_name_or_path"))
        if push_to_hub is not None:
            push(out, push_to_hub, private=private)
        return out
    if not hasattr(model_or_dir, "save_pretrained"):
        raise TypeError(f"expected a transformers model or a directory, got {type(model_or_dir).__name__}")
    if any("_rope_dist_window" in vars(module) for module in model_or_dir.modules()):
        raise ValueError(
            "the model has a window, within which its distances are the trained ones, and no engine reads one from a "
            "config: rope_dist.disable(model) first, and export a plan that is meant for all distances"
        )
    config = _start(model_or_dir.config, plan)
    check_model(StockModel(config), plan, engines, form, hint=FORCED)
    with new_directory(out, force=force) as temporary:
        (model_or_dir.config if config_only else model_or_dir).save_pretrained(temporary)
        _write_config(temporary, read_json(temporary / CONFIG), plan, engines, form, config, out)
        found = _finish(temporary, plan, engines, config, out)
        describe(temporary, found, model_or_dir.config._name_or_path)
    if push_to_hub is not None:
        push(out, push_to_hub, private=private)
    return out


def _start(config: PretrainedConfig, plan: RopePlan | DynamicPlan) -> PretrainedConfig:
    """The config that the plan extends: a dynamic one starts from the trained model each time."""
    return trained_config(config) if isinstance(plan, DynamicPlan) else config


def extended_config(
    file: Mapping[str, Any],
    plan: RopePlan | DynamicPlan,
    config: PretrainedConfig,
    form: Form | None = None,
) -> dict[str, Any]:
    """A copy of a ``config.json`` with the plan's entries and without those that would contradict them.

    Args:
        file: the contents of the file.
        plan: the extension.
        config: the config that transformers reads from it. The entries go where its language model's are.
        form: see :func:`hf`.
    """
    model = StockModel(config)
    text, part = model.text, model.part
    if part is not None:
        if not isinstance(file.get(part), Mapping):
            # Flat, as earlier versions wrote it: transformers 5 saves it with its parts.
            file = json.loads(config.to_json_string())
        return {**file, part: extended_config(file[part], plan, text, form)}
    entries = config_entries(plan, text, form)
    new = {k: v for k, v in file.items() if k not in ("original_max_position_embeddings", "rope_scaling")}
    for key in LENGTH_KEYS:
        if isinstance(new.get(key), int):
            new[key] = max(new[key], plan.target_length)
    derived = isinstance(getattr(type(text), "head_dim", None), property)
    if new.get("head_dim") is None and "rope_scaling" in entries and not derived:
        # The longrope of transformers 4 would multiply None (Mixtral).
        new["head_dim"] = (plan.stages[-1] if isinstance(plan, DynamicPlan) else plan).head_dim
    return {**new, **entries}


def check_model(
    model: StockModel,
    plan: RopePlan | DynamicPlan,
    engines: Iterable[str] = (),
    form: Form | None = None,
    *,
    hint: str = "",
) -> None:
    """``ValueError`` if ``plan`` is of another model, or no export for ``engines`` (or for any) can follow it.

    A warning where the model has nothing to extend (:func:`rope_dist.layer_types.too_short_a_window`).
    """
    text = model.text
    reason = unextendable(model)
    if reason is not None:
        raise ValueError(reason)
    if isinstance(plan, DynamicPlan):
        check_trained(plan, text)
    else:
        check_plan(plan, text)
    # The plan applied to a copy shows what else it would change in the stock model.
    after = StockModel(copy.deepcopy(model.config))
    after.text.__dict__.update(_overrides(plan, text, form))
    reason = changed(model, after)
    if reason is not None:
        raise ValueError(f"the plan would change more of {text.model_type} than its frequencies: {reason}")
    own = after.parameters.get("rope_type", "default")
    kinds = dict.fromkeys((own, *(("longrope",) if form is None else ())))
    for engine in engines:
        readings = [reading(engine, model, kind) for kind in kinds]
        found = next((r for r in readings if r.how in ("yes", "flag")), readings[0])
        if found.how == "unknown":
            raise ValueError(
                f"it is not known whether {engine} runs {model.config.model_type} by a plan: {found.reason}{hint}"
            )
        if found.how not in ("yes", "flag"):
            raise ValueError(f"{engine} cannot run {model.config.model_type} by a plan: {found.reason}{hint}")
    warn_of_window(plan, text, stacklevel=3)


def possible_forms(
    plan: RopePlan | DynamicPlan, text: PretrainedConfig, form: Form | None
) -> tuple[Form, ...]:
    """Forms to try in turn where ``form`` is asked for in the config of a language model."""
    if form is not None:
        return (form,)
    return FORMS if native_entries(plan, text) is not None else ("longrope",)


def _write_config(
    directory: Path,
    file: Mapping[str, Any],
    plan: RopePlan | DynamicPlan,
    engines: tuple[str, ...],
    form: Form | None,
    source: PretrainedConfig,
    out: Path,
) -> None:
    """Write ``config.json`` in the first form that all ``engines`` run; ``ValueError`` if there is none."""
    forms = possible_forms(plan, StockModel(source).text, form)
    for tried in forms:
        _write_json(directory / CONFIG, extended_config(file, plan, source, tried))
        try:
            _verified(directory, plan, engines, source, out)
            return
        except ValueError:
            if tried == forms[-1]:
                raise


def _finish(
    directory: Path,
    plan: RopePlan | DynamicPlan,
    engines: Iterable[str],
    source: PretrainedConfig,
    out: Path,
) -> Verification:
    """Raise the lengths that other files repeat, and verify the directory against the plan."""
    for name, key in (
        ("tokenizer_config.json", "model_max_length"),
        ("generation_config.json", "max_length"),
    ):
        path = directory / name
        if path.exists():
            data = read_json(path)
            # generate() stops there; vLLM takes the smaller length for some tasks.
            if isinstance(data.get(key), int) and plan.original_length <= data[key] < plan.target_length:
                _write_json(path, {**data, key: plan.target_length})
    return _verified(directory, plan, engines, source, out)


def _verified(
    directory: Path,
    plan: RopePlan | DynamicPlan,
    engines: Iterable[str],
    source: PretrainedConfig,
    out: Path,
) -> Verification:
    """What was found; ``ValueError``, which names ``out``, unless the directory follows the plan."""
    try:
        verification = verify(directory, plan, engines=engines, source=source)
    except ValueError as error:
        raise ValueError(str(error).replace(str(directory), str(out))) from None
    try:
        dataclasses.replace(verification, artefact=out).raise_for_failure()
    except ValueError as error:
        named = all(c.engine in engines for c in verification.checks if c.required and c.reason is not None)
        raise ValueError(f"{error}{FORCED if named else ''}") from None
    return verification


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    # Not through a link, which the copy may be.
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(source: Path, config_only: bool) -> list[Path]:
    """Files of the model relative to ``source``; ``ValueError`` for one that cannot be read."""
    folders = [source, *(source / name for name in FOLDERS if (source / name).is_dir())]
    files = []
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        name = path.name
        skipped = (*OTHER_FORMATS, *(WEIGHTS if config_only else ()))
        if name.startswith(".") or name == CONFIG or any(fnmatch.fnmatch(name, p) for p in skipped):
            continue
        try:
            path.stat()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        if path.is_file():
            files.append(path.relative_to(source))
    return files


def _copy(files: list[Path], source: Path, target: Path, link: bool) -> None:
    sizes = {file: (source / file).stat().st_size for file in files}
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc="copying", disable=None, leave=False
    ) as bar:
        for file, size in sizes.items():
            new = target / file
            new.parent.mkdir(exist_ok=True)
            if link and any(fnmatch.fnmatch(file.name, p) for p in WEIGHTS):
                # Files in a hub cache are symbolic links into its store.
                os.link((source / file).resolve(), new)
                bar.update(size)
            else:
                with open(source / file, "rb") as old, open(new, "wb") as file_out:
                    copy_bytes(old, file_out, size, bar.update)
