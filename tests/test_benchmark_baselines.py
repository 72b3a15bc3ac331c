"""Other packages' kernels in the benchmarks: handed what they take, timed without copies of ours, and labelled."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import baselines, benchmark, projection, shapes
from rope_dist import bench, ops

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class TestBaselines:
    """Adapters against functions that behave as their packages document."""

    @pytest.mark.parametrize("name", ["Liger", "flash-attn", "FlashInfer", "quack", "vLLM", "Unsloth"])
    def test_an_adapter_hands_over_what_its_package_takes(self, name):
        shape, tokens = shapes.SHAPES["SmolLM2-135M"], 20
        angles = shape.angles(tokens, torch.float32, CPU)
        q, k = (torch.randn(1, tokens, n, shape.head_dim) for n in (shape.q_heads, shape.k_heads))

        def by_tables(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
            assert q.shape[1:] == (shape.q_heads, tokens, shape.head_dim)
            return ops.apply_rotary_pos_emb(q, k, cos, sin)

        def by_one_tensor(x, cos, sin, interleaved=False, inplace=False):
            return ops.apply_rotary_emb(x, cos, sin, interleaved, inplace)

        def by_cache(positions, query, key, head_size, cache, is_neox):
            assert is_neox
            cos, sin = cache[positions].chunk(2, -1)
            for x in (query, key):
                x = x.view(1, tokens, -1, head_size)
                ops.rotary(x, x[:, :, :0], cos[None], sin[None], inplace=True)

        def unsloth(q, k, cos, sin):
            return ops.apply_rotary_pos_emb(q, k, cos[None], sin[None])

        module = types.SimpleNamespace(
            liger_rotary_pos_emb=by_tables,
            apply_rotary_emb=by_one_tensor,
            apply_rope_with_cos_sin_cache_inplace=by_cache,
            rotary_embedding=by_cache,
            fast_rope_embedding=unsloth,
        )
        want = bench.huggingface(q, k, angles)
        found = baselines.BASELINES[name].rotate(module, q.clone(), k.clone(), angles)()
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)

    def test_on_a_cpu_kernels_for_gpus_are_skipped(self):
        options = benchmark.Options(CPU)
        for name in baselines.BASELINES:
            assert baselines.unavailable(name, options) == "needs a GPU"

    def test_folders_of_pip_target_are_read_as_site_packages_are(self, tmp_path):
        """nvidia-cutlass-dsl's modules lie in a subfolder that only a .pth file names."""
        (tmp_path / "dsl_packages" / "cutlass_stand_in").mkdir(parents=True)
        (tmp_path / "dsl_packages" / "cutlass_stand_in" / "__init__.py").touch()
        (tmp_path / "dsl.pth").write_text("dsl_packages\n")
        asked = "from benchmarks.baselines import missing; print(missing('cutlass_stand_in'))"
        done = subprocess.run(
            [sys.executable, "-c", asked],
            env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout.strip() == "None", done.stderr


VIEWS = {
    "view",
    "_unsafe_view",
    "transpose",
    "unsqueeze",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "t",
}
VIEWS |= {"detach", "alias", "permute", "expand", "as_strided", "_reshape_alias"}


class NoCopies(TorchDispatchMode):
    """Counts what a call does besides views: copies, joins, conversions, arithmetic."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class TestTimed:
    """What is timed of a package is its kernel: nothing is joined, copied or converted for it in the call."""

    SHAPE = "SmolLM2-135M"
    TOKENS = 20

    def options(self, monkeypatch):
        for module in (baselines, projection):
            monkeypatch.setattr(module, "unavailable", lambda name, options: None)
        return benchmark.Options(CPU)

    def stand_in(self, monkeypatch):
        """Modules whose functions do nothing, and Liger's of which two kernels run here."""

        widths = sum(shapes.SHAPES[self.SHAPE].widths)
        product = torch.zeros(self.TOKENS, widths, dtype=torch.bfloat16)
        self.weights, self.pinned = [], []

        def fused(x, weight, **_):
            self.weights.append(weight)
            return {"D": product}

        module = types.SimpleNamespace(
            liger_rotary_pos_emb=lambda q, k, cos, sin: (q, k),
            apply_rotary_emb=lambda x, cos, sin, inplace: x,
            apply_rope_with_cos_sin_cache_inplace=lambda *_, **__: None,
            rotary_embedding=lambda *_, **__: None,
            fast_rope_embedding=lambda q, k, cos, sin: (q, k),
            make_interleaved_inv_freq=lambda inv_freq, rotated, rest: inv_freq,
            rope_posfreq_epi=fused,
            available_impls=lambda op: ["nvidia-cutedsl", "nvidia-triton"],
            set_impl=self.pinned.append,
        )
        names = [baseline.module for baseline in baselines.BASELINES.values()]
        for name in (*names, "liger_kernel.backends", "quack.epilogue.rotary"):
            monkeypatch.setitem(sys.modules, name, module)

    def layer(self, gradients=False):
        size = benchmark.Size(shapes.SHAPES[self.SHAPE], self.TOKENS, "bf16")
        layer = projection.Layer(size, CPU, gradients)
        return size, layer, size.shape.angles(self.TOKENS, torch.bfloat16, CPU)

    def test_rotary(self, monkeypatch):
        options = self.options(monkeypatch)
        self.stand_in(monkeypatch)
        size, _, angles = self.layer()
        heads = bench.Heads(size.shape.heads, size.shape.head_dim, self.TOKENS, torch.bfloat16, CPU)
        found = baselines.rotary_baselines(options, angles)
        timed = {p.name: p for p in found if isinstance(p, baselines.Implementation)}
        assert timed.keys() == set(baselines.ROTARY)
        for name in timed.keys() - {baselines.COMPILED}:
            call = timed[name].bind(heads)
            with NoCopies() as seen:
                call()
            assert seen.found == [], name
        assert timed["Liger"].labels["kernel"] == "nvidia-triton"
        assert self.pinned == ["nvidia-triton"]

    def test_a_fused_product_has_its_weights_joined_before(self, monkeypatch):
        """They were joined anew in every call: 100 MB more to move for a layer of Llama-3-8B."""

        options = self.options(monkeypatch)
        self.stand_in(monkeypatch)
        size, layer, angles = self.layer()
        call = projection._quack(size, options, angles, False).bind(layer)
        cats = []
        cat = torch.cat
        monkeypatch.setattr(torch, "cat", lambda *a, **k: cats.append(1) or cat(*a, **k))
        with NoCopies() as seen:
            for _ in range(3):
                call()
        assert (cats, seen.found) == ([], [])
        assert len(self.weights) == 3
        torch.testing.assert_close(self.weights[0].T, cat(layer.weights))

    def test_each_kernel_of_liger_has_a_column(self, monkeypatch):
        options = self.options(monkeypatch)
        self.stand_in(monkeypatch)
        size, layer, _ = self.layer(gradients=True)
        found = {p.name: p for p in projection.implementations(size, options, layer)}
        kernels = {n: p.labels["kernel"] for n, p in found.items() if n.startswith("Liger")}
        assert kernels == {"Liger": "nvidia-triton", "Liger, nvidia-cutedsl": "nvidia-cutedsl"}
        for name in kernels:
            found[name].bind(layer)()
        assert self.pinned == ["nvidia-triton", "nvidia-cutedsl"]
        # Without gradients the second hands over to the first.
        names = [p.name for p in projection.implementations(size, options, self.layer()[1])]
        assert [name for name in names if name.startswith("Liger")] == ["Liger"]
