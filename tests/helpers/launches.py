"""Every kernel launch of a few calls, made twice: by Triton, then from the launch cache. Nothing is launched.

``python launches.py``: one JSON line a call. Run in a process of its own, since the tests interpret kernels.
"""

from __future__ import annotations

import json
from types import FunctionType

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import host_driver
from rope_dist import ops
from rope_dist.ops import launch_cache, triton_projection


def heads(batch, length, count, dim=128):
    return torch.randn(batch, length, count, dim).bfloat16()


def calls():
    """By name: what makes the tensors of a call, and the call."""
    inv_freq = ops.to_fixed_point(1.0 / 10000.0 ** (torch.arange(64) / 64))

    def weights(bias=False):
        both = [torch.randn(n * 128, 256).bfloat16() for n in (4, 2, 2)]
        return [*both, *(torch.randn(w.shape[0]).bfloat16() if bias else None for w in both)]

    def tables(length):
        return ops.cos_sin(torch.rand(64), torch.arange(length)[None])

    def at(length):
        return {"inv_freq": inv_freq, "position_ids": torch.arange(length)[None]}

    def projection(length, path, bias=False, table=False, batch=1):
        def make():
            cos, sin = tables(length)
            angles = {"cos": cos, "sin": sin} if table else at(length)
            return [torch.randn(batch, length, 256).bfloat16(), *weights(bias)], angles

        return make, lambda x, angles: ops.qkv_rotary(*x, head_dim=128, path=path, **angles)

    def normed(path):
        def call(x, angles):
            norms = (torch.ones(128), torch.ones(128))
            return ops.qkv_norm_rotary(*x[:4], *norms, *x[4:], head_dim=128, path=path, **angles)

        return projection(40, path)[0], call

    def decode(x, angles):
        caches = {"k_cache": heads(1, 9, 2)[0], "v_cache": heads(1, 9, 2)[0], "slots": torch.tensor([4])}
        return ops.decode_rotary(*x, **caches, **angles)

    def write():
        heads_ = [heads(1, 5, n)[0] for n in (4, 2, 2)]
        return [*heads_, *(heads(3, 2, 2) for _ in range(2))], {"slots": torch.arange(5), **at(5)}

    def write_fp8():
        heads_, angles = (
            [heads(1, 5, n) for n in (4, 2, 2)],
            {"cache_seqlens": torch.tensor([3]), "inv_freq": inv_freq},
        )
        caches = [heads(9, 4, 2).to(torch.float8_e4m3fn) for _ in range(2)]
        scales = {"k_scale": torch.rand(2) + 0.1, "v_scale": 0.5}
        weights = {"q_weight": torch.randn(128), "k_weight": torch.randn(128)}
        return [*heads_, *caches], {"block_table": torch.tensor([[7, 2]]), **angles, **scales, **weights}

    two = lambda: ((heads(1, 5, 4), heads(1, 5, 2)), tables(5))  # noqa: E731

    def bias():
        return (
            (heads(1, 5, 4), heads(1, 5, 2)),
            (torch.randn(512).bfloat16(), torch.randn(256).bfloat16()),
        )

    def norm(joint):
        def make():
            weights = [torch.rand(n if joint else 128).bfloat16() for n in (512, 256)]
            return (heads(1, 5, 4), heads(1, 5, 2)), [*weights, *bias()[1]]

        return make

    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    return {
        "rotary": (two, lambda x, t: ops.rotary(*x, *t)),
        "in place": (two, lambda x, t: ops.rotary(*x, *t, inplace=True)),
        "bias": (bias, lambda x, b: ops.rotary(*x, *tables(5), q_bias=b[0], k_bias=b[1])),
        "deinterleave": (two, lambda x, t: ops.rotary(*x, *t, deinterleave=True)),
        "queries": (two, lambda x, t: ops.rotary(x[0], None, *t)),
        "positions": (two, lambda x, t: ops.rotary_at(*x, **at(5))),
        "packed": (two, lambda x, t: ops.rotary_at(x[0][0], x[1][0], inv_freq, cu_seqlens=bounds)),
        "flash-attention": (two, lambda x, t: ops.apply_rotary_emb(x[0], t[0][0], t[1][0], inplace=True)),
        "norm": (norm(False), lambda x, w: ops.norm_rotary_at(*x, *w[:2], **at(5))),
        "norm in place, bias": (
            norm(False),
            lambda x, w: ops.norm_rotary(*x, *w[:2], *tables(5), q_bias=w[2], k_bias=w[3], inplace=True),
        ),
        "norm of all heads": (norm(True), lambda x, w: ops.norm_rotary(*x, *w[:2], *tables(5))),
        "separate": projection(40, "separate"),
        "triton": projection(40, "triton"),
        "triton, bias and table of two batches": projection(40, "triton", bias=True, table=True, batch=2),
        "triton_tma": projection(40, "triton_tma"),
        "triton_tma, bias and table of two batches": projection(
            128, "triton_tma", bias=True, table=True, batch=2
        ),
        "triton, norm": normed("triton"),
        "triton_tma, norm": normed("triton_tma"),
        "decode": projection(1, "decode"),
        "decode, bias and table of two batches": projection(1, "decode", bias=True, table=True, batch=2),
        "decode with caches": (projection(1, "decode")[0], decode),
        "cache write": (write, lambda x, rest: ops.rotary_write_cache(*x, **rest)),
        "cache write, fp8 by a block table, normalised": (
            write_fp8,
            lambda x, rest: ops.rotary_write_cache(*x, inplace=True, **rest),
        ),
    }


def described(argument):
    """An argument of a launch without its address."""
    if isinstance(argument, torch.Tensor):
        return ["tensor", str(argument.dtype), argument.numel(), argument.data_ptr() % 16]
    if isinstance(argument, TensorDescriptor):
        return [
            "descriptor",
            str(argument.base.dtype),
            *map(list, (argument.shape, argument.strides, argument.block_shape)),
        ]
    return argument if isinstance(argument, int | float | None) else str(argument)


def addresses(arguments):
    tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
    return [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]


def kept() -> int:
    """Tensors that the launches which are kept hold, in their closures or in what these refer to."""
    found, seen, left = 0, set(), list(launch_cache._LAUNCHES.values())
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found += 1
        elif isinstance(thing, FunctionType):
            left += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, list | tuple):
            left += thing
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, triton_projection.Descriptor):
            left += [thing.fields]
    return found


def main() -> None:
    recorded, compiled = [], []
    host_driver._Launcher.__call__ = lambda self, *arguments: recorded.append(arguments)
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *a, **k: compiled.append(self) or run(self, *a, **k)
    with host_driver.host_only():
        for name, (make, call) in calls().items():
            runs = []
            for _ in range(2):
                recorded.clear()
                compiled.clear()
                tensors = make()
                # New tensors while the old ones live, so that their addresses differ.
                call(*tensors)
                (launch,) = recorded
                grid, arguments = launch[:3], launch[9:]
                runs.append((grid, len(compiled), arguments, tensors))
            (first_grid, first_compiled, first, _), (grid, by_triton, second, _) = runs
            print(
                json.dumps(
                    {
                        "name": name,
                        "compiled": [first_compiled, by_triton],
                        "same grid": first_grid == grid,
                        "same arguments": [described(a) for a in first] == [described(a) for a in second],
                        "arguments": len(second),
                        "new addresses": len(set(addresses(second)) - set(addresses(first))),
                        "addresses": len(set(addresses(second))),
                        "kept": kept(),
                    }
                )
            )


if __name__ == "__main__":
    main()
