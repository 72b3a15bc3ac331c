"""Standard artefacts of an extended model, for engines without this package.

:func:`hf` writes a Hugging Face directory, :func:`gguf` a GGUF file, :func:`vllm_overrides` the value of vLLM's
``--hf-overrides``, :func:`flags` command line flags; :func:`verify` reads an artefact as its engines do and compares it
with the plan; :func:`doctor` says without a plan what each engine computes from a checkpoint.
"""

from ..optional import require_hf

require_hf("rope_dist.export")

from .doctor import Diagnosis, doctor
from .engines import ENGINES
from .flags import flags, vllm_arguments, vllm_overrides
from .forms import FORMS, native_entries
from .gguf_file import gguf, gguf_rope
from .hf_directory import config_entries, hf
from .verification import Check, Verification, verify

__all__ = [
    "ENGINES",
    "FORMS",
    "Check",
    "Diagnosis",
    "Verification",
    "config_entries",
    "doctor",
    "flags",
    "gguf",
    "gguf_rope",
    "hf",
    "native_entries",
    "verify",
    "vllm_arguments",
    "vllm_overrides",
]
