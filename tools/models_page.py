"""Writes ``docs/models.md``: what ``enable()`` does with each model type: ``python -m tools.models_page``.

From the installed transformers and the engines that the export knows. Engines are asked about the tiny configs of the
tests, so that nothing large is built.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import transformers
from tabulate import tabulate

from rope_dist.export.architectures import VERSIONS, reading, unextendable
from rope_dist.export.stock import StockModel
from rope_dist.files import write_text
from rope_dist.hf import supported

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
ENGINES = {
    engine: f"{name} {VERSIONS[engine]}"
    for engine, name in (
        ("transformers-4", "transformers"),
        ("vllm", "vLLM"),
        ("sglang", "SGLang"),
        ("mlx", "mlx-lm"),
        ("exllamav3", "ExLlamaV3"),
    )
}

INTRODUCTION = """\
# Models

```python
import rope_dist
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))
plan = rope_dist.plan(model, factor=4)
print(rope_dist.enable(model))  # the model's own frequencies, this package's kernels
rope_dist.enable(model, factor=2)  # and new frequencies; config.max_position_embeddings is raised
rope_dist.enable(model, factor=2, dynamic=False)  # the same frequencies for every text
rope_dist.enable(model, plan=plan)  # a RopePlan or a DynamicPlan
print(rope_dist.report(model))  # per layer: which path runs, and why
rope_dist.disable(model)  # restores the original classes, frequencies and config entries

with rope_dist.enable(model, factor=2):  # undone on leaving
    ...

rope_dist.enable(factor=2)  # every supported model that from_pretrained, from_config or its class builds from now on
rope_dist.disable()  # ends that, and restores every enabled model
```

- Enabling gives each attention and rotary module a subclass of its own class. Parameters, names, hooks and
  checkpoints stay, and so does the model's own code around the rotation (norms, gates, sinks, windows, latent
  attention).
- With the model's own frequencies float32 logits equal stock's bit for bit, and to 1e-5 where norms are fused and in
  DeepSeek V2 and Llama 4, which multiply complex numbers. Queries, keys and values reach the attention function
  without a copy.
- `inv_freq` stays float32 under `.to(torch.bfloat16)`, and 16-bit queries and keys are rotated in float32 and rounded
  once. Stock rounds the frequencies themselves, which is off by more than 2 pi within a few thousand tokens.
  `tables="model"` rounds cos and sin to the model's dtype first: bit for bit the rotation of vLLM's CUDA kernel
  ([integrations.md](integrations.md)).
- With a target the plan is dynamic where the model's cached keys can be corrected (column "dynamic"), else static,
  and `Enabled.why_static` says why: [dynamic.md](dynamic.md). `window=` keeps short distances as trained:
  [window.md](window.md).
- A model that is scaled already (Llama 3.1, YaRN, ...) is extended from what it has. Where sliding and full layers
  have frequencies of their own (Gemma 3 and 4, OLMo 3), those of the full layers are extended; sliding-window layers
  are left unchanged. A model that rotates its sliding layers only (Llama 4, Cohere 2, EXAONE 4) has nothing to
  extend, and `enable()` says so.
- Two causal language models cannot be enabled, GPT-J and CodeGen, whose tables are made once for a fixed length, and
  of composite ones HunYuan-VL's, whose pairs have two positions. A global `enable()` leaves these as they are, with a
  warning.

Tested against the stock model for every type, on tiny random models: prefill with sdpa and eager attention, decoding
with the cache and left padding, loss and gradients, bfloat16, an extension saved and read by stock. For Llama and
fifteen families close to it also: flex attention, static caches, packed sequences, gradient checkpointing, copies and
pickles, `torch.compile(fullgraph=True)`; beam search, sampling, assisted generation, autocast, offloading by
accelerate and torchao's int8 weights on some. `make test-matrix` repeats it on transformers 5.6, 5.17, 5.19, 5.20.1,
5.24 and the newest. OLMo 3 needs transformers 5.13, Gemma 4 5.15.

## What enable() does with each type

The model types of transformers {version} that have a rotary embedding, and which engines read the factors of an
extension. Written by `python -m tools.models_page`; `rope_dist.supported()` and `rope-dist info --models` say the
same of the transformers that you have, `rope-dist info MODEL` of one model.

- **projection + rotary**: projections and rotation in one launch, forward and backward, where the Triton kernels run
  and each projection is a plain `nn.Linear` in 16 bits; else as below.
- **projection + norm + rotary**: with the norms of queries and keys, where each is a plain RMS norm of each head; in
  training, and where a projection is not plain, as below.
- **norm + rotary**: queries and keys are normalised and rotated in one launch, forward and backward, after the
  layer's own projections; else as below.
- **rotary**: queries and keys are rotated in one launch, after the layer's own projections and norms.
- **refused**: `enable()` raises a `ValueError` with the reason, and changes nothing.

In every case all else is the model's own code: other norms, gates, sinks, windows, caches, latent attention, layers
without a rotary embedding. A model with parts (Llava, Mistral 3, InternVL) is enabled in its language model; its
vision and audio towers are left as they are.

How the model is recognised: each model file of transformers has its own function that applies the rotation. Its
source, without names of variables, is looked up in a table of {forms} known forms (`rope_dist/hf/rotary_forms.json`).
A function that is not in the table is refused. So are RMS norms recognised, of {norms} forms
(`rope_dist/hf/norm_forms.json`); one that is not in the table is called as the module that it is.

Dynamic: "yes" where the keys that the attention caches can be corrected when a dynamic plan changes its stage
([dynamic.md](dynamic.md)); else a plan is static. It is read in the source: what it does not follow is not corrected.

Engines: how the engine's own model of this type reads a longrope of its config, which every plan has as a form.
Engines but transformers were read, not run, by `python -m tools.engine_models`; `rope-dist info MODEL` says why.

- **yes**: it hands the parameters of the config to its rotary embedding (transformers 4.57: tried, bit for bit).
- **ignored**: it runs with other frequencies and says nothing.
- **crash**: it stops with an error.
- **flag**: it needs a flag, vLLM's `--enforce-eager` where it runs transformers' own model.
- **unknown**: it has no such model, or what it does could not be followed; empty: the type has nothing to extend, or
  is composite and has no small config here.
"""


def rows() -> list[list[str]]:
    from helpers.tiny_models import tiny_config

    found = []
    for name, one in supported().items():
        engines = [""] * len(ENGINES)
        try:
            model = StockModel(tiny_config(name))
            if one.path != "refused" and unextendable(model) is None:
                engines = [reading(engine, model).how for engine in ENGINES]
        except (ValueError, KeyError, AttributeError):  # a composite type, whose text config has another type
            pass
        reason = one.reason.rpartition(" cannot be replaced: ")[2]
        found.append([f"`{name}`", one.path, reason, "" if one.why_static else "yes", *engines])
    return found


def page() -> str:
    from rope_dist.hf.forms import known_forms
    from rope_dist.hf.norm_forms import known_norms

    sys.path.insert(0, str(ROOT / "tests"))
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = tabulate(
            rows(), ["model type", "enable()", "because", "dynamic", *ENGINES.values()], tablefmt="github"
        )
    known = sum(not form.refused for form in known_forms().values())
    numbers = {"version": transformers.__version__, "forms": known, "norms": len(known_norms())}
    return f"{INTRODUCTION.format(**numbers)}\n{table}\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page())
