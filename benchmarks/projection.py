"""Projection with rotary: from a layer's input to rotated queries and keys, and values; forward and backward.

The roofline is the matrix products alone, as one. On a CPU there are no kernels that fuse both: there "rope_dist" is
what enable() does, three products and the rotation in place of their results.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, Angles, checked_tokens, huggingface, random, rotated

from .baselines import BASELINES, COMPILED, LIGER, installed, liger_kernels, missing, unavailable
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation, Skipped
from .shapes import DTYPES

QUACK = "quack"
Tensors = list[torch.Tensor]


class Layer:
    """Input ``[1, S, K]``, the three weights ``[N, K]``, and gradients of the three results ``[1, S, H, D]``."""

    def __init__(self, size: Size, device: torch.device, gradients: bool) -> None:
        shape, at = size.shape, {"dtype": DTYPES[size.dtype], "device": device}
        self.head_dim = d = shape.head_dim
        self.x = random(1, size.tokens, shape.hidden, **at)
        at_scale = at | {"scale": shape.hidden**-0.5}
        self.weights = [random(n, shape.hidden, seed=i, **at_scale) for i, n in enumerate(shape.widths, 1)]
        self.grads: Tensors = []
        if gradients:
            for y in (self.x, *self.weights):
                y.requires_grad_()
            widths = enumerate(shape.widths, 4)
            self.grads = [random(1, size.tokens, n // d, d, seed=i, **at) for i, n in widths]

    def project(self) -> Tensors:
        """The three products ``[1, S, H, D]``."""
        return [functional.linear(self.x, w).unflatten(-1, (-1, self.head_dim)) for w in self.weights]


def cases(size: Size, options: Options) -> list[Case]:
    return [case(size, options, gradients) for gradients in (False, True)]


def case(size: Size, options: Options, gradients: bool) -> Case:
    """Forward, or with ``gradients`` forward and backward."""
    shape, dtype = size.shape, DTYPES[size.dtype]
    tokens, total = checked_tokens(size.tokens, options.device), sum(shape.widths)
    moved = (size.tokens * (shape.hidden + total) + total * shape.hidden) * dtype.itemsize
    what = "forward + backward" if gradients else "forward"

    def pick(outputs) -> Tensors:
        if gradients:
            return [outputs[0][0, tokens], *(w[: shape.head_dim] for w in outputs[1:])]
        return [y[0, tokens] for y in outputs]

    return Case(
        name=f"{size}, {what}",
        inputs=partial(Layer, size, options.device, gradients),
        implementations=partial(implementations, size, options),
        exact=partial(exact_backward if gradients else exact_forward, size, tokens),
        pick=pick,
        # A product's rounding adds to the rotation's.
        tolerance=2 * TOLERANCES[dtype],
        bytes=(3 if gradients else 1) * moved,
        need=(8 if gradients else 5) * moved,
        gradients=gradients,
        labels=size.labels | {"pass": what},
    )


def exact_forward(size: Size, tokens: torch.Tensor, layer: Layer, interleaved: bool = False) -> Tensors:
    """Rotated queries and keys, and values, of some tokens in float64."""
    angles = size.shape.angles(1, torch.float32, tokens.device).exact(tokens)
    x = layer.x.detach()[0, tokens].double()
    q, k, v = ((x @ w.detach().double().T).unflatten(-1, (-1, layer.head_dim)) for w in layer.weights)
    return [*(rotated(y, *angles, interleaved=interleaved) for y in (q, k)), v]


def exact_backward(size: Size, tokens: torch.Tensor, layer: Layer) -> Tensors:
    """In float64: the input's gradient at some tokens, and that of the first head's rows of each weight."""
    angles = size.shape.angles(1, torch.float32, tokens.device)
    some, everywhere = angles.exact(tokens), angles.exact(torch.arange(size.tokens, device=tokens.device))
    d_x, d_weights = 0, []
    for index, (grad, weight) in enumerate(zip(layer.grads, layer.weights, strict=True)):
        at_some, first = grad[0, tokens].double(), grad[0, :, :1].double()
        if index < 2:
            at_some, first = rotated(at_some, *some, inverse=True), rotated(first, *everywhere, inverse=True)
        d_x = d_x + at_some.flatten(1) @ weight.detach().double()
        d_weights.append(first[:, 0].T @ layer.x.detach()[0].double())
    return [d_x, *d_weights]


def implementations(size: Size, options: Options, layer: Layer) -> list[Implementation | Skipped]:
    """Everything that projects and rotates; of a layer with gradients each followed by its backward pass."""
    gradients = bool(layer.grads)
    angles = size.shape.angles(size.tokens, DTYPES[size.dtype], options.device)
    at = {"head_dim": layer.head_dim, "inv_freq": angles.inv_freq_q64, "position_ids": angles.position_ids}

    def stock(x: Layer):
        q, k, v = x.project()
        return *huggingface(q, k, angles), v

    def separate(x: Layer):
        q, k, v = x.project()
        return *ops.rotary(q, k, angles.cos, angles.sin, inplace=not gradients), v

    def fused(x: Layer, path: str = "auto"):
        return ops.qkv_rotary(x.x, *x.weights, path=path, **at)

    def timed(name: str, run: Callable, kind: str = "baseline", **more) -> Implementation:
        def bind(x: Layer) -> Callable:
            if not gradients:
                return partial(run, x)
            return lambda: torch.autograd.grad(run(x), (x.x, *x.weights), x.grads)

        return Implementation(name, bind, kind, **more)

    found: list[Implementation | Skipped] = [timed(HUGGINGFACE, stock, "reference")]
    if ops.backend_for(layer.x) == "triton":
        found.append(timed("rope_dist", fused, "ours"))
        operands = [y.detach() for y in (layer.x, *layer.weights)]
        dims = {"head_dim": layer.head_dim, "rotary_dim": 2 * angles.inv_freq_q64.shape[1]}
        for path in ops.projection_paths(*operands, **dims):
            found.append(timed(f"rope_dist, {path}", partial(fused, path=path), "ours"))
    else:
        found.append(timed("rope_dist", separate, "ours"))
    found.append(Implementation("one product" + " each" * gradients, products, "roofline"))
    if options.wants(COMPILED):
        found.append(timed(COMPILED, torch.compile(stock, dynamic=False), late=True))
    if options.wants(LIGER):
        found += _liger(options, angles, gradients, timed)
    if options.wants(QUACK):
        found.append(_quack(size, options, angles, gradients))
    return found


def products(layer: Layer) -> Callable[[], object]:
    """The matrix products alone, of all three weights as one: one forward, two backward."""
    x = layer.x.detach()[0]
    weight = torch.cat([w.detach() for w in layer.weights])
    if not layer.grads:
        return lambda: functional.linear(x, weight)
    grad = torch.cat([g.flatten(2) for g in layer.grads], -1)[0]
    return lambda: (functional.linear(x, weight), grad @ weight, grad.T @ x)


def _liger(
    options: Options, angles: Angles, gradients: bool, timed: Callable
) -> list[Implementation | Skipped]:
    if reason := unavailable(LIGER, options):
        return [Skipped(LIGER, reason)]
    baseline = BASELINES[LIGER]
    rotate = partial(baseline.rotate, importlib.import_module(baseline.module))

    def run(kernel: str | None, x: Layer):
        q, k, v = x.project()
        return *rotate(q, k, angles, kernel)(), v

    # Without gradients the others hand over to the first, Triton's.
    return [
        timed(name, partial(run, kernel), late=True, labels=installed(baseline.module, kernel))
        for i, kernel in enumerate(liger_kernels()[: None if gradients else 1])
        for name in [f"{LIGER}, {kernel}" if i else LIGER]
    ]


def _quack(size: Size, options: Options, angles: Angles, gradients: bool) -> Implementation | Skipped:
    """quack's matrix product with the rotation in its epilogue: interleaved pairs, forward only."""
    if gradients:
        return Skipped(QUACK, "its fused product has no backward pass")
    if reason := unavailable(QUACK, options) or missing("quack.epilogue.rotary"):
        return Skipped(QUACK, reason)
    module = importlib.import_module("quack.epilogue.rotary")
    n_q, n_k, n_v = widths = size.shape.widths
    frequencies = module.make_interleaved_inv_freq(angles.inv_freq, n_q + n_k, n_v)[None]
    # Its search over tiles would take minutes: the default tile, and the table says so.
    more = {"tuned": False, "pos": angles.position_ids.float(), "freq": frequencies}

    def bind(x: Layer):
        # One weight, as a model that was made for this kernel has it.
        weight = torch.cat(x.weights).T
        product = partial(module.rope_posfreq_epi, x.x[0], weight, **more)
        return lambda: [y.unflatten(-1, (-1, x.head_dim))[None] for y in product()["D"].split(widths, -1)]

    exact = partial(exact_forward, size, checked_tokens(size.tokens, options.device), interleaved=True)
    labels = installed(BASELINES[QUACK].module)
    return Implementation(f"{QUACK}, default tile", bind, exact=exact, late=True, labels=labels)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Projection and rotary",
    cases=cases,
    sizes={
        "cpu": ["SmolLM2-135M TinyLlama-1.1B: 8k 16k"],
        "cuda": ["Llama-3-8B LLaMA2-7B LLaMA2-13B: 8k 16k", "Llama-3-8B: 1k 2k 4k 32k"],
        "quick": ["SmolLM2-135M: 1k"],
    },
    share={"cpu": 22, "cuda": 28},
    products=True,
    baselines=(COMPILED, LIGER, QUACK),
)
