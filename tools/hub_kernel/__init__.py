"""Writes the kernel for the slot ``rotary_pos_emb`` of transformers, as Hugging Face's ``kernels`` project has it.

``python -m tools.hub_kernel`` writes a repository for kernel-builder into ``build/hub-kernel``: the files of
``repository/``, with the operators of ``rope_dist/ops`` that they need copied beside them, since a kernel may import
nothing but torch. It is also built, as kernel-builder would: ``build/torch-cpu`` and so on, which
``kernels.get_local_kernel`` loads. See docs/hub.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

from rope_dist import files
from rope_dist.version import __version__

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = Path(__file__).with_name("repository")
PACKAGE = "rope_dist_rotary"
VENDORED = (
    "arguments",
    "drop_in",
    "fixed_point",
    "launch_cache",
    "reference",
    "triton_angles",
    "triton_launch",
    "triton_rotary",
    "validation",
)
"""Modules of rope_dist/ops; their imports are relative, and ``repository`` has what else they name."""

HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# rope_dist {version}, rope_dist/ops/{name}.py: copied by tools/hub_kernel, changes belong there.
"""

# What kernel-builder writes for a kernel without ahead-of-time compilation (kernels 0.17), in our words.
OPS = '''\
"""The namespace of this build's operators: every build has its own, so that several can be loaded in one process."""

import torch


def _backend() -> str:
    if torch.version.cuda is not None:
        return "cuda"
    return "rocm" if torch.version.hip is not None else "cpu"


_OPS_NAME = f"_{package}_{{_backend()}}_{identifier}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def write(out: Path, *, repo_id: str | None = None, force: bool = False) -> None:
    """Write the repository, and its build, to the folder ``out``.

    Args:
        repo_id: ``owner/name`` on the hub, for kernel-builder's upload; None: to be given there.
        force: ``out`` may exist, and is replaced.

    Raises:
        ValueError: ``out`` exists and ``force`` is False, or ``repo_id`` is no name of a repository.
        OSError: the folder cannot be written.
    """
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"the repository must be OWNER/NAME, got {repo_id!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.new_directory(out, force=force) as folder:
        _write_sources(folder, repo_id)
        _write_build(folder)


def _write_sources(folder: Path, repo_id: str | None) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(REPOSITORY, folder, dirs_exist_ok=True, ignore=ignore)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    (folder / ".gitignore").write_text("build/\n__pycache__/\nresult\n", encoding="utf-8")
    if repo_id is not None:
        with (folder / "build.toml").open("a", encoding="utf-8") as file:
            file.write(f'\n[general.hub]\nrepo-id = "{repo_id}"\n')
    package = folder / "torch-ext" / PACKAGE
    for name in VENDORED:
        source = (ROOT / "rope_dist" / "ops" / f"{name}.py").read_text(encoding="utf-8")
        header = HEADER.format(version=__version__, name=name)
        (package / f"{name}.py").write_text(header + source, encoding="utf-8")


def _write_build(folder: Path) -> None:
    """A variant for each backend of build.toml, with the digest of its files."""
    general = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))["general"]
    package = folder / "torch-ext" / PACKAGE
    identifier = _identifier(package)
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(package, variant)
        (variant / "_ops.py").write_text(OPS.format(package=PACKAGE, identifier=identifier), encoding="utf-8")
        metadata = {
            "name": general["name"],
            "id": f"_{PACKAGE}_{backend}_{identifier}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": _digests(variant)},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _identifier(package: Path) -> str:
    """Of the sources, as kernel-builder takes one from git."""
    everything = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        everything.update(path.name.encode() + path.read_bytes())
    return everything.hexdigest()[:7]


def _digests(variant: Path) -> dict[str, str]:
    return {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
