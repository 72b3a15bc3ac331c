"""Hugging Face models: :func:`enable`, :func:`disable`, :func:`supported`."""

from .patching import Enabled, disable, enable, enabled_modules, supported

__all__ = ["Enabled", "disable", "enable", "enabled_modules", "supported"]
