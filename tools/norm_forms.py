"""Compares ``rope_dist/hf/norm_forms.json`` with the installed transformers, for ``python -m tools.rotary_forms``."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from rope_dist.hf.forms import StockFile
from rope_dist.hf.norm_forms import NormForm, known_norms, methods_of, norm_digest, norms_of

FORMS = [
    NormForm(eps, weight, scaled, offset, promotes)
    for eps, (weight, scaled, offset, promotes) in itertools.product(
        ("eps", "variance_epsilon"),
        (("weight", scaled, offset, promotes)
         for scaled in ("", "with_scale") for offset in (0.0, 1.0) for promotes in (False, True)),
    )
] + [NormForm("eps"), NormForm("variance_epsilon")]  # fmt: skip


def norm_classes(file: StockFile) -> Iterator[type]:
    """Classes of the norms that modules of a file have which may rotate."""
    found: list[type] = []
    for cls in vars(file.module).values():
        own = inspect.isclass(cls) and cls.__module__ == file.module.__name__
        if own and ("Attention" in cls.__name__ or "Indexer" in cls.__name__):
            found += [one for classes in norms_of(cls)[0].values() for one in classes]
    for one in dict.fromkeys(found):
        if one.__module__ == file.module.__name__ and "forward" in vars(one):
            yield one


def matching_form(cls: type) -> NormForm | None:
    return next((form for form in FORMS if agrees(cls, form)), None)


def agrees(cls: type, form: NormForm) -> bool:
    """Whether ``cls`` computes what ``form`` says, from nothing but the attributes that it names."""
    try:
        return all(_agrees(cls, form, scaled) for scaled in ((True, False) if form.scaled else (True,)))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def _agrees(cls: type, form: NormForm, scaled: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, dtype=torch.float64, generator=generator)
    norm: Any = cls.__new__(cls)
    nn.Module.__init__(norm)
    setattr(norm, form.eps, 0.3)
    if form.scaled:
        setattr(norm, form.scaled, scaled)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.3).sqrt()
    if form.weight and scaled:
        setattr(norm, form.weight, nn.Parameter(weight.float()))
        expected = expected * (weight + form.offset)
    with torch.no_grad():
        found, rounded = norm(x.float()), norm(x.bfloat16())
    promoted = torch.float32 if form.promotes else torch.bfloat16
    return (
        found.dtype == torch.float32
        and rounded.dtype == promoted
        and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
        and torch.allclose(rounded.double(), expected, rtol=0.03, atol=0.03)
    )


def compare(files: Iterator[StockFile]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Norms of the installed transformers as entries of the table, and a line about each that is new or wrong.

    One that is no RMS norm has no line: the model's own module is called.
    """
    found: dict[str, dict[str, Any]] = {}
    lines = []
    known = known_norms()
    for file in files:
        for cls in norm_classes(file):
            key, where = (
                norm_digest(methods_of(cls)),
                f"{file.module.__name__.rpartition('.modeling_')[2]}.{cls.__name__}",
            )
            if key in known:
                form = known[key] if agrees(cls, known[key]) else None
                if form is None:
                    lines.append(f"{where}: WRONG, the table has {known[key]}")
            else:
                form = matching_form(cls)
                if form is not None:
                    lines.append(f"{where}: new, {form}")
            if form is not None:
                found.setdefault(key, _entry(form, where))
    return found, lines


def _entry(form: NormForm, example: str) -> dict[str, Any]:
    default = asdict(NormForm(""))
    return {**{k: v for k, v in asdict(form).items() if v != default[k]}, "example": example}
