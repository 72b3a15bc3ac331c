"""Continuous batching of transformers, which keeps the keys of several texts in pages of one cache."""

import pytest
import torch

import rope_dist

REFUSED = "for continuous batching enable a static plan (dynamic=False)"


@pytest.fixture
def answers(make_llama):
    """The new tokens of prompts of 60 and 20 tokens, or why there are none: ``answers(compiled, **plan)``."""
    from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

    def generate(compiled=False, **plan):
        model = make_llama(initializer_range=0.2)
        if plan:
            rope_dist.enable(model, **plan)
        prompts = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(0)).tolist()
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        options = {"num_blocks": 16, "max_batch_tokens": 64}
        if compiled:
            # Not one graph: transformers' paged cache breaks it.
            options["varlen_compile_config"] = CompileConfig(backend="eager", mode=None, fullgraph=False)
        batch = model.generate_batch(
            inputs=[prompts, prompts[:20]],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )
        alone = [
            model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
            for ids in (prompts, prompts[:20])
        ]
        return [(one.generated_tokens, one.error) for one in batch.values()], alone

    return generate


def test_a_static_plan_is_read_as_alone(answers):
    batch, alone = answers(factor=2)
    assert batch == [(tokens, None) for tokens in alone]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dynamic_plan_is_refused(answers, compiled):
    """One stage for all texts of a batch would be wrong for most, and keys in pages are not corrected."""
    batch, alone = answers(compiled, factor=2, dynamic=True)
    assert [len(tokens) for tokens in alone] == [12, 12]
    for tokens, error in batch:
        assert tokens == []
        assert REFUSED in error
