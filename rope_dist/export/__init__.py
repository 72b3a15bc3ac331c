"""Standard artefacts of an extended model, for engines without this package.

:func:`hf` writes a Hugging Face directory, :func:`gguf` a GGUF file, :func:`vllm_overrides` the value of vLLM's
``--hf-overrides``; :func:`verify` reads an artefact as its engines do and compares it with the plan.
"""

from ..optional import require_hf

require_hf("rope_dist.export")


from .engines import ENGINES
from .gguf_file import gguf, gguf_rope
from .hf_directory import config_entries, hf, vllm_arguments, vllm_overrides
from .verification import Check, Verification, verify

__all__ = [
    "ENGINES",
    "Check",
    "Verification",
    "config_entries",
    "gguf",
    "gguf_rope",
    "hf",
    "verify",
    "vllm_arguments",
    "vllm_overrides",
]
