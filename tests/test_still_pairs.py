"""Plans with pairs that do not rotate (``cope``, ``clip``) in reports, models, cached keys and exports."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers.growing import dynamic_of, first_keys, grow, stock_at, text
from transformers import LlamaForCausalLM

import rope_dist
from rope_dist import export
from rope_dist.cli import main
from rope_dist.distribution import DEFAULT_SMOOTHING
from rope_dist.export.engines import unable
from rope_dist.export.flags import llama_server_arguments
from rope_dist.strategies import STILL

STRATEGIES = ("cope", "clip")
CLIPPED = {"of": "dprope"}  # which does not scale cos and sin: every engine's longrope can have it


@pytest.fixture
def llama(make_llama):
    """Of its 8 pairs 0-6 come round within 64 tokens."""
    return make_llama(initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 20.0})


def clipped(source, **settings):
    return rope_dist.plan(source, factor=2, strategy="clip", **{**CLIPPED, **settings})


class TestReports:
    @pytest.mark.parametrize("model", ["llama2-7b", "llama3.1-8b"])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_json(self, strategy, model, tmp_path):
        made = rope_dist.plan(model, factor=2, strategy=strategy)
        assert made.factors[-1] == STILL, "also where a model's own factor is more than 1"
        assert made.inv_freq[-1] == 0
        made.save(tmp_path / "plan.json")
        assert rope_dist.RopePlan.load(tmp_path / "plan.json") == made

    @pytest.mark.parametrize("divergence", ["pretrained-extended", "extended-pretrained"])
    def test_the_disturbance_is_that_of_one_angle(self, divergence):
        length, target, b = 4096, 8192, 360
        made = rope_dist.plan(
            "llama2-7b", factor=2, strategy="clip", dtype="float64", intervals=b, divergence=divergence
        )
        last = 10000.0 ** (-126 / 128)
        p = [DEFAULT_SMOOTHING / length] * b
        for position in range(length):
            p[int(position * last / (2 * math.pi) * b)] += 1 / length
        q = [DEFAULT_SMOOTHING / target] * b
        q[0] += 1
        if divergence == "extended-pretrained":
            p, q = q, p
        expected = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        assert made.disturbance_per_pair[-1] == pytest.approx(expected, rel=1e-4)

    def test_text(self, capsys):
        made = rope_dist.plan("llama2-7b", factor=2, strategy="clip")
        row = next(line for line in made.summary().splitlines() if "46-63" in line)
        assert "does not rotate" in row
        assert "e+38" not in made.summary()
        main(["compare", "llama2-7b", "--target", "8192", "--strategies", "yarn", "clip"])
        assert "clip, 8192: pair 63" in capsys.readouterr().out


class TestModels:
    @torch.no_grad()
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_logits_are_those_of_hand_made_frequencies(self, llama, strategy):
        plan = rope_dist.plan(llama, factor=2, strategy=strategy)
        by_hand = copy.deepcopy(llama)
        frequencies = [20.0 ** (-i / 8) / f for i, f in enumerate(plan.factors)]
        frequencies = [0.0 if f == STILL else v for f, v in zip(plan.factors, frequencies, strict=True)]
        assert 0.0 in frequencies
        by_hand.model.rotary_emb.inv_freq = torch.tensor(frequencies)
        by_hand.model.rotary_emb.attention_scaling = plan.attention_scaling
        ids = text(120)
        expected = by_hand(ids).logits
        with rope_dist.enable(llama, plan=plan):
            torch.testing.assert_close(llama(ids).logits, expected, rtol=0, atol=1e-4)
        assert (llama(ids).logits - expected).abs().max() > 0.1

    @torch.no_grad()
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_cached_keys_are_corrected_to_them(self, llama, strategy):
        """Keys of the first layer depend on no earlier rotation: as of a text that stock reads whole."""
        model, plan = dynamic_of(llama, strategy=strategy)
        assert plan.stages[0].inv_freq[-1] > 0 == plan.stages[-1].inv_freq[-1]
        ids = text(150)
        _, cache = grow(model, ids, [30, 30, 10, 1, 1, 40, 1])
        _, whole = grow(stock_at(llama, plan, 150), ids, ())
        got, expected = first_keys(model, cache), whole.layers[0].keys
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        # Pairs are halves of a head; the last one has lost its rotation.
        plain = llama.model.layers[0]
        states = plain.self_attn.k_proj(plain.input_layernorm(llama.model.embed_tokens(ids)))
        states = states.view(2, 150, 2, 16).transpose(1, 2) * plan.at(150).attention_scaling
        for half in (7, 15):
            torch.testing.assert_close(got[..., half], states[..., half], rtol=0, atol=1e-4)

    def test_a_saved_model_is_read_back(self, llama, tmp_path):
        plan = clipped(llama)
        with rope_dist.enable(llama, plan=plan):
            llama.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.model.rotary_emb.inv_freq, plan.inv_freq)
        further = rope_dist.plan(tmp_path, factor=4, strategy="yarn")
        still = plan.factors.count(STILL)
        assert f"{still} of the 8 pairs of a head do not rotate, and stay so" in further.notes
        assert further.factors[-still:] == (STILL,) * still


class TestExports:
    def test_every_engine_computes_them(self, llama, tmp_path):
        plan = clipped(llama)
        out = export.hf(llama, plan, tmp_path / "out")
        assert export.verify(out, plan)
        file = json.loads((out / "config.json").read_text())
        for name, read in export.ENGINES.items():
            assert unable(name, plan) is None
            assert torch.equal(read(file).inv_freq, plan.inv_freq), name
        assert int((plan.inv_freq == 0).sum()) == plan.factors.count(STILL) > 0

    def test_verify_names_a_pair_that_rotates_in_one_of_them(self, llama, tmp_path):
        plan = clipped(llama)
        out = export.hf(llama, plan, tmp_path / "out")
        last_but_still = plan.factors.index(STILL) - 1
        moved = list(plan.factors)
        moved[last_but_still] *= 1.5
        other = dataclasses.replace(plan, factors=tuple(moved))
        reasons = {c.engine: c.reason for c in export.verify(out, other).checks}
        assert f"most in pair {last_but_still}:" in reasons["vllm"]
        turned = dataclasses.replace(plan, factors=(*plan.factors[:-1], 2.0))
        reasons = {c.engine: c.reason for c in export.verify(out, turned).checks}
        assert "most in pair 7: 0 radians per token" in reasons["vllm"]

    def test_doctor_counts_them(self, llama, tmp_path, capsys):
        plan = clipped(llama)
        out = export.hf(llama, plan, tmp_path / "out")
        main(["doctor", str(out)])
        assert f"{plan.factors.count(STILL)} do not rotate" in " ".join(capsys.readouterr().out.split())

    def test_gguf(self, llama, tmp_path):
        pytest.importorskip("gguf")
        from helpers.exports import write_gguf

        plan = clipped(llama)
        source = write_gguf(llama, tmp_path / "model.gguf")
        out = export.gguf(source, plan, tmp_path / "out.gguf")
        assert export.verify(out, plan)
        # llama.cpp divides the angle by the factor, in float32: less than its smallest step from cos 1 and sin 0.
        angle = torch.tensor(2.0**31, dtype=torch.float32) / torch.tensor(plan.factors[-1])
        assert (torch.cos(angle), torch.sin(angle) < 1e-28) == (1.0, True)

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize(
        ("engine", "reason"),
        [
            ("mlx", "mlx does not scale cos and sin of a longrope"),
            ("exllamav3", "exllamav3 does not scale cos and sin of a longrope"),
        ],
    )
    def test_what_an_engine_cannot_have_is_refused_by_name(self, llama, strategy, engine, reason, tmp_path):
        plan = rope_dist.plan(llama, factor=2, strategy=strategy)
        with pytest.raises(ValueError, match=reason):
            export.hf(llama, plan, tmp_path / "out", engines=[engine])

    def test_flags_of_llama_server(self, llama):
        with pytest.raises(ValueError, match="cannot express the factors of clip"):
            llama_server_arguments(clipped(llama), "llama")
