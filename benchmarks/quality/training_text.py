"""What the small LLaMA is trained on, and what it never sees.

Trained on: the first 95 % of enwik8 and five novels, packed one after the other, and a small share of documents that
are made here: a number that is told early is asked for later. Such text is rare in Wikipedia, and without it a model
of a few million parameters finds no passkeys. Never seen: the four texts of the study and the rest of enwik8.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from rope_dist.evaluation import install_corpus, load_text
from rope_dist.evaluation.passkey import FILLER, NEEDLE, QUESTION, TASK

WIKIPEDIA = "enwik8"
NOVELS = ("emma", "mansfield-park", "northanger-abbey", "pride-and-prejudice", "sense-and-sensibility")
HELD_OUT = ("persuasion", "state-of-the-union", "moby-dick", "python")
HELD_OUT_SHARE = 0.05
"""Of enwik8, from its end."""
REMEMBER_SHARE = 0.05
"""Of the samples of the first training."""
END = "<|endoftext|>"
VOCABULARY = 4096
THINGS = ("box", "door", "ship", "house", "garden", "bank", "tower", "school", "train", "letter")


def training_texts() -> list[str]:
    """Of the corpora, installed where they are not."""
    for name in (WIKIPEDIA, *NOVELS):
        install_corpus(name)
    wikipedia = load_text(WIKIPEDIA)[1]
    return [wikipedia[: _cut(wikipedia)], *(load_text(name)[1] for name in NOVELS)]


def held_out_texts() -> dict[str, str]:
    """By title. None of it is part of :func:`training_texts`."""
    for name in (WIKIPEDIA, *HELD_OUT):
        install_corpus(name)
    wikipedia = load_text(WIKIPEDIA)[1]
    return {**dict(map(load_text, HELD_OUT)), f"{WIKIPEDIA}, its last 5 %": wikipedia[_cut(wikipedia) :]}


def _cut(text: str) -> int:
    return round(len(text) * (1 - HELD_OUT_SHARE))


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """BPE of bytes, digits apart, trained on an even sample of about 10 MB of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sample(texts, 10_000_000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _sample(texts: Sequence[str], characters: int, piece: int = 10_000) -> Iterator[str]:
    every = max(sum(map(len, texts)) // characters, 1)
    for text in texts:
        for start in range(0, len(text), every * piece):
            yield text[start : start + piece]


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], piece: int = 100_000) -> torch.Tensor:
    """The texts one after the other, with an end-of-text token after each. Returns ``[tokens]`` int16."""
    ids: list[torch.Tensor] = []
    for text in texts:
        # Pieces: the tokenizer holds offsets of every token of what it reads at once.
        for start in range(0, len(text), piece):
            ids.append(
                torch.tensor(
                    tokenizer(text[start : start + piece], verbose=False).input_ids, dtype=torch.int16
                )
            )
        ids.append(torch.tensor([tokenizer.eos_token_id], dtype=torch.int16))
    return torch.cat(ids)


class Remember:
    """Documents of ``length`` tokens in which a number that is told once is asked for later, at every distance.

    Half are passkey prompts as :mod:`rope_dist.evaluation.passkey` has them, with its filler or a piece of the
    training text; half name the numbers of several things and ask for each of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, stream: torch.Tensor) -> None:
        self.tokenizer, self.length, self.stream = tokenizer, length, stream
        self.filler = self._ids(" ".join([FILLER] * (length // 20 + 2)))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False).input_ids)

    def document(self, draw: random.Random) -> list[int]:
        """``length`` token ids."""
        made = self._passkey(draw) if draw.random() < 0.5 else self._several(draw)
        return [*made, self.tokenizer.eos_token_id, *self._text(draw, self.length)][: self.length]

    def _text(self, draw: random.Random, tokens: int) -> list[int]:
        if draw.random() < 0.5:
            return self.filler[:tokens]
        start = draw.randrange(len(self.stream) - tokens)
        return self.stream[start : start + tokens].tolist()

    def _passkey(self, draw: random.Random) -> list[int]:
        key = draw.randrange(10_000, 100_000)
        head, needle = self._ids(f"{TASK}\n"), self._ids(f"\n{NEEDLE.format(key=key)}\n")
        question = self._ids(f"\n{QUESTION} {key}.")
        room = max(self.length - len(head) - len(needle) - len(question) - 2, 0)
        filler = self._text(draw, draw.randint(0, room))
        before = draw.randint(0, len(filler))
        return head + filler[:before] + needle + filler[before:] + question

    def _several(self, draw: random.Random) -> list[int]:
        things = draw.sample(THINGS, draw.randint(2, 4))
        keys = {thing: draw.randrange(10_000, 100_000) for thing in things}
        told = [self._ids(f"\nThe key of the {thing} is {key}.\n") for thing, key in keys.items()]
        asked = [self._ids(f"\nWhat is the key of the {t}? The key of the {t} is {keys[t]}.") for t in things]
        draw.shuffle(asked)
        parts = told + asked
        room = max(self.length - sum(map(len, parts)) - 2, 0)
        filler = self._text(draw, draw.randint(0, room))
        cuts = sorted(draw.randint(0, len(filler)) for _ in parts)
        made: list[int] = []
        for part, start, end in zip(parts, [0, *cuts], cuts, strict=False):
            made += filler[start:end] + part
        return made
