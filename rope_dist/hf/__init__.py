"""Hugging Face models: :func:`enable`, :func:`disable`, :func:`report`, :func:`supported`."""

from .patching import Enabled, disable, enable, enabled_modules, supported
from .reporting import LayerReport, report, summary

__all__ = ["Enabled", "LayerReport", "disable", "enable", "enabled_modules", "report", "summary", "supported"]
