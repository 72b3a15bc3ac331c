"""The criteria that ``auto`` was compared with: counted directly, and minimised by trying every chain."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quality import criteria, tuning
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
    monkeypatch.setattr(tuning, "MODEL", str(model_directory))
    monkeypatch.setattr(tuning, "TEXT", "python")
    monkeypatch.setattr(tuning, "CANDIDATES", (("auto", "auto", {}), ("other", "auto", {"fast_periods": 32})))
    monkeypatch.setattr(tuning, "TRAINED", 64)
    monkeypatch.setattr(tuning, "TARGET", 128)
    monkeypatch.setattr(sys, "argv", ["tuning", "--output", str(tmp_path)])
    tuning.main()
    assert capsys.readouterr().out.count(" s\n") == 5
    tuning.main()
    assert capsys.readouterr().out.count(": on record") == 5
    record = json.loads((tmp_path / "quality_tuning.json").read_text(encoding="utf-8"))
    labels = [m["what"]["variant"] for m in record["measurements"]]
    assert labels == ["stock", "auto", "other", "by distance", "of neighbours"]
    settings = [plan["settings"].get("fast_periods") for plan in record["plans"].values()]
    assert settings == [64.0, 32.0, None, None]
