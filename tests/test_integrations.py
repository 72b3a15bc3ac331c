"""The ways in which models are run: each computes what stock does, and the report says what each layer does."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.model_families import model_of
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rope_dist
from rope_dist import ops
from rope_dist.cli import main
from rope_dist.evaluation.models import cache_option

NAMES = ("Llama", "Mistral", "Qwen2")


@pytest.fixture(autouse=True)
def stock_again():
    yield
    rope_dist.disable()


@pytest.fixture
def ids():
    return torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A stock model, and the same one extended: both read with the plan's frequencies."""
    stock = model_of(name)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    return stock, enabled


GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 5},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_generation(name, options, ids):
    ids = ids[:1] if "prompt_lookup_num_tokens" in options else ids
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("the offloaded cache needs a GPU")
    sequences = []
    for model in pair(name):
        torch.manual_seed(3)
        sequences.append(model.generate(ids, **{**GENERATE, **options}))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("name", NAMES)
def test_assisted_generation(name, ids):
    """The assistant proposes, the model verifies several tokens at once."""
    stock, enabled = pair(name)
    assistant = model_of(name, num_hidden_layers=1)
    expected = stock.generate(ids[:1], **GENERATE)
    with rope_dist.enable(assistant):
        assert torch.equal(enabled.generate(ids[:1], assistant_model=assistant, **GENERATE), expected)


