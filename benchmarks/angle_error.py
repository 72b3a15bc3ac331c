"""How exact are cosine and sine of a position's angles? ``python -m benchmarks.angle_error``

The largest error of cos and sin near a position, of all pairs, against float64. Angles are the float32 product of
position and frequency (Hugging Face's tables), the same with frequencies rounded to bfloat16 (as by
``model.to(torch.bfloat16)``), or made by ``ops.rotary_at``, which multiplies in fixed point.
"""

import json
import sys

import torch

from rope_dist import machine, ops
from rope_dist.files import write_text

from .results import RESULTS
from .tables import markdown

PATH = RESULTS / "angle_error.json"
THETA, HEAD_DIM, AROUND = 500000.0, 128, 1024
POSITIONS = (4096, 32768, 131072, 1_000_000)


def errors(position: int) -> dict[str, float]:
    """Largest errors at the positions up to ``position``, by implementation."""
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    inv_freq = (THETA**-exponents).float()
    positions = torch.arange(position - AROUND, position)
    exact = positions.double()[:, None] * inv_freq.double()
    product = positions.float()[:, None] * inv_freq
    rounded = positions.float()[:, None] * inv_freq.bfloat16().float()
    # The rotation of (1, 0) is (cos, sin).
    q = torch.cat((torch.ones(1, AROUND, 1, HEAD_DIM // 2), torch.zeros(1, AROUND, 1, HEAD_DIM // 2)), -1)
    rotated = ops.rotary_at(q, None, inv_freq, positions[None])[0][0, :, 0].double()
    found = {
        "bfloat16 frequencies": (rounded.double().cos(), rounded.double().sin()),
        "float32 product (Hugging Face)": (product.double().cos(), product.double().sin()),
        "`ops.rotary_at`": rotated.chunk(2, -1),
    }
    return {
        name: max((cos - exact.cos()).abs().max().item(), (sin - exact.sin()).abs().max().item())
        for name, (cos, sin) in found.items()
    }


def table() -> tuple[str, str]:
    """The table of docs/kernels.md, of the result file."""
    result = json.loads(PATH.read_text(encoding="utf-8"))
    rows = [
        [name, *(f"{result['errors'][str(position)][name]:.0e}" for position in result["positions"])]
        for name in result["errors"][str(result["positions"][0])]
    ]
    return markdown(rows, ["largest error of cos and sin", *(f"at {n}" for n in result["positions"])]), ""


def main() -> int:
    """Compute and write the result."""
    result = {
        "command": "python -m benchmarks.angle_error",
        "machine": machine.describe(),
        "theta": THETA,
        "head_dim": HEAD_DIM,
        "positions": POSITIONS,
        "errors": {str(position): errors(position) for position in POSITIONS},
    }
    write_text(PATH, json.dumps(result, indent=2) + "\n")
    print(table()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
