"""``rope-dist eval``: what a model and its extensions read, find and answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from .. import defaults
from . import options, values
from .options import choice, flag, option
from .runner import Command, make_app, quieten

Strategies = Annotated[
    list[str] | None,
    option(
        values.variant,
        "NAME...",
        f"stock, strategies, with settings (dprope:threshold=0), growing with the text (auto+dynamic), for distances "
        f"beyond a window (auto+window=1024, grouped+window=1024), or plans "
        f"(plan.json); default: "
        f"{' '.join(defaults.EVALUATED_STRATEGIES)}.",
    ),
]
Output = Annotated[str, option(str, "DIR", "Folder for the record and the plot.", "-o", "--output")]
Restart = Annotated[bool, flag("--restart", "Discard the record of earlier runs.")]
Bucket = Annotated[int | None, option(values.whole(1), "N", "Positions per table column, a multiple of 256.")]
Pieces = Annotated[int, option(values.whole(1), "N", "Consecutive pieces of every text.")]
Install = Annotated[bool, flag("--install", "Install missing corpora for this user (npm, apt-get, pip).")]
Chunk = Annotated[int, option(values.whole(1), "N", "Tokens per forward pass (less memory, same result).")]
NoPlot = Annotated[bool, flag("--no-plot", "Skip the plot.")]
Against = Annotated[
    str | None,
    option(
        str, "NAME", "Strategy that the others are compared with, by the same tokens (default: the first)."
    ),
]
Quick = Annotated[bool, flag("--quick", "Small run: minutes on a CPU.")]
MODEL, OUTPUT = defaults.PACKAGED_MODEL_NAMES[0], "rope-dist-eval"

app = make_app()


@app.callback()
def _eval() -> None:
    """Evaluate perplexity, LongPPL, passkey retrieval, synthetic tasks and lm-eval's.

    The same command resumes an interrupted run: finished measurements are kept in a JSON file in the output folder.

    \b
    Examples:
      rope-dist eval perplexity --model ./my-model --text book.txt --factor 2
      rope-dist eval longppl --quick
      rope-dist eval synthetic --lengths 8192 16384
      rope-dist eval tasks --model ./my-model --tasks longbench-e ruler
    """


@app.command("perplexity", cls=Command)
def _perplexity(
    model: options.Weights = MODEL,
    strategies: Strategies = None,
    target: options.Target = None,
    factor: options.Factor = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    output: Output = OUTPUT,
    restart: Restart = False,
    text: options.Texts = options.DEFAULT_TEXTS,
    install: Install = False,
    lengths: Annotated[
        list[int] | None,
        option(values.tokens, "TOKENS...", "Window lengths (default: trained length, target)."),
    ] = None,
    method: Annotated[
        list[str] | None,
        choice(defaults.METHODS, "Whole texts, or sliding windows, which are slow (default: whole).", "..."),
    ] = None,
    stride: Annotated[int, option(values.whole(1), "N", "Stride of the sliding window.")] = 256,
    tokens: Annotated[
        int | None,
        option(
            values.tokens, "N", "Tokens that sliding windows cover (default: longest length + 16 strides)."
        ),
    ] = None,
    pieces: Pieces = 1,
    bucket: Bucket = None,
    against: Against = None,
    chunk: Chunk = 512,
    no_plot: NoPlot = False,
    quick: Quick = False,
) -> None:
    """Perplexity of long texts by position or sliding window.

    \b
    Examples:
      rope-dist eval perplexity --model ./my-model --text book.txt emma --lengths 8192 16384
      rope-dist eval perplexity --method sliding --lengths 4096 8192 --tokens 12288
    """
    options.at_most_one(target=target, factor=factor)

    from ..evaluation import install_corpus, make_variants, measure_perplexity, passages, perplexity_tables
    from ..evaluation.tables import average_perplexity, bucket_width, check_width, compared_with, curves
    from ..plots import plot_perplexity

    plot = _plot_path(output, "perplexity.png", no_plot)
    for name in text if install else ():
        install_corpus(name)
    loaded, tokenizer, trained, target = _load(model, device, dtype, target, factor)
    methods = method or ["whole"]
    sliding, strides = "sliding" in methods, 4 if quick else 16
    if not lengths:
        lengths = sorted({trained, target})
        if quick:
            # Sliding windows are quick only if they are short.
            lengths = [trained // 8 if sliding else trained * 5 // 4]
    width = bucket_width(max(lengths)) if bucket is None else check_width(bucket)
    needed = max(lengths)
    if sliding:
        needed = needed + strides * stride if tokens is None else tokens
    texts = passages(tokenizer, text, needed, pieces)
    variants = make_variants(loaded, _names(strategies, quick), target)
    compared_with([variant.label for variant in variants], against)
    record = _record(output, "perplexity", loaded, model, restart)
    measurements = _collect(
        measure_perplexity(
            loaded,
            texts,
            variants,
            record,
            lengths=lengths,
            methods=methods,
            stride=stride,
            chunk=chunk,
            progress=True,
        ),
        lambda m: (
            f"{m['what']['text']}, {m['what']['method']} {m['what'].get('length', m['what']['tokens'])}: "
            f"perplexity {average_perplexity([m['result']]):.2f}"
        ),
    )
    if "whole" not in methods:
        plot = None
    if plot:
        title = ", ".join(dict.fromkeys(passage.text for passage in texts))
        plot_perplexity(curves(measurements, width), trained, f"{title}: perplexity by position", plot)
    _finish(perplexity_tables(measurements, trained, width, against), record, plot)


@app.command("passkey", cls=Command)
def _passkey(
    model: options.Weights = MODEL,
    strategies: Strategies = None,
    target: options.Target = None,
    factor: options.Factor = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    output: Output = OUTPUT,
    restart: Restart = False,
    lengths: Annotated[
        list[int] | None,
        option(
            values.tokens,
            "TOKENS...",
            "Prompt lengths (default: 0.5 and 1 x trained length, 1 and 1.25 x target).",
        ),
    ] = None,
    depths: Annotated[
        list[float] | None,
        option(
            values.share,
            "SHARE...",
            f"Depths of the key, 0 to 1 (default: {' '.join(f'{d:g}' for d in defaults.DEPTHS)}).",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        option(
            values.whole(1),
            "N",
            f"Keys per length and depth (default: as many as make {defaults.COMPARED_PROMPTS} prompts a length).",
        ),
    ] = None,
    digits: Annotated[int, option(values.whole(1), "N", "Digits of a key.")] = 5,
    seed: Annotated[int, option(values.seed, "N", "Seed of the keys.")] = 0,
    scoring: Annotated[
        list[str] | None,
        choice(
            defaults.SCORINGS,
            "generate: the answer begins with the key; decoys: the key is likelier than each of 9 others, for base "
            "models (default: generate).",
            "...",
        ),
    ] = None,
    chunk: Chunk = 512,
    no_plot: NoPlot = False,
    quick: Quick = False,
) -> None:
    """Passkey accuracy by prompt length and depth of the key.

    \b
    Examples:
      rope-dist eval passkey --model ./my-model --factor 4 --trials 5
      rope-dist eval passkey --scoring decoys --lengths 12288 16384
    """
    options.at_most_one(target=target, factor=factor)

    from ..evaluation import make_cases, make_variants, measure_passkey, passkey_tables
    from ..evaluation.tables import grids
    from ..plots import plot_passkey

    plot = _plot_path(output, "passkey.png", no_plot)
    loaded, tokenizer, trained, target = _load(model, device, dtype, target, factor)
    usual = [trained // 8, trained * 5 // 4] if quick else {trained // 2, trained, target, target * 5 // 4}
    depths = depths or ([0.25, 0.75] if quick else list(defaults.DEPTHS))
    cases = make_cases(
        lengths or sorted(usual),
        depths,
        trials=trials or (1 if quick else -(-defaults.COMPARED_PROMPTS // len(depths))),
        digits=digits,
        seed=seed,
    )
    variants = make_variants(loaded, _names(strategies, quick), target)
    record = _record(output, "passkey", loaded, model, restart)
    measurements = _collect(
        measure_passkey(
            loaded,
            tokenizer,
            cases,
            variants,
            record,
            scorings=scoring or (["generate", "decoys"] if quick else ["generate"]),
            chunk=chunk,
            progress=True,
        ),
        lambda m: (
            f"{m['what']['length']} tokens, depth {m['what']['depth']:g}, key {m['what']['key']}: "
            f"{'right' if m['result']['correct'] else 'wrong'} by {m['what']['scoring']}"
        ),
    )
    if plot:
        title = f"passkey retrieval, {digits} digits (* past the trained length)"
        plot_passkey(grids(measurements), trained, title, plot)
    _finish(passkey_tables(measurements, trained), record, plot)


@app.command("longppl", cls=Command)
def _longppl(
    model: options.Weights = MODEL,
    strategies: Strategies = None,
    target: options.Target = None,
    factor: options.Factor = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    output: Output = OUTPUT,
    restart: Restart = False,
    text: options.Texts = options.DEFAULT_TEXTS,
    install: Install = False,
    lengths: Annotated[
        list[int] | None,
        option(
            values.tokens, "TOKENS...", "The longest is read; it has every shorter one (default: target)."
        ),
    ] = None,
    pieces: Pieces = 1,
    evaluator: Annotated[
        str,
        option(values.variant, "NAME", "What finds the key tokens: stock, a strategy or a plan (plan.json)."),
    ] = "stock",
    window: Annotated[
        int | None,
        option(
            values.tokens, "TOKENS", "Its longest context (default: trained length; of a plan, its target)."
        ),
    ] = None,
    short: Annotated[
        int | None, option(values.tokens, "TOKENS", "Its short context (default: an eighth of the longest).")
    ] = None,
    alpha: Annotated[
        float, option(values.real(lambda x: x > 0, "above 0"), "NATS", "Least gain of a key token.")
    ] = 2.0,
    beta: Annotated[
        float, option(values.real(lambda x: x <= 0, "at most 0"), "NATS", "Least log-probability of one.")
    ] = -2.0,
    bucket: Bucket = None,
    against: Against = None,
    chunk: Chunk = 512,
    quick: Quick = False,
) -> None:
    """LongPPL: perplexity of the tokens that need a long context.

    Key tokens are found once, for all strategies alike; by default by the stock model in windows of its trained length.

    \b
    Examples:
      rope-dist eval longppl --model ./my-model --text book.txt --factor 2 --strategies stock yarn auto --against auto
      rope-dist eval longppl --quick
    """
    options.at_most_one(target=target, factor=factor)

    from ..evaluation import (
        install_corpus,
        longppl_tables,
        make_evaluator,
        make_variants,
        measure_longppl,
        passages,
    )
    from ..evaluation.tables import bucket_width, check_width, compared_with

    for name in text if install else ():
        install_corpus(name)
    loaded, tokenizer, trained, target = _load(model, device, dtype, target, factor)
    tokens = max(lengths) if lengths else trained * 5 // 4 if quick else target
    width = bucket_width(tokens) if bucket is None else check_width(bucket)
    texts = passages(tokenizer, text, tokens, pieces)
    variants = make_variants(loaded, _names(strategies, quick), target)
    compared_with([variant.label for variant in variants], against)
    (finder,) = make_variants(loaded, [evaluator], target)
    contexts = make_evaluator(loaded, finder, window=window, short=short, alpha=alpha, beta=beta)
    record = _record(output, "longppl", loaded, model, restart)
    measurements = _collect(
        measure_longppl(loaded, texts, variants, record, evaluator=contexts, chunk=chunk, progress=True),
        _describe_longppl,
    )
    _finish(longppl_tables(measurements, trained, width, against), record, None)


def _describe_longppl(measurement: dict[str, Any]) -> str:
    import statistics
    from math import exp

    what, result = measurement["what"], measurement["result"]
    text = f"{what['text']}, {what['tokens']} tokens"
    if what["measure"] == "key tokens":
        return f"{text}: {len(result['positions'])} key tokens"
    if not result["key_nll"]:
        return f"{text}: no key tokens"
    return f"{text}: LongPPL {exp(statistics.fmean(result['key_nll'])):.2f}"


@app.command("synthetic", cls=Command)
def _synthetic(
    model: options.Weights = MODEL,
    strategies: Strategies = None,
    target: options.Target = None,
    factor: options.Factor = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    output: Output = OUTPUT,
    restart: Restart = False,
    tasks: Annotated[
        list[str] | None, choice(defaults.SYNTHETIC_TASK_NAMES, "Tasks (default: all).", "...")
    ] = None,
    lengths: Annotated[
        list[int] | None,
        option(values.tokens, "TOKENS...", "Prompt lengths (default: 0.5 and 1 x trained length, target)."),
    ] = None,
    trials: Annotated[
        int | None,
        option(
            values.whole(1),
            "N",
            f"Questions per task and length, five or ten about one context (default: {defaults.COMPARED_PROMPTS}).",
        ),
    ] = None,
    text: options.Text = defaults.CORPUS_NAMES[0],
    install: Install = False,
    seed: Annotated[int, option(values.seed, "N", "Seed of keys, values and places.")] = 0,
    against: Against = None,
    chunk: Chunk = 512,
    quick: Quick = False,
) -> None:
    """Synthetic tasks in the manner of RULER, offline, for small and base models.

    Every question is answered by generation and among decoys; the log-probability of the right answer tells
    strategies apart where both are always right, or never. RULER itself is a task of rope-dist eval tasks.

    \b
    Examples:
      rope-dist eval synthetic --model ./my-model --factor 2 --tasks multi-key variables --lengths 8192 16384
      rope-dist eval synthetic --quick
    """
    options.at_most_one(target=target, factor=factor)

    from ..evaluation import (
        install_corpus,
        load_text,
        make_synthetic_cases,
        make_variants,
        measure_synthetic,
        synthetic_prompts,
        synthetic_tables,
    )
    from ..evaluation.tables import compared_with

    if install:
        install_corpus(text)
    title, content = load_text(text)
    loaded, tokenizer, trained, target = _load(model, device, dtype, target, factor)
    usual = {trained // 8, trained * 5 // 4} if quick else {trained // 2, trained, target}
    names = tasks or (defaults.QUICK_SYNTHETIC_TASKS if quick else defaults.SYNTHETIC_TASK_NAMES)
    trials = trials or (5 if quick else defaults.COMPARED_PROMPTS)
    cases = make_synthetic_cases(lengths or sorted(usual), names, trials=trials, seed=seed)
    prompts = synthetic_prompts(tokenizer, cases, title, content)
    variants = make_variants(loaded, _names(strategies, quick), target)
    compared_with([variant.label for variant in variants], against)
    record = _record(output, "synthetic", loaded, model, restart)
    measurements = _collect(
        measure_synthetic(loaded, tokenizer, prompts, variants, record, chunk=chunk, progress=True),
        lambda m: (
            f"{m['what']['task']}, {m['what']['length']} tokens, question {m['what']['trial'] + 1}: "
            f"{'right' if m['result']['generated'] else 'wrong'}, "
            f"{'right' if m['result']['decoys'] else 'wrong'} among decoys"
        ),
    )
    _finish(synthetic_tables(measurements, trained, against), record, None)


@app.command("tasks", cls=Command)
def _tasks(
    tasks: Annotated[list[str], option(str, "NAME...", "Task sets, tasks, groups or tags.")],
    model: options.Weights = MODEL,
    strategies: Strategies = None,
    target: options.Target = None,
    factor: options.Factor = None,
    device: options.Device = None,
    dtype: options.ModelDtype = None,
    output: Output = OUTPUT,
    restart: Restart = False,
    include_path: Annotated[str | None, option(str, "DIR", "Folder with your own task files.")] = None,
    shots: Annotated[
        int | None, option(values.whole(0), "N", "Few-shot examples (tasks without @N).")
    ] = None,
    limit: Annotated[int | None, option(values.whole(1), "N", "Run only N examples of a task.")] = None,
    batch_size: Annotated[str, option(str, "N", "Batch size, or auto.")] = "1",
    max_length: Annotated[
        int | None, option(values.tokens, "TOKENS", "Longest prompt (default: target).")
    ] = None,
    ruler_lengths: Annotated[
        list[int] | None, option(values.tokens, "TOKENS...", "RULER's prompts (default: 4096).")
    ] = None,
    chat_template: Annotated[bool, flag("--chat-template", "Use the tokenizer's chat template.")] = False,
) -> None:
    """Tasks of lm-evaluation-harness.

    The paper's are the sets longbench-e, ruler and open-llm; any task of lm-eval works, with @N for N few-shot
    examples (arc_challenge@25).

    \b
    Examples:
      rope-dist eval tasks --model ./my-model --tasks longbench-e ruler open-llm --ruler-lengths 4096 8192
      rope-dist eval tasks --tasks my-task --include-path ./my-tasks
    """
    options.at_most_one(target=target, factor=factor)

    from ..evaluation import make_variants, measure_tasks, resolve_tasks, tasks_table
    from ..optional import require

    require("lm_eval", "tasks", "running tasks")
    resolved = resolve_tasks(tasks, shots)
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path} is not a folder")
    loaded, tokenizer, _, target = _load(model, device, dtype, target, factor)
    variants = make_variants(loaded, strategies or defaults.EVALUATED_STRATEGIES, target)
    record = _record(output, "tasks", loaded, model, restart)
    measurements = _collect(
        measure_tasks(
            loaded,
            tokenizer,
            resolved,
            variants,
            record,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            max_length=target if max_length is None else max_length,
            ruler_lengths=ruler_lengths or None,
            chat_template=chat_template,
        ),
        lambda m: f"{m['what']['task']} done",
    )
    _finish(tasks_table(measurements), record, None)


def _load(
    name: str, device: str | None, dtype: str | None, target: int | None, factor: float | None
) -> tuple[Any, Any, int, int]:
    """The model, its tokenizer, its trained length and the target."""
    import torch

    from ..evaluation import load_model
    from ..planning import pretrained_rope

    quieten()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(name, device, dtype)
    trained = pretrained_rope(model.config)[0].length
    target = round(trained * (factor or 2.0)) if target is None else target
    # Also where only the stock model is evaluated, which no strategy refuses.
    if target < trained:
        raise ValueError(f"the target length {target} is below the trained length {trained}")
    return model, tokenizer, trained, target


def _record(output: str, kind: str, model: Any, name: str, restart: bool) -> Any:
    from ..evaluation import Record, describe

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return Record(folder / f"{kind}.json", kind, describe(model, name), restart=restart)


def _names(strategies: list[str] | None, quick: bool) -> tuple[str, ...]:
    return tuple(strategies or (defaults.QUICK_STRATEGIES if quick else defaults.EVALUATED_STRATEGIES))


def _collect(measurements: Iterable[Any], describe: Callable[[Any], str]) -> list[dict[str, Any]]:
    found = []
    for variant, measurement, finished in measurements:
        time = "on record" if finished else f"{measurement['result']['seconds']:.0f} s"
        print(f"{variant.label}: {describe(measurement)} ({time})", flush=True)
        found.append(measurement)
    return found


def _plot_path(output: str, name: str, no_plot: bool) -> Path | None:
    """Where the plot goes; a missing matplotlib is noticed before the run, not after it."""
    from ..optional import require

    if no_plot:
        return None
    require("matplotlib", "plot", "a plot (--no-plot does without)")
    return Path(output) / name


def _finish(table: str, record: Any, plot: Path | None) -> None:
    print(f"\n{table}\n\nwrote {record.path}{f' and {plot}' if plot else ''}")
