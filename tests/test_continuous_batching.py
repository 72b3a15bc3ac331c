"""Continuous batching of transformers, which keeps the keys of several texts in pages of one cache."""

import pytest
import torch

import rope_dist

REFUSED = "for continuous batching enable a static plan (dynamic=False)"


@pytest.fixture
def batch():
    """The new tokens of texts of 60 and 20 tokens, and the error of each: ``batch(model, compiled=False)``."""
    from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

    def generate(model, compiled=False):
        ids = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(0)).tolist()
        options = {"num_blocks": 16, "max_batch_tokens": 64}
        if compiled:
            # Not one graph: transformers' paged cache breaks it.
            options["varlen_compile_config"] = CompileConfig(backend="eager", mode=None, fullgraph=False)
        made = model.generate_batch(
            inputs=[ids, ids[:20]],
            generation_config=GenerationConfig(
                max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )
        return [(one.generated_tokens, one.error) for one in made.values()]

    return generate


def test_a_static_plan_is_read_as_by_stock(batch, make_llama):
    model = make_llama(initializer_range=0.2)
    unextended = batch(model)
    rope_dist.enable(model, factor=2)
    stock = type(model)(model.config).eval()  # which has the plan's factors
    stock.load_state_dict(model.state_dict())
    extended = batch(model)
    assert extended == batch(stock)
    assert [len(tokens) for tokens, _ in extended] == [12, 12]
    assert extended != unextended


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dynamic_plan_is_refused(batch, make_llama, compiled):
    """One stage for all texts of a batch would be wrong for most, and keys in pages are not corrected."""
    model = make_llama()
    rope_dist.enable(model, factor=2, dynamic=True)
    for tokens, error in batch(model, compiled):
        assert tokens == []
        assert REFUSED in error
