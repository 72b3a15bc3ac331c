"""Tables of the study of growing texts: perplexity by position, and paired differences with their standard errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.benchmark import machine_of
from benchmarks.quality.answers import answers_table, passkey_answers
from benchmarks.quality.growth import GROWN, RATIOS, STALE, STRATEGY
from benchmarks.quality.growth_passkeys import DEPTHS, TRIALS
from benchmarks.quality.parts import TRAINED
from benchmarks.quality.readings import Losses, load, newest, perplexity, span
from benchmarks.quality.study import SEED
from benchmarks.tables import markdown
from rope_dist.dynamic import ladder
from rope_dist.evaluation.paired import paired_difference, percent
from rope_dist.evaluation.variants import STOCK

NAMES = {
    STOCK: STOCK,
    **{f"{STRATEGY} for {n * TRAINED}": f"static, for {n * TRAINED}" for n in (4, 2)},
    GROWN: "dynamic",
}
"""Label of a variant -> its row of a table."""
Readings = dict[str, dict[str, Losses]]
"""By label, then by text."""


def readings(folder: Path, tokens: int) -> Readings:
    """Readings of ``tokens``: stock and static plans for whole texts, dynamic plans for growing ones."""
    found: Readings = {}
    compared = stages(load(folder, "growth"))
    for kind in ("perplexity", "growth"):
        record = load(folder, kind)
        current = newest(record["measurements"])
        for m in record["measurements"]:
            what, label = m["what"], m["what"]["variant"]
            if what["tokens"] != tokens:
                continue
            plan = record["plans"].get(what["frequencies"], {})
            if label == STRATEGY or label.startswith(f"{STRATEGY} for "):
                label = f"{STRATEGY} for {plan['target_length']}"
                if _rotation(plan) not in compared:
                    continue
            elif what["frequencies"] != current[label, tokens]:
                continue
            found.setdefault(label, {})[what["text"]] = [m["result"]["nll_by_position"]]
    return found


def stages(record: dict[str, Any]) -> set[tuple[float, ...]]:
    """What the newest dynamic plans rotate by. A static plan of the same name may have been made by other constants."""
    current = {
        frequencies
        for (label, _), frequencies in newest(record["measurements"]).items()
        if label.startswith(GROWN)
    }
    plans = (record["plans"].get(frequencies, {}) for frequencies in current)
    return {_rotation(stage) for plan in plans for stage in plan.get("stages", ())}


def _rotation(plan: dict[str, Any]) -> tuple[float, ...]:
    return plan["attention_scaling"], *plan["factors"]


def stage_of(tokens: int) -> int:
    """Length of the stage that reads ``tokens`` by a dynamic plan to 4x."""
    return next(length for length in (TRAINED, *ladder(TRAINED, 4 * TRAINED)) if tokens <= length)


def difference(texts: Sequence[Losses], others: Sequence[Losses], start: int, end: int) -> str:
    """Perplexity at positions ``start`` to ``end`` against that of other readings of the same tokens."""
    return percent(*paired_difference(*(span(one, start, end) for one in (texts, others))))


def by_position(folder: Path, tokens: int, labels: dict[str, str], against: str) -> tuple[str, list[str]]:
    """A row a label, and the texts that all labels have read; empty where there are none.

    Args:
        labels: label of a reading -> what the row is called.
        against: label that the others are compared with.
    """
    found = readings(folder, tokens)
    if missing := labels.keys() - found.keys():
        return "", sorted(missing)
    texts = [text for text in found[against] if all(text in found[label] for label in labels)]
    if not texts:
        return "", []
    step = (tokens - TRAINED) // 4
    spans = [
        (0, TRAINED),
        *((start, start + step) for start in range(TRAINED, tokens, step)),
        (TRAINED, tokens),
    ]
    rows = []
    base = [found[against][text] for text in texts]
    for label, name in labels.items():
        own = [found[label][text] for text in texts]
        cells = [f"{perplexity(span(own, *at)):.2f}" for at in spans]
        compared = (
            [difference(own, base, *at) for at in (spans[0], spans[-1])] if label != against else ["", ""]
        )
        rows.append([name, *cells, *compared])
    heads = [f"{a / 1024:g}-{b / 1024:g}k" for a, b in spans]
    return markdown(rows, ["", *heads, f"below {TRAINED}", f"past {TRAINED}"]), texts


def whole_texts(folder: Path) -> tuple[str, list[str]]:
    """Whole texts of rising length: stock, the static plan for 4x, and the plan of the stage for that length."""
    lengths = [2048, 4096, TRAINED, 3 * TRAINED // 2, 2 * TRAINED, 3 * TRAINED, 4 * TRAINED]
    at = {tokens: readings(folder, tokens) for tokens in lengths[3:]}
    longest = f"{STRATEGY} for {4 * TRAINED}"
    reads = {tokens: stage_of(tokens) for tokens in lengths[3:]}
    needed = [at[tokens].get(f"{STRATEGY} for {stage}", {}) for tokens, stage in reads.items()]
    needed += [at[4 * TRAINED].get(label, {}) for label in (STOCK, longest)]
    texts = [text for text in needed[0] if all(text in one for one in needed)]
    if not texts:
        return "", []
    long = {label: [at[4 * TRAINED][label][text] for text in texts] for label in (STOCK, longest)}
    rows = []
    for tokens in lengths:
        dynamic = long[STOCK]
        if tokens > TRAINED:
            dynamic = [at[tokens][f"{STRATEGY} for {reads[tokens]}"][text] for text in texts]
        cells = [f"{perplexity(span(own, 0, tokens)):.2f}" for own in (long[STOCK], long[longest], dynamic)]
        compared = difference(dynamic, long[longest], 0, tokens) if tokens < 4 * TRAINED else "the same"
        rows.append([str(tokens), *cells, compared])
    heads = ["tokens", STOCK, f"static, for {4 * TRAINED}", "dynamic", "dynamic against static"]
    return markdown(rows, heads), texts


def looking_ahead(folder: Path) -> str:
    """A sentence: texts of 1.5 times the trained length, by the stage for all of it from the start, and grown."""
    tokens = 3 * TRAINED // 2
    ahead = readings(folder, tokens).get(f"{STRATEGY} for {stage_of(tokens)}", {})
    grown = readings(folder, 2 * TRAINED).get(GROWN, {})
    texts = [text for text in ahead if text in grown]
    if not texts:
        return ""
    both = [ahead[text] for text in texts], [grown[text] for text in texts]
    return (
        f"Read by the stage for {tokens} tokens from the start (`expect_length`), {len(texts)} texts have "
        f"{difference(*both, 0, TRAINED)} perplexity below {TRAINED} and {difference(*both, TRAINED, tokens)} from "
        f"there to {tokens}, against texts that grow."
    )


def block(folder: Path) -> tuple[str, str]:
    """The tables, and the machines that measured them."""
    to_2x, to_4x = (f"{STRATEGY} for {n * TRAINED}" for n in (2, 4))
    parts = []
    labels = {**NAMES, GROWN: "dynamic, grown", STALE: "dynamic, keys not corrected"}
    table, texts = by_position(folder, 2 * TRAINED, labels, to_2x)
    if table:
        parts += [
            f"The first {2 * TRAINED} tokens of {'; '.join(texts)}; differences against the static plan:",
            table,
        ]
    table, texts = by_position(
        folder, 4 * TRAINED, {STOCK: STOCK, to_4x: labels[to_4x], GROWN: labels[GROWN]}, to_4x
    )
    if table:
        parts += [f"The first {4 * TRAINED} tokens of {'; '.join(texts)}:", table]
    table, texts = whole_texts(folder)
    if table:
        parts += [
            f"Whole texts, read at once, as a prompt is ({'; '.join(texts)}); perplexity of all tokens:",
            table,
        ]
    parts += filter(None, [looking_ahead(folder)])
    ladders = {GROWN: "3 stages", **{f"{GROWN}, {name}": name for name in RATIOS}}
    table, texts = by_position(folder, 2 * TRAINED, ladders, GROWN)
    if table:
        parts += [f"Ladders to {2 * TRAINED} with other numbers of stages ({'; '.join(texts)}):", table]
    parts += [
        f"Passkeys found, of {len(DEPTHS) * TRIALS} prompts a length (five digits, {TRIALS} keys at each of the depths "
        f"{', '.join(map(str, DEPTHS))}; seed {SEED}): in the greedy continuation, and likelier than each of nine "
        f"decoys. Prompts are read at once, by the stage for their length "
        f"(`python -m benchmarks.quality.growth_passkeys`):",
        answers_table(passkey_answers(folder, "growth_passkey"), NAMES, "passkeys found"),
    ]
    record = load(folder, "growth")
    parts.append(
        f"`python -m benchmarks.quality.growth`: {record['model']['name']}, {record['model']['dtype']}."
    )
    machines = dict.fromkeys(machine_of(machine) for machine in record["machines"])
    return "\n\n".join(parts), "; ".join(machines)
