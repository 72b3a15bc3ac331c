"""What cached keys have of the rotation: in sources, and for every model type against keys of other frequencies."""

import ast
import inspect
import re

import pytest
import torch
from helpers.tiny_models import MULTIMODAL, NOT_BUILT, ROTARY_TYPES, tiny_model, tiny_multimodal
from transformers import DynamicCache

import rope_dist
from rope_dist import ops
from rope_dist.hf.cached_keys import CachedKeys, cached_layers, followed
from rope_dist.hf.finding import find
from rope_dist.hf.forms import Form, Unsupported

pytestmark = [
    pytest.mark.usefixtures("stock_again", "one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers"),
]

# --- sources -----------------------------------------------------------------------------------

FUNCTIONS = """
def whole(q, k, cos, sin, unsqueeze_dim=1):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

def part(q, k, cos, sin, unsqueeze_dim=1):
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    return torch.cat([rotate(q_rot), q_pass], dim=-1), torch.cat([rotate(k_rot), k_pass], dim=-1)

def neighbours(q, k, cos, sin, unsqueeze_dim=1):
    return whole(q, k, cos, sin)

def to_half(q, k, cos, sin, unsqueeze_dim=1):
    return whole(q, k, cos, sin)

def negative(q, k, cos, sin, unsqueeze_dim=1):
    return whole(q, k, cos, sin)

def one(x, cos, sin, unsqueeze_dim=1):
    return x * cos + rotate_half(x) * sin

def last(x, cos, sin, unsqueeze_dim=1):
    return torch.cat([x[..., :-cos.shape[-1]], one(x[..., -cos.shape[-1]:], cos, sin)], dim=-1)

def complex(xq, xk, freqs_cis):
    return xq * freqs_cis, xk * freqs_cis
"""
FORMS = {
    "whole": Form(),
    "part": Form(),
    "neighbours": Form("interleaved"),
    "to_half": Form("interleaved-to-half"),
    "negative": Form(negative=True),
    "one": Form(),
    "last": Form("interleaved", "once", last=True),
    "complex": Form("interleaved", "complex"),
}
ROTATE = "q, k = whole(q, k, cos, sin)"
UPDATE = "k, v = past.update(k, v, self.layer_idx)"
HALF, INTERLEAVED = CachedKeys(True, False), CachedKeys(True, True)
LAST = CachedKeys(False, False)


def read(*lines):
    """What is read in a method of these lines, after those that every attention has."""
    body = ["q, k, v = self.qkv(x)", "cos, sin = position_embeddings", *lines, "return self.attend(q, k, v)"]
    source = "def forward(self, x, position_embeddings, past=None):\n" + "\n".join(body)
    source = "\n    ".join(source.split("\n"))
    functions = {node.name: node for node in ast.parse(FUNCTIONS).body}
    return followed(ast.parse(source).body[0], FORMS, functions)


