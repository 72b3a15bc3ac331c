"""Runs in a process of its own: the rotary class of a vLLM or SGLang wheel, everything around it stubbed.

``python engine_rotary.py ENGINE WHEEL_DIR MODEL_DIR OUT [TOKENS]``: OUT gets cos and sin ``[TOKENS, head_dim / 2]``,
read off the class's own forward (queries of (1, 0) a pair come out as (cos, sin)), or where that is a kernel, its own
table. TOKENS is the length of the text and
vLLM's ``--max-model-len``; by default what the model reads.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path

import torch
from transformers import AutoConfig

engine, tree, source, out, *limit = sys.argv[1:]
ROTARY = {
    "vllm": "vllm.model_executor.layers.rotary_embedding",
    "sglang": "sglang.srt.layers.rotary_embedding",
}[engine]


class _AnyAttribute(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *a, **k: lambda wrapped: wrapped  # CustomOp.register("...") and the like


class Stand(torch.nn.Module, metaclass=_AnyAttribute):
    """A base class, a decorator or a function that answers no."""

    def __init__(self, *a, **k):
        super().__init__()

    def __bool__(self):
        return False

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *a, **k: None


class StubModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stand


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of the engine outside its rotary package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != engine or name.startswith(ROTARY):
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(Path(tree, *name.split(".")))]
        return spec

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


torch.compile = lambda function=None, **options: function or (lambda wrapped: wrapped)
sys.meta_path.insert(0, Stubs())
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
