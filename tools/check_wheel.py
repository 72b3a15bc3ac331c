"""Whether the installed package has its CPU library, and what that says of itself; torch is not needed.

A compiler that fails costs the library and not the wheel, so ``cibuildwheel`` runs this on each.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Print the library's compiler and instruction sets; 1 where there is none."""
    found = find_spec("rope_dist")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "_native"
    libraries = sorted(folder.glob("librope_dist_*.[sd]*"))
    if [path.stem for path in libraries] != ["librope_dist_cpu"]:
        record = folder / "build.json"
        print(record.read_text(encoding="utf-8") if record.exists() else f"no library in {folder}")
        return 1
    library = ctypes.CDLL(str(libraries[0]))
    library.rope_dist_cpu_build.restype = ctypes.c_char_p
    print(library.rope_dist_cpu_build().decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
