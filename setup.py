"""Metadata is in pyproject.toml; this file is where a native part would be built."""

from setuptools import setup

setup()
