"""The criteria that ``auto`` was compared with: counted directly, and minimised by trying every chain."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rope_dist
from benchmarks.quality import criteria, tuning
from benchmarks.quality.logit_scaling import LogScaledVariant
from rope_dist.evaluation import Variant
from rope_dist.evaluation.models import cache_option
from rope_dist.strategies import default_inv_freq


def angle_interval(frequency, position, intervals):
    turns = frequency * position / (2 * math.pi)
    return min(int((turns - math.floor(turns)) * intervals), intervals - 1)


def test_distances_are_those_of_all_pairs_of_positions():
    inv_freq, length, intervals = torch.tensor([1.1, 0.13, 0.004]), 60, 12
    counted = criteria._distances(inv_freq, length, intervals)
    for row, frequency in zip(counted, inv_freq.double().tolist(), strict=True):
        expected = [0] * intervals
        for later, earlier in itertools.product(range(length), repeat=2):
            if later >= earlier:
                expected[angle_interval(frequency, later - earlier, intervals)] += 1 / length
        assert row.tolist() == pytest.approx(expected)


def test_by_distance_interpolates_what_did_not_come_round():
    inv_freq = default_inv_freq(1e5, 64)
    factors = torch.tensor(criteria.by_distance(inv_freq, 512, 1024))
    turns = 512 * inv_freq / (2 * math.pi)
    assert set(factors.tolist()) == {1.0, 2.0}
    # One that stays within an interval or two of a circle of 360 is left as it is.
    assert torch.all(factors[(turns < 1) & (turns > 0.01)] == 2)


def test_of_neighbours_is_the_least_of_all_chains():
    inv_freq, length, target, cells = default_inv_freq(100.0, 10), 64, 160, 6
    chosen = criteria.of_neighbours(inv_freq, length, target, cells=cells, steps=2)

    def disturbed(chain):
        total = 0.0
        before = criteria._cells(inv_freq, length, cells)
        after = criteria._cells(inv_freq / torch.tensor(chain), target, cells)
        for i in range(len(chain) - 1):
            p, q = (criteria._joint(x[i], x[i + 1], cells) for x in (before, after))
            total += criteria._divergence(p, q).item()
        return total

    chains = list(itertools.product([1.0, 2.5**0.5, 2.5], repeat=5))
    assert disturbed(tuple(chosen)) == pytest.approx(min(map(disturbed, chains)))


def test_the_tuning_reads_and_goes_on(bfloat16_attention, model_directory, tmp_path, monkeypatch, capsys):
    entry = replace(tuning.SMOLLM2, source=str(model_directory), trained=64)
    monkeypatch.setattr(tuning, "SMOLLM2", entry)
    monkeypatch.setattr(tuning, "chosen_models", lambda *_: [entry])
    monkeypatch.setattr(tuning, "TEXT", "python")
    other = ("other", "auto", {"fast_periods": 32})
    monkeypatch.setattr(tuning, "CANDIDATES", {2: (("auto", "auto", {}), other), 4: (("auto", "auto", {}),)})
    monkeypatch.setattr(tuning, "POWERS", {2: (1.5,)})
    monkeypatch.setattr(tuning, "WINDOWED", {2: ("auto+window=16",)})
    monkeypatch.setattr(tuning, "TRAINED", 64)
    monkeypatch.setattr(sys, "argv", ["tuning", "--output", str(tmp_path)])
    tuning.main()
    assert capsys.readouterr().out.count(" s\n") == 12
    tuning.main()
    assert capsys.readouterr().out.count(": on record") == 12
    record = json.loads((tmp_path / "quality_tuning.json").read_text(encoding="utf-8"))
    labels = {
        tokens: [m["what"]["variant"] for m in record["measurements"] if m["what"]["tokens"] == tokens]
        for tokens in (128, 256)
    }
    power, yarn = "auto, ramp to the power 1.5", "yarn, auto's temperature"
    assert labels[128] == [
        "stock",
        "auto",
        "other",
        yarn,
        tuning.LOG_N,
        "auto+window=16",
        power,
        "by distance",
        "of neighbours",
    ]
    assert labels[256] == ["auto", yarn, tuning.LOG_N]
    # A scale of the logits is another measurement than that of its frequencies.
    of_auto = [name for name in record["plans"] if f"{name}-log-n" in record["plans"]]
    assert len(of_auto) == 2


def test_a_ramp_to_a_power(model_directory):
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    made = {v.label: v.plan for v in tuning.variants(model, 2) if v.plan}
    auto, convex = (
        torch.tensor(made[label].factors).log2() for label in ("auto", "auto, ramp to the power 2")
    )
    torch.testing.assert_close(convex, auto**2)
    assert made["auto, ramp to the power 2"].attention_scaling == made["auto"].attention_scaling


def test_queries_scaled_by_the_logarithm_of_their_position(model_directory):
    """In one layer a token's logits depend on its own query alone: scaled weights give the same."""
    trained, length = 64, 96
    model = AutoModelForCausalLM.from_pretrained(model_directory, num_hidden_layers=1).eval()
    ids = torch.arange(length)[None] % model.config.vocab_size
    plan = rope_dist.plan(model, original_length=trained, target_length=2 * trained)
    variant = LogScaledVariant("scaled", plan)
    pieces = torch.zeros(length, model.config.vocab_size)
    with torch.inference_mode(), variant.applied(model):
        whole = model(ids).logits[0]
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 70), slice(70, length)):
            pieces[part] = model(ids[:, part], **cache_option(model, cache), use_cache=True).logits[0]
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    weight = model.model.layers[0].self_attn.q_proj.weight
    plain = Variant("plain", plan)
    for position in (0, 40, 63, 64, 80, 95):
        scale = max(1.0, math.log(position + 1) / math.log(trained))
        with torch.inference_mode():
            weight *= scale
            with plain.applied(model):
                expected = model(ids).logits[0, position]
            weight /= scale
        torch.testing.assert_close(whole[position], expected, rtol=1e-4, atol=1e-5)
    assert variant.fingerprint != plain.fingerprint
