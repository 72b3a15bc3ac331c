"""The model card of an exported directory, its measured perplexity, and the upload to the hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..dynamic import DynamicPlan
from ..layer_types import layer_typed
from ..messages import one_line
from ..planning import FORMAT, RopePlan
from ..version import __version__
from .verification import CONFIG, Verification, read_json

CARD = "README.md"
TAGS = ("long-context", "rope-scaling", "rope_dist")
# Measured with the source's own frequencies.
DROPPED = ("model-index", "eval_results")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    directory: Path,
    plan: RopePlan | DynamicPlan,
    verification: Verification,
    *,
    name: str,
    base_model: str | None = None,
    measured: Sequence[str] = (),
) -> None:
    """Write ``README.md``: what the extension changed, before the text of the card that is there.

    Args:
        directory: the exported model, verified; with the source's card, if it has one.
        plan: the extension.
        verification: of ``directory``.
        name: by which the directory is loaded, a hub id or a path.
        base_model: hub id of the source, if it is known.
        measured: lines of a table, from :func:`measured_perplexity`.
    """
    from huggingface_hub import ModelCard

    path = directory / CARD
    source, old, unread = _read(path)
    data = {key: value for key, value in source.items() if key not in DROPPED}
    if base_model is not None:
        # Of the hub's relations (adapter, merge, quantized, finetune) the one of a changed model of the same size.
        data |= {"base_model": base_model, "base_model_relation": "finetune"}
    data.setdefault("library_name", "transformers")
    tags = data.get("tags") or ()
    data["tags"] = [*dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS])]
    first, last = (plan.stages[0], plan.stages[-1]) if isinstance(plan, DynamicPlan) else (plan, plan)
    rope = read_json(directory / CONFIG).get("rope_parameters") or _inner(directory)
    types = {r["rope_type"] for r in (rope.values() if layer_typed(rope) else [rope]) if "rope_type" in r}
    settings = ", ".join(f"`{key}={value}`" for key, value in last.settings.items())
    model = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "A model"
    lines = [
        f"# {name}",
        f"{model} whose rotary position "
        f"embedding was rescaled by rope_dist {__version__}, from {last.original_length} to {last.target_length} "
        "tokens. The weights are unchanged.",
        f"- Strategy: `{last.strategy}`" + (f" ({settings})" if settings else ""),
        f"- Written in `{CONFIG}` as: {', '.join(f'`{name}`' for name in sorted(types))}",
    ]
    if isinstance(plan, DynamicPlan):
        lines[-1] += f"\n- Up to {first.target_length} tokens the frequencies are the trained ones"
    lines[2:] = ["\n".join(lines[2:])]
    lines += ["## Use", _usage(name, last.target_length, verification)]
    lines += [
        "## Engines",
        "Whether each computes the planned frequencies from these files, by its source:",
        f"```\n{verification}\n```",
    ]
    if measured:
        lines += ["## Perplexity", "\n".join(measured)]
    if old.strip() or unread:
        lines.append("## The source's card")
        lines += [f"Its metadata could not be read: {unread}."] if unread else []
        lines += [old.strip()] if old.strip() else []
    card = ModelCard("---\n{}\n---\n" + "\n\n".join(lines) + "\n", ignore_metadata_errors=True)
    for key, value in data.items():
        card.data[key] = value
    # Not through a link, which the copy may be.
    path.unlink(missing_ok=True)
    path.write_text(str(card), encoding="utf-8")


def _inner(directory: Path) -> Mapping[str, Any]:
    """The rotary parameters of the language model inside a config with parts."""
    parts = [part for part in read_json(directory / CONFIG).values() if isinstance(part, Mapping)]
    return next((part["rope_parameters"] for part in parts if part.get("rope_parameters")), {})


def _read(path: Path) -> tuple[dict[str, Any], str, str | None]:
    """Metadata and text of a card, and why the metadata cannot be read; nothing where there is none."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not path.is_file():
        return {}, "", None
    text = path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return {}, text, None
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return {}, text[block.end() :], one_line(error)
    if not isinstance(data or {}, dict):
        return {}, text[block.end() :], f"it is a {type(data).__name__}, not a mapping"
    return data or {}, text[block.end() :], None


