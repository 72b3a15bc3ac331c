"""Perplexity of several texts, lengths and variants in one run that can be stopped and continued."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpora import load_text
from .memory import check_memory, memory_errors_in_words
from .perplexity import Bucket, sliding_window_nll, sliding_windows, token_nll
from .progress import announce, measure_pace
from .records import Record
from .variants import Variant

METHODS = ("whole", "sliding")
WIDTH = 256
"""Positions that a record keeps one mean for; wider buckets are made of them."""


@dataclass(frozen=True)
class Passage:
    """A stretch of a text: its name, the number of the stretch, and ``ids [1, S]``."""

    text: str
    piece: int
    ids: torch.Tensor

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from every other passage: the digest is of the token ids."""
        digest = hashlib.sha256(self.ids.cpu().to(torch.int64).numpy().tobytes()).hexdigest()[:12]
        return {"text": self.text, "piece": self.piece, "tokens": self.ids.shape[1], "digest": digest}


def passages(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, pieces: int = 1
) -> list[Passage]:
    """The first ``pieces`` stretches of ``tokens`` tokens of every text, side by side from its beginning.

    Args:
        tokenizer: of the model that will read.
        texts: corpora or files, as in :func:`rope_dist.evaluation.load_text`.
        tokens: tokens a passage, at least 2.
        pieces: passages a text.

    Raises:
        ValueError: no such text, or one too short; says how many tokens it has.
        MissingPackageError: a corpus that is not installed; says how to install it.
    """
    if tokens < 2:
        raise ValueError(f"a passage needs at least 2 tokens, got {tokens}")
    if pieces < 1:
        raise ValueError(f"read at least 1 piece of a text, got {pieces}")
    result = []
    for name in dict.fromkeys(texts):
        title, content = load_text(name)
        ids = _tokens(tokenizer, content, tokens * pieces)
        if ids.shape[1] < tokens * pieces:
            raise ValueError(
                f"{title} has {ids.shape[1]} tokens, fewer than the {tokens * pieces} to be read "
                f"({pieces} x {tokens}): give a longer text, or fewer tokens or pieces"
            )
        result += [Passage(title, i, ids[:, i * tokens : (i + 1) * tokens]) for i in range(pieces)]
    return result


def _tokens(tokenizer: PreTrainedTokenizerBase, content: str, wanted: int) -> torch.Tensor:
    # A novel is tokenised as far as it is read. English has about four characters a token; where ten are
    # not enough, all of it is. The end of a cut text may fall into other tokens, so it must not be needed.
    head = tokenizer(content[: 10 * wanted], return_tensors="pt", verbose=False).input_ids
    if len(content) <= 10 * wanted or head.shape[1] >= wanted + 64:
        return head
    return tokenizer(content, return_tensors="pt", verbose=False).input_ids


def measure_perplexity(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    variants: Sequence[Variant],
    record: Record,
    *,
    lengths: Sequence[int],
    methods: Sequence[str] = METHODS,
    stride: int = 256,
    chunk: int = 512,
    progress: bool = False,
) -> Iterator[tuple[Variant, dict[str, Any], bool]]:
    """Read every passage with every variant; what ``record`` holds already is not read again.

    ``whole`` reads the first ``max(lengths)`` tokens of a passage once, with everything before a token in
    sight: perplexity by position, which holds that of every shorter length. ``sliding`` reads the whole
    passage in windows of each length (:func:`rope_dist.evaluation.perplexity.sliding_window_nll`).

    Args:
        model: of a supported family; each variant is applied to it while it reads.
        passages: each of at least ``max(lengths)`` tokens.
        variants: from :func:`rope_dist.evaluation.variants.make_variants`.
        record: where finished readings are and go.
        lengths: tokens.
        methods: of :data:`METHODS`.
        stride: of the sliding window, tokens.
        chunk: tokens a step.
        progress: announce the time that the readings will take, and show a bar for each.

    Yields:
        The variant, the measurement as in the record, and whether it was taken from there. A caller that
        stops iterating loses nothing but the reading that it does not wait for.

    Raises:
        ValueError: a bad setting, a passage that is too short, too little memory.
    """
    longest = _check(passages, lengths, methods, stride, chunk)
    check_memory(model, longest, chunk)
    readings = []
    for passage in passages:
        whole = Passage(passage.text, passage.piece, passage.ids[:, :longest])
        cases: list[tuple[dict[str, Any], torch.Tensor, int]] = []
        if "whole" in methods:
            cases.append(({"method": "whole", **whole.identity}, whole.ids, 0))
        if "sliding" in methods:
            for length in dict.fromkeys(lengths):
                what = {"method": "sliding", **passage.identity, "length": length, "stride": stride}
                cases.append((what, passage.ids, length))
        for case, ids, window in cases:
            for variant in variants:
                what = {**case, "variant": variant.label, "frequencies": variant.fingerprint}
                readings.append((what, ids, window, variant))
    if progress:
        _announce(model, [(r[1].shape[1], r[2]) for r in readings if record.get(r[0]) is None], stride)
    for what, ids, window, variant in readings:
        result = record.get(what)
        finished = result is not None
        if result is None:
            doing = f"{what['method']}, {what['text']}, {variant.label}"
            options = {"chunk": chunk, "description": doing if progress else None}
            began = time.perf_counter()
            with memory_errors_in_words(f"reading {window or longest} tokens"), variant.applied(model):
                if window:
                    nll = sliding_window_nll(model, ids, window=window, stride=stride, **options)
                else:
                    nll = token_nll(model, ids, **options)
            result = _summary(nll, time.perf_counter() - began)
            record.put(what, result, variant)
        yield variant, {"what": what, "result": result}, finished


