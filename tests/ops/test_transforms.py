"""``torch.func`` and forward-mode differentiation of the operators, against the plain rotation in PyTorch."""

from __future__ import annotations

import pytest
import torch
from helpers.tensors import exact, exact_tables, frequencies
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from rope_dist import ops

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def problem(device, dtype=torch.float64):
    torch.manual_seed(5)
    q, k = (torch.randn(2, 3, h, 8, device=device, dtype=dtype) for h in (2, 1))
    inv_freq, positions = frequencies(6).to(device), torch.tensor([[1, 20, 300]], device=device)
    cos, sin = (t.to(torch.promote_types(dtype, torch.float32)) for t in exact_tables(inv_freq, positions))
    return q, k, inv_freq, positions, cos, sin


FORMS = {
    "tables": lambda q, k, i, p, cos, sin, **o: ops.rotary(q, k, cos, sin, **o),
    "positions": lambda q, k, i, p, cos, sin, **o: ops.rotary_at(q, k, i, p, **o),
    "in place": lambda q, k, i, p, cos, sin, **o: ops.rotary(q * 1, k * 1, cos, sin, inplace=True, **o),
    "hugging face": lambda q, k, i, p, cos, sin: ops.apply_rotary_pos_emb(
        q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), unsqueeze_dim=2
    ),
    "flash-attention": lambda q, k, i, p, cos, sin: tuple(
        ops.apply_rotary_emb(x, cos[0], sin[0]) for x in (q, k)
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["torch.func", "dual numbers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_tangent_is_the_rotated_tangent(backend, device, form, mode, dtype):
    q, k, *angles = problem(device, dtype)
    cos, sin = angles[-2:]
    tangents = torch.randn_like(q), torch.randn_like(k)
    if mode == "torch.func":
        out, tangent = jvp(lambda q, k: FORMS[form](q, k, *angles), (q, k), tangents)
    else:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip((q, k), tangents, strict=True)]
            pairs = [forward_ad.unpack_dual(y) for y in FORMS[form](*duals, *angles)]
            out, tangent = zip(*pairs, strict=True)
    for actual, x in zip((*out, *tangent), (q, k, *tangents), strict=True):
        torch.testing.assert_close(actual.double(), exact(x, cos, sin), rtol=1e-6, atol=1e-6)


def test_tangents_of_one_of_the_two_and_of_a_bias(backend, device):
    q, k, _, _, cos, sin = problem(device)
    bias, tangent = torch.randn(2, 16, device=device, dtype=q.dtype)
    _, (of_q, of_k) = jvp(lambda b: ops.rotary(q, k, cos, sin, q_bias=b), (bias,), (tangent,))
    torch.testing.assert_close(of_q, exact(tangent.view(1, 1, 2, 8).expand(2, 3, 2, 8), cos, sin))
    assert of_k.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_torch_func(backend, device, form):
    q, k, *angles = problem(device)
    cos, sin = angles[-2:]

    def loss(q, k, rotate=FORMS[form]):
        a, b = rotate(q, k, *angles)
        return (a.sin().sum() + b.pow(3).sum()) if k is not None else a.sin().sum()

    def plain(q, k):
        return loss(q, k, lambda q, k, *_: (exact(q, cos, sin), exact(k, cos, sin)))

    for actual, want in zip(grad(loss, (0, 1))(q, k), grad(plain, (0, 1))(q, k), strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-7, atol=1e-7)


def test_jacobians_and_second_derivatives(device):
    q, k, _, _, cos, sin = problem(device)

    def loss(k, rotate=ops.rotary):
        return rotate(q, k, cos, sin)[1].pow(3).sum()

    want = hessian(lambda k: exact(k, cos, sin).pow(3).sum())(k)
    for outer in (jacfwd, jacrev):
        torch.testing.assert_close(outer(grad(loss))(k), want)
    torch.testing.assert_close(jacrev(jacfwd(loss))(k), want)


def test_gradients_of_single_samples(backend, device):
    q, k, _, _, cos, sin = problem(device)
    samples = torch.stack((q, -2 * q, q.flip(0)))
    per_sample = vmap(grad(lambda q: ops.rotary(q, k, cos, sin)[0].sin().sum()))(samples)
    for actual, sample in zip(per_sample, samples, strict=True):
        want = grad(lambda q: exact(q, cos, sin).sin().sum())(sample)
        torch.testing.assert_close(actual, want)


def test_forward_over_reverse(device):
    """A dual number into the backward pass of a graph made with it: a Hessian times a vector."""
    q, k, _, _, cos, sin = problem(device)
    q.requires_grad_()
    vector = torch.randn_like(q)

    def product(rotated):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, vector)
            (gradient,) = torch.autograd.grad(rotated(dual).sin().sum(), dual, create_graph=True)
            return forward_ad.unpack_dual(gradient).tangent

    got = product(lambda q: ops.rotary(q, k, cos, sin)[0])
    torch.testing.assert_close(got, product(lambda q: exact(q, cos, sin)))


