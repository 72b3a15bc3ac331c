"""Compares the tables of forms with the installed transformers: ``python -m tools.rotary_forms``.

They are ``rotary_forms.json`` and ``norm_forms.json`` of ``rope_dist/hf``.

Prints, for each function of a model file that applies a rotation, whether its form is known, new or changed (another
model has an older form of that name), and tries every known form on numbers: float64, against the definition of the
rotation; so for each RMS norm of an attention. ``--write`` adds what it found out of new ones by trying all forms;
look at them before you commit. It exits with 1 where something is (still) new or wrong.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.models

from rope_dist.hf import norm_forms as norms
from rope_dist.hf.applying import replacement
from rope_dist.hf.enabled import is_rotary_embedding
from rope_dist.hf.forms import (
    FILE,
    Form,
    StockFile,
    Unsupported,
    digest,
    known_forms,
    rotating_methods,
    stock_file,
)

from . import norm_forms

REFUSED = {
    (
        "tensor",
        "sin",
        "cos",
    ): "its tables are rows of one table of sines and cosines, made once for a fixed length",
    (
        "q",
        "k",
        "cos",
        "sin",
        "kwargs",
    ): "it rotates the patches of an image and leaves other tokens as they are",
}
"""Parameters of functions that this package does not apply, and why."""
OF_TOWERS = re.compile("vision|_2d|_time_|multidimensional")
"""Functions of image, video and audio towers, which are left as they are."""


def stock_files() -> Iterator[StockFile]:
    """Every model file of transformers that imports here and mentions a rotation."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = f"{transformers.models.__path__[0]}/{package.name}"
        for module in pkgutil.iter_modules([folder]):
            if module.name.startswith("modeling_"):
                with open(f"{folder}/{module.name}.py", encoding="utf-8") as file:
                    if "RotaryEmbedding" not in file.read():
                        continue
                name = f"transformers.models.{package.name}.{module.name}"
                try:
                    importlib.import_module(name)
                except ImportError:
                    continue  # it needs a package that is not installed
                yield stock_file(name)


def applied(file: StockFile) -> list[str]:
    """Functions of a file that methods of its classes call to rotate."""
    classes = [
        value
        for value in vars(file.module).values()
        if inspect.isclass(value)
        and value.__module__ == file.module.__name__
        and not is_rotary_embedding(value)
    ]
    names = (
        name for cls in classes for base, _, called in rotating_methods(cls) if base is cls for name in called
    )
    return [name for name in dict.fromkeys(names) if name in file.functions and not OF_TOWERS.search(name)]


FORMS = [
    Form(layout, tables, negative, last, heads_axis)
    for layout, tables, negative, last, heads_axis in itertools.product(
        ("half", "interleaved", "interleaved-to-half"), ("twice", "pairs", "once", "complex"),
        (False, True), (False, True), (1, 2),
    )
]  # fmt: skip


def matching_form(function: Any) -> Form | None:
    """The form in which ``function`` rotates; None where it is in none of :data:`FORMS`."""
    parameters = inspect.signature(function).parameters
    if tuple(parameters) in REFUSED:
        return Form(refused=REFUSED[tuple(parameters)])
    if "position_ids" in parameters and parameters["position_ids"].default is inspect.Parameter.empty:
        return Form(refused="it looks up its tables by position itself")
    return next((form for form in FORMS if agrees(function, form)), None)


def agrees(function: Any, form: Form) -> bool:
    """Whether ``function``, and this package's replacement, rotate as ``form`` is defined: on numbers, in float64."""
    parameters = list(inspect.signature(function).parameters)
    if (form.tables == "complex") != ("freqs_cis" in parameters) or (
        form.tables != "complex" and form.heads_axis == 2
    ):
        return False
    try:
        ours = replacement(form, function)
    except ValueError:
        return False
    return (
        _agrees(function, ours, form, parameters, 8)
        and _agrees(function, ours, form, parameters, 12) is not False
    )


