"""Hugging Face models: :func:`enable`, :func:`disable`, :func:`report`, :func:`supported`, :func:`prepare_cache`."""

from ..optional import require_hf

require_hf("rope_dist.hf")


from .growing import prepare_cache
from .patching import Enabled, disable, enable, enabled_modules
from .reporting import LayerReport, report, summary
from .stages import expect_length
from .support import ModelSupport, supported
from .window_calls import Window

__all__ = [
    "Enabled",
    "LayerReport",
    "ModelSupport",
    "Window",
    "disable",
    "enable",
    "enabled_modules",
    "expect_length",
    "prepare_cache",
    "report",
    "summary",
    "supported",
]
