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

What `rope_dist.enable()` does with each model type of transformers {version} that has a rotary embedding, and which
engines read the factors of an extension. Written by `python -m tools.models_page`; `rope_dist.supported()` and
`rope-dist info --models` say the same of the transformers that you have, `rope-dist info MODEL` of one model.

- **projection + rotary**: projections and rotation in one launch, forward and backward, where the Triton kernels run
  and each projection is a plain `nn.Linear` in 16 bits; else as below.
- **projection + norm + rotary**: with the norms of queries and keys, where each is a plain RMS norm of each head; in
  training, and where a projection is not plain, as below.
- **norm + rotary**: queries and keys are normalised and rotated in one launch, forward and backward, after the layer's
  own projections; else as below.
- **rotary**: queries and keys are rotated in one launch, after the layer's own projections and norms.
- **refused**: `enable()` raises a `ValueError` with the reason, and changes nothing.

In every case all else is the model's own code: other norms, gates, sinks, windows, caches, latent attention, layers
without a rotary embedding. A model with parts (Llava, Mistral 3, InternVL) is enabled in its language model; its
vision and audio towers are left as they are.

How the model is recognised: each model file of transformers has its own function that applies the rotation. Its
source, without names of variables, is looked up in a table of {forms} known forms
(`rope_dist/hf/rotary_forms.json`). A function that is not in the table is refused. So are RMS norms recognised, of
{norms} forms (`rope_dist/hf/norm_forms.json`); one that is not in the table is called as the module that it is.

Dynamic: "yes" where the keys that the attention caches can be corrected when a dynamic plan changes its stage
(docs/dynamic.md); else a plan is static. It is read in the source: what it does not follow is not corrected.

Engines: how the engine's own model of this type reads a longrope of its config, which every plan has as a form.
Engines but transformers were read, not run, by `python -m tools.engine_models`; `rope-dist info MODEL` says why.

- **yes**: it hands the parameters of the config to its rotary embedding (transformers 4.57: tried, bit for bit).
- **ignored**: it runs with other frequencies and says nothing.
- **crash**: it stops with an error.
- **flag**: it needs a flag, vLLM's `--enforce-eager` where it runs transformers' own model.
- **unknown**: it has no such model, or what it does could not be followed; empty: the type has nothing to extend, or is
  composite and has no small config here.
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
