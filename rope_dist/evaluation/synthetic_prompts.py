"""Synthetic long-context tasks in the manner of RULER (Hsieh et al. 2024, arXiv 2404.06654), made offline.

They are for small and base models, which rarely answer RULER's own prompts: every question has one short answer that
continues the prompt, so that it can be scored by its likelihood as well. Five or ten questions share a context, and
with it the key/value cache. RULER itself, for chat models and with its data, is ``rope-dist eval tasks --tasks ruler``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..defaults import COMPARED_PROMPTS
from ..messages import unknown

QUESTIONS = 5
"""Questions about one context of most tasks."""
DECOYS = 9
"""Wrong answers a question; chance is one in ten."""
KEYS = DECOYS + 1
"""Needles of the tasks of keys: each is asked for."""


def questions_about_one_context(task: str) -> int:
    """How many questions of ``task`` share a context."""
    return KEYS if task in ("single-key", "multi-key") else QUESTIONS


@dataclass(frozen=True)
class SyntheticCase:
    """One question: with ``n`` about one context, number ``trial % n`` about context ``trial // n``."""

    task: str
    length: int
    trial: int
    seed: int


@dataclass(frozen=True)
class SyntheticPrompt:
    """A prompt of at most ``case.length`` tokens that `` answer`` continues."""

    case: SyntheticCase
    text: str
    answer: str
    decoys: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the prompt: it changes with the text that surrounds the needles, and with the tokenizer."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Context:
    """A task's draw: sentences at their depths (0: beginning, 1: end), and questions with answers and decoys."""

    opening: str
    needles: tuple[tuple[float, str], ...]
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]


_THINGS = (
    "access code of the library",
    "phone extension of the kitchen",
    "box number of the archive",
    "serial number of the engine",
    "room number of the choir",
    "licence number of the pilot",
    "weight of the anchor in grams",
    "price of the painting in crowns",
    "catalogue number of the comet",
    "distance to the island in metres",
)
_PLACES = (
    *(
        "airport",
        "bakery",
        "brewery",
        "castle",
        "cinema",
        "clinic",
        "embassy",
        "factory",
        "garage",
        "harbour",
    ),
    *(
        "hospital",
        "laboratory",
        "library",
        "lighthouse",
        "monastery",
        "museum",
        "observatory",
        "palace",
        "prison",
    ),
    *("school", "stadium", "station", "theatre", "university", "vineyard", "warehouse", "workshop", "zoo"),
)


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(n) for n in draw.sample(range(10_000, 100_000), count)]


def _depths(draw: random.Random, count: int) -> list[float]:
    """Rising depths, one in each of ``count`` equal shares of the text."""
    return [(i + draw.random()) / count for i in range(count)]


def _shuffled(draw: random.Random, items: Sequence[str]) -> list[str]:
    return draw.sample(items, len(items))


def _single_key(draw: random.Random) -> _Context:
    """Ten needles of ten kinds: nothing in the text can be taken for the one that is asked for."""
    values = _numbers(draw, KEYS * (DECOYS + 1))
    things = _shuffled(draw, _THINGS)
    needles = [f"The {thing} is {value}." for thing, value in zip(things, values, strict=False)]
    questions = [
        (f"What is the {thing}? The {thing} is", values[i], tuple(values[KEYS + i :: KEYS]))
        for i, thing in enumerate(things)
    ]
    return _Context(
        "Some facts are hidden in the following text. Remember them.",
        tuple(zip(_depths(draw, KEYS), needles, strict=True)),
        tuple(draw.sample(questions, KEYS)),
    )


def _multi_key(draw: random.Random) -> _Context:
    """Ten needles of one kind: every decoy is the value of another key in the text."""
    places, values = draw.sample(_PLACES, KEYS), _numbers(draw, KEYS)
    needles = [f"The access code of the {p} is {v}." for p, v in zip(places, values, strict=True)]
    questions = [
        (
            f"What is the access code of the {p}? The access code of the {p} is",
            v,
            tuple(x for x in values if x != v),
        )
        for p, v in zip(places, values, strict=True)
    ]
    return _Context(
        "Some access codes are hidden in the following text. Remember them.",
        tuple(zip(_depths(draw, KEYS), needles, strict=True)),
        tuple(draw.sample(questions, len(questions))),
    )


