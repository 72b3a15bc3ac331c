"""Dynamic plans under torch.compile: one graph for all stages, the correction of cached keys outside of it."""

import copy

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import rope_dist
from rope_dist.evaluation.models import cache_option

TRAINED, TOKENS, PROMPT = 32, 56, 24


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, max_position_embeddings=TRAINED,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rope_dist.enable(model, factor=2, dynamic=True)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def decode(model, call, ids, prepare=False):
    """Logits of every token after the prompt, one at a time with a static cache, and the cache."""
    cache = StaticCache(config=model.config, max_cache_len=2 * TRAINED)
    logits = []
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], **cache_option(model, cache))
        for i in range(PROMPT, ids.shape[1]):
            if prepare:
                rope_dist.prepare_cache(model, cache, 1)
            logits.append(call(input_ids=ids[:, i : i + 1], **cache_option(model, cache)).logits)
    return torch.cat(logits, dim=1), cache


def test_one_graph_decodes_through_every_stage(model, ids):
    expected, grown = decode(model, model, ids)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    logits, cache = decode(model, compiled, ids, prepare=True)
    assert graphs.count == 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.layers[0].keys, grown.layers[0].keys, atol=1e-6, rtol=0)


def test_a_graph_of_the_whole_model_says_what_it_needs(model, ids):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="prepare_cache"):
        decode(model, compiled, ids)


def test_graphs_with_a_break_prepare_themselves(model, ids):
    ids = ids[:, :40]
    expected, grown = decode(model, model, ids)
    logits, cache = decode(model, torch.compile(model, backend="eager"), ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(cache.layers[0].keys, grown.layers[0].keys, atol=1e-6, rtol=0)


def test_generate_prepares_what_it_compiles(model, ids):
    prompt = ids[:1, :PROMPT]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(prompt, **options)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # generate() compiles for accelerators only
    done = model.generate(prompt, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(done.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(done.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


def test_training_by_the_length_of_the_batch(model):
    plan = rope_dist.enable(model).plan
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (20, 40, 64):
        static = copy.deepcopy(model)
        rope_dist.disable(static)
        rope_dist.enable(static, plan=plan.at(length))
        batch = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))
        for one in (compiled, static):
            one(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        grad = [m.model.layers[0].self_attn.k_proj.weight.grad for m in (model, static)]
        torch.testing.assert_close(*grad, atol=1e-7, rtol=1e-5)
        model.zero_grad()
