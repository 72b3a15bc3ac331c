"""Models that normalise queries and keys: norm and rotation in one call, and when the norms are called as modules."""

from __future__ import annotations

import copy
import functools
import inspect
import sys

import pytest
import torch
import transformers
from helpers.stock import assert_stock, classes
from helpers.stock_copies import stock_copy, tiny
from helpers.tiny_models import ROTARY_TYPES, tiny_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rope_dist
from rope_dist import ops
from rope_dist.hf import projecting, reporting

IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(1))
NORM, ROTARY = "norm + rotary", "rotary"
# model type -> names of the norms
PER_HEAD = {
    "qwen3": ("q_norm", "k_norm"),
    "qwen3_moe": ("q_norm", "k_norm"),
    "gemma3_text": ("q_norm", "k_norm"),  # 1 + weight, heads before tokens
    "glm4_moe": ("q_norm", "k_norm"),  # under a condition; half of each head is rotated
    "hunyuan_v1_dense": ("query_layernorm", "key_layernorm"),  # after the rotation
    "lfm2": ("q_layernorm", "k_layernorm"),
    "exaone4": ("q_norm", "k_norm"),  # some layers without rotation
    "qwen3_next": ("q_norm", "k_norm"),  # queries with a gate
    "nanochat": ("q_norm", "k_norm"),  # without weights, after the rotation, by negative angles
}
JOINT = dict.fromkeys(("olmo2", "olmo3", "minimax_m2", "flex_olmo"), ("q_norm", "k_norm"))
FAMILIES = {name: norms for name, norms in {**PER_HEAD, **JOINT}.items() if name in ROTARY_TYPES}
FEW = [name for name in ("qwen3", "gemma3_text", "olmo2", "hunyuan_v1_dense") if name in FAMILIES]

