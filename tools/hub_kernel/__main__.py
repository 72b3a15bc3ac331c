"""``python -m tools.hub_kernel [OUT] [--repo-id OWNER/NAME]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import ROOT, write


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hub_kernel", description="Write the kernel for the hub."
    )
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "hub-kernel", metavar="OUT")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    arguments = parser.parse_args()
    try:
        write(arguments.out, repo_id=arguments.repo_id, force=arguments.force)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()
