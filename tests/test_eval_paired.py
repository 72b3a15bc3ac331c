"""Standard errors of comparisons against float64 computations by numpy and published numbers."""

import math

import numpy as np
import pytest

from rope_dist.evaluation import paired_difference, percent, wilson_interval


def test_the_error_is_that_of_the_mean_of_differences():
    a = np.array([3.1, 2.9, 3.3, 3.0, 2.8])
    b = np.array([3.0, 2.95, 3.1, 2.9, 2.85])
    d = a - b
    mean, error = paired_difference(a.tolist(), b.tolist())
    assert mean == pytest.approx(d.mean(), abs=1e-15)
    assert error == pytest.approx(d.std(ddof=1) / math.sqrt(5), rel=1e-12)
    # What the readings share does not count: a text that is harder for both has the same error.
    assert paired_difference((a + [0, 5, 0, 9, 0]).tolist(), (b + [0, 5, 0, 9, 0]).tolist())[
        1
    ] == pytest.approx(error, rel=1e-9)


def test_weights_give_the_mean_over_tokens():
    rng = np.random.default_rng(0)
    parts = [rng.normal(0.1, 1.0, n) for n in (3, 10, 1, 7, 30, 4)]
    weights = [len(part) for part in parts]
    mean, error = paired_difference([p.mean() for p in parts], [0.0] * 6, weights)
    assert mean == pytest.approx(np.concatenate(parts).mean(), rel=1e-12)
    residuals = np.array([p.sum() - mean * len(p) for p in parts])
    assert error == pytest.approx(math.sqrt(6 * residuals.var(ddof=1)) / sum(weights), rel=1e-12)
    assert paired_difference([1.0, 2.0], [0.0, 0.0], [5, 5]) == paired_difference([1.0, 2.0], [0.0, 0.0])


def test_the_error_covers_what_it_says():
    """Of 2000 repetitions 68 % of the means are within one error of the truth, at unequal weights too."""
    rng = np.random.default_rng(1)
    for weights in (None, rng.integers(1, 9, 60).tolist()):
        within = 0
        for _ in range(2000):
            spread = 1.0 if weights is None else 1 / np.sqrt(weights)
            mean, error = paired_difference(rng.normal(0.3, spread, 60).tolist(), [0.0] * 60, weights)
            within += abs(mean - 0.3) < error
        assert 0.64 < within / 2000 < 0.71


def test_percent():
    assert percent(0.0036, 0.0008) == "+0.36 ± 0.08 %"
    assert percent(math.log(2), 0.01) == "+100.00 ± 2.00 %"
    assert percent(-0.01, math.nan) == "-1.00 %"


def test_one_part_has_no_error():
    mean, error = paired_difference([2.0], [1.5])
    assert mean == 0.5 and math.isnan(error)


@pytest.mark.parametrize(
    "arguments", [([], []), ([1.0], [1.0, 2.0]), ([1.0], [1.0], [0]), ([1.0], [1.0], [1, 2])]
)
def test_bad_parts(arguments):
    with pytest.raises(ValueError, match="parts"):
        paired_difference(*arguments)


def test_wilson():
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    for correct, prompts, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        assert wilson_interval(correct, prompts) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    for correct, prompts in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="right answers"):
            wilson_interval(correct, prompts)
