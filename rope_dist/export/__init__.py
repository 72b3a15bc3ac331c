"""Standard artefacts of an extended model, for engines without this package.

:func:`hf` writes a Hugging Face directory, :func:`gguf` a GGUF file, :func:`vllm_overrides` the value of vLLM's
``--hf-overrides``; :func:`verify` reads an artefact as its engines do and compares it with the plan;
:func:`doctor` says without a plan what each engine computes from a checkpoint.
"""

from ..optional import require_hf

require_hf("rope_dist.export")

from .doctor import Diagnosis, doctor
from .engines import ENGINES
from .gguf_file import gguf, gguf_rope
from .hf_directory import config_entries, hf, vllm_arguments, vllm_overrides
from .verification import Check, Verification, verify

__all__ = [
    "ENGINES",
    "Check",
    "Diagnosis",
    "Verification",
    "config_entries",
    "doctor",
    "gguf",
    "gguf_rope",
    "hf",
    "verify",
    "vllm_arguments",
    "vllm_overrides",
]
