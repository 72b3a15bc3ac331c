"""The tables of the study of strategies and of the tuning: perplexities, and paired differences with their errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.quality.parts import BASELINE, PARTS, STRATEGIES, TEXTS, windowed
from benchmarks.quality.readings import Readings, load, only_newest, path_of, readings, trained_length
from benchmarks.tables import markdown
from rope_dist.evaluation.paired import percent
from rope_dist.evaluation.perplexity import WIDTH
from rope_dist.evaluation.variants import STOCK

SCALES = tuple(sorted({part.scale for part in PARTS}))
KINDS = {
    "perplexity": "SmolLM2-135M",
    "perplexity_small": "A small LLaMA",
    "perplexity_small_2": "Another small LLaMA",
}
"""Record of a model -> its title."""
WINDOW_KINDS = KINDS | {"perplexity_float32": KINDS["perplexity"]}
"""Records of windows: on a CPU without bfloat16 products float32 is faster."""


def names(found: Readings) -> list[str]:
    """Labels that share a text with the baseline, by their losses past the trained length."""
    labels = [label for label in found.losses if found.both(label, BASELINE)]
    against = {
        label: found.difference(label, BASELINE, found.both(label, BASELINE), *found.past) for label in labels
    }
    return sorted(labels, key=against.__getitem__)


def strategies_table(found: Readings, against: str = BASELINE) -> str:
    """A row a strategy: perplexity below and past the trained length, differences from ``against``, texts."""
    rows, several = [], len(found.losses[against]) > 1
    for label in names(found):
        texts = found.both(label, against)
        cells = [f"{found.perplexity(label, texts, *span):.2f}" for span in (found.below, found.past)]
        for span in (found.below, found.past):
            cells.append("" if label == against else percent(*found.difference(label, against, texts, *span)))
        rows.append([label, *cells, *[str(len(texts))] * several])
    below, past = f"below {found.trained}", f"past {found.trained}"
    heads = ["", below, past, f"{below}, against {against}", f"{past}, against {against}"]
    return markdown(rows, heads + ["texts"] * several)


def texts_table(found: Readings, against: str = BASELINE) -> str:
    """A row a strategy, a column a text: differences from ``against`` past the trained length."""
    texts = list(found.losses.get(against, {}))
    rows = []
    for label in names(found):
        read = found.both(label, against)
        if label != against:
            cells = [
                percent(*found.difference(label, against, [text], *found.past)) if text in read else ""
                for text in texts
            ]
            rows.append([label, *cells])
    return markdown(rows, ["", *texts])


def positions_table(found: Readings, against: str = BASELINE, columns: int = 4) -> str:
    """A row a label, a column a range of positions: differences from ``against``."""
    step = max(found.tokens // columns // found.width, 1) * found.width
    spans = [(at, min(at + step, found.tokens)) for at in range(0, found.tokens, step)]
    rows = []
    for label in names(found):
        texts = found.both(label, against)
        if label != against:
            rows.append(
                [label, *(percent(*found.difference(label, against, texts, *span)) for span in spans)]
            )
    return markdown(rows, ["", *(f"{start}-{end}" for start, end in spans)])


def where_others_lead(found: Readings, label: str = BASELINE) -> str:
    """A sentence: against how many strategies and texts ``label`` is ahead past the trained length, and where not.

    Ahead and behind are more than one standard error of the paired difference.
    """
    ahead, within, behind = 0, [], []
    for other in (name for name in names(found) if name not in (label, STOCK)):
        for text in found.both(other, label):
            mean, error = found.difference(other, label, [text], *found.past)
            place = f"{other} on {text} ({percent(mean, error)})"
            if mean > error:
                ahead += 1
            elif mean < -error:
                behind.append(place)
            else:
                within.append(place)
    total = ahead + len(within) + len(behind)
    if not total:
        return ""
    sentence = (
        f"Past {found.trained}, text by text, `{label}` is ahead of the other extensions by more than one standard "
        f"error in {ahead} of {total} comparisons, within one in {len(within)}, behind by more in {len(behind)}"
    )
    return f"{sentence}: {'; '.join(behind)}." if behind else f"{sentence}."


def in_the_mean(found: Readings, label: str = BASELINE) -> str:
    """A sentence: which strategies are not behind ``label`` past the trained length by more than one error."""
    level, ahead = [], []
    for other in (name for name in names(found) if name not in (label, STOCK)):
        mean, error = found.difference(other, label, found.both(other, label), *found.past)
        if mean < -error:
            ahead.append(f"{other} ({percent(mean, error)})")
        elif mean <= error:
            level.append(f"{other} ({percent(mean, error)})")
    parts = [f"ahead of `{label}` by more than one standard error: {', '.join(ahead) or 'none'}"]
    if level:
        parts.append(f"within one: {', '.join(level)}")
    return f"In the mean of the texts that both have read, past {found.trained}, {'; '.join(parts)}."


def read_of(found: Readings) -> str:
    """What the baseline has read, in words: tokens and texts."""
    texts = found.losses[BASELINE]
    passages = len(next(iter(texts.values())))
    of = f"{passages} passages of" if passages > 1 else "The first"
    return f"{of} {found.tokens} tokens of {'; '.join(texts)}"


def of_model(record: dict[str, Any], title: str) -> list[str]:
    """The section of a model: of each scale the tables and sentences."""
    trained = trained_length(record)
    parts = [f"### {title}, trained to {trained} tokens"]
    for scale in SCALES:
        found = readings(record, int(scale * trained), STRATEGIES)
        if BASELINE not in found.losses or len(found.losses) < 2:
            continue
        parts += [
            f"#### {scale:g}x: {found.tokens} tokens",
            f"{read_of(found)}; every plan is for {found.tokens} tokens. Errors are over parts of "
            f"{found.width} positions.",
            strategies_table(found),
            in_the_mean(found),
            "Text by text, past the trained length:",
            texts_table(found),
            where_others_lead(found),
        ]
    model = record["model"]
    parts.append(
        f"`python -m benchmarks.quality.study`: {model['name']}, {model['dtype']}, without training."
    )
    return parts


def strategies(folder: Path) -> tuple[str, str]:
    """The tables of docs/quality.md, of every model that has a record, and the machines that measured them."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    for kind, title in KINDS.items():
        if path_of(folder, kind).exists():
            record = load(folder, kind)
            parts += of_model(record, title)
            machines |= dict.fromkeys(map(machine_of, record["machines"]))
    return "\n\n".join(filter(None, parts)), "; ".join(machines)


