"""Attention with a window beside stock's: a layer reads a whole prompt, and one token with the prompt in its cache.

Queries, keys and values are those that a layer hands to its attention function, rotated by the trained frequencies. The
time with a window has in it what a model does once for all its layers too: choosing the pieces, and the angles of new
tokens. On a CPU "peak MiB" are the tensors that a call makes, its result included; of a GPU, all of its memory.
The roofline reads all keys and values once, which is what bounds one token.
"""

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import rope_dist
from rope_dist.bench import checked_tokens, random
from rope_dist.hf.cache_record import CacheRecord
from rope_dist.hf.window_calls import WindowCall, attend, begin_window_call, end_window_call

from . import models
from .benchmark import MODELS, Benchmark, Options, Size
from .harness import TOLERANCES, Case, Implementation
from .shapes import DTYPES

WINDOW, FACTOR = 1024, 4


class Layer:
    """A layer of a model with a window, ``new`` queries, and the keys and values of all tokens."""

    def __init__(self, size: Size, new: int, device: torch.device) -> None:
        shape, more = size.shape, {"dtype": DTYPES[size.dtype], "device": device}
        self.model = models.build(size, 1, device).model
        rope_dist.enable(self.model, factor=FACTOR, dynamic=False, window=WINDOW)
        self.windowing, self.module = self.model._rope_dist_window, self.model.layers[0].self_attn
        self.past = size.tokens - new
        self.positions = torch.arange(size.tokens, device=device)[None]
        self.q = random(1, shape.q_heads, new, shape.head_dim, **more)
        self.k, self.v = (random(1, shape.k_heads, size.tokens, shape.head_dim, **more) for _ in range(2))
        self.record = None
        if self.past:
            self.record = CacheRecord(self.windowing.plan)
            self.record.write(0, self.positions[:, : self.past])

    def stock(self) -> torch.Tensor:
        return sdpa_attention_forward(self.module, self.q, self.k, self.v, None)[0]

    def windowed(self) -> torch.Tensor:
        """By the attention function of the layer, in a call of its model."""
        record = self.record
        call = WindowCall(
            self.model, self.windowing, record, self.past, self.windowing.stage(self.k.shape[2])
        )
        begin_window_call(call)
        kept = record.rotations if record else None
        call.note(self.positions[:, self.past :])
        if kept is not None:  # the token of the call before is read again: the angles of the others are known
            kept.length, record.rotations = self.past, kept
        try:
            return attend(sdpa_attention_forward, "sdpa", self.module, self.q, self.k, self.v, None)[0]
        finally:
            end_window_call(self.model)

    def read(self) -> Callable[[], object]:
        """The call that reads all keys and values."""
        integers = [x.view(torch.int64) for x in (self.k, self.v)]
        return lambda: [x.sum() for x in integers]

    def exact(self, tokens: torch.Tensor, window: int) -> torch.Tensor:
        """``[tokens, H, D]`` in float64: each pair of tokens by its own angle; a window of all tokens is stock's."""
        q, k, v = (x[0].double() for x in (self.q[:, :, tokens], self.k, self.v))
        i, j = self.positions[0, self.past + tokens], self.positions[0]
        theta, far = (x.to(q.device).double() for x in (self.windowing.trained, self.windowing.far[0]))
        distance = (i[:, None] - j)[..., None]
        # Queries and keys have the trained angles already.
        more = torch.where(distance < window, 0.0, (distance - window) * (far - theta))
        turn, groups, heads = torch.polar(torch.ones_like(more), more), q.shape[0] // k.shape[0], []
        for head in range(q.shape[0]):
            a, b = (torch.complex(*x.chunk(2, -1)) for x in (q[head], k[head // groups]))
            logits = torch.einsum("sr,tr,str->st", a, b.conj(), turn).real * q.shape[-1] ** -0.5
            weights = logits.masked_fill(distance[..., 0] < 0, -torch.inf).softmax(-1)
            heads.append(weights @ v[head // groups])
        return torch.stack(heads, 1)


class _Made(TorchDispatchMode):
    """Bytes of the tensors that are made while it is on: of those that are there, and at their highest."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in _storages((args, kwargs)):
            self.known.add(x._cdata)
        out = func(*args, **(kwargs or {}))
        for x in _storages(out):
            if x._cdata not in self.known:
                self.known.add(x._cdata)
                self.now += x.nbytes()
                weakref.finalize(x, self._free, x._cdata, x.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(call: Callable[[], object]) -> int:
    """Of the tensors that ``call`` makes."""
    with _Made() as made:
        call()
    return made.most


def implementations(size: Size, tokens: torch.Tensor, layer: Layer) -> list[Implementation]:
    found = []
    for name, call, kind, window in (
        (models.STOCK, Layer.stock, "reference", size.tokens),
        (f"rope_dist, window of {WINDOW}", Layer.windowed, "ours", WINDOW),
    ):
        labels = {}
        if layer.q.device.type == "cpu":
            call(layer)  # the angles of the tokens in the cache are made once
            labels["peak_bytes"] = peak_bytes(partial(call, layer))
        exact = partial(Layer.exact, tokens=tokens, window=window)
        bind = partial(partial, call)
        found.append(Implementation(name, bind, kind, exact=lambda x, exact=exact: [exact(x)], labels=labels))
    return [*found, Implementation("keys and values read once", Layer.read, "roofline")]


def cases(size: Size, options: Options) -> list[Case]:
    shape, dtype, made = size.shape, DTYPES[size.dtype], []
    for step, new in (("prefill", size.tokens), ("one token more", 1)):
        tokens = checked_tokens(new, options.device)
        moved = (2 * new * shape.widths[0] + 2 * size.tokens * shape.widths[1]) * dtype.itemsize
        case = Case(
            name=f"{size}, {step}",
            inputs=cache(lambda new=new: Layer(size, new, options.device)),
            implementations=partial(implementations, size, tokens),
            exact=lambda layer: [],
            pick=lambda out, tokens=tokens: [out[0, tokens]],
            tolerance=2 * TOLERANCES[dtype],
            bytes=moved,
            # Keys and queries again, rotated on, and the angles of all tokens.
            need=models.parameters_bytes(size, 1) + 3 * moved + 4 * size.tokens * shape.head_dim,
            kernel=False,
            labels=size.labels | {"step": step},
        )
        made.append(case)
    return made


BENCHMARK = Benchmark(
    __file__,
    __doc__,
    title="Attention with a window",
    cases=cases,
    sizes={
        "cpu": ["SmolLM2-135M: 8k 16k"],
        "cuda": ["Llama-3-8B: 8k 32k"],
        "quick": ["SmolLM2-135M: 2k"],
    },
    share={"cpu": 6, "cuda": 3},
    products=True,
    sources=MODELS,
)
