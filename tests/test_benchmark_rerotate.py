"""The byte counts of benchmarks/rerotate.py, against those of stock models."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import rerotate
from benchmarks.harness import Case, Implementation, measure
from benchmarks.shapes import SHAPES

NAMES = ("Llama-3-8B", "LLaMA2-7B", "TinyLlama-1.1B")
"""Models whose output has weights of its own."""


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_decoded_token_are_those_of_the_stock_model(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = SHAPES[name]
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads, num_key_value_heads=shape.k_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    parameters = {key: value.numel() for key, value in model.named_parameters()}
    weights = sum(parameters.values()) - parameters["model.embed_tokens.weight"]
    assert rerotate.decoded_token_bytes(shape, 0) == 2 * weights
    cache = transformers.DynamicCache()
    keys = torch.empty(1, shape.k_heads, 1000, shape.head_dim, dtype=torch.bfloat16, device="meta")
    for layer in range(config.num_hidden_layers):
        cache.update(keys, keys, layer)
    both = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert rerotate.decoded_token_bytes(shape, 1000) == 2 * weights + both
    # Keys are read and written, which are as many bytes as keys and values.
    assert rerotate.correction_bytes(shape, 1000) == both


def test_a_correction_of_an_8b_cache_at_16k_is_less_than_two_decoded_tokens():
    """Llama 3.1 8B: 7.5e9 weights are read, and 2 * 32 * 8 * 128 numbers a cached token."""
    shape, tokens = SHAPES["Llama-3-8B"], 16384
    assert rerotate.correction_bytes(shape, tokens) == 2 * 32 * 16384 * 8 * 128 * 2 == 2_147_483_648
    assert rerotate.decoded_token_bytes(shape, tokens) == pytest.approx(15.01e9 + 2.147e9, rel=1e-3)
    assert rerotate.decoded_tokens(shape, tokens) == pytest.approx(0.125, abs=5e-4)
    # As many keys as values are read with each token: whatever the length it stays below one.
    assert all(rerotate.decoded_tokens(shape, n) < 1 for n in (1, 8192, 131072, 10**9))
    assert "2.15 GB in bf16, 0.13 of what one decoded token reads (17.2 GB)" in rerotate.remark(shape, tokens)


def test_a_remark_is_in_every_row():
    case = Case(
        name="ones",
        inputs=lambda: torch.ones(4),
        implementations=lambda _: [Implementation("sum", lambda x: lambda: [x + x])],
        remark="ones are added",
    )
    assert [row["remark"] for row in measure(case, torch.device("cpu"), seconds=0.1)] == ["ones are added"]
