"""Every rotary language model type of the installed transformers: enabled it is stock, to the last bit of float32.

But for sums of squares, which a norm + rotary kernel adds in an order of its own: there to 1e-5.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.stock import classes
from helpers.tiny_models import MULTIMODAL, NOT_BUILT, ROTARY_TYPES, tiny_model, tiny_multimodal

import rope_dist
from rope_dist.hf import enabled_modules, projecting, reporting

ROOT = Path(__file__).resolve().parent.parent
REFUSED = {name: "made once for a fixed length" for name in ("codegen", "gptj") if name in ROTARY_TYPES}
"""Types that enable() does not take, and words of the reason."""
TYPES = [name for name in ROTARY_TYPES if name not in (*REFUSED, *NOT_BUILT)]
COMPLEX = ("deepseek_v2", "llama4", "llama4_text")
"""Types that multiply complex numbers: torch's products may be fused with the sums, by processor and by strides."""
IDS = torch.randint(
    3, 90, (2, 24), generator=torch.Generator().manual_seed(1)
)  # past the sliding windows of 16

pytestmark = [
    pytest.mark.usefixtures("stock_again", "one_thread"),
    # Of transformers' own code, in models that few run.
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
]


@pytest.fixture
def projected_at_once(monkeypatch):
    """Projections and rotation in one call wherever a model's code allows it, in float32 on the CPU too."""
    for module in (projecting, reporting):
        monkeypatch.setattr(module, "why_not_fused", lambda attention, x: None)


def equal(name, enabled, found, expected):
    """What ``enabled`` computes, and stock."""
    if name in COMPLEX or paths(enabled) & {"norm + rotary", "projection + norm + rotary"}:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def paths(model):
    return {layer.path for layer in rope_dist.report(model)} - {"untouched"}


def both(name, **options):
    """A stock model and the same one enabled."""
    stock = tiny_model(name, **options)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    return stock, enabled


def generated(model):
    """Six tokens after a padded batch, with the cache, and their logits."""
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, output_logits=True, eos_token_id=None,
        return_dict_in_generate=True, pad_token_id=0, disable_compile=True,
    )  # fmt: skip


