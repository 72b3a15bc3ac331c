"""A LLaMA whose answers are known."""

import torch
from transformers import LlamaForCausalLM

from rope_dist.evaluation.models import cache_option


class PlantedLlama(LlamaForCausalLM):
    """A LLaMA that reads and caches as any other, but whose logits are of ``next_letter(text so far)``.

    The text so far of a token is what the causal order, or a mask ``[1, 1, S, T]``, lets it see.
    """

    def forward(self, input_ids, cache=None, past_key_values=None, attention_mask=None, **options):
        cache = cache if cache is not None else past_key_values
        past = cache.get_seq_length()
        options["attention_mask"] = attention_mask
        out = super().forward(input_ids, **cache_option(super(), cache), **options)
        self.seen = [*getattr(self, "seen", [])[:past], *input_ids[0].tolist()]
        tokens, kept = len(self.seen), out.logits.shape[1]
        assert tokens == cache.get_seq_length()
        sees = torch.ones(input_ids.shape[1], tokens, dtype=torch.bool).tril(past)
        if attention_mask is not None and attention_mask.ndim == 4:
            sees = attention_mask[0, 0] > -1
        out.logits = torch.zeros_like(out.logits)
        for i, row in enumerate(sees[-kept:].tolist()):
            text = "".join(chr(letter) for letter, seen in zip(self.seen, row, strict=True) if seen)
            out.logits[0, i, ord(self.next_letter(text))] = 10
        return out
