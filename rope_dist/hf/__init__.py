"""Hugging Face models: :func:`enable`, :func:`disable`, :func:`report`."""

from .patching import Enabled, disable, enable, enabled_modules
from .reporting import LayerReport, report, summary

__all__ = ["Enabled", "LayerReport", "disable", "enable", "enabled_modules", "report", "summary"]
