"""Training libraries: an enabled model's steps are stock's, and adapters come and go."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.model_families import model_of

import rope_dist
from rope_dist import ops
from rope_dist.hf import enabled_modules

ADAPTER = "q_proj: not a plain nn.Linear (an adapter or quantised)"


@pytest.fixture(autouse=True)
def stock_again():
    yield
    rope_dist.disable()


def kinds(model):
    """What each attention layer of a bfloat16 copy does where the kernels run, and why."""
    with ops.use_backend("triton"):
        return {(layer.path, layer.reason) for layer in rope_dist.report(copy.deepcopy(model).bfloat16())}


class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft", reason="peft is not installed")

    @pytest.fixture
    def attach(self, peft):
        """Attach LoRA adapters, always the same random ones, to a model."""

        def attach(model, **changes):
            torch.manual_seed(7)
            # Half of LoRA starts as zeros, which would hide the adapter's part.
            options = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
            return peft.get_peft_model(
                model, peft.LoraConfig(task_type="CAUSAL_LM", **{**options, **changes})
            )

        return attach

    @pytest.fixture(params=["before", "after"])
    def both(self, request, attach):
        """A stock model with adapters and the same one enabled, before or after they were attached."""
        stock, model = model_of("Llama"), model_of("Llama")
        if request.param == "before":
            rope_dist.enable(model)
        enabled = attach(model)
        if request.param == "after":
            rope_dist.enable(enabled)
        return attach(stock), enabled

    @staticmethod
    def train(model):
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        model.train()
        losses = []
        for step in range(4):
            ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(step))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def test_train_and_merge(self, both, ids):
        stock, enabled = both
        ids = ids % 96
        assert len(list(enabled_modules(enabled))) == 3
        losses = self.train(stock)
        assert len(set(losses)) == 4
        assert self.train(enabled) == pytest.approx(losses, rel=1e-5)
        assert kinds(enabled) == {("rotary", ADAPTER)}

        adapted = enabled.eval()(input_ids=ids).logits
        merged = enabled.merge_and_unload()
        assert {type(layer.self_attn.q_proj) for layer in merged.model.layers} == {torch.nn.Linear}
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-5)
        assert kinds(merged) == {("projection + rotary", "")}

        rope_dist.disable(merged)
        assert not list(enabled_modules(merged))
        plain = stock.eval().merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)

    def test_layers_without_an_adapter_stay_fused(self, attach):
        model = attach(model_of("Llama"), target_modules=["o_proj", "up_proj"])
        rope_dist.enable(model)
        assert kinds(model) == {("projection + rotary", "")}

    def test_an_adapter_of_the_values_alone(self, attach):
        model = attach(model_of("Llama"), target_modules=["v_proj"])
        rope_dist.enable(model)
        assert kinds(model) == {("rotary", ADAPTER.replace("q_proj", "v_proj"))}

    def test_extend_a_model_with_adapters(self, attach, ids):
        ids = ids % 96
        model, base = attach(model_of("Llama")), model_of("Llama")
        own = model(input_ids=ids).logits
        with rope_dist.enable(model, factor=2) as enabled:
            assert model.config.max_position_embeddings == 128
            assert model.base_model.model.config.max_position_embeddings == 128
            rope_dist.enable(base, plan=enabled.plan)
            extended = model(input_ids=ids).logits
            assert not torch.allclose(extended, own, atol=1e-4)
            with model.disable_adapter():
                torch.testing.assert_close(model(input_ids=ids).logits, base(ids).logits)
            torch.testing.assert_close(attach(base)(input_ids=ids).logits, extended)
        assert model.config.max_position_embeddings == 64
        assert torch.equal(model(input_ids=ids).logits, own)


class TestTrl:
    @pytest.fixture
    def fit(self, letters, tmp_path):
        """Four steps of TRL's supervised fine-tuning: the losses, and the trainer."""
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        trl = pytest.importorskip("trl", reason="trl is not installed")
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in range(9, 25)]

        def fit(model, **changes):
            options = {
                "output_dir": str(tmp_path),
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "max_length": 32,
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
            }
            trainer = trl.SFTTrainer(
                model,
                args=trl.SFTConfig(**{**options, **changes}),
                train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
                processing_class=letters,
            )
            trainer.train()
            return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

        return fit

    @pytest.mark.parametrize("packing", [False, True])
    def test_losses_are_stocks(self, fit, llama, packing):
        enabled = copy.deepcopy(llama)
        rope_dist.enable(enabled)
        expected, _ = fit(llama, packing=packing)
        losses, trainer = fit(enabled, packing=packing)
        assert len(set(expected)) == 4
        assert losses == pytest.approx(expected, rel=1e-5)
        assert len(list(enabled_modules(trainer.model))) == 3
