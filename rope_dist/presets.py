"""Published rotary embeddings of well-known models, so that planning needs no download.

The numbers are those of each model's ``config.json`` on the Hugging Face Hub.
"""

from __future__ import annotations

from .strategies import PretrainedRope, llama3


def _llama3_1() -> PretrainedRope:
    # Llama 3.1 was trained with its own scaling in place: pre-trained at 8192, factor 8, read to 131072.
    base = PretrainedRope(theta=500000.0, rotary_dim=128, length=8192)
    factors = llama3(base, 131072, factor=8.0).factors.float().tolist()
    return PretrainedRope(theta=500000.0, rotary_dim=128, length=131072, factors=tuple(factors))


_LLAMA2 = PretrainedRope(theta=10000.0, rotary_dim=128, length=4096)

PRESETS: dict[str, PretrainedRope] = {
    "llama2-7b": _LLAMA2,
    "llama2-13b": _LLAMA2,
    "llama2-70b": _LLAMA2,
    "llama3-8b": PretrainedRope(theta=500000.0, rotary_dim=128, length=8192),
    "llama3.1-8b": _llama3_1(),
    "mistral-7b": PretrainedRope(theta=1000000.0, rotary_dim=128, length=32768),
    "qwen2.5-7b": PretrainedRope(theta=1000000.0, rotary_dim=128, length=32768),
    "smollm2-135m": PretrainedRope(theta=100000.0, rotary_dim=64, length=8192),
}
"""Preset -> its rotary embedding; the repositories are in :data:`rope_dist.defaults.PRESETS`."""
