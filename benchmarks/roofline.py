"""ROOFLINE.md: the least time of each part, from its bytes and operations, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rope_dist.timing import three_digits

from .shapes import SHAPES, Shape
from .sources import RESULTS, ROOT
from .tables import load, machine, markdown, stale

PAGE = ROOT / "benchmarks" / "ROOFLINE.md"
MODELS = ("Llama-3-8B", "LLaMA2-7B", "LLaMA2-13B")
LENGTHS = (8192, 16384)
BYTES = 2
"""Of an element in bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """The numbers of NVIDIA's data sheet: memory in bytes a second, dense bfloat16 operations a second."""

    name: str
    bandwidth: float
    operations: float


GPUS = (
    Gpu("A100", 2.039e12, 312e12),
    Gpu("H100", 3.35e12, 989e12),
    Gpu("H200", 4.8e12, 989e12),
)
"""The SXM modules (A100 with 80 GB)."""


@dataclass(frozen=True)
class Part:
    """What a step must move and compute.

    Attributes:
        stages: bytes and operations of what runs one after the other.
        question, provider: where its measured time is; None where none is taken.
        case: what the measured case's labels must have beyond model and tokens.
    """

    name: str
    stages: tuple[tuple[float, float], ...]
    question: str | None = None
    provider: str | None = None
    case: tuple[tuple[str, Any], ...] = ()

    def seconds(self, gpu: Gpu) -> float:
        """Of each stage what takes longer, moving or computing."""
        return sum(max(moved / gpu.bandwidth, done / gpu.operations) for moved, done in self.stages)


def parts(shape: Shape, tokens: int) -> list[Part]:
    """The parts of one layer's attention."""
    total, heads = sum(shape.widths), shape.q_heads + shape.k_heads
    rotated = tokens * heads * shape.head_dim
    # Queries and keys read and written once, three multiply-adds an element.
    one_pass = (2 * rotated * BYTES, 3 * rotated)
    product = (
        (tokens * (shape.hidden + total) + total * shape.hidden) * BYTES,
        2 * tokens * shape.hidden * total,
    )
    packed = (2 * tokens * total * BYTES, 3 * rotated)
    attention = (
        2 * tokens * (heads + shape.k_heads) * shape.head_dim * BYTES,
        2 * tokens**2 * shape.q_heads * shape.head_dim,
    )
    forward, backward = (("pass", "forward"),), (("pass", "forward + backward"),)
    return [
        Part("rotary alone, one pass", (one_pass,), "rotary", "rope_dist, in place"),
        # A rotated copy, two products and a sum: each tensor is read or written ten times in all.
        Part("rotary of Hugging Face", ((5 * one_pass[0], one_pass[1]),), "rotary", "Hugging Face"),
        Part("projection, rotary within it", (product,), "projection", "rope_dist", forward),
        Part(
            "projection, then a rotary pass",
            (product, one_pass),
            "projection",
            "rope_dist, separate",
            forward,
        ),
        Part(
            "the same with gradients",
            (product, packed, product, product),
            "projection",
            "rope_dist",
            backward,
        ),
        Part("causal attention", (attention,)),
    ]


def decoding(shape: Shape) -> Part:
    """One token."""
    weights = sum(shape.widths) * shape.hidden
    return Part("decoding one token", ((weights * BYTES, 2 * weights),), "decode", "rope_dist, decode")


def page() -> str:
    """The whole page."""
    return (
        "\n\n".join(
            [
                "# Roofline",
                "Made by `python -m benchmarks.report`; no figure is typed by hand.",
                "## GPUs, bfloat16",
                "Predicted milliseconds: for what runs one after the other, the larger of bytes over "
                "memory bandwidth and operations over the tensor cores' peak, both from NVIDIA's data sheets ("
                + "; ".join(
                    f"{g.name} {g.bandwidth / 1e12:g} TB/s, {g.operations / 1e12:g} TFLOP/s" for g in GPUS
                )
                + "). Real kernels stay under both peaks, so a prediction is a lower bound. "
                + _measured_on(),
                _gpu_table(),
                "## CPU",
                _cpu(),
            ]
        )
        + "\n"
    )


