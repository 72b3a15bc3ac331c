"""An enabled LLaMA takes the fused projection where it may, and computes the same."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import rope_dist
from rope_dist import ops


@pytest.fixture
def model(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=64,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).to(device).eval()
    with rope_dist.enable(model):
        yield model


def run(model, ids, **options):
    """Logits, and how often the fused operator was called."""
    with mock.patch.object(ops, "qkv_rotary", wraps=ops.qkv_rotary) as fused:
        logits = model(ids, **options).logits
    return logits.float(), fused.call_count


@pytest.fixture
def ids(device):
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)


def test_same_logits_and_gradients_as_the_modules(model, ids):
    def loss_and_gradients():
        model.zero_grad()
        logits, count = run(model, ids)
        logits.square().mean().backward()
        return logits.detach(), count, [p.grad.float().clone() for p in model.parameters()]

    with ops.use_backend("triton"):
        fused, fused_count, fused_grads = loss_and_gradients()
    with ops.use_backend("reference"):
        plain, plain_count, plain_grads = loss_and_gradients()
    assert (fused_count, plain_count) == (2, 0)
    assert (fused - plain).norm() < 0.02 * plain.norm()
    for grad, want in zip(fused_grads, plain_grads, strict=True):
        assert (grad - want).norm() < 0.05 * want.norm() + 1e-6


def test_generates_the_same(model, ids):
    with ops.use_backend("triton"):
        got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with ops.use_backend("reference"):
        want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)


class Wrapped(nn.Linear):
    """A linear layer of another type, as adapters and quantisers put in place."""


def replaced_forward(projection):
    projection.forward = lambda x: nn.functional.linear(x, projection.weight, projection.bias)


def other_type(projection):
    projection.__class__ = Wrapped


def hooked(projection):
    projection.register_forward_hook(lambda module, args, output: output)


def other_dtype(projection):
    projection.float()
    projection.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    projection.register_forward_hook(lambda module, args, output: output.bfloat16())


@pytest.mark.parametrize("change", [replaced_forward, other_type, hooked, other_dtype])
def test_a_projection_that_is_more_than_its_matrix_is_called(model, ids, change):
    with ops.use_backend("triton"):
        change(model.model.layers[0].self_attn.k_proj)
        logits, count = run(model, ids)
        assert count == 1
        assert logits.isfinite().all()


def test_autocast_is_left_to_the_modules(model, ids, device):
    with ops.use_backend("triton"), torch.autocast(device.type, torch.float16):
        assert run(model, ids)[1] == 0


def test_compiles_whole(model, ids):
    with ops.use_backend("triton"):
        want = model.model(ids).last_hidden_state
        compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
        got = compiled(ids).last_hidden_state
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        "glm4",
        "cohere2",
        "ernie4_5",
        "nanochat",
        "ministral3",
        "deepseek_v3",
        "llama4_text",
        "gemma4_text",
    ],
)
@torch.no_grad()
def test_other_forms_of_rotation(device, ids, name):
    """Half tables, interleaved and partial heads, the other direction, latent attention, complex tables, one tensor."""
    from helpers.tiny_models import ROTARY_TYPES, tiny_model

    if name not in ROTARY_TYPES:
        pytest.skip(f"this transformers has no {name}")
    model = tiny_model(name, dtype=torch.bfloat16).to(device)
    logits, counts = [], []
    with rope_dist.enable(model):
        layers = rope_dist.supported(name)[name]
        for backend in ("triton", "reference"):
            with ops.use_backend(backend):
                found, count = run(model, ids)
            logits.append(found)
            counts.append(count)
    assert (counts[0] > 0, counts[1]) == (layers.path == "projection + rotary", 0)
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[1].norm()


@pytest.fixture(params=["qwen3", "gemma3_text", "hunyuan_v1_dense"])
def normalising_model(request, device):
    """With norms of each head: before the rotation, of 1 + weight, and after it."""
    from helpers.tiny_models import ROTARY_TYPES, tiny_model

    if request.param not in ROTARY_TYPES:
        pytest.skip(f"this transformers has no {request.param}")
    model = tiny_model(request.param).to(torch.bfloat16).to(device).eval()
    with rope_dist.enable(model):
        yield model


def test_norms_are_in_the_launch_of_the_projection(normalising_model, ids):
    model = normalising_model
    layers = len(rope_dist.report(model))
    with (
        ops.use_backend("triton"),
        mock.patch.object(ops, "qkv_norm_rotary", wraps=ops.qkv_norm_rotary) as fused,
        torch.no_grad(),
    ):
        assert {layer.path for layer in rope_dist.report(model)} == {"projection + norm + rotary"}
        got = model(ids).logits.float()
    assert fused.call_count == layers
    with ops.use_backend("reference"), torch.no_grad():
        assert {layer.path for layer in rope_dist.report(model)} == {"rotary"}
        want = model(ids).logits.float()
    assert (got - want).norm() < 0.02 * want.norm()


def test_gradients_of_norms_and_projections(normalising_model, ids):
    def gradients(backend):
        normalising_model.zero_grad()
        with ops.use_backend(backend):
            normalising_model(ids).logits.float().square().mean().backward()
        return [p.grad.float().clone() for p in normalising_model.parameters() if p.grad is not None]

    for grad, want in zip(gradients("triton"), gradients("reference"), strict=True):
        assert (grad - want).norm() < 0.05 * want.norm() + 1e-6