def block(folder: Path, against: str = "yarn") -> tuple[str, str]:
    """Differences from YaRN past the trained length of SmolLM2, a column a scale."""
    record = load(folder, "perplexity")
    trained = trained_length(record)
    at = {scale: readings(record, int(scale * trained), STRATEGIES) for scale in SCALES}
    at = {scale: found for scale, found in at.items() if found.losses.get(against)}
    cells: dict[str, dict[float, str]] = {}
    order: dict[str, tuple[float, float]] = {}
    counts = {scale: len(found.losses[against]) for scale, found in at.items()}
    for scale, found in at.items():
        # Only those that have read all texts can be compared down a column.
        for label, (mean, error) in _of_all_texts(found, against).items():
            cells.setdefault(label, {})[scale] = percent(mean, error)
            order[label] = min(order.get(label, (9.0, 0.0)), (abs(scale - 2), mean))
    rows = [
        [label, *(cells[label].get(scale, "") for scale in at)]
        for label in sorted(cells, key=order.__getitem__)
    ]
    table = markdown(rows, [f"perplexity past {trained}", *(f"{scale:g}x" for scale in at)])
    read = ", ".join(f"{counts[scale]} at {scale:g}x" for scale in at)
    model = record["model"]
    note = (
        f"Against `{against}`, with standard errors of the paired difference; number of texts: {read}. "
        f"{model['name']}, {model['dtype']}, without training, by `python -m benchmarks.quality.study`."
    )
    machines = dict.fromkeys(map(machine_of, record["machines"]))
    return f"{table}\n\n{note}", "; ".join(machines)


Cells = dict[str, dict[str, tuple[float, float]]]
"""By label, then by the name of a column: a mean difference and its standard error."""


def _of_all_texts(found: Readings, against: str) -> dict[str, tuple[float, float]]:
    """By label the difference past the trained length, of those that have read every text of ``against``."""
    read = {label: found.both(label, against) for label in found.losses if label != against}
    return {
        label: found.difference(label, against, texts, *found.past)
        for label, texts in read.items()
        if len(texts) == len(found.losses[against])
    }


