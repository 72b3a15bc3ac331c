"""A LLaMA whose answers are known."""

import torch
from transformers import LlamaForCausalLM

from rope_dist.evaluation.models import cache_option


class PlantedLlama(LlamaForCausalLM):
    """A LLaMA that reads and caches as any other, but whose logits are of ``next_letter(text so far)``."""

    def forward(self, input_ids, cache=None, past_key_values=None, **options):
        cache = cache if cache is not None else past_key_values
        past = cache.get_seq_length()
        out = super().forward(input_ids, **cache_option(super(), cache), **options)
        self.seen = [*getattr(self, "seen", [])[:past], *input_ids[0].tolist()]
        assert len(self.seen) == cache.get_seq_length()
        kept = out.logits.shape[1]
        out.logits = torch.zeros_like(out.logits)
        for i in range(kept):
            text = "".join(map(chr, self.seen[: len(self.seen) - kept + i + 1]))
            out.logits[0, i, ord(self.next_letter(text))] = 10
        return out