@pytest.mark.parametrize(
    ("expected", "lines"),
    [
        (HALF, [ROTATE, UPDATE]),
        (HALF, [ROTATE, "if past is not None:", "    " + UPDATE]),
        (HALF, ["q, k = part(q, k, cos, sin, unsqueeze_dim=2)", UPDATE]),
        (INTERLEAVED, ["q, k = neighbours(q, k, cos, sin)", UPDATE]),
        (HALF, ["q, k = to_half(q, k, cos, sin)", UPDATE]),
        (INTERLEAVED, ["q, k = complex(q, k, position_embeddings.to(q.device))", UPDATE]),
        # One tensor at a time, in any order, as soon as the keys are.
        (HALF, ["q = one(q, cos, sin)", "k = one(k, cos, sin, unsqueeze_dim=2)", UPDATE]),
        (HALF, ["k = one(k, cos, sin)", UPDATE, "q = one(q, cos, sin)"]),
        (CachedKeys(False, True), ["q = last(q, cos, sin)", "k = last(k, cos, sin)", UPDATE]),
        # Views, dtypes, and whatever is done to the queries.
        (HALF, [ROTATE, "k = k.transpose(1, 2).contiguous().to(v.dtype)", "q = q * self.scale", UPDATE]),
        (HALF, [ROTATE, "k = k.permute(0, 2, 1, 3)", UPDATE]),
        (HALF, [ROTATE, "q, k = q.to(v.dtype), k.to(v.dtype)", UPDATE]),
        # A part of each head.
        (HALF, ["a, b = k[..., :8], k[..., 8:]", "q, a = whole(q, a, cos, sin)", "k = torch.cat((a, b), dim=-1)",
                UPDATE]),
        (HALF, ["a, b = k.chunk(2, -1)", "q, a = part(q, a, cos, sin)", "k = torch.cat([a, b], -1).contiguous()",
                UPDATE]),
        (LAST, ["a, b = k.chunk(2, -1)", "q, b = whole(q, b, cos, sin)", "b = b.expand(*a.shape[:-1], -1)",
                "k = torch.cat((a, b), dim=-1)", UPDATE]),
        (LAST, ["a, b = k.chunk(2, -1)", "q, b = to_half(q, b, cos, sin)", "b = b.expand(-1, a.shape[1], -1, -1)",
                "k = torch.cat((a, b), dim=-1)", UPDATE]),
        # Latent attention caches what is not rotated as keys.
        (CachedKeys(True, False, "values"), [ROTATE, "v, k = past.update(v, k, self.layer_idx, kwargs=kwargs)"]),
        # Conditions of the attention itself.
        (CachedKeys(True, False, test="self.use_rope"), ["if self.use_rope:", "    " + ROTATE, UPDATE]),
        (CachedKeys(True, False, test="not self.skip"), ["if self.skip:", "    pass", "else:", "    " + ROTATE,
                                                         UPDATE]),
        (CachedKeys(True, False, test="self.a"), ["k = one(k, cos, sin) if self.a else k.contiguous()", UPDATE]),
        (CachedKeys(True, False, test="not self.shared"),
         ["if self.shared:", "    k, v = others", "else:", "    k = one(k, cos, sin)", "    " + UPDATE]),
        (CachedKeys(True, False, test="not self.shared"),
         ["if self.shared:", "    k, v = others", "else:", "    k = one(k, cos, sin)",
          "if past is not None and not self.shared:", "    " + UPDATE]),
        (HALF, ["if self.config.interleave:", "    q, k = to_half(q, k, cos, sin)", "else:", "    " + ROTATE, UPDATE]),
    ],
)  # fmt: skip
def test_followed(expected, lines):
    assert read(*lines) == expected


