"""The rotary angle distribution and its disturbance (eq. 5-8)."""

import math

import numpy as np
import pytest
import torch
from helpers.dprope_authors import angle_counts
from hypothesis import given
from hypothesis import strategies as st

from rope_dist.distribution import disturbance, disturbances, rotary_angle_distribution
from rope_dist.strategies import default_inv_freq

LLAMA2 = default_inv_freq(10000.0, 128)


def numpy_distribution(inv_freq: torch.Tensor, length: int, intervals: int) -> np.ndarray:
    """Float64 histogram by another library."""
    angles = np.outer(inv_freq.double().numpy(), np.arange(length, dtype=np.float64)) % (2 * math.pi)
    edges = np.linspace(0, 2 * math.pi, intervals + 1)
    return np.stack([np.histogram(row, edges)[0] for row in angles]) / length


@pytest.mark.parametrize("length", [7, 4096, 40000])  # the last is counted in more than one piece
@pytest.mark.parametrize("intervals", [2, 360])
def test_float64_distribution_is_numpys_histogram(length, intervals):
    inv_freq = default_inv_freq(10000.0, 32)
    ours = rotary_angle_distribution(
        inv_freq, length, intervals=intervals, smoothing=0.0, dtype=torch.float64
    )
    theirs = numpy_distribution(inv_freq, length, intervals)
    # An angle on an interval's edge may fall to either side of it: a position or two.
    assert np.abs(ours.numpy() - theirs).sum(axis=1).max() <= 4.5 / length
    torch.testing.assert_close(ours.sum(1), torch.ones(16, dtype=torch.float64))


@given(
    theta=st.floats(2, 1e6),
    pairs=st.integers(1, 8),
    length=st.integers(1, 60),
    intervals=st.integers(2, 400),
)
def test_float32_distribution_is_the_authors_count(theta, pairs, length, intervals):
    inv_freq = default_inv_freq(theta, 2 * pairs)
    try:
        expected = angle_counts(inv_freq, length, intervals)
    except IndexError:  # theirs fails on an angle that rounds to a whole revolution
        return
    assert torch.equal(rotary_angle_distribution(inv_freq, length, intervals=intervals), expected)


def test_an_angle_that_rounds_to_a_whole_turn_is_counted_in_the_last_interval():
    just_under = torch.from_numpy(np.nextafter(np.float32([2 * math.pi]), np.float32(0)))
    rounds_up = [b for b in range(2, 721) if torch.floor(just_under * (b / (2 * math.pi))) == b]
    assert rounds_up  # where the authors' code would index past the end
    for intervals in rounds_up:
        share = rotary_angle_distribution(just_under, 2, intervals=intervals, smoothing=0.0)
        assert share[0, intervals - 1] == 0.5


@pytest.mark.parametrize(
    ("target", "pi", "dprope"), [(8192, 24.08, 6.71), (16384, 33.67, 22.92)], ids=["8k", "16k"]
)
def test_published_table_3(target, pi, dprope):
    """Wu et al. 2024, Table 3, x 1e-3."""
    s = target / 4096
    d = disturbances(LLAMA2, 4096, [torch.ones(64), torch.full((64,), s)], target)
    assert d[1].mean() * 1e3 == pytest.approx(pi, abs=0.011)
    assert d.amin(0).mean() * 1e3 == pytest.approx(dprope, abs=0.011)


def test_printed_direction_is_the_other_divergence():
    before = rotary_angle_distribution(LLAMA2, 4096, dtype=torch.float64)
    after = rotary_angle_distribution(LLAMA2 / 2, 8192, dtype=torch.float64)
    p, q = before.numpy(), after.numpy()
    np.testing.assert_allclose(disturbance(before, after).numpy(), (p * np.log(p / q)).sum(1), rtol=1e-9)
    printed = disturbance(before, after, divergence="extended-pretrained")
    np.testing.assert_allclose(printed.numpy(), (q * np.log(q / p)).sum(1), rtol=1e-9)
    assert printed.mean() > 5 * disturbance(before, after).mean()


def test_float64_disturbance_is_near_the_float32_one():
    factors = [torch.full((64,), 2.0)]
    exact = disturbances(LLAMA2, 4096, factors, 8192, dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert exact.mean().item() == pytest.approx(
        disturbances(LLAMA2, 4096, factors, 8192).mean().item(), rel=0.02
    )


def test_no_change_is_no_disturbance():
    assert disturbances(LLAMA2, 4096, [torch.ones(64)], 4096).abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intervals": 1}, "intervals must be a whole number of at least 2"),
        ({"intervals": 2.5}, "intervals"),
        ({"length": 0}, "length must be at least 1"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"smoothing": math.nan}, "smoothing"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"inv_freq": torch.tensor([1.0, math.nan])}, "finite numbers of at least 0"),
        ({"inv_freq": torch.tensor([-1.0])}, "finite numbers of at least 0"),
        ({"inv_freq": torch.ones(2, 2)}, "vector"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"inv_freq": LLAMA2, "length": 16, **change}
    with pytest.raises(ValueError, match=message):
        rotary_angle_distribution(arguments.pop("inv_freq"), arguments.pop("length"), **arguments)


def test_a_pair_that_does_not_rotate_is_at_angle_0_everywhere():
    shares = rotary_angle_distribution(torch.tensor([0.0]), 16, intervals=8, smoothing=0.0)
    assert shares.tolist() == [[1.0] + [0.0] * 7]


def test_divergence_names_are_checked():
    p = torch.full((1, 4), 0.25)
    with pytest.raises(ValueError, match="pretrained-extended, extended-pretrained"):
        disturbance(p, p, divergence="kl")
    with pytest.raises(ValueError, match="one shape"):
        disturbance(p, torch.full((1, 8), 0.125))
