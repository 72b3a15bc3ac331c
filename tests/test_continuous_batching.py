"""Continuous batching of transformers, which keeps the keys of several texts in pages of one cache."""

from contextlib import nullcontext

import pytest
import torch

import rope_dist


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
        model.set_attn_implementation("sdpa")  # transformers 5.6 leaves the paged one
        return [(one.generated_tokens, one.error) for one in made.values()]

    return generate


def test_a_static_plan_is_read_as_by_stock(batch, make_llama):
    model = make_llama(initializer_range=0.2)
    unextended = batch(model)
    rope_dist.enable(model, factor=2, dynamic=False)
    stock = type(model)(model.config).eval()  # which has the plan's factors
    stock.load_state_dict(model.state_dict())
    extended = batch(model)
    assert extended == batch(stock)
    assert [len(tokens) for tokens, _ in extended] == [12, 12]
    assert extended != unextended


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_dynamic_plan_is_read_by_its_last_stage(batch, make_llama, compiled):
    """Whatever stage is in force: pages hold the keys of several texts, which are not corrected."""
    model, static = make_llama(initializer_range=0.2), make_llama(initializer_range=0.2)
    short = torch.arange(3, 43)[None]
    trained = model(short).logits
    plan = rope_dist.enable(model, factor=2, dynamic=True).plan
    rope_dist.enable(static, plan=plan.stages[-1])
    expected = batch(static, compiled)
    for _ in range(2):
        assert torch.equal(model(short).logits, trained)
        with nullcontext() if compiled else pytest.warns(UserWarning, match="last stage.* for 128 tokens"):
            assert batch(model, compiled) == expected
    assert torch.equal(model(short).logits, trained)
