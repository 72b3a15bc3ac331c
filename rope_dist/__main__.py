"""``python -m rope_dist`` and ``rope-dist``."""

from __future__ import annotations

import sys

from .optional import MissingPackageError, require, require_hf


def main() -> int:
    """Run the command line; one line and exit code 2 where what it needs is not installed."""
    try:
        require("typer", "hf", "rope-dist")
        require_hf("rope-dist")
    except MissingPackageError as error:
        print(f"rope-dist: error: {error}", file=sys.stderr)
        return 2
    from .cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