def gradients(model):
    model.train()
    torch.manual_seed(5)  # some drop out
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_logits(name, attention):
    stock, enabled = both(name, attn_implementation=attention)
    assert list(enabled_modules(enabled))
    equal(name, enabled, enabled(IDS).logits, stock(IDS).logits)
    rope_dist.disable(enabled)
    assert classes(enabled) == classes(stock)
    assert torch.equal(enabled(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_decoding_with_left_padding(name):
    stock, enabled = both(name)
    a, b = generated(stock), generated(enabled)
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        equal(name, enabled, y, x)


@pytest.mark.parametrize("name", TYPES)
def test_loss_and_gradients(name):
    stock, enabled = both(name)
    (a, expected), (b, found) = gradients(stock), gradients(enabled)
    equal(name, enabled, b, a)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        # Autograd sums a rotated pair's two contributions in another order.
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", TYPES)
def test_projections_and_rotation_in_one_call(name, projected_at_once):
    stock, enabled = both(name)
    # An indexer has one projection of its queries, whatever its attention has.
    layers = [layer for layer in rope_dist.report(enabled) if not layer.name.endswith(".indexer")]
    taken = {layer.path for layer in layers} - {"untouched"}
    if name != "nemotron":  # before transformers 5.17 it has a class for each attention function
        assert taken == {rope_dist.supported(name)[name].path}
    if not taken & {"projection + rotary", "projection + norm + rotary"}:
        assert all(layer.reason for layer in rope_dist.report(enabled))
        return
    with torch.no_grad():
        equal(name, enabled, enabled(IDS).logits, stock(IDS).logits)
    (a, expected), (b, found) = (gradients(model) for model in (stock, enabled))
    equal(name, enabled, b, a)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_bfloat16(name):
    """The same dtype, and about as far from float32 as stock: other rounding is the greater part."""
    exact = tiny_model(name, dtype=torch.bfloat16).float()(IDS).logits
    model = tiny_model(name, dtype=torch.bfloat16)
    stock = model(IDS).logits
    rope_dist.enable(model)
    ours = model(IDS).logits
    assert ours.dtype == stock.dtype
    error, limit = ((logits.float() - exact).square().mean().sqrt() for logits in (ours, stock))
    assert error <= 1.5 * limit  # a few thousand logits: their mean error varies by a quarter


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_extended_saved_and_read_by_stock(name, tmp_path):
    model = tiny_model(name)
    own = model(IDS).logits
    if not extend(model):
        assert classes(model) == classes(tiny_model(name))
        return
    extended = model(IDS).logits
    assert not torch.allclose(extended, own, atol=1e-4)
    model.save_pretrained(tmp_path)
    rope_dist.disable(model)
    assert torch.equal(model(IDS).logits, own)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, extended, rtol=1e-5, atol=1e-5)


NO_PLAN = (
    "there is nothing to extend",
    "layers of Granite",
    "this version of transformers",
    "cannot run this plan in BambaConfig",  # before transformers 5.17 its configs reload as partial by half
)
"""Words of the reasons for which a model's frequencies cannot be planned; test_model_types.py has each."""


def extend(model):
    """Extend ``model`` fourfold; False where that is refused for one of the known reasons."""
    try:
        rope_dist.enable(model, factor=4, dynamic=False)
    except ValueError as error:
        if not any(words in str(error) for words in NO_PLAN):
            raise
        return False
    return True


@pytest.mark.skipif("granite_swa" not in TYPES, reason="this transformers has no granite_swa")
@torch.no_grad()
def test_a_rotary_embedding_with_a_copy_of_the_config(tmp_path):
    model = tiny_model("granite_swa", layer_rope_theta=[10000.0, 0.0, 10000.0])
    assert model.model.rotary_embs[0].config is not model.config
    before = copy.deepcopy(model)
    assert extend(model)
    extended = model(IDS).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        type(model).from_pretrained(tmp_path)(IDS).logits, extended, rtol=1e-5, atol=1e-5
    )
    rope_dist.disable(model)
    assert torch.equal(model(IDS).logits, before(IDS).logits)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    model = tiny_model(name)
    before = classes(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        rope_dist.enable(model)
    assert classes(model) == before


@pytest.mark.parametrize("name", MULTIMODAL)
@torch.no_grad()
def test_the_language_model_of_a_multimodal_model(name, tmp_path):
    model = tiny_multimodal(name)
    before = dict(zip((n for n, _ in model.named_modules()), classes(model), strict=True))
    own = model(IDS).logits
    rope_dist.enable(model)
    equal(name, model, model(IDS).logits, own)
    changed = [n for n, module in model.named_modules() if type(module) is not before[n]]
    assert changed
    assert not [n for n in changed if "vision" in n or "visual" in n]
    if not extend(model):
        return
    extended = model(IDS).logits
    assert not torch.allclose(extended, own, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, extended, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MULTIMODAL if name.startswith(("qwen", "glm4v"))])
@torch.no_grad()
def test_positions_in_time_height_and_width(name):
    stock = tiny_multimodal(name)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    axes = torch.tensor([1, 2, 5])[:, None, None]
    positions = (torch.arange(IDS.shape[1]) * axes).expand(3, 2, -1)
    expected = stock(IDS, position_ids=positions).logits
    assert not torch.allclose(expected, stock(IDS).logits, atol=1e-4)
    equal(name, enabled, enabled(IDS, position_ids=positions).logits, expected)


@pytest.mark.skipif("gptj" not in REFUSED, reason="before 5.24 GPT-J has no rotary embedding of its own")
def test_a_global_enable_leaves_what_it_does_not_know(tmp_path):
    tiny_model("gptj").save_pretrained(tmp_path)
    with rope_dist.enable():
        with pytest.warns(
            UserWarning, match="GPTJForCausalLM is left as it is: .*made once for a fixed length"
        ):
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not list(enabled_modules(model))


def test_the_page_of_models():
    """docs/models.md has what supported() says."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip(f"docs/models.md is of another transformers than {transformers.__version__}")
    rows = re.findall(r"^\| `(\S+)` +\| ([^|]*?) +\| [^|]*\| ([^|]*?) *\|", page, re.M)
    written = {name: (path, dynamic) for name, path, dynamic in rows}
    found = rope_dist.supported().items()
    assert written == {name: (one.path, "" if one.why_static else "yes") for name, one in found}
