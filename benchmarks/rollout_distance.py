"""How far a trainer's rotation is from that of the engine which writes its rollouts: arithmetic, no timings.

    python -m benchmarks.rollout_distance

Queries in bfloat16 by stock transformers and by an enabled attention's rotation with each ``tables=``, against vLLM's
kernel (cos and sin rounded to bfloat16, float32 arithmetic, one rounding) and SGLang's on CUDA (float32 tables). The
result is ``benchmarks/results/rollout_distance.json``; docs/integrations.md has its table.
"""

import json
import sys

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rope_dist import machine, ops
from rope_dist.files import write_text
from rope_dist.hf.rotary_embedding import rounded

from .results import RESULTS
from .tables import markdown

PATH = RESULTS / "rollout_distance.json"
THETA, HEAD_DIM, HEADS, TOKENS = 500000.0, 128, 8, 512
STARTS = (0, 65536)


def engine(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``apply_token_rotary_embedding`` of vLLM and SGLang: ``q`` ``[S, H, D]`` in float32, rounded once."""
    first, second = q.float().chunk(2, dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(q.dtype)


def distances(start: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, float]]:
    """Relative rms distance of each trainer's queries to each engine's, of tokens from ``start`` on."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype)
    inv_freq = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float) / HEAD_DIM)
    angles = torch.arange(start, start + TOKENS, dtype=torch.float)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    pairs = cos[None], sin[None]
    twice = [torch.cat((table, table), -1)[None].to(dtype) for table in (cos, sin)]
    stock, _ = apply_rotary_pos_emb(q, q, *twice, unsqueeze_dim=2)
    trainers = {
        "transformers": stock,
        "rope_dist": ops.rotary(q, None, *pairs)[0],
        "rope_dist, tables=\"model\"": ops.rotary(q, None, *rounded(pairs, dtype))[0],
    }  # fmt: skip
    engines = {
        "vLLM": engine(q[0], cos.to(dtype), sin.to(dtype)),
        "SGLang": engine(q[0], cos, sin),
    }
    return {
        name: {where: _relative(x[0], exact) for where, exact in engines.items()}
        for name, x in trainers.items()
    }


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return ((x - y).square().mean() / y.square().mean()).sqrt().item()


def table() -> tuple[str, str]:
    """The table of docs/integrations.md, of the result file."""
    result = json.loads(PATH.read_text(encoding="utf-8"))
    columns = [(start, name) for start in result["starts"] for name in ("vLLM", "SGLang")]
    heads = ["trainer", *(f"to {name}, from position {start}" for start, name in columns)]
    trainers = result["distances"][str(result["starts"][0])]
    cells = {t: [result["distances"][str(start)][t][name] for start, name in columns] for t in trainers}
    rows = [[t, *("0" if v == 0 else f"{v:.1e}" for v in values)] for t, values in cells.items()]
    return markdown(rows, heads), ""


def main() -> int:
    """Compute and write the result."""
    result = {
        "command": "python -m benchmarks.rollout_distance",
        "machine": machine.describe(),
        "theta": THETA,
        "head_dim": HEAD_DIM,
        "tokens": TOKENS,
        "starts": STARTS,
        "distances": {str(start): distances(start) for start in STARTS},
    }
    write_text(PATH, json.dumps(result, indent=2) + "\n")
    print(table()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
