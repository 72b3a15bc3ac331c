"""Defaults that the library and the command line share; nothing here needs torch."""

DEFAULT_STRATEGY = "auto"