def _against_baseline(folder: Path) -> tuple[dict[str, Readings], Cells]:
    """Readings of every model at 2x and 4x by the name of their column, and differences past the trained length."""
    columns: dict[str, Readings] = {}
    for kind, title in KINDS.items():
        if path_of(folder, kind).exists():
            record = load(folder, kind)
            for scale in (2, 4):
                found = readings(record, scale * trained_length(record), STRATEGIES)
                if BASELINE in found.losses and len(found.losses) > 1:
                    columns[f"{title}, {scale}x"] = found
    cells: Cells = {}
    for head, found in columns.items():
        for label, difference in _of_all_texts(found, BASELINE).items():
            cells.setdefault(label, {})[head] = difference
    return columns, cells


def every_model(folder: Path) -> tuple[str, str]:
    """Differences from the baseline, a column a model and scale, in the order of the largest.

    Nothing without a record.
    """
    columns, cells = _against_baseline(folder)
    if not cells:
        return "", ""
    rows = [
        [label, *(percent(*cells[label][head]) if head in cells[label] else "" for head in columns)]
        for label in sorted(cells, key=lambda label: max(mean for mean, _ in cells[label].values()))
    ]
    table = markdown(rows, [f"against {BASELINE}", *columns])
    read = "; ".join(f"{head}: {len(found.losses[BASELINE])}" for head, found in columns.items())
    others = [
        f"{label} on {head} ({percent(*cells[label][head])})"
        for label, head in _compared(cells)
        if not _ahead(*cells[label][head])
    ]
    but = f"; not of {', '.join(others)}" if others else ""
    return (
        f"{table}\n\n`{BASELINE}` is ahead of the other extensions by more than one standard error in "
        f"{_lead(cells)} comparisons{but}. Number of texts: {read}."
    ), ""


def lead(folder: Path) -> str:
    """In how many cells of :func:`every_model` the baseline is ahead of an extension, "N of M"."""
    return _lead(_against_baseline(folder)[1])


def _lead(cells: Cells) -> str:
    compared = _compared(cells)
    return f"{sum(_ahead(*cells[label][head]) for label, head in compared)} of {len(compared)}"


def _compared(cells: Cells) -> list[tuple[str, str]]:
    return [(label, head) for label in cells if label != STOCK for head in cells[label]]


def _ahead(mean: float, error: float) -> bool:
    """Whether the baseline is ahead of a strategy with this difference."""
    return mean > error


def auto_yarn(folder: Path) -> tuple[str, str]:
    """A sentence: ``auto-yarn`` beside ``auto`` and YaRN past the trained length of SmolLM2."""
    record, parts = load(folder, "perplexity"), []
    for scale in SCALES:
        found = readings(record, int(scale * trained_length(record)))
        both = {other: found.both("auto-yarn", other) for other in (BASELINE, "yarn")}
        if all(both.values()):
            of = {
                other: percent(*found.difference("auto-yarn", other, texts, *found.past))
                for other, texts in both.items()
            }
            texts = len(both[BASELINE])
            parts.append(
                f"at {scale:g}x {of[BASELINE]} against `auto` and {of['yarn']} against `yarn` ({texts} texts)"
            )
    return (
        f"Perplexity of `auto-yarn` on SmolLM2-135M, past the trained length and without training: {'; '.join(parts)}."
    ), ""


