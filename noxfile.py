"""The tests of what touches transformers, on the ends of the versions that are supported: ``make test-matrix``."""

from __future__ import annotations

import nox

nox.options.reuse_existing_virtualenvs = True
VERSIONS = ("5.6.0", "5.17.0", "5.19.0", "5.20.1", "5.24.0", "newest")
"""The first is the lower bound in pyproject.toml, 5.20.1 what SGLang and axolotl pin; from 5.24 on the key/value cache
has another name. The last is installed without a version."""
TORCH = "torch==2.13.0"
TESTS = (
    "tests/test_enable.py",
    "tests/test_enable_configs.py",
    "tests/test_every_model.py",
    "tests/test_export_every_type.py",
    "tests/test_export_families.py",
    "tests/test_export_hf.py",
    "tests/test_export_models.py",
    "tests/test_families.py",
    "tests/test_model_config.py",
    "tests/test_model_types.py",
    "tests/test_passkey.py",
    "tests/test_planning.py",
    "tests/test_progress.py",
    "tests/test_tiny_models.py",
    "tests/test_integrations.py",
)


def _run(session: nox.Session, version: str) -> None:
    # The pinned torch has a build without CUDA; it comes first, or transformers would choose another.
    session.install("--quiet", TORCH)
    transformers = ("--upgrade", "transformers") if version == "newest" else (f"transformers=={version}",)
    session.install("--quiet", *transformers, "--editable", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *(session.posargs or TESTS))


for _version in VERSIONS:

    @nox.session(name=f"transformers-{_version}", venv_backend="venv")
    def _tests(session: nox.Session, version: str = _version) -> None:
        _run(session, version)


@nox.session(name="kernels", venv_backend="venv")
def _kernels(session: nox.Session) -> None:
    """The kernel for the hub with the library that loads it: each transformers takes one minor version of that."""
    session.install("--quiet", TORCH)
    session.install("--quiet", "transformers==5.20.1", "kernels==0.17.2", "--editable", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or ("tests/test_hub_kernel.py",)))