@pytest.mark.parametrize(
    ("reason", "lines"),
    [
        ("more is done after the rotation: self.k_norm(k)", [ROTATE, "k = self.k_norm(k)", UPDATE]),
        ("more is done after the rotation: k * self.scale", [ROTATE, "k = k * self.scale", UPDATE]),
        ("more is done", [ROTATE, "if self.norm:", "    k = self.k_norm(k)", UPDATE]),
        ("more is done", [ROTATE, "k = k[..., :8]", UPDATE]),
        ("more is done", [ROTATE, "k = k.transpose(-1, -2)", UPDATE]),
        ("more is done", [ROTATE, "k = k.reshape(1, 2, -1, 8)", UPDATE]),
        ("more is done", [ROTATE, "k = k.expand(2, 4, 8, 16)", UPDATE]),
        ("more is done", [ROTATE, "k = torch.cat((k, k), dim=-1)", UPDATE]),
        ("more is done", [ROTATE, "k = torch.cat((k, v), dim=1)", UPDATE]),
        ("more is done", [ROTATE, "k = torch.cat((v, k, v), dim=-1)", UPDATE]),
        # Neither the first nor the last dimensions of a head.
        ("more is done", ["q, k = part(q, k, cos, sin)", "k = torch.cat((v, k), dim=-1)", UPDATE]),
        ("more is done", ["k = last(k, cos, sin)", "k = torch.cat((k, v), dim=-1)", UPDATE]),
        ("more is done", ["k = last(k, cos, sin)", "k = torch.cat((v, k), dim=-1)", "k = torch.cat((k, v), dim=-1)",
                          UPDATE]),
        # In place, by whatever name.
        ("more is done", [ROTATE, "k.mul_(2)", UPDATE]),
        ("more is done", [ROTATE, "k *= 2", UPDATE]),
        ("more is done", [ROTATE, "k[:, :1] = 0", UPDATE]),
        ("more is done", [ROTATE, "view = k.transpose(1, 2)", "view.mul_(2)", UPDATE]),
        ("more is done", [ROTATE, "view = k.flatten(2)", "view *= 2", UPDATE]),
        ("more is done", [ROTATE, "self.change(k)", UPDATE]),
        ("more is done", [ROTATE, "torch.mul(v, 2, out=k)", UPDATE]),
        ("more is done", [ROTATE, "for i in range(2):", "    k = k + i", UPDATE]),
        ("cached keys are changed in place", [ROTATE, UPDATE, "k.mul_(2)"]),
        # Where and when.
        ("cached keys are not rotated", [UPDATE]),
        ("cached keys are not rotated", ["q = one(q, cos, sin)", UPDATE]),
        ("keys are rotated after they were cached", [UPDATE, ROTATE]),
        ("keys are rotated after they were cached", [UPDATE, "k = k.transpose(1, 2)", "k = one(k, cos, sin)"]),
        ("a tensor is rotated twice", [ROTATE, ROTATE, UPDATE]),
        ("a tensor is rotated twice", [ROTATE, "k = k * 2", "k = one(k, cos, sin)", UPDATE]),
        ("keys and values are both rotated", ["k = one(k, cos, sin)", "k = past.update(k, k, self.layer_idx)[0]"]),
        ("keys are rotated by the negatives of the angles", ["q, k = negative(q, k, cos, sin)", UPDATE]),
        ("rotated or cached in a for statement", ["for i in range(2):", "    " + ROTATE, UPDATE]),
        ("rotated or cached in", ["k = [one(i, cos, sin) for i in k]", UPDATE]),
        ("one is used without being called", ["turn = one", "k = turn(k, cos, sin)", UPDATE]),
        # Whether, and how.
        ("depends on past is None", ["if past is None:", "    " + ROTATE, UPDATE]),
        ("depends on self.training", ["if self.training:", "    " + ROTATE, UPDATE]),
        ("whether keys are rotated depends on not past", ["if past:", "    pass", "else:", "    " + ROTATE, UPDATE]),
        ("how keys are rotated depends on self.a",
         ["if self.a:", "    " + ROTATE, "else:", "    q, k = neighbours(q, k, cos, sin)", UPDATE]),
        ("how keys are rotated depends on self.b",
         ["if self.a:", "    " + ROTATE, "if self.b:", "    k = one(v, cos, sin)", UPDATE]),
        # Other caches, other tables.
        ("the method that rotates caches no keys", [ROTATE]),
        ("it caches keys in several places", [ROTATE, UPDATE, UPDATE]),
        ("it has another cache: past.update_indexer", [ROTATE, "past.update_indexer(k, self.layer_idx)", UPDATE]),
        ("its layer of the cache changes", [ROTATE, "k, v = past.update(k, v, self.layer_idx + offset)"]),
        ("its layer of the cache changes", [ROTATE, "k, v = past.update(k, v)"]),
        ("its tables are not known", ["q, k = whole(q, k, cos, -sin)", UPDATE]),
        ("its tables are not known", ["q, k = whole(q, k, sin, cos)", UPDATE]),
        ("its tables are not known", ["q, k = whole(q, k, cos, sin=-sin)", UPDATE]),
        ("its tables are not known", ["q, k = whole(*(q, k), cos, sin)", UPDATE]),
        ("its tables are not known", ["q, k = whole(q, k, cos[..., :8], sin[..., :8])", UPDATE]),
        ("cos and sin are not", ["cos = cos * 2", ROTATE, UPDATE]),
        ("cos and sin are not", ["for cos, sin in x:", "    pass", ROTATE, UPDATE]),
        ("cos and sin are not", ["sin, cos = position_embeddings", ROTATE, UPDATE]),
    ],
)  # fmt: skip
def test_refused(reason, lines):
    found = read(*lines)
    assert isinstance(found, str)
    assert reason in found


# --- models ------------------------------------------------------------------------------------

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
SCALING = 1.25
BY_CALL = "whether keys are rotated depends on position_embeddings is not None"
INDEXER = "it has another cache|self.expand_kv|caches no keys"  # of transformers 5.24, 5.17 and 5.6
REFUSED = {
    "beam": BY_CALL,
    "blt": "layer 0 of a cache is not its own",
    "cohere_compass": BY_CALL,
    "cohere_compass_text": BY_CALL,
    "deepseek_v4": "its tables are not known",
    "dory": "its layer of the cache changes",
    "falcon": "whether keys are rotated depends on alibi is None",
    "granite_swa": BY_CALL,
    "granitemoe_swa": BY_CALL,
    "granitemoehybrid": BY_CALL,
    "hrm_text": "its layer of the cache changes",
    "hunyuan_v1_dense": "more is done after the rotation: self.key_layernorm",
    "hunyuan_v1_moe": "more is done after the rotation: self.key_layernorm",
    "lara_mini": BY_CALL,
    "llama4": "more is done after the rotation: self.qk_norm",
    "llama4_text": "more is done after the rotation: self.qk_norm",
    "minimax_m3_vl": "its tables are not known",
    "minimax_m3_vl_text": "its tables are not known",
    "nanochat": "keys are rotated by the negatives of the angles",
    "olmo_hybrid": "cos and sin are not",
    "qwen4_exp": "cos and sin are not",
    "qwen4_exp_text": "cos and sin are not",
    "zamba2": "its layer of the cache changes",
    **dict.fromkeys(
        ["axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"], INDEXER
    ),
}
NOT_ENABLED = ("codegen", "gptj", *NOT_BUILT)
TYPES = [(tiny_model, name) for name in ROTARY_TYPES if name not in NOT_ENABLED]
TYPES += [(tiny_multimodal, name) for name in MULTIMODAL]


