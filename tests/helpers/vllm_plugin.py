"""Runs in a process of its own: ``python vllm_plugin.py WHEEL_DIR``, the plugin in the rotary package of vLLM's wheel.

Prints, as JSON, what ``get_rope`` makes of several longropes with the plugin.
"""

import json
import sys
import types

import engine_stubs
import torch

import rope_dist.integrations.vllm as plugin

assert "vllm" not in sys.modules
engine_stubs.install("vllm", plugin.ROTARY, sys.argv[1])
torch.compile = lambda function=None, **options: function or (lambda wrapped: wrapped)
import vllm.config  # noqa: E402
import vllm.model_executor.custom_op  # noqa: E402


class CustomOp(torch.nn.Module):
    """As vLLM's where no kernel is enabled."""

    def __init__(self, *, enforce_enable=False, compile_native=False):
        super().__init__()

    @classmethod
    def register(cls, name):
        return lambda operator: operator

    @classmethod
    def enabled(cls):
        return False


vllm.model_executor.custom_op.CustomOp = CustomOp
model = types.SimpleNamespace(max_model_len=0)
vllm.config.get_current_vllm_config = lambda: types.SimpleNamespace(model_config=model)

import vllm.model_executor.layers.rotary_embedding as rotary  # noqa: E402

original = rotary.Phi3LongRoPEScaledRotaryEmbedding
FACTORS = [1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
CASES = {
    "equal": {},
    "within the trained length": {"tokens": 64},
    "scaled": {"short_mscale": 1.25, "long_mscale": 1.25},
    "bfloat16": {"dtype": torch.bfloat16},
    "partial": {"partial_rotary_factor": 0.5, "head": 32},
    "two sets": {"short_factor": [1.0] * 8},
    "two scalings": {"short_mscale": 1.25},
}


def made(tokens=128, dtype=torch.float32, head=16, **more):
    rotary._ROPE_DICT.clear()
    model.max_model_len = tokens
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS, "long_factor": FACTORS,
        "original_max_position_embeddings": 64, **more,
    }  # fmt: skip
    return rotary.get_rope(head, max_position=128, rope_parameters=rope, dtype=dtype)


def turned(module, tokens, head):
    x = torch.randn(tokens, 2 * head, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    return module(torch.arange(tokens), x.clone(), x.clone())[0]


results = {}
for name, case in CASES.items():
    before = made(**case)
    assert type(before) is original, type(before)
    plugin.register()
    plugin.register()  # vLLM may do so
    after = made(**case)
    rotary.Phi3LongRoPEScaledRotaryEmbedding = original
    results[name] = {"class": type(after).__name__, "plain": type(after) is rotary.RotaryEmbedding}
    if type(after) is rotary.RotaryEmbedding:
        tokens, head = case.get("tokens", 128), case.get("head", 16)
        table = before.long_short_cos_sin_cache
        wanted = table[64:192] if tokens > 64 else table[:64]
        kept = after.cos_sin_cache
        results[name]["equal"] = torch.equal(kept, wanted) and kept.dtype == wanted.dtype
        results[name]["bytes"] = kept.nbytes / table.nbytes
        far = after.forward_native(torch.arange(tokens), *2 * [torch.randn(tokens, 2 * head)])
        assert all(x.shape == (tokens, 2 * head) for x in far)
        after.forward = after.forward_native
        results[name]["same rotation"] = torch.equal(
            turned(before, tokens, head), turned(after, tokens, head)
        )
print(json.dumps(results))