def windows(folder: Path) -> tuple[str, str]:
    """Windows of trained frequencies beside the baseline, a table a scale; nothing while there is no reading by one."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    for kind in filter(lambda kind: path_of(folder, kind).exists(), WINDOW_KINDS):
        record = load(folder, kind)
        model, trained = record["model"], trained_length(record)
        for scale in SCALES:
            found = readings(record, int(scale * trained), (BASELINE, *windowed(trained)))
            if BASELINE in found.losses and len(found.losses) > 1:
                parts += [
                    f"### {WINDOW_KINDS[kind]}, {scale:g}x: {found.tokens} tokens",
                    f"{read_of(found)}; far plans are for {found.tokens} tokens. {model['dtype']}.",
                    strategies_table(found),
                    "By position, against the single plan:",
                    positions_table(found),
                ]
                machines |= dict.fromkeys(map(machine_of, record["machines"]))
    if not parts:
        return "", ""
    title = "## Exact near, extended far: a window"
    return "\n\n".join([title, *parts, "`python -m benchmarks.quality.study`, without training."]), "; ".join(
        machines
    )


_LONGPPL = f"rope-dist eval longppl --text {' '.join(TEXTS)} --pieces 32 --target N --lengths N"


def longppl(folder: Path) -> tuple[str, str]:
    """LongPPL of every model, a table a length; nothing while there is no record of it."""

    def tables(record: dict[str, Any]) -> list[str]:
        from rope_dist.evaluation.long_context_tables import longppl_tables

        measurements, trained = only_newest(record["measurements"]), trained_length(record)
        lengths = sorted({m["what"]["tokens"] for m in measurements})
        by_length = {n: [m for m in measurements if m["what"]["tokens"] == n] for n in lengths}
        return [longppl_tables(of, trained, max(n // 4, WIDTH), BASELINE) for n, of in by_length.items()]

    title = (
        "LongPPL: perplexity of the tokens that need a long context",
        "The trained model, in windows of its trained length, predicts these tokens much better from a long context "
        "than from a short one ([evaluation.md](evaluation.md#longppl)).",
    )
    study = "python -m benchmarks.quality.study_longppl"
    of = {
        "longppl": (study, KINDS["perplexity"]),
        "longppl_float32": (study, KINDS["perplexity"]),
        "longppl_small": (_LONGPPL, KINDS["perplexity_small_2"]),
    }
    return _if_measured(folder, of, title, tables)


def synthetic(folder: Path) -> tuple[str, str]:
    """Needles and other synthetic tasks of SmolLM2; nothing while there is no record of them."""

    def tables(record: dict[str, Any]) -> list[str]:
        from rope_dist.evaluation.long_context_tables import synthetic_tables

        measurements = only_newest(record["measurements"], "length")
        return [synthetic_tables(measurements, trained_length(record), BASELINE)]

    title = (
        "Needles and other synthetic tasks",
        "Tasks: [evaluation.md](evaluation.md#synthetic-tasks). Chance among decoys is 10 %. What the trained model "
        "finds within its trained length (`stock`) is what an extension could keep.",
    )
    return _if_measured(
        folder, {"synthetic": ("rope-dist eval synthetic", KINDS["perplexity"])}, title, tables
    )


def _if_measured(
    folder: Path,
    kinds: dict[str, tuple[str, str]],
    title: tuple[str, str],
    tables: Callable[[dict[str, Any]], list[str]],
) -> tuple[str, str]:
    """A section of the records that exist, with its title and first sentences, which are left out if none does.

    ``kinds`` has for each the command that measures it, and its model.
    """
    parts: list[str] = []
    machines: dict[str, None] = {}
    for kind in filter(lambda kind: path_of(folder, kind).exists(), kinds):
        record, (command, model) = load(folder, kind), kinds[kind]
        parts.append(f"{model}:")
        parts += [f"```text\n{table}\n```" for table in tables(record)]
        parts.append(f"`{command}`: {record['model']['dtype']}, without training.")
        machines |= dict.fromkeys(map(machine_of, record["machines"]))
    return "\n\n".join([f"## {title[0]}", title[1], *parts] if parts else parts), "; ".join(machines)


def tuning(folder: Path) -> tuple[str, str]:
    """The tables of what the constants of ``auto`` were chosen on, and the machines."""
    parts: list[str] = []
    machines: dict[str, None] = {}
    for kind in ("tuning", "tuning_small"):
        if kind != "tuning" and not path_of(folder, kind).exists():
            continue
        record = load(folder, kind)
        model, trained, width = record["model"], trained_length(record), WIDTH
        for scale in (2, 4):
            found = readings(record, scale * trained)
            for text, passages in found.losses.get(BASELINE, {}).items():
                of = f"{len(passages)} passages of" if len(passages) > 1 else "the first"
                parts += [f"{model['name']}, {text}, {of} {found.tokens} tokens:", strategies_table(found)]
                width = found.width
        machines |= dict.fromkeys(map(machine_of, record["machines"]))
        parts.append(f"{model['name']}: {model['dtype']}; errors are over parts of {width} positions.")
    parts.append("`python -m benchmarks.quality.tuning`.")
    return "\n\n".join(parts), "; ".join(machines)
