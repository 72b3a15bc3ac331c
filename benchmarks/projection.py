"""Projection with rotary: from a layer's input to rotated queries and keys, and values; forward and backward.

The roofline is the matrix products alone, as one. On a CPU there are no kernels that fuse both: there
"rope_dist" is what enable() does, three products and the rotation in place of their results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from rope_dist import ops
from rope_dist.bench import HUGGINGFACE, checked_tokens, huggingface, random, rotated
from rope_dist.ops import dispatch_projection

from .baselines import (
    BASELINES,
    COMPILED,
    LIGER,
    installed,
    kernel,
    liger_implementations,
    missing,
    unavailable,
)
from .benchmark import Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation, Skipped
from .shapes import DTYPES, Angles

QUACK = "quack"


class Layer:
    """Input ``[1, S, K]``, the three weights ``[N, K]``, and gradients of the three results ``[1, S, H, D]``."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, gradients: bool) -> None:
        shape = size.shape
        at = {"dtype": dtype, "device": device}
        self.x = random(1, size.tokens, shape.hidden, **at)
        self.weights = [
            random(n, shape.hidden, scale=shape.hidden**-0.5, seed=i + 1, **at)
            for i, n in enumerate(shape.widths)
        ]
        self.grads: list[torch.Tensor] = []
        if gradients:
            for y in (self.x, *self.weights):
                y.requires_grad_()
            self.grads = [
                random(1, size.tokens, n // shape.head_dim, shape.head_dim, seed=i + 4, **at)
                for i, n in enumerate(shape.widths)
            ]

    def project(self, head_dim: int) -> list[torch.Tensor]:
        """The three products ``[1, S, H, D]``."""
        return [functional.linear(self.x, w).unflatten(-1, (-1, head_dim)) for w in self.weights]


def cases(size: Size, options: Options) -> list[Case]:
    return [_case(size, options, gradients) for gradients in (False, True)]


def _case(size: Size, options: Options, gradients: bool) -> Case:
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    total = sum(shape.widths)
    moved = size.tokens * (shape.hidden + total) + total * shape.hidden
    products = 3 if gradients else 1
    what = "forward + backward" if gradients else "forward"
    return Case(
        name=f"{size}, {what}",
        inputs=partial(Layer, size, dtype, device, gradients),
        implementations=lambda layer: implementations(size, options, layer, gradients),
        exact=partial(_exact_gradients if gradients else _exact_some, size),
        pick=partial(_pick_gradients, size) if gradients else partial(_pick_some, size),
        # A product's rounding adds to the rotation's.
        tolerance=2 * TOLERANCES[dtype],
        bytes=products * moved * dtype.itemsize,
        need=(8 if gradients else 5) * moved * dtype.itemsize,
        gradients=gradients,
        labels=size.labels | {"pass": what},
    )


def exact_forward(
    size: Size, tokens: torch.Tensor, layer: Layer, interleaved: bool = False
) -> list[torch.Tensor]:
    """Rotated queries and keys, and values, of some tokens in float64."""
    shape = size.shape
    cos, sin = shape.angles(1, torch.float32, tokens.device).exact(tokens)
    x = layer.x.detach()[0, tokens].double()
    q, k, v = ((x @ w.detach().double().T).unflatten(-1, (-1, shape.head_dim)) for w in layer.weights)
    return [rotated(q, cos, sin, interleaved=interleaved), rotated(k, cos, sin, interleaved=interleaved), v]


def _exact_some(size: Size, layer: Layer) -> list[torch.Tensor]:
    return exact_forward(size, checked_tokens(size.tokens, layer.x.device), layer)


def _pick_some(size: Size, outputs) -> list[torch.Tensor]:
    tokens = checked_tokens(size.tokens, outputs[0].device)
    return [y[0, tokens] for y in outputs]


def _exact_gradients(size: Size, layer: Layer) -> list[torch.Tensor]:
    """In float64: the input's gradient at some tokens, and that of the first head's rows of each weight."""
    tokens = checked_tokens(size.tokens, layer.x.device)
    shape, everywhere = size.shape, torch.arange(size.tokens, device=tokens.device)
    angles = shape.angles(1, torch.float32, tokens.device)
    (cos, sin), (all_cos, all_sin) = angles.exact(tokens), angles.exact(everywhere)
    x = layer.x.detach()[0].double()
    d_x, d_weights = 0, []
    for index, (grad, weight) in enumerate(zip(layer.grads, layer.weights, strict=True)):
        some, first = grad[0, tokens].double(), grad[0, :, :1].double()
        if index < 2:
            some = rotated(some, cos, sin, inverse=True)
            first = rotated(first, all_cos, all_sin, inverse=True)
        d_x = d_x + some.flatten(1) @ weight.detach().double()
        d_weights.append(first[:, 0].T @ x)
    return [d_x, *d_weights]


def _pick_gradients(size: Size, outputs) -> list[torch.Tensor]:
    d_x, *d_weights = outputs
    tokens = checked_tokens(size.tokens, d_x.device)
    return [d_x[0, tokens], *(w[: size.shape.head_dim] for w in d_weights)]


def implementations(
    size: Size, options: Options, layer: Layer, gradients: bool
) -> list[Implementation | Skipped]:
    """Everything that projects and rotates; with ``gradients`` each followed by its backward pass."""
    shape, device, dtype = size.shape, options.device, DTYPES[size.dtype]
    angles = shape.angles(size.tokens, dtype, device)
    at = {"head_dim": shape.head_dim, "inv_freq": angles.fixed, "position_ids": angles.position_ids}

    def stock(inputs: Layer):
        q, k, v = inputs.project(shape.head_dim)
        return *huggingface(q, k, angles), v

    def separate(inputs: Layer):
        q, k, v = inputs.project(shape.head_dim)
        return *ops.rotary(q, k, angles.cos, angles.sin, inplace=not gradients), v

    def fused(inputs: Layer, path: str = "auto"):
        return ops.qkv_rotary(inputs.x, *inputs.weights, path=path, **at)

    def timed(name: str, run: Callable, kind: str = "baseline", **more) -> Implementation:
        bind = partial(_with_backward, run) if gradients else lambda inputs: partial(run, inputs)
        return Implementation(name, bind, kind=kind, **more)

    found: list[Implementation | Skipped] = [timed(HUGGINGFACE, stock, "reference")]
    if ops.backend_for(layer.x) == "triton":
        found.append(timed("rope_dist", fused, "ours"))
        rotary_dim = 2 * angles.fixed.shape[1]
        weights = [w.detach() for w in layer.weights]
        for path in dispatch_projection.candidates(layer.x.detach(), *weights, shape.head_dim, rotary_dim):
            found.append(timed(f"rope_dist, {path}", partial(fused, path=path), "ours"))
    else:
        found.append(timed("rope_dist", separate, "ours"))
    found.append(Implementation("one product" + " each" * gradients, _products, kind="roofline"))
    if options.wants(COMPILED):
        found.append(timed(COMPILED, torch.compile(stock, dynamic=False), late=True))
    if options.wants(LIGER):
        found += _liger(size, options, angles, gradients, timed)
    if options.wants(QUACK):
        found.append(_quack(size, options, angles, gradients))
    return found


def _with_backward(run: Callable, layer: Layer) -> Callable[[], tuple[torch.Tensor, ...]]:
    def call():
        return torch.autograd.grad(run(layer), (layer.x, *layer.weights), layer.grads)

    return call


def _products(layer: Layer) -> Callable[[], object]:
    """The matrix products alone, of all three weights as one: one forward, two backward."""
    x = layer.x.detach()[0]
    weight = torch.cat([w.detach() for w in layer.weights])
    if not layer.grads:
        return lambda: functional.linear(x, weight)
    grad = torch.cat([g.flatten(2) for g in layer.grads], -1)[0]
    return lambda: (functional.linear(x, weight), grad @ weight, grad.T @ x)


def _liger(
    size: Size, options: Options, angles: Angles, gradients: bool, timed: Callable
) -> list[Implementation | Skipped]:
    reason = unavailable(LIGER, options)
    if reason:
        return [Skipped(LIGER, reason)]
    baseline = BASELINES[LIGER]
    module = importlib.import_module(baseline.module)

    def run(implementation: str | None, inputs: Layer):
        q, k, v = inputs.project(size.shape.head_dim)
        return *baseline.rotate(module, q, k, angles, implementation)(), v

    triton, *others = liger_implementations()
    found = {LIGER: triton}
    if gradients:
        # Without them these hand over to Triton's.
        found |= {f"{LIGER}, {name}": name for name in others}
    return [
        timed(name, partial(run, chosen), late=True, labels=installed(baseline.module) | kernel(chosen))
        for name, chosen in found.items()
    ]


def _quack(size: Size, options: Options, angles: Angles, gradients: bool) -> Implementation | Skipped:
    """quack's matrix product with the rotation in its epilogue: interleaved pairs, forward only."""
    if gradients:
        return Skipped(QUACK, "its fused product has no backward pass")
    reason = unavailable(QUACK, options) or missing("quack.epilogue.rotary")
    if reason:
        return Skipped(QUACK, reason)
    module = importlib.import_module("quack.epilogue.rotary")
    shape = size.shape
    n_q, n_k, n_v = shape.widths
    frequencies = module.make_interleaved_inv_freq(angles.inv_freq, n_q + n_k, n_v)[None]
    positions = angles.position_ids.float()

    def bind(inputs: Layer):
        # One weight, as a model that was made for this kernel has it.
        weight = torch.cat(inputs.weights).T

        def call():
            # Its search over tiles would take minutes: the default tile, and the table says so.
            y = module.rope_posfreq_epi(inputs.x[0], weight, tuned=False, pos=positions, freq=frequencies)[
                "D"
            ]
            return tuple(part.unflatten(-1, (-1, shape.head_dim))[None] for part in y.split(shape.widths, -1))

        return call

    tokens = checked_tokens(size.tokens, options.device)
    exact = partial(exact_forward, size, tokens, interleaved=True)
    labels = installed(BASELINES[QUACK].module)
    return Implementation(f"{QUACK}, default tile", bind, exact=exact, late=True, labels=labels)


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Projection and rotary",
    cases=cases,
    sizes={
        "cpu": [(("SmolLM2-135M", "TinyLlama-1.1B"), (8192, 16384), ("bf16",))],
        "cuda": [
            (("Llama-3-8B", "LLaMA2-7B"), (8192, 16384), ("bf16",)),
            (("LLaMA2-13B",), (8192, 16384), ("bf16",)),
            (("Llama-3-8B",), (1024, 2048, 4096, 32768), ("bf16",)),
        ],
    },
    quick=[(("SmolLM2-135M",), (1024,), ("bf16",))],
    share={"cpu": 22, "cuda": 28},
    baselines=(COMPILED, LIGER, QUACK),
    plot=True,
)