def _left_out(
    items: Sequence[str], others: Sequence[str], question: str, draw: random.Random
) -> list[tuple[str, str, tuple[str, ...]]]:
    """A question for each of ``items``, which names the rest; decoys are the rest and ``others``."""
    found = []
    for item in items:
        rest = _shuffled(draw, [x for x in items if x != item])
        found.append((question + " " + ", ".join(rest) + " and", item, (*rest, *others)))
    return draw.sample(found, len(found))


def _multi_value(draw: random.Random) -> _Context:
    """Five values of one key and five of another; four of the first are given, the fifth is asked for."""
    (place, other), values = draw.sample(_PLACES, 2), _numbers(draw, 2 * QUESTIONS)
    own, others = values[:QUESTIONS], values[QUESTIONS:]
    needles = [f"One of the access codes of the {place} is {v}." for v in own]
    needles += [f"One of the access codes of the {other} is {v}." for v in others]
    question = f"What are the five access codes of the {place}? The access codes of the {place} are"
    return _Context(
        "Some access codes are hidden in the following text. Remember them.",
        tuple(zip(_depths(draw, len(needles)), _shuffled(draw, needles), strict=True)),
        tuple(_left_out(own, others, question, draw)),
    )


def _variables(draw: random.Random) -> _Context:
    """Two chains of five variables; four of the first are given, the fifth is asked for."""
    names = ["".join(draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(2 * QUESTIONS)]
    chains, values = (names[:QUESTIONS], names[QUESTIONS:]), _numbers(draw, 2)
    needles: list[tuple[float, str]] = []
    for chain, value in zip(chains, values, strict=True):
        assigned = [value, *(f"VAR {name}" for name in chain)]
        lines = [f"VAR {name} = {source}." for name, source in zip(chain, assigned, strict=False)]
        needles += zip(_depths(draw, QUESTIONS), lines, strict=True)
    question = f"Which five variables have the value {values[0]}? They are"
    return _Context(
        "Variables are assigned in the following text. Remember their values.",
        tuple(sorted(needles)),
        tuple(_left_out(chains[0], chains[1], question, draw)),
    )


FREQUENT, OTHER = 30, 3
"""How often a frequent word and another one occur, as in RULER's common words."""


def _frequent_words(draw: random.Random) -> _Context:
    """A list of words, five of them frequent; four are given, the fifth is asked for. The words are made up."""
    words: dict[str, None] = {}
    while len(words) < 2 * QUESTIONS:
        words[_word(draw)] = None
    own, others = list(words)[:QUESTIONS], list(words)[QUESTIONS:]
    question = "Which five words occur most often in the list? They are"
    needles = [(draw.random(), word) for word in own for _ in range(FREQUENT)]
    needles += [(draw.random(), word) for word in others for _ in range(OTHER)]
    return _Context(
        "Some words of the following list occur more often than the others. Remember them.",
        tuple(sorted(needles)),
        tuple(_left_out(own, others, question, draw)),
    )


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


SYNTHETIC_TASKS: dict[str, Callable[[random.Random], _Context]] = {
    "single-key": _single_key,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "variables": _variables,
    "frequent-words": _frequent_words,
}


def make_synthetic_cases(
    lengths: Sequence[int],
    tasks: Sequence[str] = tuple(SYNTHETIC_TASKS),
    *,
    trials: int = COMPARED_PROMPTS,
    seed: int = 0,
) -> list[SyntheticCase]:
    """The questions of every task and length.

    A question depends on the seed and on itself alone: more trials, tasks or lengths change no other.

    Args:
        lengths: of the prompts, tokens.
        tasks: of :data:`SYNTHETIC_TASKS`.
        trials: questions a task and length, :func:`questions_about_one_context` of them about one context.
        seed: of the draw.

    Raises:
        ValueError: an unknown task, no length or task, fewer than one trial.
    """
    if not lengths or not tasks:
        raise ValueError("give at least one length and one task")
    for task in tasks:
        if task not in SYNTHETIC_TASKS:
            raise ValueError(unknown("task", task, SYNTHETIC_TASKS))
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    return [
        SyntheticCase(task, length, trial, seed)
        for length in sorted(set(lengths))
        for task in dict.fromkeys(tasks)
        for trial in range(trials)
    ]


def synthetic_prompts(
    tokenizer: PreTrainedTokenizerBase, cases: Sequence[SyntheticCase], title: str, text: str
) -> list[SyntheticPrompt]:
    """The prompts of ``cases``, those about one context one after the other.

    Args:
        tokenizer: of the model.
        cases: from :func:`make_synthetic_cases`.
        title, text: what surrounds the needles, as :func:`rope_dist.evaluation.load_text` returns it; a context begins
            at a random sentence of it and goes on at its beginning where it ends.

    Raises:
        ValueError: a length too short for the prompt, or too long for the text.
    """
    sentences = _sentences(text)

    def context_of(case: SyntheticCase) -> tuple[int, str, int, int]:
        return case.length, case.task, case.seed, case.trial // questions_about_one_context(case.task)

    ordered = sorted(cases, key=lambda c: (c.length, list(SYNTHETIC_TASKS).index(c.task), c.seed, c.trial))
    prompts = []
    for (length, task, seed, number), group in groupby(ordered, context_of):
        draw = random.Random(f"{seed} {task} {length} {number}")
        context = SYNTHETIC_TASKS[task](draw)
        filled = _filled(tokenizer, task, length, context, _filler(task, draw, sentences), title)
        for case in group:
            question, answer, decoys = context.questions[case.trial % len(context.questions)]
            prompts.append(SyntheticPrompt(case, f"{filled}\n\n{question}", answer, decoys))
    return prompts


def _sentences(text: str) -> list[str]:
    """Sentences and lines of a text, with the space after them, of at most 400 characters."""
    return re.findall(r"(?s).{1,400}?(?:[.!?]\s+|\n+|\Z)|.{1,400}(?:\s+|\Z)|.{1,400}", text)


def _filler(task: str, draw: random.Random, sentences: Sequence[str]) -> Callable[[int], Iterator[str]]:
    """What surrounds the needles: ``filler(n)`` are the first ``n`` pieces of it, fewer if there are no more."""
    if task != "frequent-words":
        start = draw.randrange(len(sentences))
        around = [*sentences[start:], *sentences[:start]]
        return lambda n: iter(around[:n])
    more: list[str] = []
    seed = draw.random()

    def words(n: int) -> Iterator[str]:
        drawn = random.Random(seed)
        more.extend(f"{_word(draw)} " for _ in range(n - len(more)))
        occurrences = more[:n] * OTHER
        drawn.shuffle(occurrences)
        return iter(occurrences)

    return words


def _filled(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    context: _Context,
    filler: Callable[[int], Iterator[str]],
    title: str,
) -> str:
    """Opening and body of a prompt, with as much filler as fits into ``length`` tokens with the longest question."""

    def body(n: int) -> str:
        pieces, parts, done = list(filler(n)), [], 0
        for depth, needle in context.needles:
            place = round(depth * len(pieces))
            parts += [*pieces[done:place], f"{needle} "]
            done = place
        return f"{context.opening}\n\n{''.join([*parts, *pieces[done:]]).rstrip()}"

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    longest = max((question for question, *_ in context.questions), key=count)

    def tokens(n: int) -> int:
        return count(f"{body(n)}\n\n{longest}")

    least = tokens(0)
    if least > length:
        raise ValueError(f"a prompt of {task} needs at least {least} tokens, got the length {length}")
    fits, above, n = 0, None, 16
    while above is None or above - fits > 1:
        found = tokens(n)
        if found <= length:
            if sum(1 for _ in filler(n)) < n:
                raise ValueError(f"{title} has too few tokens for a prompt of {length}: give a longer text")
            fits = n
        else:
            above = n
        each = max((found - least) / n, 0.1)
        n += int((length - found) / each)
        n = max(n, fits + 1) if above is None else min(max(n, fits + 1), above - 1)
    return body(fits)
