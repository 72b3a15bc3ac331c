"""LLaMA-shaped models with random weights, stock and enabled, that share their parameters; and their benchmarks."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import local_torch_dtype

import rope_dist

from .baselines import COMPILED
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import Case, Implementation
from .shapes import DTYPES, Shape

STOCK, ENABLED = "huggingface, sdpa", "rope_dist.enable"


class Pair:
    """A model, the same one enabled, and tokens ``ids`` ``[1, S]``.

    A benchmark's own also has ``run(model)``, from one of the models (or that compiled) to the call that is timed, and
    ``need(size, layers, weights)``, the bytes beyond those of the weights.

    Attributes:
        most_layers: by device type how many are built, unless asked otherwise.
        step: of the case's name.
        passes: how often the layers' products are computed, and of how many tokens; None: of all.
        compiled: 1: the stock model is compiled too, 2: also the enabled one.
        gradients: whether calls are made with autograd.
    """

    most_layers: ClassVar[dict[str, int]] = {}
    step = ""
    passes: tuple[int, int | None] = (1, None)
    compiled = 0
    gradients = False

    def __init__(self, size: Size, layers: int, device: torch.device) -> None:
        self.model = build(size, layers, device)
        self.enabled = enabled(self.model)
        generator, vocabulary = torch.Generator(device).manual_seed(0), size.shape.vocabulary
        self.ids = torch.randint(vocabulary, (1, size.tokens), device=device, generator=generator)


def benchmark(file: str, doc: str, pair: type[Pair], *, unit: str = "tokens/s", **more: Any) -> Benchmark:
    """Of the stock and the enabled model, and of their matrix products alone."""

    def cases(size: Size, options: Options) -> list[Case]:
        device, most = options.device, size.shape.layers
        count = options.layers or min(pair.most_layers.get(device.type, most), most)
        weights, (times, tokens) = parameters_bytes(size, count), pair.passes

        def products(x: Any) -> Callable[[], None]:
            matrices = [m.weight.detach() for m in x.model.model.layers.modules() if isinstance(m, nn.Linear)]
            # One input for all of the same width.
            inputs = {w.shape[1]: w.new_empty(tokens or size.tokens, w.shape[1]).normal_() for w in matrices}

            def call() -> None:
                for weight in matrices * times:
                    functional.linear(inputs[weight.shape[1]], weight)

            return call

        def implementations(x: Any) -> list[Implementation]:
            found = [
                Implementation(STOCK, lambda x: x.run(x.model), "reference"),
                Implementation(ENABLED, lambda x: x.run(x.enabled), "ours"),
                Implementation("products alone", products, "roofline"),
            ]
            kinds = (COMPILED, x.model, "baseline"), (f"{COMPILED} of {ENABLED}", x.enabled, "ours")
            for name, model, kind in kinds[: pair.compiled]:
                if device.type == "cuda" and options.wants(COMPILED):
                    fast = torch.compile(model, dynamic=False)
                    found.append(Implementation(name, lambda x, m=fast: x.run(m), kind, late=True))
            return found

        case = Case(
            name=f"{size}, {count} layer{'s' * (count > 1)}{pair.step}",
            # Both copies of the inputs are the same: two may not fit.
            inputs=cache(lambda: pair(size, count, device)),
            implementations=implementations,
            # Both are right or wrong together with the stock model in its own type.
            exact=lambda x: [y.double() for y in x.run(x.model)()],
            # Softmax and rounding are between the rotation and what is compared.
            tolerance=0.1,
            need=weights + pair.need(size, count, weights),
            kernel=False,
            gradients=pair.gradients,
            labels=size.labels | {"layers": count},
        )
        return [case]

    more |= {"layers": True, "sources": MODELS, "baselines": (COMPILED,) * bool(pair.compiled)}
    return Benchmark(file, doc, cases=cases, unit=unit, **more)


def build(size: Size, layers: int, device: torch.device) -> LlamaForCausalLM:
    """A stock model with random weights, made on the device, of that shape and trained to the length it reads."""
    shape = size.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.k_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=size.tokens,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device, local_torch_dtype(DTYPES[size.dtype]):
        model = LlamaForCausalLM(config)
    float32_frequencies(model.model.rotary_emb, shape)
    return model.eval()


def float32_frequencies(rotary: nn.Module, shape: Shape) -> None:
    """Give a stock rotary embedding the frequencies that a checkpoint's has: float32, whatever its weights are."""
    rotary.inv_freq = shape.inv_freq(rotary.inv_freq.device)
    rotary.original_inv_freq = rotary.inv_freq.clone()


def copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model again; parameters are shared."""
    return copy.deepcopy(model, memo={id(p): p for p in model.parameters()})


def enabled(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model with this package's attention; parameters are shared."""
    second = copied(model)
    rope_dist.enable(second)
    return second


def parameters_bytes(size: Size, layers: int) -> int:
    """Bytes of all weights."""
    shape = size.shape
    layer = shape.hidden * (sum(shape.widths) + shape.widths[0] + 3 * shape.intermediate)
    return (layers * layer + 2 * shape.vocabulary * shape.hidden) * DTYPES[size.dtype].itemsize
