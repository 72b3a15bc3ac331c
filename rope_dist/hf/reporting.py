"""Which path each attention layer of a model takes, and why: fused, with its norms, rotary only, or untouched."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import nn

from .enabled import EnabledAttention, enabled_class, is_rotary_embedding, stock_class
from .finding import language_modules
from .fusing import PROJECTIONS
from .normalising import why_called
from .projecting import projections, why_not_fused, why_not_its_weight

FUSED = "projection + rotary"
FUSED_NORM = "projection + norm + rotary"
NORM = "norm + rotary"
ROTARY = "rotary"
UNTOUCHED = "untouched"

JOINT = "all heads of a token are normalised together, after the projections"


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: of the module in the model.
        path: ``"projection + rotary"`` or ``"projection + norm + rotary"`` (one launch), ``"norm + rotary"`` (one
            launch, after the layer's own projections), ``"rotary"`` (after its own norms too) or ``"untouched"`` (the
            stock forward).
        reason: why not the first; empty where it is.
        window: of a model with a window, how the layer attends to near and far distances; else empty.
    """

    name: str
    path: str
    reason: str = ""
    window: str = ""


def report(
    model: nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> list[LayerReport]:
    """List which kernels each attention layer of ``model`` runs now, and why, in the order of the model.

    An adapter that is attached, a layer that is quantised or a hook shows from then on, and no longer once it
    is gone. FSDP2 gathers weights only while their layer runs: it is fused then, though sharded when asked here.

    Args:
        model: enabled or not, a module of ``transformers`` or one that holds one.
        dtype, device: of the activations; by default those of the model's first floating parameter.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = dtype or (first.dtype if first is not None else torch.get_default_dtype())
    device = device or (first.device if first is not None else "cpu")
    x = torch.empty(0, dtype=dtype, device=device)
    layers = []
    for name, module in language_modules(model):
        stock = stock_class(type(module))
        if stock is not None and not is_rotary_embedding(stock):
            layers.append(replace(_layer(name, module, stock, x), window=_window(module)))
    return layers


def _window(attention: nn.Module) -> str:
    windowing = attention.__dict__.get("_rope_dist_window")
    if windowing is None:
        return ""
    window, plan = windowing.window, windowing.plan
    far = f"by {plan.strategy} {plan.scale:g}x" if window.far == "plan" else f"{window.far}, {plan.scale:g}x"
    scaled = "" if window.scaling == "none" else f", attention scaling of {window.scaling} logits"
    return f"distances below {window.size} as trained, beyond {far}{scaled}"


def _layer(name: str, attention: nn.Module, stock: type, x: torch.Tensor) -> LayerReport:
    try:
        enabled = enabled_class(stock)
    except ValueError as error:
        return LayerReport(name, UNTOUCHED, str(error))
    if not enabled.rotates(attention):
        return LayerReport(name, UNTOUCHED, "the layer has no rotary embedding")
    if not isinstance(attention, EnabledAttention):
        return LayerReport(name, UNTOUCHED, "the model is not enabled")
    fused, separate, always = FUSED, ROTARY, attention.why_separate
    if attention.norms is not None and attention.norms.called(attention):
        if reason := why_called(attention, x):
            return LayerReport(name, ROTARY, reason)
        fused, separate = FUSED_NORM, NORM
        always = always or (JOINT if attention.norms.joint else "")
    if always:
        return LayerReport(name, separate, always)
    reason = why_not_fused(attention, x)
    if reason is None:
        return LayerReport(name, fused)
    for projection, module in zip(PROJECTIONS, projections(attention), strict=True):
        if why_not_its_weight(module, x) == reason:
            reason = f"{projection}: {reason}"
            break
    return LayerReport(name, separate, reason)


def summary(layers: list[LayerReport]) -> str:
    """``layers`` as text, a line for each run of neighbours that take one path for one reason."""
    lines = []
    for (path, reason, window), run in itertools.groupby(
        layers, key=lambda layer: (layer.path, layer.reason, layer.window)
    ):
        names = [layer.name for layer in run]
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} layers)"
        lines.append(f"{where}: {path}{f' ({reason})' if reason else ''}{f'; {window}' if window else ''}")
    return "\n".join(lines)
