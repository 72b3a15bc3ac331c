"""``rope-dist eval``: perplexity, passkey retrieval and tasks of a model and its extensions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..defaults import (
    CORPUS_NAMES,
    DEPTHS,
    EVALUATED_STRATEGIES,
    METHODS,
    PACKAGED_MODEL_NAMES,
    QUICK_STRATEGIES,
    SCORINGS,
    TASK_SET_NAMES,
)
from . import values
from .options import add_length

DESCRIPTION = (
    "Measure what an extension does to a model. A run that was stopped goes on where it stopped when the same "
    "command is given again: finished measurements are kept in a JSON file in the output folder."
)
EXAMPLES = """examples:
  rope-dist eval perplexity --model ./my-model --text book.txt --factor 2
  rope-dist eval passkey --quick
  rope-dist eval tasks --model ./my-model --tasks longbench-e ruler"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "eval",
        help="measure perplexity, passkey retrieval and tasks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="perplexity|passkey|tasks", parser_class=type(parser)
    )
    _add_perplexity(kinds)
    _add_passkey(kinds)
    _add_tasks(kinds)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=values.weights,
        default=PACKAGED_MODEL_NAMES[0],
        help="packaged model, directory or hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        type=values.variant,
        metavar="NAME",
        help="what to read with: stock, strategies, strategies with settings (dprope:threshold=0), or plans "
        f"(plan.json); default: {' '.join(EVALUATED_STRATEGIES)}",
    )
    length = parser.add_mutually_exclusive_group()
    add_length(length, "; default: 2")
    parser.add_argument(
        "--device",
        type=values.device,
        help="device of the model, e.g. cuda:0 (default: a GPU if there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        help="dtype of the model; auto keeps the one it was saved in (default: float32 on a CPU, else auto)",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="rope-dist-eval",
        metavar="DIR",
        help="folder for the record and the picture, made if missing (default: %(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="discard the record and begin anew")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chunk",
        type=values.whole(1),
        default=512,
        metavar="N",
        help="tokens a forward pass: changes memory and speed, not the result (default: %(default)s)",
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    parser.add_argument("--quick", action="store_true", help="make a small run: minutes on a CPU")


def _add_perplexity(kinds: Any) -> None:
    parser = kinds.add_parser(
        "perplexity",
        help="perplexity by position, and by sliding window",
        description="Perplexity of long texts: whole, by position, and within a sliding window (stride 256, as "
        "in the paper).",
        epilog="""examples:
  rope-dist eval perplexity --model ./my-model --text book.txt emma --lengths 8192 16384
  rope-dist eval perplexity --method sliding --lengths 4096 8192 --tokens 12288""",
    )
    _add_common(parser)
    parser.add_argument(
        "--text",
        nargs="+",
        type=values.corpus,
        default=[CORPUS_NAMES[0]],
        metavar="NAME",
        help=f"text files or corpora: {', '.join(CORPUS_NAMES)} (default: {CORPUS_NAMES[0]}, its language reference)",
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="install corpora that are missing, with npm or apt-get, for you alone",
    )
    parser.add_argument(
        "--lengths",
        type=values.tokens,
        nargs="+",
        metavar="TOKENS",
        help="window lengths; a text is read whole up to the longest (default: trained length and target)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        metavar="|".join(METHODS),
        help="how a text is read (default: whole); sliding reads every window anew and takes far longer",
    )
    parser.add_argument(
        "--stride",
        type=values.whole(1),
        default=256,
        metavar="N",
        help="stride of the sliding window (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=values.tokens,
        metavar="N",
        help="tokens of a text that the sliding window covers (default: the longest length and 16 strides)",
    )
    parser.add_argument(
        "--pieces",
        type=values.whole(1),
        default=1,
        metavar="N",
        help="consecutive pieces of every text that are read (default: %(default)s)",
    )
    parser.add_argument(
        "--bucket",
        type=values.whole(1),
        metavar="N",
        help="positions a column of the table, a multiple of 256 (default: by the length)",
    )
    _add_reading(parser)
    parser.set_defaults(run=_perplexity)


def _add_passkey(kinds: Any) -> None:
    parser = kinds.add_parser(
        "passkey",
        help="retrieval of a number hidden in a long text",
        description="Passkey retrieval: accuracy by length of the text and depth of the key.",
        epilog="""examples:
  rope-dist eval passkey --model ./my-model --factor 4 --trials 5
  rope-dist eval passkey --scoring decoys --lengths 12288 16384""",
    )
    _add_common(parser)
    parser.add_argument(
        "--lengths",
        type=values.tokens,
        nargs="+",
        metavar="TOKENS",
        help="lengths of the prompts (default: 0.5 and 1 times the trained length, 1 and 1.25 times the target)",
    )
    parser.add_argument(
        "--depths",
        type=values.share,
        nargs="+",
        metavar="SHARE",
        help=f"depths of the key in the text, from 0 to 1 (default: {' '.join(f'{d:g}' for d in DEPTHS)})",
    )
    parser.add_argument(
        "--trials", type=values.whole(1), metavar="N", help="keys a length and depth (default: 3)"
    )
    parser.add_argument(
        "--digits",
        type=values.whole(1),
        default=5,
        metavar="N",
        help="digits of a key (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the keys (default: %(default)s)")
    parser.add_argument(
        "--scoring",
        nargs="+",
        choices=SCORINGS,
        metavar="|".join(SCORINGS),
        help="generate: the key must begin the answer; decoys: it must be likelier than each of 9 others, "
        "without generation, for base models (default: generate)",
    )
    _add_reading(parser)
    parser.set_defaults(run=_passkey)


def _add_tasks(kinds: Any) -> None:
    parser = kinds.add_parser(
        "tasks",
        help="tasks of lm-evaluation-harness",
        description=f"Tasks of lm-evaluation-harness: {', '.join(TASK_SET_NAMES)} are the paper's; any name "
        "of lm-eval's works too, with @N for N examples shown (arc_challenge@25).",
        epilog="""examples:
  rope-dist eval tasks --model ./my-model --tasks longbench-e ruler open-llm --ruler-lengths 4096 8192
  rope-dist eval tasks --tasks my-task --include-path ./my-tasks""",
    )
    _add_common(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="sets of tasks, tasks, groups or tags to run",
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    parser.add_argument(
        "--shots",
        type=values.whole(0),
        metavar="N",
        help="examples shown, for tasks without an @N of their own",
    )
    parser.add_argument(
        "--limit",
        type=values.whole(1),
        metavar="N",
        help="run only the first N examples of a task, to try it",
    )
    parser.add_argument(
        "--batch-size", default="1", metavar="N", help="batch size, or auto (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=values.tokens,
        metavar="TOKENS",
        help="tokens after which a prompt is cut (default: the target)",
    )
    parser.add_argument(
        "--ruler-lengths",
        type=values.tokens,
        nargs="+",
        metavar="TOKENS",
        help="lengths of RULER's prompts (default: 4096)",
    )
    parser.add_argument("--chat-template", action="store_true", help="use the tokenizer's chat template")
    parser.set_defaults(run=_tasks)


def _load(parsed: argparse.Namespace) -> tuple[Any, Any, int, int]:
    """The model, its tokenizer, its trained length and the target."""
    import torch
    from transformers.utils import logging

    from ..evaluation import load_model
    from ..planning import pretrained_rope

    # Loading notes and length warnings would stand between the lines of a run.
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = parsed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(parsed.model, device, parsed.dtype)
    trained = pretrained_rope(model.config)[0].length
    return model, tokenizer, trained, _target(parsed, trained)


def _target(parsed: argparse.Namespace, trained: int) -> int:
    factor = 2.0 if parsed.factor is None else parsed.factor
    target = round(trained * factor) if parsed.target is None else parsed.target
    # Also where only the stock model is read, which no strategy refuses.
    if target < trained:
        raise ValueError(f"the target length {target} is below the trained length {trained}")
    return target


def _record(parsed: argparse.Namespace, kind: str, model: Any) -> Any:
    from ..evaluation import Record, describe

    folder = Path(parsed.output)
    folder.mkdir(parents=True, exist_ok=True)
    return Record(folder / f"{kind}.json", kind, describe(model, parsed.model), restart=parsed.restart)


def _names(parsed: argparse.Namespace) -> tuple[str, ...]:
    return tuple(parsed.strategies or (QUICK_STRATEGIES if parsed.quick else EVALUATED_STRATEGIES))


def _collect(measurements: Any, say: Any) -> list[dict[str, Any]]:
    found = []
    for variant, measurement, finished in measurements:
        seconds = measurement["result"]["seconds"]
        print(f"{variant.label}: {say(measurement)} ({'on record' if finished else f'{seconds:.0f} s'})")
        sys.stdout.flush()
        found.append(measurement)
    return found


def _picture(parsed: argparse.Namespace, name: str) -> Path | None:
    """Where the picture goes; what draws it is missed before the run, not after it."""
    from ..optional import require

    if parsed.no_plot:
        return None
    require("matplotlib", "plot", "a picture (--no-plot does without)")
    return Path(parsed.output) / name


def _end(parsed: argparse.Namespace, table: str, record: Any, picture: Path | None) -> None:
    print(f"\n{table}\n\nwrote {record.path}{f' and {picture}' if picture else ''}")


def _perplexity(parsed: argparse.Namespace) -> None:
    from ..evaluation import install_corpus, make_variants, measure_perplexity, passages, perplexity_tables
    from ..evaluation.tables import average_perplexity, bucket_width, check_width, curves
    from ..plots import plot_perplexity

    picture = _picture(parsed, "perplexity.png")
    for name in parsed.text if parsed.install else ():
        install_corpus(name)
    model, tokenizer, trained, target = _load(parsed)
    methods = parsed.method or ["whole"]
    lengths, strides = parsed.lengths or sorted({trained, target}), 16
    if parsed.quick:
        # Windows that are each read anew are quick only if they are short.
        lengths = parsed.lengths or [trained // 8 if "sliding" in methods else trained * 5 // 4]
        strides = 4
    width = bucket_width(max(lengths)) if parsed.bucket is None else check_width(parsed.bucket)
    tokens = max(lengths)
    if "sliding" in methods:
        tokens = tokens + strides * parsed.stride if parsed.tokens is None else parsed.tokens
    read = passages(tokenizer, parsed.text, tokens, parsed.pieces)
    variants = make_variants(model, _names(parsed), target)
    record = _record(parsed, "perplexity", model)
    measurements = _collect(
        measure_perplexity(
            model,
            read,
            variants,
            record,
            lengths=lengths,
            methods=methods,
            stride=parsed.stride,
            chunk=parsed.chunk,
            progress=True,
        ),
        lambda m: (
            f"{m['what']['text']}, {m['what']['method']} {m['what'].get('length', m['what']['tokens'])}: "
            f"perplexity {average_perplexity([m['result']]):.2f}"
        ),
    )
    if "whole" not in methods:
        picture = None
    if picture:
        title = ", ".join(dict.fromkeys(p.text for p in read))
        plot_perplexity(curves(measurements, width), trained, f"{title}: perplexity by position", picture)
    _end(parsed, perplexity_tables(measurements, trained, width), record, picture)


def _passkey(parsed: argparse.Namespace) -> None:
    from ..evaluation import make_cases, make_variants, measure_passkey, passkey_tables
    from ..evaluation.tables import grids
    from ..plots import plot_passkey

    picture = _picture(parsed, "passkey.png")
    model, tokenizer, trained, target = _load(parsed)
    usual = sorted({trained // 2, trained, target, target * 5 // 4})
    lengths = parsed.lengths or ([trained // 8, trained * 5 // 4] if parsed.quick else usual)
    cases = make_cases(
        lengths,
        parsed.depths or ((0.25, 0.75) if parsed.quick else DEPTHS),
        trials=(1 if parsed.quick else 3) if parsed.trials is None else parsed.trials,
        digits=parsed.digits,
        seed=parsed.seed,
    )
    scorings = parsed.scoring or (["generate", "decoys"] if parsed.quick else ["generate"])
    variants = make_variants(model, _names(parsed), target)
    record = _record(parsed, "passkey", model)
    measurements = _collect(
        measure_passkey(
            model,
            tokenizer,
            cases,
            variants,
            record,
            scorings=scorings,
            chunk=parsed.chunk,
            progress=True,
        ),
        lambda m: (
            f"{m['what']['length']} tokens, depth {m['what']['depth']:g}, key {m['what']['key']}: "
            f"{'right' if m['result']['correct'] else 'wrong'} by {m['what']['scoring']}"
        ),
    )
    if picture:
        title = f"passkey retrieval, {parsed.digits} digits (* past the trained length)"
        plot_passkey(grids(measurements), trained, title, picture)
    _end(parsed, passkey_tables(measurements, trained), record, picture)


def _tasks(parsed: argparse.Namespace) -> None:
    from ..evaluation import make_variants, measure_tasks, resolve_tasks, tasks_table
    from ..optional import require

    require("lm_eval", "tasks", "running tasks")
    tasks = resolve_tasks(parsed.tasks, parsed.shots)
    if parsed.include_path and not Path(parsed.include_path).is_dir():
        raise ValueError(f"--include-path {parsed.include_path} is not a folder")
    model, tokenizer, _, target = _load(parsed)
    variants = make_variants(model, parsed.strategies or EVALUATED_STRATEGIES, target)
    record = _record(parsed, "tasks", model)
    measurements = _collect(
        measure_tasks(
            model,
            tokenizer,
            tasks,
            variants,
            record,
            include_path=parsed.include_path,
            limit=parsed.limit,
            batch_size=parsed.batch_size,
            max_length=target if parsed.max_length is None else parsed.max_length,
            ruler_lengths=parsed.ruler_lengths,
            chat_template=parsed.chat_template,
        ),
        lambda m: f"{m['what']['task']} done",
    )
    _end(parsed, tasks_table(measurements), record, None)