def _announce(model: PreTrainedModel, unread: Sequence[tuple[int, int]], stride: int) -> None:
    """Say how long ``(tokens, window)`` take to read; a window of 0 is the whole text."""
    if unread:
        pace = measure_pace(model)
        announce(
            sum(
                pace.seconds(window) * len(sliding_windows(tokens, window, stride))
                if window
                else pace.seconds(tokens)
                for tokens, window in unread
            )
        )


def _check(
    passages: Sequence[Passage], lengths: Sequence[int], methods: Sequence[str], stride: int, chunk: int
) -> int:
    if not passages or not lengths or min(lengths) < 2:
        raise ValueError(f"give at least one passage and lengths of 2 tokens or more, got {list(lengths)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    longest = max(lengths)
    for passage in passages:
        if passage.ids.shape[1] < longest:
            raise ValueError(
                f"the passage of {passage.text} has {passage.ids.shape[1]} tokens, fewer than the length {longest}"
            )
        if "sliding" in methods:
            for length in lengths:
                sliding_windows(passage.ids.shape[1], length, stride)
    return longest


def _summary(nll: torch.Tensor, seconds: float) -> dict[str, Any]:
    """What a record keeps of ``nll [S - 1]``: the mean, and the mean of every :data:`WIDTH` positions."""
    by_position = [nll[max(start - 1, 0) : start + WIDTH - 1] for start in range(0, len(nll) + 1, WIDTH)]
    return {
        "nll": nll.double().mean().item(),
        "predicted": len(nll),
        "nll_by_position": [round(part.double().mean().item(), 6) for part in by_position if len(part)],
        "seconds": round(seconds, 1),
    }


def average_perplexity(results: Sequence[Mapping[str, Any]]) -> float:
    """Perplexity of all predicted tokens of several readings together."""
    predicted = sum(r["predicted"] for r in results)
    return math.exp(sum(r["nll"] * r["predicted"] for r in results) / predicted)


def average_buckets(results: Sequence[Mapping[str, Any]], width: int) -> list[Bucket]:
    """Perplexity by position over readings of equally long passages.

    Args:
        results: as a record holds them.
        width: positions a bucket, a multiple of :data:`WIDTH`.

    Raises:
        ValueError: another width, or readings of different lengths.
    """
    check_width(width)
    if len({r["predicted"] for r in results}) != 1:
        raise ValueError("only readings of equally many tokens have an average by position")
    length = results[0]["predicted"] + 1
    buckets = []
    for start in range(0, length, width):
        end = min(start + width, length)
        total = count = 0.0
        for low in range(start, end, WIDTH):
            weight = min(low + WIDTH, end) - max(low, 1)
            if weight > 0:  # position 0 has no prediction
                total += weight * sum(r["nll_by_position"][low // WIDTH] for r in results) / len(results)
                count += weight
        if count:
            buckets.append(Bucket(start, end, math.exp(total / count)))
    return buckets


def check_width(width: int) -> int:
    """``width`` if buckets can be that wide; ``ValueError`` otherwise."""
    if width < 1 or width % WIDTH:
        raise ValueError(f"the width of a bucket must be a multiple of {WIDTH} positions, got {width}")
    return width


def bucket_width(tokens: int) -> int:
    """A width that cuts ``tokens`` into about six to twelve buckets: 256 times a power of two."""
    width = WIDTH
    while tokens > 12 * width:
        width *= 2
    return width


def curves(measurements: Sequence[Mapping[str, Any]], width: int) -> dict[str, list[Bucket]]:
    """Perplexity by position of each variant's ``whole`` readings, over all passages."""
    whole = [m for m in measurements if m["what"]["method"] == "whole"]
    return {
        label: average_buckets([m["result"] for m in whole if m["what"]["variant"] == label], width)
        for label in dict.fromkeys(m["what"]["variant"] for m in whole)
    }


def perplexity_tables(measurements: Sequence[Mapping[str, Any]], trained_length: int, width: int) -> str:
    """The measurements of one run as text.

    By position and, for several texts, by text (``whole``), then by length (``sliding``); a row a variant.
    ``*`` marks what lies past the trained length.
    """

    def rows(method: str, key: str) -> tuple[list[Any], dict[str, list[str]]]:
        results: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
        for m in measurements:
            if m["what"]["method"] == method:
                results.setdefault((m["what"]["variant"], m["what"][key]), []).append(m["result"])
        columns = list(dict.fromkeys(column for _, column in results))
        return columns, {
            label: [f"{average_perplexity(results[label, column]):.2f}" for column in columns]
            for label in dict.fromkeys(label for label, _ in results)
        }

    parts = []
    by_position = curves(measurements, width)
    if by_position:
        _, overall = rows("whole", "method")
        first = next(iter(by_position.values()))
        marked = [f"{b.start}-{b.end}{'*' if b.start >= trained_length else ''}" for b in first]
        table = {
            label: [*overall[label], *(f"{b.perplexity:.2f}" for b in buckets)]
            for label, buckets in by_position.items()
        }
        parts.append(_table("perplexity by position", ["all", *marked], table))
        texts, by_text = rows("whole", "text")
        if len(texts) > 1:
            parts.append(_table("perplexity by text", texts, by_text))
    lengths, by_length = rows("sliding", "length")
    if lengths:
        marked = [f"{n}{'*' if n > trained_length else ''}" for n in lengths]
        parts.append(_table("sliding window, by its length", marked, by_length))
    return "\n\n".join([*parts, f"* past the {trained_length} tokens that the model was trained on"])


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [[label, *cells] for label, cells in rows.items()]
    align = ("left", *("right",) * len(columns))
    return tabulate(lines, [title, *columns], disable_numparse=True, colalign=align)
