import torch
from kernels.benchmark import Benchmark


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def stock(q, k, cos, sin):
    """transformers.models.llama.modeling_llama.apply_rotary_pos_emb"""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class RotaryBenchmark(Benchmark):
    """Heads of Llama 3.1 8B, as its attention hands them: ``[B, S, H, D]`` transposed."""

    seed: int = 42

    def _setup(self, batch, tokens):
        dtype = torch.bfloat16
        angles = torch.arange(tokens, device=self.device)[None, :, None] * 500000.0 ** (
            -torch.arange(0, 128, 2, device=self.device) / 128
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.q, self.k = (
            torch.randn(batch, tokens, heads, 128, device=self.device, dtype=dtype).transpose(1, 2)
            for heads in (32, 8)
        )

    def _run(self):
        self.out = self.kernel.apply_rotary_pos_emb(self.q, self.k, self.cos, self.sin)[0]

    def _verify(self) -> torch.Tensor:
        return stock(self.q, self.k, self.cos, self.sin)[0]

    def setup_decode(self):
        self._setup(16, 1)

    def benchmark_decode(self):
        self._run()

    def verify_decode(self) -> torch.Tensor:
        return self._verify()

    def setup_prefill(self):
        self._setup(1, 8192)

    def benchmark_prefill(self):
        self._run()

    def verify_prefill(self) -> torch.Tensor:
        return self._verify()