def cases(refused):
    return [
        pytest.param(build, name, id=f"{build.__name__}-{name}")
        for build, name in TYPES
        if (name in REFUSED) == refused
    ]


@torch.no_grad()
def cached(model):
    """The cache after a forward pass, and the positions that a rotary embedding was called with."""
    positions = []

    def remember(module, args, kwargs):
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        positions.append(ids[0] if ids.ndim == 3 else ids)  # of text, which has the same on every axis

    hooks = [rotary.register_forward_pre_hook(remember, with_kwargs=True) for rotary in find(model).rotaries]
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    given = {name: DynamicCache(config=model.config)} if model.config.model_type == "recurrent_gemma" else {}
    out = model(IDS, use_cache=True, **given)
    for hook in hooks:
        hook.remove()
    return given.get(name) or out.past_key_values, positions[0].expand(len(IDS), -1)


def change(rotary):
    """Other frequencies, pair by pair, and another scaling; returns the factor of the scaling."""
    if "phimoe" in type(rotary).__module__:  # computes its frequencies anew from the config at every call
        rotary.config.rope_parameters["rope_theta"] /= 10
        return 1.0
    for name, table in rotary.named_buffers():
        if name.endswith("inv_freq"):
            table.mul_(torch.linspace(0.5, 1.5, table.shape[-1]))
    for name, value in list(vars(rotary).items()):
        if name.endswith("attention_scaling"):
            setattr(rotary, name, value * SCALING)
    return SCALING


def frequencies(rotary, layer_type):
    if "phimoe" in type(rotary).__module__:
        return rotary.rope_init_fn(rotary.config)[0]
    own = getattr(rotary, f"{layer_type}_inv_freq", None)
    return (rotary.inv_freq if own is None else own).clone()


@pytest.mark.parametrize(("build", "name"), cases(refused=False))
def test_corrected_keys_are_those_of_the_new_frequencies(build, name):
    """In the first layer that rotates: what it gets does not depend on frequencies."""
    model = build(name)
    found = find(model)
    layers = cached_layers(found.attentions)
    index = min(layers)
    _, keys = layers[index]
    rotary = found.rotaries[0]
    layer_types = getattr(rotary.config, "layer_types", None)
    layer_type = layer_types[index] if layer_types else None
    cache, positions = cached(model)
    ours, old = getattr(cache.layers[index], keys.tensor).clone(), frequencies(rotary, layer_type)
    scaling = {change(module) for module in found.rotaries}.pop()
    cache, _ = cached(model)
    expected, new = getattr(cache.layers[index], keys.tensor), frequencies(rotary, layer_type)

    rotated = 2 * len(old)
    part = ours[..., :rotated] if keys.first else ours[..., -rotated:]
    other = ours[..., rotated:] if keys.first else ours[..., :-rotated]
    same = expected[..., rotated:] if keys.first else expected[..., :-rotated]
    assert torch.equal(other, same)
    assert not torch.allclose(ours, expected, atol=1e-2)
    options = {"attention_scaling": scaling, "interleaved": keys.interleaved}
    ops.rerotate_(part.transpose(1, 2), old, new, positions[:, -ours.shape[2] :], **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in ("llama", "deepseek_v3", "smollm3") if name in ROTARY_TYPES]
)
def test_layers_of_stock_and_enabled_models(name, enabled):
    model = tiny_model(name)
    if enabled:
        rope_dist.enable(model)
    layers = cached_layers(find(model).attentions)
    assert sorted(layers) == ([0] if name == "smollm3" else [0, 1])  # the second of SmolLM3 does not rotate
    assert all(attention.layer_idx == index for index, (attention, _) in layers.items())


@pytest.mark.parametrize(("build", "name"), cases(refused=True))
def test_refused_models(build, name):
    with pytest.raises(Unsupported) as refused:
        cached_layers(find(build(name)).attentions)
    assert "cannot be corrected" in str(refused.value)
    assert re.search(REFUSED[name], str(refused.value))
