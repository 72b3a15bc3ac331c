"""Plugins of other packages: each file is imported by the package that it is for, which has to be installed."""