def _gpu_records() -> dict[str, dict]:
    names = ("rotary", "projection", "decode")
    return {name: load(f"{name}-cuda.json") for name in names if (RESULTS / f"{name}-cuda.json").exists()}


def _measured_on() -> str:
    records = _gpu_records()
    if not records:
        return "**No GPU was at hand: everything in this table is predicted, nothing measured.**"
    return "Measured: " + "; ".join(f"{name}: {machine(r)}{stale(r)}" for name, r in records.items()) + "."


def _gpu_table() -> str:
    records = _gpu_records()
    rows = []
    for model in MODELS:
        shape = SHAPES[model]
        for tokens, part in [
            *((n, part) for n in LENGTHS for part in parts(shape, n)),
            (1, decoding(shape)),
        ]:
            length = f"{tokens // 1024}k" if tokens > 1 else "1"
            row = [
                f"{model}, {length}",
                part.name,
                three_digits(sum(moved for moved, _ in part.stages) / 1e6),
                three_digits(sum(done for _, done in part.stages) / 1e9),
                *(f"{part.seconds(gpu) * 1e3:.3f}" for gpu in GPUS),
            ]
            if records:
                row.append(_measured(records.get(part.question or ""), part, model, tokens))
            rows.append(row)
    headers = ["", "part", "MB", "GFLOP", *(f"{g.name}, predicted ms" for g in GPUS)]
    return markdown(rows, headers + ["measured ms"] * bool(records), text=2)


def _measured(record: dict | None, part: Part, model: str, tokens: int) -> str:
    for case in record["cases"] if record else ():
        wanted = {"model": model, "tokens": tokens, "dtype": "bf16", **dict(part.case)}
        result = case["results"].get(part.provider, {})
        if all(case.get(key) == value for key, value in wanted.items()) and "seconds" in result:
            return f"{result['seconds']['p50'] * 1e3:.3f}"
    return ""


def _cpu() -> str:
    """Predicted from the copy and the product of the same run."""
    blocks = []
    for name, what, provider in (
        ("rotary", "the faster of a copy of the same bytes and a pass in place", "rope_dist, in place"),
        ("projection", "the matrix products alone", "rope_dist"),
    ):
        if not (RESULTS / f"{name}-cpu.json").exists():
            blocks.append(f"`{name}` has not been measured on a CPU yet.")
            continue
        record = load(f"{name}-cpu.json")
        rows = []
        for case in record["cases"]:
            limits = [
                r["seconds"]["p50"]
                for r in case["results"].values()
                if r["kind"] == "limit" and "seconds" in r
            ]
            ours, stock = (case["results"].get(p, {}).get("seconds") for p in (provider, "Hugging Face"))
            if not (limits and ours and stock):
                continue
            least = min(limits)
            work = case["bytes"] if name == "rotary" else case["flops"]
            rows.append(
                [
                    case["name"],
                    three_digits(work / 1e6),
                    three_digits(work / least / 1e9),
                    *(three_digits(s * 1e3) for s in (least, ours["p50"], stock["p50"])),
                    f"{least / ours['p50']:.2f}",
                ]
            )
        units = ("MB", "GB/s") if name == "rotary" else ("MFLOP", "GFLOP/s")
        headers = [
            "",
            units[0],
            f"{units[1]} of the limit",
            "predicted ms",
            f"{provider}, ms",
            "Hugging Face, ms",
        ]
        blocks.append(
            f"Predicted is {what}, measured in the same run ({machine(record)}).{stale(record)}\n\n"
            + markdown(rows, [*headers, "predicted / measured"])
        )
    return "\n\n".join(blocks)
