"""Generation and scoring of prompts that share a long prefix, with one key/value cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .models import cache_option
from .progress import Progress, announce, measure_pace, work


class PrefixCachingModel:
    """Generation and scoring of long prompts that reuse the key/value cache of a common prefix.

    Args:
        model, tokenizer: the model must not change while the cache is in use.
        chunk: tokens a forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chunk: int = 512
    ) -> None:
        self.model: Any = model
        self.tokenizer, self.chunk = tokenizer, chunk
        self._cache = DynamicCache(config=model.config)
        self._ids = torch.empty(0, dtype=torch.long)

    @torch.inference_mode()
    def generate(self, prompt: str, tokens: int, progress: Progress | None = None) -> str:
        """Greedy continuation of ``prompt`` by at most ``tokens`` tokens."""
        ids = self._encode(prompt)
        # Without the last token: generate() needs its logits.
        self._prefill(ids[:-1], progress)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id or 0,
        )
        batch = ids[None].to(self.model.device)
        with self._temporary_cache() as cache:
            out = self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                **cache_option(self.model, cache),
                generation_config=greedy,
            )
        return str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    @torch.inference_mode()
    def log_probabilities(
        self, prompt: str, continuations: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        """Natural log-probability of each continuation, after a space, given ``prompt``."""
        whole = [self._encode(f"{prompt} {c}") for c in continuations]
        # A tokenizer may merge the end of the prompt with the continuation: score from the first token that differs.
        shared = min(common_prefix(w, self._encode(prompt)) for w in whole)
        self._prefill(whole[0][: shared - 1], progress)
        rests = [ids[shared - 1 :].to(self.model.device) for ids in whole]
        result = []
        for rest, logits in zip(rests, self._logits([rest[:-1] for rest in rests]), strict=True):
            chosen = logits.float().log_softmax(-1).gather(1, rest[1:, None])
            result.append(chosen.double().sum().item())
        return result

    def _logits(self, continuations: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Logits ``[S, vocabulary]`` of each continuation ``[S]`` of what is in the cache."""
        if not self._takes_masks:
            for ids in continuations:
                with self._temporary_cache() as cache:
                    out = self.model(ids[None], **cache_option(self.model, cache), use_cache=True)
                yield out.logits[0]
            return
        # All in one pass, none of which sees another: a long cache, and not few tokens, is what takes the time.
        past, sizes = len(self._ids), [len(ids) for ids in continuations]
        tokens, device = torch.cat(list(continuations)), self.model.device
        positions = torch.cat([torch.arange(past, past + size, device=device) for size in sizes])
        own = torch.block_diag(*(torch.ones(size, size, device=device).tril() for size in sizes))
        sees = torch.cat([own.new_ones(sum(sizes), past), own], 1).bool()
        mask = torch.where(sees, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        with self._temporary_cache() as cache:
            out = self.model(
                tokens[None],
                attention_mask=mask[None, None],
                position_ids=positions[None],
                **cache_option(self.model, cache),
                use_cache=True,
            )
        yield from out.logits[0].split(sizes)

    @property
    def _takes_masks(self) -> bool:
        """Whether attention takes a mask of queries and keys; a sliding window would count other continuations."""
        return not self._slides and self.model.config._attn_implementation in ("sdpa", "eager")

    def prefill_work(self, prompt: str) -> float:
        """The :func:`work` of the part of ``prompt`` that is not in the key/value cache."""
        ids = self._encode(prompt)
        return work(self.model, self._reusable(ids), len(ids))

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, verbose=False).input_ids)

    def _prefill(self, ids: torch.Tensor, progress: Progress | None) -> None:
        """Fill the cache with exactly ``ids [S]``."""
        self._crop(self._reusable(ids))
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

    def _reusable(self, ids: torch.Tensor) -> int:
        """Number of tokens of ``ids`` whose keys and values in the cache are taken."""
        common = common_prefix(self._ids, ids)
        # Tokens behind others that are cached need a mask, and then attention computes what it hides too. All of them
        # in one pass need none: twice as fast for half of a long prompt and more.
        anew = common < len(ids) / 2 and len(ids) <= self.chunk
        return 0 if anew or (self._slides and common < len(self._ids)) else common

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
        # A sliding-window layer has dropped the first tokens, so that its cache cannot be cropped.
        return any(getattr(layer, "is_sliding", True) for layer in self._cache.layers)

    @contextmanager
    def _temporary_cache(self) -> Iterator[DynamicCache]:
        """The key/value cache; tokens that are added to it are removed on exit."""
        if self._slides:
            yield copy.deepcopy(self._cache)
            return
        yield self._cache
        self._cache.crop(len(self._ids) - self._cache.get_seq_length())


def common_prefix(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the common prefix of two sequences of tokens."""
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return int(different[0]) if len(different) else n


def announce_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[str]]
) -> None:
    """Print the estimated time of the ``prompts`` of each variant, without the prefixes that they share."""
    if not any(prompts):
        return
    pace, seconds = measure_pace(model), 0.0
    for of_variant in prompts:
        before = torch.empty(0, dtype=torch.long)
        for prompt in of_variant:
            ids = torch.tensor(tokenizer(prompt, verbose=False).input_ids)
            seconds += pace.seconds(len(ids), common_prefix(before, ids))
            before = ids
    announce(seconds)
