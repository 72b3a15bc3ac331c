"""Passkey retrieval: a number hidden in a long repetitive text, asked for at its end.

The prompt is that of Mohtashami and Jaggi 2023 (Landmark Attention); the paper (Wu et al. 2024) asks for five
random digits. A model passes where its greedy continuation begins with the key, or,
without generation, where the key is the likeliest continuation among decoys.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .memory import check_memory, memory_errors_in_words
from .models import cache_option
from .progress import Progress, announce, measure_pace, work
from .records import Record
from .variants import Variant

SCORINGS = ("generate", "decoys")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_DIGITS = 18
"""Of a key: numbers that a Python range can count."""

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Case:
    """One prompt: the key at ``depth`` (0 first, 1 last) of a text of about ``length`` tokens."""

    length: int
    depth: float
    trial: int
    seed: int
    key: str
    decoys: tuple[str, ...]


def make_cases(
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    trials: int = 1,
    digits: int = 5,
    decoys: int = 9,
    seed: int = 0,
) -> list[Case]:
    """Every length, depth and trial with its own key and decoys, all of ``digits`` digits.

    The draw of a case depends on the seed and on the case alone: every model and variant is asked for the
    same keys, and a case that is added changes no other.

    Raises:
        ValueError: a depth outside [0, 1], fewer than one trial, digit or decoy, more decoys than numbers, more
            than :data:`MOST_DIGITS` digits.
    """
    if not lengths or not depths:
        raise ValueError("give at least one length and one depth")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is a share of the text from 0 to 1, got {depth}")
    for name, value in (("trials", trials), ("digits", digits), ("decoys", decoys)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if digits > MOST_DIGITS:
        raise ValueError(f"digits must be at most {MOST_DIGITS}, got {digits}")
    numbers = range(10 ** (digits - 1), 10**digits)
    if decoys + 1 > len(numbers):
        raise ValueError(f"there are only {len(numbers)} numbers of {digits} digits, for {decoys} decoys")
    cases = []
    for length in dict.fromkeys(lengths):
        for depth in dict.fromkeys(map(float, depths)):
            for trial in range(trials):
                drawn = random.Random(f"{seed} {length} {depth} {trial}").sample(numbers, decoys + 1)
                key, *others = map(str, drawn)
                cases.append(Case(length, depth, trial, seed, key, tuple(others)))
    return cases


def passkey_prompt(tokenizer: PreTrainedTokenizerBase, case: Case) -> str:
    """The prompt of a case: as much filler as fits into ``case.length`` tokens, the question included.

    Raises:
        ValueError: the length does not hold the prompt without filler.
    """

    def prompt(fillers: int) -> str:
        before = round(case.depth * fillers)
        lines = (
            _TASK,
            " ".join([_FILLER] * before),
            _NEEDLE.format(key=case.key),
            " ".join([_FILLER] * (fillers - before)),
            _QUESTION,
        )
        return "\n".join(line for line in lines if line)

    def tokens(fillers: int) -> int:
        return len(tokenizer(prompt(fillers), verbose=False).input_ids)

    least = tokens(0)
    if case.length < least:
        raise ValueError(f"a passkey prompt needs at least {least} tokens, got the length {case.length}")
    each = (tokens(20) - tokens(10)) / 10
    fillers = int((case.length - least) / each) + 2
    while fillers and tokens(fillers) > case.length:
        fillers -= 1
    return prompt(fillers)


def answered_key(answer: str) -> str | None:
    """The first number in an answer; the whole run of digits, so that a longer number is not the key."""
    found = re.search(r"\d+", answer)
    return found and found[0]


class PromptReader:
    """A model that reads long prompts in chunks and keeps the part that the next one begins with.

    Prompts that differ from some token on share the key/value cache up to it: cases in falling order of
    depth are read in about half the time.

    Args:
        model, tokenizer: what reads; the model must not be changed while the reader is in use.
        chunk: tokens a step.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chunk: int = 512
    ) -> None:
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        self._cache = DynamicCache(config=model.config)
        self._ids = torch.empty(0, dtype=torch.long)

    @torch.inference_mode()
    def generate(self, prompt: str, tokens: int, progress: Progress | None = None) -> str:
        """The greedy continuation of ``prompt`` by at most ``tokens`` tokens."""
        ids = self._encode(prompt)
        # The last token is left to generate(), which needs its logits.
        self._read(ids[:-1], progress)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id or 0,
        )
        batch = ids[None].to(self.model.device)
        with self._undone() as cache:
            out = self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                **cache_option(self.model, cache),
                generation_config=greedy,
            )
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    @torch.inference_mode()
    def log_probabilities(
        self, prompt: str, continuations: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        """Natural log-probability of each continuation, after a space, given ``prompt``."""
        whole = [self._encode(f"{prompt} {c}") for c in continuations]
        # Where the tokenizer joins the end of the prompt with what follows, scoring begins before that.
        shared = min(_common(w, self._encode(prompt)) for w in whole)
        self._read(whole[0][: shared - 1], progress)
        result = []
        for ids in whole:
            rest = ids[None, shared - 1 :].to(self.model.device)
            with self._undone() as cache:
                out = self.model(rest[:, :-1], **cache_option(self.model, cache), use_cache=True)
            chosen = out.logits[0].float().log_softmax(-1).gather(1, rest[0, 1:, None])
            result.append(chosen.double().sum().item())
        return result

    def unread(self, prompt: str) -> float:
        """The :func:`work` of ``prompt`` that is not in the key/value cache yet."""
        ids = self._encode(prompt)
        return work(self.model, self._kept(ids), len(ids))

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, verbose=False).input_ids)

    def _read(self, ids: torch.Tensor, progress: Progress | None) -> None:
        """Bring the cache to exactly ``ids [S]``."""
        self._crop(self._kept(ids))
        device = self.model.device
        for start in range(len(self._ids), len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            self.model(
                part[None].to(device),
                **cache_option(self.model, self._cache),
                use_cache=True,
                logits_to_keep=1,
            )
            self._ids = ids[: start + len(part)]
            if progress is not None:
                progress.update(work(self.model, start, start + len(part)))

    def _kept(self, ids: torch.Tensor) -> int:
        """How many tokens of ``ids`` need not be read again."""
        common = _common(self._ids, ids)
        return 0 if self._slides and common < len(self._ids) else common

    def _crop(self, length: int) -> None:
        if length == len(self._ids):
            return
        if self._slides:
            self._cache, self._ids = DynamicCache(config=self.model.config), self._ids[:0]
        else:
            self._cache.crop(length - self._cache.get_seq_length())
            self._ids = self._ids[:length]

    @property
    def _slides(self) -> bool:
        # A layer with a sliding window has thrown the beginning away: it cannot go back to a shorter text.
        return any(layer.is_sliding for layer in self._cache.layers)

    @contextmanager
    def _undone(self) -> Iterator[DynamicCache]:
        """The key/value cache to go on from; what is added to it is taken back at the end."""
        if self._slides:
            yield copy.deepcopy(self._cache)
            return
        yield self._cache
        self._cache.crop(len(self._ids) - self._cache.get_seq_length())


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return int(different[0]) if len(different) else n


def measure_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    variants: Sequence[Variant],
    record: Record,
    *,
    scorings: Sequence[str] = ("generate",),
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Ask every variant for every key; what ``record`` holds already is not asked again.

    Args:
        model: of a supported family; each variant is applied to it while it reads.
        tokenizer: the model's.
        cases: from :func:`make_cases`.
        variants: from :func:`rope_dist.evaluation.variants.make_variants`.
        record: where finished answers are and go.
        scorings: ``generate`` compares the number in the greedy continuation with the key; ``decoys`` asks
            whether the key is likelier than every decoy (chance is 1 in ``decoys + 1``).
        chunk: tokens a step.
        progress: announce the time that the prompts will take to read, and show a bar for each.

    Yields:
        The variant, the measurement as in the record, and whether it was taken from there.

    Raises:
        ValueError: an unknown scoring, a length below the prompt's own, too little memory.
    """
    for scoring in scorings:
        if scoring not in SCORINGS:
            raise ValueError(f"unknown scoring {scoring!r}; known: {', '.join(SCORINGS)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    check_memory(model, max(case.length for case in cases), chunk)
    # Late keys first: the next prompt then begins with what is in the cache.
    ordered = sorted(cases, key=lambda case: (case.length, -case.depth, case.trial))
    prompts = {case: passkey_prompt(tokenizer, case) for case in ordered}
    jobs = [
        (variant, case, scoring, _what(variant, case, scoring))
        for variant in variants
        for case in ordered
        for scoring in scorings
    ]
    if progress:
        unread = [(variant, prompts[case]) for variant, case, _, what in jobs if record.get(what) is None]
        _announce(model, tokenizer, unread)
    reader: PromptReader | None = None
    reading_with: Variant | None = None
    for variant, case, scoring, what in jobs:
        result = record.get(what)
        finished = result is not None
        if result is None:
            if reader is None or reading_with is not variant:
                reader, reading_with = PromptReader(model, tokenizer, chunk=chunk), variant
            doing = f"{variant.label}, {case.length} tokens, depth {case.depth:g}"
            began = time.perf_counter()
            with (
                memory_errors_in_words(f"reading {case.length} tokens"),
                Progress(doing if progress else None, reader.unread(prompts[case])) as bar,
                variant.applied(model),
            ):
                result = _ask(reader, prompts[case], case, scoring, bar)
            result["seconds"] = round(time.perf_counter() - began, 1)
            record.put(what, result, variant)
        yield variant, {"what": what, "result": result}, finished


def _what(variant: Variant, case: Case, scoring: str) -> dict[str, Any]:
    """What a record knows the answer by."""
    what = {"scoring": scoring, "length": case.length, "depth": case.depth, "trial": case.trial}
    what |= {"seed": case.seed, "key": case.key}
    if scoring == "decoys":
        what["decoys"] = list(case.decoys)
    return what | {"variant": variant.label, "frequencies": variant.fingerprint}


def _announce(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, unread: Sequence[tuple[Variant, str]]
) -> None:
    """Say how long the prompts take to read, each without what it has in common with the one before."""
    if not unread:
        return
    pace, seconds = measure_pace(model), 0.0
    ids, last = torch.empty(0, dtype=torch.long), None
    for variant, prompt in unread:
        before = ids if variant is last else ids[:0]
        ids, last = torch.tensor(tokenizer(prompt, verbose=False).input_ids), variant
        seconds += pace.seconds(len(ids), _common(before, ids))
    announce(seconds)


def _ask(reader: PromptReader, prompt: str, case: Case, scoring: str, bar: Progress) -> dict[str, Any]:
    if scoring == "decoys":
        key, *others = reader.log_probabilities(prompt, [case.key, *case.decoys], bar)
        return {
            "correct": key > max(others),
            "key_log_probability": round(key, 4),
            "best_decoy": round(max(others), 4),
        }
    # Room for the key in any tokenizer, and for a word before it.
    answer = reader.generate(prompt, len(case.key) + 3, bar)
    return {"correct": answered_key(answer) == case.key, "answer": answer}


def accuracy(measurements: Sequence[Mapping[str, Any]]) -> dict[tuple[int, float], float]:
    """Share of right answers for every ``(length, depth)``, from measurements of one variant and scoring."""
    answers: dict[tuple[int, float], list[bool]] = {}
    for m in measurements:
        answers.setdefault((m["what"]["length"], m["what"]["depth"]), []).append(m["result"]["correct"])
    return {cell: sum(correct) / len(correct) for cell, correct in sorted(answers.items())}


def grids(measurements: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[int, float], float]]:
    """:func:`accuracy` by title: the variant, and the scoring where there are several."""
    scorings = {m["what"]["scoring"] for m in measurements}
    sorted_out: dict[str, list[Mapping[str, Any]]] = {}
    for m in measurements:
        suffix = f", {m['what']['scoring']}" if len(scorings) > 1 else ""
        sorted_out.setdefault(m["what"]["variant"] + suffix, []).append(m)
    return {title: accuracy(chosen) for title, chosen in sorted_out.items()}


def passkey_tables(measurements: Sequence[Mapping[str, Any]], trained_length: int) -> str:
    """Accuracy in per cent: a table a variant and scoring, a row a depth, a column a length."""
    parts = []
    for title, cells in grids(measurements).items():
        lengths = sorted({length for length, _ in cells})
        depths = sorted({depth for _, depth in cells})
        headers = [title, *(f"{n}{'*' if n > trained_length else ''}" for n in lengths)]
        rows = [[f"depth {d:g}", *(_percent(cells.get((n, d))) for n in lengths)] for d in depths]
        means = [[v for (n, _), v in cells.items() if n == length] for length in lengths]
        rows.append(["all depths", *(_percent(sum(m) / len(m)) for m in means)])
        align = ("left", *("right",) * len(lengths))
        parts.append(tabulate(rows, headers, disable_numparse=True, colalign=align))
    return "\n\n".join([*parts, f"right answers, %; * past the {trained_length} tokens of the training"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