@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_from_a_cache(name, ids):
    stock, enabled = pair(name)
    states = []
    for model in (stock, enabled):
        option = cache_option(model, DynamicCache(config=model.config))
        model(ids[:, :15], **option)
        states.append(model(ids[:, 15:], **option).logits)
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_training(name, ids):
    losses = []
    for model in pair(name):
        torch.compiler.reset()
        step = torch.compile(
            lambda ids, model=model: model(ids, labels=ids, use_cache=False).loss, backend="aot_eager"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            loss = step(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(step(ids))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_attention_functions_get_heads_without_a_copy(ids):
    """flash-attention wants [B, S, H, D]: what it makes of ``[B, H, S, D]`` by transposing must be contiguous."""
    seen = []

    def probe(module, query, key, value, attention_mask, **options):
        seen.append([x.transpose(1, 2).is_contiguous() for x in (query, key, value)])
        assert options["cu_seq_lens_q"] is bounds
        return torch.zeros(*query.transpose(1, 2).shape), None

    ALL_ATTENTION_FUNCTIONS.register("probe", probe)
    bounds = torch.tensor([0, 24], dtype=torch.int32)
    model = model_of("Llama")
    rope_dist.enable(model)
    model.set_attn_implementation("probe")
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            model(ids[:1], use_cache=False, cu_seq_lens_q=bounds)
    assert seen == [[True] * 3] * 4


@pytest.mark.parametrize("seen_by", [None, "gradients", "a hook", "every hook"])
def test_rotated_in_place_where_nobody_can_see_it(ids, seen_by, monkeypatch):
    stock, enabled = pair("Llama")
    projection = enabled.model.layers[0].self_attn.q_proj
    places, outputs, hooks = [], [], []

    def rotary(q, k, cos, sin, *, interleaved, inplace):
        places.append(inplace)
        return rotate(q, k, cos, sin, interleaved=interleaved, inplace=inplace)

    def keep(module, arguments, output):
        if module is projection:
            outputs.append((output, output.clone()))

    rotate = ops.rotary
    monkeypatch.setattr(ops, "rotary", rotary)
    if seen_by == "a hook":
        hooks.append(projection.register_forward_hook(keep))
    if seen_by == "every hook":
        hooks.append(nn.modules.module.register_module_forward_hook(keep))
    try:
        with torch.set_grad_enabled(seen_by == "gradients"):
            assert torch.equal(enabled(ids).logits, stock(ids).logits)
    finally:
        for hook in hooks:
            hook.remove()
    # The hook is on the first of two layers.
    assert places == {None: [True, True], "a hook": [False, True]}.get(seen_by, [False, False])
    assert all(torch.equal(output, before) for output, before in outputs)
    assert len(outputs) == len(hooks)


def test_offloaded_to_the_cpu(ids):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of("Llama")
    expected = model(ids).logits
    rope_dist.enable(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(ids).logits, expected)
    with ops.use_backend("triton"):
        assert {layer.path for layer in rope_dist.report(model)} == {"rotary"}


def test_offloaded_before_it_is_enabled(ids, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of("Llama")
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    rope_dist.enable(model)
    assert torch.equal(model(ids).logits, expected)
    rope_dist.disable(model)
    assert torch.equal(model(ids).logits, expected)


def test_device_map_with_a_layer_on_disk(ids, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of("Llama")
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with rope_dist.enable():
        split = type(model).from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert split.model.layers[1].self_attn.q_proj.weight.is_meta
        assert torch.equal(split(ids).logits, expected)
        with ops.use_backend("triton"):
            layers = rope_dist.report(split, dtype=torch.bfloat16)
    assert layers[1].path == "rotary"


def test_a_part_of_a_sequence_is_rotated_by_its_own_positions(ids):
    """Context parallelism: a rank holds a first and a last piece of the text, and hands their positions over."""
    seen = []

    def probe(module, query, key, value, attention_mask, **options):
        seen.append((query, key))
        return torch.zeros(*query.transpose(1, 2).shape), None

    ALL_ATTENTION_FUNCTIONS.register("parts", probe)
    stock, enabled = pair("Llama")
    positions = torch.arange(24)[None]
    mine = torch.cat((torch.arange(6), torch.arange(18, 24)))
    for model in (stock, enabled):
        model.set_attn_implementation("parts")
    stock(ids, position_ids=positions, use_cache=False)
    enabled(ids[:, mine], position_ids=positions[:, mine], use_cache=False)
    for whole, part in zip(seen[0], seen[2], strict=True):
        torch.testing.assert_close(part, whole[:, :, mine], rtol=1e-5, atol=1e-5)


def test_quantised_projections_stay_their_own(ids):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    stock, enabled = pair("Llama")
    for model in (stock, enabled):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert torch.equal(enabled(ids).logits, stock(ids).logits)
    with ops.use_backend("triton"):
        layer, _ = rope_dist.report(enabled, dtype=torch.bfloat16)
    assert layer.path == "rotary"
    assert layer.reason.startswith("q_proj: its weight is not a plain tensor")


class Adapted(nn.Module):
    """A projection with a low-rank part beside it, as adapters are."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_the_report_follows_the_model():
    model = model_of("Llama", dtype=torch.bfloat16)
    enabled = rope_dist.enable(model)
    attention = model.model.layers[1].self_attn
    with ops.use_backend("triton"):
        assert [layer.path for layer in enabled.report()] == ["projection + rotary"] * 2
        plain = attention.v_proj
        attention.v_proj = Adapted(plain)
        assert [layer.reason for layer in enabled.report()] == [
            "",
            "v_proj: not a plain nn.Linear (an adapter or quantised)",
        ]
        attention.v_proj = plain
        hook = plain.register_forward_hook(lambda *_: None)
        assert enabled.report()[1].reason == "v_proj: it has hooks"
        hook.remove()
        assert enabled.report()[1].reason == ""
        assert "float16 and bfloat16" in rope_dist.report(model, dtype=torch.float32)[0].reason
    assert rope_dist.report(nn.Linear(2, 2)) == []


def test_info_reports_on_a_model(tmp_path, capsys):
    model_of("SmolLM3").config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "model.layers.0.self_attn" in text
    assert "untouched (the layer has no rotary embedding)" in text
    assert main(["info", str(tmp_path / "none")]) == 2
    assert "no such file or directory: " in capsys.readouterr().err
