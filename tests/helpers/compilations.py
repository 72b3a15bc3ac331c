"""What Triton would compile for prompts of many lengths, counted by its own cache keys. Nothing is compiled.

``python compilations.py``: one JSON line a kernel and use. Run in a process of its own, since the tests interpret
kernels.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
import triton

from benchmarks import host_driver
from rope_dist import ops

LONGEST = 2048
# Every short prompt; around the powers of two where a tile changes; and some of every remainder between.
LENGTHS = sorted(
    {
        *range(1, 100),
        *(n + d for n in (128, 256, 512, 1024, 2032) for d in range(-16, 17)),
        *range(100, 2048, 61),
    }
)


def uses():
    """By name: a call for a number of tokens, and the most tokens that it takes."""
    inv_freq = ops.to_fixed_point(1.0 / 10000.0 ** (torch.arange(64) / 64))
    x, positions = torch.empty(1, LONGEST, 256).bfloat16(), torch.arange(LONGEST)[None]
    weights = [torch.empty(n * 128, 256).bfloat16() for n in (4, 2, 2)]
    q, k = (torch.empty(1, LONGEST, n, 128).bfloat16() for n in (4, 2))
    cos, sin = (torch.empty(1, LONGEST, 64) for _ in range(2))
    caches = [torch.empty(LONGEST, 2, 128).bfloat16() for _ in range(2)]
    slots = torch.arange(LONGEST)

    def at(n):
        return {"inv_freq": inv_freq, "position_ids": positions[:, :n].contiguous()}

    def table(n):
        return {"cos": cos[:, :n], "sin": sin[:, :n]}

    def projection(path, angles):
        return lambda n: ops.qkv_rotary(x[:, :n].contiguous(), *weights, head_dim=128, path=path, **angles(n))

    def normed(n):
        norms = (torch.empty(128), torch.empty(128))
        ops.qkv_norm_rotary(x[:, :n].contiguous(), *weights, *norms, head_dim=128, path="triton_tma", **at(n))

    def decode(n):
        written = {"k_cache": caches[0], "v_cache": caches[1], "slots": slots[:n].contiguous()}
        ops.decode_rotary(x[:, :n].contiguous(), *weights, **written, **at(n))

    def heads(n):
        return q[:, :n].contiguous(), k[:, :n].contiguous()

    return {
        **{f"{path}, {form}": (projection(path, angles), most)
           for path, most in (("triton", LONGEST), ("triton_tma", LONGEST), ("decode", 16))
           for form, angles in (("positions", at), ("table", table))},
        "triton_tma, norm": (normed, LONGEST),
        "decode_rotary": (decode, 16),
        "rotary_at": (lambda n: ops.rotary_at(*heads(n), **at(n)), LONGEST),
        "rotary": (lambda n: ops.rotary(*heads(n), **table(n)), LONGEST),
    }  # fmt: skip


def main() -> None:
    keys = set()
    nothing = SimpleNamespace(
        launch_metadata=lambda *arguments: None,
        run=lambda *arguments: None,
        function=None,
        packed_metadata=None,
    )

    def count(self, key, signature, device, *rest):
        """In the place of the compiler."""
        keys.add((self.__name__, key))
        self.device_caches[device][0][key] = nothing
        return nothing

    triton.JITFunction._do_compile = count
    with host_driver.host_only():
        for name, (call, most) in uses().items():
            keys.clear()
            for tokens in LENGTHS:
                if tokens <= most:
                    call(tokens)
            kernels = sorted({kernel for kernel, _ in keys})
            print(json.dumps({"name": name, "kernels": kernels, "compilations": len(keys)}), flush=True)


if __name__ == "__main__":
    main()
