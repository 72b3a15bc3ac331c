"""Runs in a process of its own: the rotary class of a vLLM or SGLang wheel, everything around it stubbed.

``python engine_rotary.py ENGINE WHEEL_DIR MODEL_DIR OUT [TOKENS]``: OUT gets cos and sin ``[TOKENS, head_dim / 2]``,
read off the class's own forward (queries of (1, 0) a pair come out as (cos, sin)), or where that is a kernel, its own
table. TOKENS is the length of the text and
vLLM's ``--max-model-len``; by default what the model reads.
"""

import importlib
import sys
import types

import engine_stubs
import torch
from transformers import AutoConfig

engine, tree, source, out, *limit = sys.argv[1:]
ROTARY = {
    "vllm": "vllm.model_executor.layers.rotary_embedding",
    "sglang": "sglang.srt.layers.rotary_embedding",
}[engine]


torch.compile = lambda function=None, **options: function or (lambda wrapped: wrapped)
engine_stubs.install(engine, ROTARY, tree)
config = AutoConfig.from_pretrained(source)
length, head_dim, rope = config.max_position_embeddings, config.head_dim, config.rope_parameters
tokens = int(limit[0]) if limit else length
current = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=tokens))
if engine == "vllm":
    import vllm.config

    vllm.config.get_current_vllm_config = lambda: current
rotary = importlib.import_module(ROTARY)
base_module = importlib.import_module(ROTARY + ".base")


def _table_alone(self, head_size, rotary_dim, max_position_embeddings, base, is_neox_style, dtype, **options):
    """The constructor without what it asks of the platform: the table is the class's own."""
    torch.nn.Module.__init__(self)
    self.head_size, self.rotary_dim, self.base = head_size, rotary_dim, base
    self.max_position_embeddings, self.position_start, self._force_native = max_position_embeddings, 0, False
    self.table = self._compute_cos_sin_cache()


for name in ("RotaryEmbeddingBase", "RotaryEmbedding"):
    if hasattr(base_module, name):
        getattr(base_module, name).__init__ = _table_alone
if engine == "vllm":
    module = rotary.get_rope(head_dim, max_position=length, rope_parameters=rope, dtype=torch.float32)
else:
    module = importlib.import_module(ROTARY + ".factory").get_rope(
        head_dim, head_dim, length, rope["rope_theta"], True, rope, torch.float32
    )
assert type(module).__module__.startswith(ROTARY), type(module)
if hasattr(module, "table"):
    cos, sin = module.table[:tokens].chunk(2, dim=-1)
    torch.save({"cos": cos.clone(), "sin": sin.clone(), "class": type(module).__name__}, out)
    sys.exit()
half = torch.tensor([1.0, 0.0]).repeat_interleave(head_dim // 2).repeat(tokens, 1)
query, _ = module(torch.arange(tokens), half.clone(), half.clone())
cos, sin = query.reshape(tokens, head_dim).chunk(2, dim=-1)
torch.save({"cos": cos, "sin": sin, "class": type(module).__name__}, out)