def _agrees(function: Any, ours: Any, form: Form, parameters: list[str], head_dim: int) -> bool | None:
    """On heads of which 8 dimensions are rotated; None where ``function`` takes whole heads only."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, heads, 5, head_dim, dtype=torch.float64, generator=generator)
        for heads in ((3,) if parameters[0] == "x" else (3, 1))
    ]
    angles = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    if "mrope_section" in parameters:  # the axes of transformers before 5.17: one after the other, and again
        angles = torch.stack((angles, angles + 1, angles + 2))
    tables = _tables(form, angles)
    rest: list[Any] = [[1, 2, 1]] if "mrope_section" in parameters else []
    if form.tables == "complex" and form.heads_axis == 2:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    try:
        theirs = function(*tensors, *tables, *rest)
    except (RuntimeError, IndexError, TypeError):
        return None if head_dim != 8 else False
    if "mrope_section" in parameters:
        angles = torch.cat((angles[0, ..., :1], angles[1, ..., 1:3], angles[2, ..., 3:]), dim=-1)
    shaped = angles[:, :, None] if form.heads_axis == 2 else angles[:, None]
    expected = [_defined(form, x, shaped) for x in tensors]
    for found in (theirs, ours(*tensors, *tables, *rest)):
        found = found if isinstance(found, tuple) else (found,)
        if [x.shape for x in found] != [x.shape for x in expected]:
            return False
        # The functions of some families compute in float32.
        if not all(
            torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True)
        ):
            return False
    return True


def _tables(form: Form, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if form.tables == "complex":
        return (torch.polar(torch.ones_like(angles), angles),)
    repeated = {"twice": torch.cat((angles, angles), -1), "pairs": angles.repeat_interleave(2, -1)}
    angles = repeated.get(form.tables, angles)
    return angles.cos(), angles.sin()


def _defined(form: Form, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """``(x1, x2)`` to ``(x1 cos - x2 sin, x2 cos + x1 sin)`` in the layout of ``form``."""
    rotary_dim = 2 * angles.shape[-1]
    kept = x.shape[-1] - rotary_dim
    first, x = x.split([kept, rotary_dim] if form.last else [rotary_dim, kept], dim=-1)
    if not form.last:
        first, x = x, first
    if form.layout == "half":
        x1, x2 = x.chunk(2, dim=-1)
    else:
        x1, x2 = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), -angles.sin() if form.negative else angles.sin()
    turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    x = torch.stack(turned, -1).flatten(-2) if form.layout == "interleaved" else torch.cat(turned, -1)
    return torch.cat((first, x) if form.last else (x, first), dim=-1)


def compare() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Forms of the installed transformers as entries of the table, and a line about each function that is not known."""
    found, lines = {}, []
    known = known_forms()
    for file in stock_files():
        model = file.module.__name__.rpartition(".modeling_")[2]
        for name in applied(file):
            key, where = digest(name, file.functions), f"{model}.{name}"
            try:
                file.check_own(name)
            except Unsupported as error:
                lines.append(f"{where}: {error}")
                continue
            if key in known:
                form = known[key]
                if form.refused or agrees(file.function(name), form):
                    found.setdefault(key, _entry(form, where))
                else:
                    lines.append(f"{where}: WRONG, the table has {form}")
            else:
                form = matching_form(file.function(name))
                lines.append(f"{where}: new, {form or 'in no form of this package'}")
                if form is not None:
                    found.setdefault(key, _entry(form, where))
    return found, lines


def _entry(form: Form, example: str) -> dict[str, Any]:
    default = asdict(Form())
    chosen = {"refused": form.refused} if form.refused else {"layout": form.layout, "tables": form.tables}
    return {**chosen, **{k: v for k, v in asdict(form).items() if v != default[k]}, "example": example}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="add the new forms that were recognised to the tables"
    )
    options = parser.parse_args()
    (found, lines), (found_norms, norm_lines) = compare(), norm_forms.compare(stock_files())
    title = f"transformers {transformers.__version__}: {len(found)} forms, {len(found_norms)} RMS norms"
    print(title, *lines, *norm_lines, sep="\n")
    if options.write:
        _add(FILE, found)
        _add(norms.FILE, found_norms)
        known_forms.cache_clear()
        norms.known_norms.cache_clear()
        lines, norm_lines = compare()[1], norm_forms.compare(stock_files())[1]
    return 1 if lines or norm_lines else 0


def _add(file: Path, found: dict[str, dict[str, Any]]) -> None:
    """Add entries to a table; those that are there stay."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    merged = {**found, **old}
    text = json.dumps(dict(sorted(merged.items(), key=lambda item: (item[1]["example"], item[0]))), indent=2)
    file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
