"""Tools for developing the package; they are not installed with it."""