pytestmark = [
    pytest.mark.usefixtures("stock_again", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
]
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture
def launches(monkeypatch):
    """Options of each call of ``ops.norm_rotary``, and of ``ops.rotary``."""
    found = {"norm_rotary": [], "rotary": []}

    def counted(name, function):
        def call(*arguments, **options):
            found[name].append(options)
            return function(*arguments, **options)

        return call

    for name in found:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return found


def both(name, **options):
    """A stock model and the same one enabled."""
    stock = tiny_model(name, **options)
    enabled = copy.deepcopy(stock)
    rope_dist.enable(enabled)
    return stock, enabled


def attentions(model):
    return [m for m in model.modules() if getattr(m, "norms", None) is not None and type(m).rotates(m)]


def paths(model):
    return [layer.path for layer in rope_dist.report(model) if layer.path != "untouched"]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_prefill(name, launches):
    stock, enabled = both(name)
    layers = len(attentions(enabled))
    assert layers > 0
    assert paths(enabled) == [NORM] * layers
    assert {(a.norms.q, a.norms.k) for a in attentions(enabled)} == {FAMILIES[name]}
    expected = stock(IDS, use_cache=False).logits
    close(enabled(IDS, use_cache=False).logits, expected)
    assert len(launches["norm_rotary"]) == layers
    assert not launches["rotary"]
    rope_dist.disable(enabled)
    assert_stock(enabled, stock)
    assert torch.equal(enabled(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_with_left_padding(name, launches):
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    found = []
    for model in both(name):
        found.append(
            model.generate(
                IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True,
                eos_token_id=None, return_dict_in_generate=True, pad_token_id=0, disable_compile=True,
            )
        )  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(*(one.logits for one in found), strict=True):
        close(b, a)
    assert not launches["rotary"]


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients(name, launches):
    results = []
    for model in both(name):
        model.train()
        torch.manual_seed(5)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, expected), (b, found) = results
    close(b, a)
    assert expected.keys() == found.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    if name != "nanochat":
        norms = [gradient for n, gradient in found.items() if n.split(".")[-2] in FAMILIES[name]]
        assert norms
        assert all(gradient.abs().max() > 0 for gradient in norms)
    assert launches["norm_rotary"]
    assert not any(options.get("inplace") for options in launches["norm_rotary"])


def heads_of(model, x):
    """Queries and keys of each layer, each given the same ``x``."""
    seen = []

    def keep(module, query, key, value, attention_mask, **options):
        seen.append(torch.cat([query.flatten(), key.flatten()]))
        return torch.zeros_like(query.transpose(1, 2), dtype=x.dtype), None

    ALL_ATTENTION_FUNCTIONS.register("keep", keep)
    model.config._attn_implementation = "keep"
    rotary = next(m for n, m in model.named_modules() if n.rpartition(".")[2] == "rotary_emb")
    forward = getattr(rotary, "stock", type(rotary)).forward
    positions = torch.arange(x.shape[1])[None]
    for module in model.modules():
        if any(hasattr(module, name) for name in ("q_norm", "query_layernorm", "q_layernorm")):
            kind = getattr(module, "layer_type", None)
            of_type = "layer_type" in inspect.signature(inspect.unwrap(forward)).parameters
            tables = rotary(x, positions, layer_type=kind) if of_type else rotary(x, positions)
            module(hidden_states=x, position_embeddings=tables, attention_mask=None)
    assert seen
    return torch.cat(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_16_bit_heads_are_no_farther_from_float64_than_stocks(name, dtype, launches):
    stock, enabled = both(name, dtype=dtype)
    exact = copy.deepcopy(stock).double()
    x = torch.randn(2, 24, stock.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = heads_of(exact, x.double())
    errors = []
    for model in (stock, enabled):
        heads = heads_of(model, x)
        assert heads.dtype == dtype
        errors.append((heads.double() - expected).square().mean().sqrt())
    assert launches["norm_rotary"]
    assert 0 < errors[1] <= errors[0]


class TestTheModuleIsCalled:
    """Where it is not what was recognised. Then everything is stock's, to the last bit of float32."""

    @pytest.fixture(params=FEW)
    def pair(self, request):
        return both(request.param)

    @staticmethod
    def norm_of(model, which="q"):
        first = next(m for m in model.modules() if hasattr(m, "q_norm") or hasattr(m, "query_layernorm"))
        name = next(n for n in (f"{which}_norm", "query_layernorm", "key_layernorm") if hasattr(first, n))
        return first, name, getattr(first, name)

    @staticmethod
    @torch.no_grad()
    def assert_called(stock, enabled, launches, words):
        """In the first layer."""
        launches["norm_rotary"].clear()
        expected = stock(IDS, use_cache=False).logits
        layers = rope_dist.report(enabled)
        assert layers[0].path == ROTARY
        assert words in layers[0].reason
        assert {layer.path for layer in layers[1:]} == {NORM}
        close(enabled(IDS, use_cache=False).logits, expected)
        assert len(launches["norm_rotary"]) == len(layers) - 1
        assert len(launches["rotary"]) == 1

    def test_with_a_hook(self, pair, launches):
        seen, handles = [], []
        for model in pair:
            _, name, norm = self.norm_of(model)
            handles.append(
                norm.register_forward_hook(
                    lambda module, inputs, output: (
                        seen.append((inputs[0], output, output.clone())) or output * 1.5
                    )
                )
            )
        self.assert_called(*pair, launches, f"{name}: it has hooks")
        (a, out_a, _), (b, out_b, kept) = seen
        assert torch.equal(a, b)
        assert a.shape == b.shape
        assert torch.equal(out_a, out_b)
        assert torch.equal(out_b, kept)
        for handle in handles:
            handle.remove()
        assert set(paths(pair[1])) == {NORM}

    def test_with_a_hook_before_it(self, pair, launches):
        for model in pair:
            self.norm_of(model, "k")[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        self.assert_called(*pair, launches, "it has hooks")

    def test_with_a_hook_on_every_module(self, pair, launches):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(type(module))
        )
        try:
            with torch.no_grad():
                logits = [model(IDS, use_cache=False).logits for model in pair]
        finally:
            handle.remove()
        assert torch.equal(*logits)
        assert seen.count(type(self.norm_of(pair[0])[2])) % 2 == 0
        assert not launches["norm_rotary"]

    def test_adapted(self, pair, launches):
        class Adapted(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base, self.scale = base, nn.Parameter(torch.tensor(1.5))

            def forward(self, x):
                return self.base(x) * self.scale

        for model in pair:
            attention, name, norm = self.norm_of(model)
            setattr(attention, name, Adapted(norm))
        self.assert_called(*pair, launches, "not a norm of a known form")

    def test_a_subclass(self, pair, launches):
        for model in pair:
            _, _, norm = self.norm_of(model)
            norm.__class__ = type("Other", (type(norm),), {"forward": lambda self, x: x * self.weight.mean()})
        self.assert_called(*pair, launches, "not a norm of a known form")

    def test_its_forward_replaced(self, pair, launches):
        """As Liger does, and accelerate where it offloads."""
        for model in pair:
            _, _, norm = self.norm_of(model)
            forward = norm.forward
            norm.forward = lambda x, forward=forward: forward(x) * 1.5
        self.assert_called(*pair, launches, "its forward has been replaced")

    def test_the_forward_of_its_class_replaced(self, pair, launches, monkeypatch):
        cls = type(self.norm_of(pair[0])[2])
        monkeypatch.setattr(cls, "forward", lambda self, x: x * self.weight.mean())
        with torch.no_grad():
            assert torch.equal(*(model(IDS, use_cache=False).logits for model in pair))
        assert not launches["norm_rotary"]
        assert "its forward has been replaced" in rope_dist.report(pair[1])[0].reason

    def test_two_eps(self, pair, launches):
        for model in pair:
            norm = self.norm_of(model)[2]
            name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
            setattr(norm, name, 0.5)
        self.assert_called(*pair, launches, "another eps")

    def test_its_weight_no_plain_tensor(self, pair, launches):
        class Sharded(nn.Parameter):
            pass

        norm = self.norm_of(pair[1])[2]
        norm.weight = Sharded(norm.weight.detach())
        self.assert_called(*pair, launches, "its weight is not a plain tensor")


@pytest.mark.parametrize(
    ("name", "path"),
    [("qwen3", ROTARY), ("gemma3_text", NORM), ("olmo2", NORM), ("hunyuan_v1_dense", ROTARY)],
)
@torch.no_grad()
def test_float32_norms_of_a_16_bit_model(name, path):
    """Stock's result is then float32 where the weight is multiplied last, and 16 bits where the product is rounded."""
    stock, enabled = both(name, dtype=torch.bfloat16)
    for model in (stock, enabled):
        for n, module in model.named_modules():
            if n.rpartition(".")[2] in FAMILIES[name]:
                module.float()
    assert set(paths(enabled)) == {path}
    x = torch.randn(2, 24, stock.config.hidden_size, dtype=torch.bfloat16)
    a, b = heads_of(stock, x), heads_of(enabled, x)
    assert a.dtype == b.dtype == (torch.float32 if path == ROTARY else torch.bfloat16)
    torch.testing.assert_close(b, a, rtol=0.02, atol=0.02)  # stock rounds cos and sin


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_autocast(name):
    stock, enabled = both(name)
    x = torch.randn(2, 24, stock.config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = heads_of(stock, x), heads_of(enabled, x)
    torch.testing.assert_close(b.float(), a.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("seen_by", [None, "gradients", "a hook"])
@pytest.mark.parametrize("name", ["qwen3", "olmo2", "qwen3_next"])
def test_in_place_where_nobody_can_see_it(name, seen_by, launches):
    stock, enabled = both(name)
    outputs = []
    for attention in attentions(enabled):
        if seen_by == "a hook":
            attention.k_proj.register_forward_hook(
                lambda m, i, output: outputs.append((output, output.clone()))
            )
    with torch.set_grad_enabled(seen_by == "gradients"):
        close(enabled(IDS).logits, stock(IDS).logits)
    # Half of what the gated projection returns is the gate.
    expected = seen_by is None and name != "qwen3_next"
    assert {options["inplace"] for options in launches["norm_rotary"]} == {expected}
    assert all(torch.equal(output, before) for output, before in outputs)


@torch.no_grad()
def test_without_norms_by_the_config(launches, monkeypatch):
    """GLM-4.5-Air has none: its projections may be in the launch."""
    stock, enabled = both("glm4_moe", use_qk_norm=False)
    assert torch.equal(enabled(IDS).logits, stock(IDS).logits)
    assert not launches["norm_rotary"]
    for module in (projecting, reporting):
        monkeypatch.setattr(module, "why_not_fused", lambda attention, x: None)
    assert set(paths(enabled)) == {"projection + rotary"}
    assert torch.equal(enabled(IDS).logits, stock(IDS).logits)


@torch.no_grad()
def test_norms_of_torch(launches):
    stock, enabled = both("qwen3")
    for model in (stock, enabled):
        torch.manual_seed(2)
        for module in model.modules():
            if hasattr(module, "q_norm"):
                for name in ("q_norm", "k_norm"):
                    norm = nn.RMSNorm(16, eps=1e-5)
                    nn.init.normal_(norm.weight, 1, 0.3)
                    setattr(module, name, norm)
    close(enabled(IDS).logits, stock(IDS).logits)
    assert len(launches["norm_rotary"]) == 2
    for module in enabled.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = None
    assert {layer.reason for layer in rope_dist.report(enabled)} == {"q_norm: its eps is not a number"}


@pytest.mark.filterwarnings("ignore")  # of torch, about what it compiles
@pytest.mark.parametrize("name", FEW)
def test_compiled(name):
    stock, enabled = both(name)
    torch.compiler.reset()
    compiled = torch.compile(enabled, fullgraph=True, backend="aot_eager")
    if name != "qwen3":
        with torch.no_grad():
            close(compiled(IDS, use_cache=False).logits, stock(IDS, use_cache=False).logits)
        return
    losses = [model(IDS, labels=IDS, use_cache=False).loss for model in (stock, compiled)]
    close(*losses)
    sum(losses).backward()
    for (parameter, a), (_, b) in zip(stock.named_parameters(), enabled.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2"])
@torch.no_grad()
def test_saved_checkpoints_are_stocks(name, tmp_path):
    stock, enabled = both(name)
    assert enabled.state_dict().keys() == stock.state_dict().keys()
    enabled.save_pretrained(tmp_path)
    loaded = type(stock).from_pretrained(tmp_path)
    assert classes(loaded) == classes(stock)
    assert torch.equal(loaded(IDS).logits, stock(IDS).logits)


# A model file of a future transformers: llama's, with norms of queries and keys.
MADE = (
    "self.o_proj = nn.Linear(",
    "self.q_norm = {0}(self.head_dim)\n        self.k_norm = {0}(self.head_dim)\n",
)
QUERIES = "self.q_proj(hidden_states).view(hidden_shape)"
KEYS = "self.k_proj(hidden_states).view(hidden_shape)"


def with_norms(norm="LlamaRMSNorm"):
    made = MADE[1].format(norm)
    return [
        (MADE[0], f"{made}        {MADE[0]}"),
        (QUERIES, f"self.q_norm({QUERIES})"),
        (KEYS, f"self.k_norm({KEYS})"),
    ]


NORM_LINE = "return self.weight * hidden_states.to(input_dtype)"
SQUARES = "hidden_states.pow(2).mean(-1, keepdim=True)"


class TestOtherNorms:
    @pytest.fixture
    def make_copy(self, tmp_path):
        made = []

        def make(*changes):
            made.append(stock_copy(tmp_path, *changes))
            return made[-1]

        yield make
        rope_dist.disable()
        for module in made:
            del sys.modules[module.__name__]

    @pytest.mark.parametrize(
        ("changes", "path"),
        [
            ([], NORM),
            ([("hidden_states = hidden_states * torch.rsqrt", "hidden_states = torch.rsqrt")], ROTARY),
            ([(SQUARES, SQUARES.replace("mean", "sum"))], ROTARY),
            ([(SQUARES, SQUARES.replace("-1", "-2"))], ROTARY),
            ([("variance + self.variance_epsilon", "variance")], ROTARY),
            ([(NORM_LINE, NORM_LINE.replace("self.weight *", "self.weight +"))], ROTARY),
            ([(NORM_LINE, f"{NORM_LINE} * 2")], ROTARY),
            ([(NORM_LINE, f"{NORM_LINE} * SCALE"), ("import torch\n", "import torch\n\nSCALE = 2\n")], ROTARY),
            ([("input_dtype = hidden_states.dtype", "dtype = hidden_states.dtype"),
              ("to(input_dtype)", "to(dtype)")], NORM),
        ],
        ids=["llama's", "not x", "a sum", "another axis", "no eps", "added", "a factor", "a factor of the file",
             "renamed"],
    )  # fmt: skip
    @torch.no_grad()
    def test_of_a_file(self, changes, path, make_copy, launches):
        model = tiny(make_copy(*with_norms(), *changes))
        for module in model.modules():
            if hasattr(module, "q_norm"):
                nn.init.normal_(module.q_norm.weight, 1, 0.3)
        expected = model(IDS % 60).logits
        rope_dist.enable(model)
        assert paths(model) == [path] * 2
        (close if path == NORM else functools.partial(close, rtol=0, atol=0))(
            model(IDS % 60).logits, expected
        )
        assert len(launches["norm_rotary"]) == (2 if path == NORM else 0)
        if path == ROTARY:
            assert {layer.reason for layer in rope_dist.report(model)} == {
                "queries and keys are normalised by LlamaRMSNorm, which is not a known RMS norm"
            }

    @torch.no_grad()
    def test_a_layer_norm(self, make_copy, launches):
        model = tiny(make_copy(*with_norms("nn.LayerNorm")))
        expected = model(IDS % 60).logits
        rope_dist.enable(model)
        assert torch.equal(model(IDS % 60).logits, expected)
        assert not launches["norm_rotary"]
        assert {layer.reason for layer in rope_dist.report(model)} == {
            "queries and keys are normalised by LayerNorm, which is not a known RMS norm"
        }

    def test_replaced_before_enable(self, make_copy, launches, monkeypatch):
        """As Liger does: the name in the model's file is another class."""
        module = make_copy(*with_norms())

        class LigerRMSNorm(nn.Module):
            def __init__(self, size, eps=1e-6):
                super().__init__()
                self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

            def forward(self, x):
                return 2 * nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

        monkeypatch.setattr(module, "LlamaRMSNorm", LigerRMSNorm)
        model = tiny(module)
        with torch.no_grad():
            expected = model(IDS % 60).logits
            rope_dist.enable(model)
            assert torch.equal(model(IDS % 60).logits, expected)
        assert not launches["norm_rotary"]
        assert "LigerRMSNorm" in rope_dist.report(model)[0].reason


def test_what_supported_says():
    for name in FAMILIES:
        # Queries and gates of Qwen3-Next are one projection.
        expected = NORM if name in JOINT or name == "qwen3_next" else "projection + norm + rotary"
        assert rope_dist.supported(name)[name].path == expected
    for name in ("cohere", "phi", "stablelm"):  # layer norms
        assert rope_dist.supported(name)[name].path == ROTARY
        assert "which is not a known RMS norm" in rope_dist.supported(name)[name].reason


def test_families_of_this_transformers():
    assert len(FAMILIES) > 10 or transformers.__version__ < "5.17"