def _usage(name: str, length: int, verification: Verification) -> str:
    code = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )
    lines = [f"It is loaded as any other model, and reads up to {length} tokens:", code]
    for check in verification.checks:
        if check.engine == "vllm" and check.reason is None:
            lines.append(f"```sh\nvllm serve {name} --max-model-len {length}{check.flag}\n```")
    return "\n\n".join(lines)


def hub_id(*candidates: str | os.PathLike[str] | None) -> str | None:
    """The first of ``candidates`` that is a model on the hub: an id, or a directory of the hub's cache."""
    for candidate in candidates:
        text = "" if candidate is None else os.fspath(candidate)
        cached = re.search(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", text)
        if cached:
            return f"{cached[1]}/{cached[2]}"
        if HUB_ID.fullmatch(text) and not text.startswith(".") and not Path(text).exists():
            return text
    return None


def measured_perplexity(path: str | os.PathLike[str], plan: RopePlan | DynamicPlan) -> list[str]:
    """Results of ``rope-dist eval perplexity`` with the frequencies of ``plan``, as lines of a Markdown table.

    Beside each is the unchanged model's, where it was measured on the same text.

    Args:
        path: the record, ``perplexity.json``.
        plan: static: an exported dynamic plan has fewer stages than the one that was measured.

    Raises:
        ValueError: it is no such record, or has no result with these frequencies.
    """
    if isinstance(plan, DynamicPlan):
        raise ValueError(
            "an exported dynamic plan has two stages of those that were measured: give no evaluation for it"
        )
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["kind"] != "perplexity":
            raise ValueError(f"{path} is a record of {data['kind']}, not of perplexity")
        measured = [name for name, made in data["plans"].items() if _same(made, plan)]
        results = {json.dumps(_text(m["what"]), sort_keys=True): m for m in _of(data, measured)}
        stock = {json.dumps(_text(m["what"]), sort_keys=True): m for m in _of(data, ["stock"])}
        rows = []
        for key, one in results.items():
            what, value = one["what"], _perplexity(one)
            where = f"{what['text']} {what['piece']}" if what.get("piece") else str(what["text"])
            before = _perplexity(stock[key]) if key in stock else "-"
            rows.append(
                f"| {where} | {what['method']} | {what.get('length', what['tokens'])} | {before} | {value} |"
            )
        model = data["model"]["name"]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a record of rope-dist eval perplexity: {one_line(error)}") from None
    if not rows:
        raise ValueError(f"{path} has no perplexity of {plan.strategy} with these frequencies")
    head = ["| text | method | tokens | before | extended |", "|---|---|---|---|---|"]
    return [f"Of `{model}`, measured by `rope-dist eval perplexity`:", "", *head, *rows]


def _of(data: Mapping[str, Any], frequencies: Sequence[str]) -> list[Mapping[str, Any]]:
    return [m for m in data["measurements"] if m["what"]["frequencies"] in frequencies]


def _text(what: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in what.items() if key not in ("variant", "frequencies")}


def _perplexity(measurement: Mapping[str, Any]) -> str:
    return f"{math.exp(measurement['result']['nll']):.2f}"


def _same(made: Mapping[str, Any], plan: RopePlan) -> bool:
    """Whether the plan of a record computes the same frequencies."""
    if made["format"] != FORMAT:
        return False
    other = RopePlan.from_dict(made)
    keys = ("theta", "rotary_dim", "attention_scaling", "factors")
    return all(getattr(other, key) == getattr(plan, key) for key in keys)


def check_repository(name: str) -> None:
    """``ValueError`` for what is no name of a repository on the hub."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{name!r} is no repository such as user/name: {one_line(error)}") from None


def push(directory: Path, repository: str, *, private: bool = False) -> str:
    """Upload ``directory`` to a model repository on the hub, which is created where there is none.

    Args:
        directory: the exported model.
        repository: ``"user/name"``.
        private: create it as a private one; one that is there has to be private already.

    Returns:
        The address of the repository.

    Raises:
        OSError: it is not uploaded, e.g. without a token or a network. ``directory`` stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="rope_dist", library_version=__version__)
    try:
        url = api.create_repo(repository, private=private or None, repo_type="model", exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise PermissionError("it exists and is public")
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            repo_type="model",
            commit_message="Rescaled rotary position embedding (rope_dist)",
        )
    # The client's errors have no class in common that all its versions share.
    except Exception as error:
        raise OSError(
            f"{directory} is written, but not uploaded to {repository}: {one_line(error)}"
        ) from error
    return str(url)