@pytest.mark.parametrize("table", [False, True])
def test_a_projection(backend, device, table):
    torch.manual_seed(6)
    x, t = torch.randn(2, 1, 3, 4, device=device, dtype=torch.float64)
    *weights, w_t = torch.randn(4, 16, 4, device=device, dtype=torch.float64)
    _, _, inv_freq, positions, cos, sin = problem(device)
    angles = {"cos": cos, "sin": sin} if table else {"inv_freq": inv_freq, "position_ids": positions}

    def ours(x, w):
        return ops.qkv_rotary(x, w, *weights[1:], head_dim=8, **angles)

    def plain(x, w):
        q, k, v = ((x @ w.t()).unflatten(-1, (2, 8)) for w in (w, *weights[1:]))
        return exact(q, cos, sin), exact(k, cos, sin), v

    got, want = (jvp(f, (x, weights[0]), (t, w_t)) for f in (ours, plain))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got, want = (
        grad(lambda *a, f=f: sum(y.sin().sum() for y in f(*a)), (0, 1))(x, weights[0]) for f in (ours, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_constants_take_no_tangent(device):
    q, k, inv_freq, positions, cos, sin = problem(device)
    for call, constant in (
        (lambda c: ops.rotary(q, k, c, sin), cos),
        (lambda f: ops.rotary_at(q, k, f, positions), inv_freq),
    ):
        with pytest.raises(ValueError, match="constant"):
            jvp(call, (constant,), (torch.ones_like(constant),))


def test_decoding_is_for_inference(device):
    x, w = torch.randn(1, 1, 4, device=device), torch.randn(8, 4, device=device)
    caches = torch.zeros(2, 3, 1, 8, device=device)

    def call(x):
        return ops.decode_rotary(
            x, w, w, w, k_cache=caches[0], v_cache=caches[1], slots=torch.tensor([0], device=device),
            inv_freq=frequencies(8).to(device), position_ids=torch.tensor([[5]], device=device),
        )  # fmt: skip

    with pytest.raises(ValueError, match="for inference"):
        jvp(call, (x,), (x,))


def test_an_enabled_model(device):
    transformers = pytest.importorskip("transformers")
    import rope_dist

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=32,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device).double().eval()
    ids = torch.randint(0, 32, (1, 6), device=device)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (ids,), {"labels": ids}).loss

    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    want = grad(loss)(parameters), jvp(loss, (parameters,), (tangents,))
    with rope_dist.enable(model):
        got = grad(loss)(parameters), jvp(loss, (parameters,), (tangents,))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["tables", "positions", "projection"])
def test_compiled_around_and_within(device, form):
    """torch.compile of a transform leaves the rotation to PyTorch; it never loses a tangent."""
    torch.compiler.reset()
    q, k, *angles = problem(device, torch.float32)
    cos, sin = angles[-2:]
    w = torch.randn(16, 8, device=device)

    def rotate(q):
        if form == "projection":
            return ops.qkv_rotary(q[:, :, 0], w, w, head_dim=8, cos=cos, sin=sin)[0]
        return FORMS[form](q, k, *angles)[0]

    transforms = (
        lambda f: grad(lambda q: f(q).sin().sum()),
        lambda f: lambda q: jvp(f, (q,), (q.sin(),))[1],
    )
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), rotate(q))
    for transform in transforms:
        want = transform(rotate)(q)
        torch.testing.assert_close(torch.compile(transform(rotate), backend="aot_eager")(q), want)
        torch.compiler.reset()
        with pytest.raises(Exception, match="func within torch"):
            torch.compile(transform(rotate), backend="aot_eager", fullgraph=True)(q)
    torch.testing.assert_close(compiled(q), rotate(q))
