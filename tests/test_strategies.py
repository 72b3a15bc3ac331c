"""Strategies against Hugging Face's own formulas, the authors' procedure and the paper's figures."""

import inspect
import math

import pytest
import torch
from conftest import llama_config
from helpers import dprope_authors as authors
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import rope_dist
from rope_dist import defaults, strategies
from rope_dist.presets import PRESETS
from rope_dist.strategies import (
    STILL,
    STRATEGIES,
    PretrainedRope,
    Scaling,
    default_inv_freq,
    default_threshold,
    dprope,
    get_strategy,
)

LLAMA2 = PRESETS["llama2-7b"]


def dims(scaling: Scaling) -> int:
    return 2 * int((scaling.factors != 1).sum())


def hugging_face(rope: PretrainedRope, target: int, parameters: dict) -> tuple[torch.Tensor, float]:
    config = llama_config(
        hidden_size=4 * rope.rotary_dim,
        max_position_embeddings=rope.length,
        rope_parameters={"rope_theta": rope.theta, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=target)


ROPES = [
    LLAMA2,
    PretrainedRope(theta=500000.0, rotary_dim=128, length=8192),
    PretrainedRope(theta=100000.0, rotary_dim=64, length=2048),
    PretrainedRope(theta=10000.0, rotary_dim=80, length=4096),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope.theta:g}-{rope.rotary_dim}-{rope.length}")
@pytest.mark.parametrize("scale", [2, 3, 8])
@pytest.mark.parametrize("name", ["pi", "dynamic-ntk", "yarn", "llama3", "longrope"])
def test_equals_hugging_face(rope, scale, name):
    target = scale * rope.length
    settings, parameters = {
        "pi": ({}, {"rope_type": "linear", "factor": float(scale)}),
        "dynamic-ntk": ({}, {"rope_type": "dynamic", "factor": float(scale)}),
        "yarn": (
            {},
            {"rope_type": "yarn", "factor": float(scale), "original_max_position_embeddings": rope.length},
        ),
        "llama3": (
            {},
            {
                "rope_type": "llama3",
                "factor": float(scale),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": rope.length,
            },
        ),
        "longrope": (
            {"factors": [1 + 0.1 * i for i in range(rope.pairs)]},
            {
                "rope_type": "longrope",
                "factor": float(scale),
                "short_factor": [1.0] * rope.pairs,
                "long_factor": [1 + 0.1 * i for i in range(rope.pairs)],
                "original_max_position_embeddings": rope.length,
            },
        ),
    }[name]
    expected, attention = hugging_face(rope, target, parameters)
    ours = STRATEGIES[name](rope, target, **settings)
    inv_freq = default_inv_freq(rope.theta, rope.rotary_dim, ours.factors)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0.0)
    assert ours.attention_scaling == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize(
    "settings", [{"beta_fast": 16, "beta_slow": 2}, {"truncate": False}, {"attention_factor": 1.0}]
)
def test_yarn_settings_equal_hugging_face(settings):
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, **settings}
    expected, attention = hugging_face(LLAMA2, 16384, parameters)
    ours = STRATEGIES["yarn"](LLAMA2, 16384, **settings)
    torch.testing.assert_close(default_inv_freq(10000.0, 128, ours.factors), expected, rtol=1e-6, atol=0.0)
    assert ours.attention_scaling == pytest.approx(attention)


@pytest.mark.parametrize(
    "rope", ROPES[:3], ids=lambda rope: f"{rope.theta:g}-{rope.rotary_dim}-{rope.length}"
)
@pytest.mark.parametrize(("scale", "whole", "free"), [(2, 0.047, 0.0281), (4, 0.15, 0.107)])
def test_auto_yarn_is_near_auto_by_parameters_of_yarn(rope, scale, whole, free):
    target = scale * rope.length
    auto = STRATEGIES["auto"](rope, target)
    for truncate, most in ((True, whole), (False, free)):
        ours = STRATEGIES["auto-yarn"](rope, target, truncate=truncate)
        parameters = {"rope_type": "yarn", "factor": float(scale), **ours.settings}
        parameters["original_max_position_embeddings"] = rope.length
        expected, attention = hugging_face(rope, target, parameters)
        inv_freq = default_inv_freq(rope.theta, rope.rotary_dim, ours.factors)
        torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0.0)
        assert ours.attention_scaling == attention == auto.attention_scaling
        assert math.expm1(float((ours.factors / auto.factors).log().abs().max())) <= most
    # The ramp that llama.cpp and MLX round is the same a little further out.
    whole_pairs = STRATEGIES["auto-yarn"](rope, target)
    near = {key: whole_pairs.settings[key] * 1.002 for key in ("beta_fast", "beta_slow")}
    moved = STRATEGIES["auto-yarn"](rope, target, **near)
    assert torch.equal(moved.factors, whole_pairs.factors)
    assert moved.settings["beta_fast"] == near["beta_fast"]


def test_ntk_is_a_change_of_base():
    scaled = default_inv_freq(10000.0 * 4 ** (128 / 126), 128).double()
    ours = LLAMA2.inv_freq.double() / STRATEGIES["ntk"](LLAMA2, 16384).factors
    torch.testing.assert_close(ours, scaled, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(
        STRATEGIES["dynamic-ntk"](LLAMA2, 16384, factor=1.0).factors, STRATEGIES["ntk"](LLAMA2, 16384).factors
    )


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "longrope"])
def test_no_extension_changes_nothing(name):
    scaling = STRATEGIES[name](LLAMA2, LLAMA2.length)
    assert torch.equal(scaling.factors, torch.ones(64, dtype=torch.float64))
    assert scaling.attention_scaling == 1.0


LLAMA3 = PRESETS["llama3-8b"]
PHI3_MINI = PretrainedRope(theta=10000.0, rotary_dim=96, length=2048)


def trained_periods(rope: PretrainedRope) -> list[float]:
    wavelengths = (2 * math.pi * rope.theta ** (2 * i / rope.rotary_dim) for i in range(rope.pairs))
    return [rope.length / wavelength for wavelength in wavelengths]


def reach(rope: PretrainedRope, periods: float) -> float:
    """The real-valued pair index of so many periods, by eq. 7 of LongRoPE2."""
    return rope.pairs * math.log(rope.length / (2 * math.pi * periods), rope.theta)


class TestMixedRadix:
    """Against the radices of the paper, multiplied up pair by pair."""

    @pytest.mark.parametrize(
        "rope", ROPES, ids=lambda rope: f"{rope.theta:g}-{rope.rotary_dim}-{rope.length}"
    )
    @pytest.mark.parametrize("s", [2, 4, 16])
    @pytest.mark.parametrize("name", ["mrrope-uni", "mrrope-pro"])
    def test_factors_are_products_of_radices(self, rope, s, name):
        d_l, d_h = math.ceil(reach(rope, 32)) - 1, math.floor(reach(rope, 1)) + 1
        n = d_h - d_l
        expected, factor = [], 1.0
        for pair in range(rope.pairs):
            expected.append(factor)
            if d_l <= pair < d_h:
                factor *= s ** (1 / n if name == "mrrope-uni" else 2 * (1 + pair - d_l) / ((1 + n) * n))
        scaling = STRATEGIES[name](rope, s * rope.length)
        torch.testing.assert_close(scaling.factors, torch.tensor(expected, dtype=torch.float64))
        assert scaling.factors[d_l] == 1 != scaling.factors[d_l + 1]
        assert scaling.factors[d_h - 1] != s
        assert scaling.factors[d_h:].tolist() == pytest.approx([s] * (rope.pairs - d_h))
        assert scaling.attention_scaling == pytest.approx(0.1 * math.log(s) + 1)

    def test_the_bounds_of_llama_3(self):
        """18 and 35, also YaRN's whole bounds."""
        factors = STRATEGIES["mrrope-uni"](LLAMA3, 4 * 8192).factors
        assert factors[18] == 1 < factors[19]
        assert factors[34] < factors[35] == 4

    def test_uni_is_autos_ramp_where_the_bounds_are_whole_pairs(self):
        rope = PretrainedRope(10000.0, 64, 4096)
        periods = trained_periods(rope)
        bounds = {"fast_periods": periods[8], "slow_periods": periods[20]}
        auto = STRATEGIES["auto"](rope, 8192, **bounds).factors
        # A pair on a bound is neither faster nor slower.
        nudged = {"fast_periods": periods[8] * 0.999, "slow_periods": periods[20] * 1.001}
        torch.testing.assert_close(
            STRATEGIES["mrrope-uni"](rope, 8192, **nudged).factors, auto, rtol=1e-6, atol=0
        )

    def test_without_fast_or_slow_pairs(self):
        short, long = PretrainedRope(10000.0, 16, 64), PretrainedRope(100.0, 16, 4096)
        assert 1 < STRATEGIES["mrrope-pro"](short, 128).factors[0] < 2
        assert 1 < STRATEGIES["mrrope-uni"](long, 8192).factors[-1] < 2


class TestNtkMixed:
    @pytest.mark.parametrize("b", [0.625, 0.75])
    def test_the_authors_formula(self, b):
        k, half = 12, 64
        a = math.log(k) / half**b
        expected = [math.exp(a * m**b) for m in range(1, half + 1)]
        factors = STRATEGIES["ntk-mixed"](LLAMA2, k * 4096, exponent=b).factors
        assert factors.tolist() == pytest.approx(expected, rel=1e-12)

    def test_its_ends(self):
        assert set(STRATEGIES["ntk-mixed"](LLAMA2, 8192, exponent=0).factors.tolist()) == {2.0}
        ratios = STRATEGIES["ntk-mixed"](LLAMA2, 8192, exponent=1).factors.log().diff()
        torch.testing.assert_close(ratios, torch.full_like(ratios, math.log(2) / 64))


class TestResonance:
    def test_rounds_the_wavelengths_of_hugging_faces_yarn(self):
        parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
        inv_freq, attention = hugging_face(LLAMA2, 16384, parameters)
        whole = [round(2 * math.pi / f) for f in inv_freq.double().tolist()]
        made = rope_dist.plan("llama2-7b", factor=4, strategy="resonance")
        torch.testing.assert_close(
            2 * math.pi / made.inv_freq.double(), torch.tensor(whole).double(), rtol=3e-7, atol=0
        )
        assert made.attention_scaling == pytest.approx(attention)
        assert whole[:4] == [6, 7, 8, 10]

    def test_on_top_of_another_strategy(self):
        of_pi = STRATEGIES["resonance"](LLAMA2, 8192, of="pi")
        wavelengths = 2 * math.pi / LLAMA2.inv_freq.double() * of_pi.factors
        torch.testing.assert_close(wavelengths, wavelengths.round(), rtol=1e-12, atol=0)
        assert float((of_pi.factors - 2).abs().max()) < 0.09
        assert of_pi.attention_scaling == 1


class TestPairsThatDoNotRotate:
    def test_cope_tapers_the_last_20_of_64(self):
        parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
        inv_freq, attention = hugging_face(LLAMA2, 16384, parameters)
        expected = inv_freq.double()
        for j in range(20):
            expected[44 + j] *= 0.5 * (1 + math.cos(math.pi * j / 19))
        made = rope_dist.plan("llama2-7b", factor=4, strategy="cope")
        torch.testing.assert_close(made.inv_freq.double(), expected, rtol=1e-6, atol=0)
        assert made.inv_freq[-1] == 0 < made.inv_freq[-2]
        assert made.attention_scaling == pytest.approx(attention)

    @pytest.mark.parametrize("clipped", [0, 1, 2, 64])
    def test_the_number_of_clipped_pairs(self, clipped):
        base = STRATEGIES["pi"](LLAMA2, 8192).factors
        factors = STRATEGIES["cope"](LLAMA2, 8192, of="pi", clipped_pairs=clipped).factors
        first = 64 - clipped + 1  # The first of them keeps its frequency.
        assert torch.equal(factors[:first], base[:first])
        assert bool((factors[first:] > base[first:]).all())
        assert bool((factors == STILL).any()) == (clipped > 1)

    @pytest.mark.parametrize(("rope", "first"), [(LLAMA2, 46), (LLAMA3, 35), (PHI3_MINI, 31)])
    def test_clip_stops_the_pairs_that_never_came_round(self, rope, first):
        """From the critical dimensions that LongRoPE2 prints for LLaMA3-8B and Phi3-mini."""
        factors = STRATEGIES["clip"](rope, 2 * rope.length, of="dprope").factors
        assert (factors == STILL).nonzero().flatten().tolist() == list(range(first, rope.pairs))
        assert torch.equal(factors[:first], dprope(rope, 2 * rope.length).factors[:first])

    def test_the_fastest_pair_always_rotates(self):
        factors = STRATEGIES["clip"](PretrainedRope(10000.0, 8, 4), 8, slow_periods=1e6).factors
        assert (factors == STILL).tolist() == [False, True, True, True]

    def test_they_are_kept_where_another_strategy_goes_on(self):
        factors = STRATEGIES["resonance"](LLAMA2, 8192, of="clip").factors
        assert int((factors == STILL).sum()) == 18
        assert float(STRATEGIES["cope"](LLAMA2, 8192, of="clip").factors.max()) == STILL

    def test_only_the_last_pairs_of_a_model_stand_still(self):
        PretrainedRope(1e4, 8, 64, (1.0, 2.0, STILL, STILL))
        for factors in ((1.0, STILL, 2.0, STILL), (STILL,) * 4):
            with pytest.raises(ValueError, match="must be the last ones"):
                PretrainedRope(1e4, 8, 64, factors)


class TestLongrope2:
    """The critical dimensions are those that the paper prints: theoretical (eq. 7) and found by its search."""

    @pytest.mark.parametrize(
        ("rope", "theoretical", "real"), [(PHI3_MINI, 31, 25), (LLAMA3, 35, 30)], ids=["phi3", "llama3"]
    )
    def test_the_papers_critical_dimensions(self, rope, theoretical, real):
        s = 16
        assert math.ceil(reach(rope, 1)) == theoretical
        for settings, critical in (({"critical_periods": 1}, theoretical), ({}, real)):
            factors = STRATEGIES["longrope2"](rope, s * rope.length, **settings).factors
            assert factors[critical - 1] < s * 0.999
            assert factors[critical:].tolist() == pytest.approx([s] * (rope.pairs - critical), rel=1e-12)
            # NTK: below it the frequencies are those of the base with which pair ``critical`` has the factor s.
            base = rope.theta * s ** (rope.rotary_dim / (2 * critical))
            scaled = [base ** (-2 * i / rope.rotary_dim) for i in range(critical)]
            plain = [rope.theta ** (-2 * i / rope.rotary_dim) for i in range(critical)]
            expected = [p / q for p, q in zip(plain, scaled, strict=True)]
            assert factors[:critical].tolist() == pytest.approx(expected, rel=1e-9)

    def test_its_attention_factor(self):
        scaling = STRATEGIES["longrope2"](LLAMA3, 131072)
        assert scaling.attention_scaling == pytest.approx(math.sqrt(math.log(131072) / math.log(8192)))


class TestDprope:
    @pytest.mark.parametrize(
        ("target", "settings", "expected"),
        [
            (8192, {"threshold": 0}, 94),
            (16384, {"threshold": 0}, 84),
            (8192, {}, 80),
            (16384, {}, 64),
            (8192, {"threshold": "paper-2x"}, 80),
            (16384, {"threshold": "paper-4x"}, 64),
            (8192, {"interpolated_dims": 80}, 80),
            (8192, {"interpolated_dims": 0}, 0),
            (8192, {"interpolated_dims": 128}, 128),
        ],
    )
    def test_the_papers_numbers_of_interpolated_dimensions(self, target, settings, expected):
        scaling = dprope(LLAMA2, target, **settings)
        assert dims(scaling) == expected
        assert set(scaling.factors.tolist()) <= {1.0, target / 4096}

    @pytest.mark.parametrize(("target", "n", "t"), [(8192, 80, 5e-4), (16384, 64, 2e-3)])
    def test_n_and_the_threshold_that_gives_it_choose_the_same(self, target, n, t):
        by_n, by_t = dprope(LLAMA2, target, interpolated_dims=n), dprope(LLAMA2, target, threshold=t)
        assert torch.equal(by_n.factors, by_t.factors)

    @given(
        theta=st.one_of(st.integers(2, 1_000_000), st.sampled_from([10_000, 500_000])),
        length=st.integers(2, 48),
        pairs=st.integers(1, 6),
        scale=st.integers(1, 5),
        intervals=st.sampled_from([2, 3, 7, 90, 180, 360, 720]),
    )
    def test_threshold_0_equals_the_authors_code(self, theta, length, pairs, scale, intervals):
        try:
            expected = authors.factors(theta, length, 2 * pairs, scale, intervals)
        except IndexError:
            return
        rope = PretrainedRope(float(theta), 2 * pairs, length)
        ours = dprope(rope, length * scale, threshold=0, intervals=intervals).factors
        assert torch.equal(ours.float(), expected)

    @given(scale=st.floats(1, 64))
    def test_default_threshold_runs_between_the_papers_two(self, scale):
        t = default_threshold(scale)
        assert 5e-4 <= t <= 2e-3
        assert default_threshold(scale * 1.5) >= t

    def test_default_threshold_at_the_papers_scales(self):
        assert [default_threshold(s) for s in (1, 1.5, 2, 4, 8)] == [5e-4, 5e-4, 5e-4, 2e-3, 2e-3]
        assert default_threshold(2 * math.sqrt(2)) == pytest.approx((5e-4 + 2e-3) / 2)

    def test_disturbance_is_that_of_the_chosen_factors(self):
        from rope_dist.distribution import disturbances

        scaling = dprope(LLAMA2, 8192)
        torch.testing.assert_close(
            scaling.disturbance, disturbances(LLAMA2.inv_freq, 4096, [scaling.factors], 8192)[0]
        )

    def test_more_candidates_disturb_no_more(self):
        def off_resonance(rope, target_length):
            # A ten-thousandth moves nearly resonant pairs by whole intervals over the length.
            return Scaling(torch.full((rope.pairs,), 1.0002, dtype=torch.float64))

        two = dprope(LLAMA2, 8192, threshold=0)
        many = dprope(LLAMA2, 8192, threshold=0, candidates=["extrapolation", "pi", "yarn", off_resonance])
        assert bool((many.disturbance <= two.disturbance).all())
        assert many.disturbance.mean() < 0.99 * two.disturbance.mean()

    def test_a_candidate_may_be_a_function(self):
        def three_quarters(rope, target_length):
            return Scaling(torch.full((rope.pairs,), 0.75 * target_length / rope.length, dtype=torch.float64))

        scaling = dprope(LLAMA2, 8192, threshold=0, candidates=["extrapolation", "pi", three_quarters])
        assert 1.5 in scaling.factors.tolist()
        assert scaling.settings["candidates"] == ["extrapolation", "pi", "three_quarters"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"threshold": 0, "interpolated_dims": 2}, "not both"),
            ({"threshold": -1e-3}, "at least 0"),
            ({"threshold": math.nan}, "threshold must be a finite number"),
            ({"threshold": "paper-3x"}, "paper-2x, paper-4x"),
            ({"interpolated_dims": 3}, "even"),
            ({"interpolated_dims": 130}, "0 to 128"),
            ({"interpolated_dims": -2}, "0 to 128"),
            ({"intervals": 1}, "intervals"),
            ({"candidates": ["pi"]}, "at least two"),
            ({"candidates": ["pi", "magic"]}, "unknown strategy 'magic'"),
            ({"divergence": "kl"}, "divergence must be one of"),
            ({"dtype": "float16"}, "dtype must be one of"),
        ],
    )
    def test_bad_settings_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            dprope(LLAMA2, 8192, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("longrope", {}, "needs factors=64"),
        ("longrope", {"factors": [1.0] * 63}, "64 numbers"),
        ("longrope", {"factors": [1.0] * 63 + [math.nan]}, "finite and positive, got nan for pair 63"),
        ("longrope", {"factors": [0.0] + [1.0] * 63}, "got 0.0 for pair 0"),
        ("longrope", {"factors": [1.0] * 64, "attention_factor": 0}, "attention_factor"),
        ("yarn", {"beta_fast": 1, "beta_slow": 1}, "beta_fast > beta_slow"),
        ("llama3", {"low_freq_factor": 4}, "high_freq_factor > low_freq_factor"),
        ("llama3", {"factor": 0.5}, "from 1 to"),
        ("dynamic-ntk", {"factor": 0.5}, "from 1 to"),
        ("ntk-mixed", {"exponent": 1.5}, "from 0 to 1"),
        ("longrope2", {"critical_periods": 0}, "critical_periods"),
        ("mrrope-uni", {"fast_periods": 1}, "mrrope-uni needs fast_periods > slow_periods > 0"),
        ("mrrope-pro", {"slow_periods": -1}, "mrrope-pro needs fast_periods > slow_periods > 0"),
        ("mrrope-pro", {"attention_factor": 0}, "mrrope-pro's attention_factor"),
        ("resonance", {"of": "yran"}, "resonance's of: unknown strategy 'yran', did you mean yarn"),
        ("resonance", {"of": "resonance"}, "unknown strategy 'resonance'"),
        ("resonance", {"of": ["yarn"]}, "resonance's of"),
        ("cope", {"of": "longrope"}, "cope's of"),
        ("cope", {"clipped_pairs": 65}, "from 0 to 64"),
        ("cope", {"clipped_pairs": 1.5}, "from 0 to 64"),
        ("clip", {"slow_periods": 0}, "clip's slow_periods"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        STRATEGIES[name](LLAMA2, 8192, **settings)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_target_below_the_original_is_refused(name):
    settings = {"factors": [1.0] * 64} if name == "longrope" else {}
    with pytest.raises(ValueError, match="below the original length 4096"):
        STRATEGIES[name](LLAMA2, 4095, **settings)


def test_an_unknown_strategy_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match="extrapolation, pi, ntk, ntk-mixed, dynamic-ntk, yarn, llama3, longrope, longrope2, mrrope",
    ):
        get_strategy("YaRN")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1.0, 128, 4096), "above 1"),
        ((math.inf, 128, 4096), "must be a finite number"),
        ((1e4, 127, 4096), "even"),
        ((1e4, 0, 4096), "even"),
        ((1e4, 128, 1), "at least 2 tokens"),
        ((1e4, 128, 4096, (1.0,)), "64 numbers"),
    ],
)
def test_a_bad_embedding_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        PretrainedRope(*numbers)


@pytest.mark.parametrize(
    ("length", "fast"),
    [(100, 2.0), (256, 2.0), (1024, 8.0), (2048, 16.0), (4096, 32.0), (8192, 64.0), (131072, 64.0)],
)
def test_auto_keeps_pairs_of_a_period_below_128_tokens(length, fast):
    rope = PretrainedRope(10000.0, 128, length)
    scaling = get_strategy("auto")(rope, 2 * length)
    assert scaling.settings["fast_periods"] == fast
    named = get_strategy("auto")(rope, 2 * length, fast_periods=fast)
    assert torch.equal(named.factors, scaling.factors)
    kept = 2 * math.pi / rope.inv_freq.double()[scaling.factors == 1]
    assert kept.max() <= length / fast < kept.max() * 10000 ** (1 / 64)


@given(
    st.sampled_from([1e4, 5e5, 1e6]),
    st.sampled_from([64, 80, 128, 256]),
    st.sampled_from([256, 4096, 8192, 131072]),
    st.floats(1, 32),
)
def test_auto_is_monotone_and_between_1_and_s(theta, dim, length, scale):
    rope, target = PretrainedRope(theta, dim, length), round(length * scale)
    s = target / length
    scaling = get_strategy("auto")(rope, target)
    assert torch.all(scaling.factors.diff() >= 0)
    periods = length * theta ** -(torch.arange(0, dim, 2).double() / dim) / (2 * math.pi)
    # A period of 128 tokens, but at least two in the trained length, and no more than 64.
    fast = {256: 2, 4096: 32}.get(length, 64)
    assert torch.all(scaling.factors[periods > fast * 1.001] == 1)
    assert torch.allclose(scaling.factors[periods < 0.999], torch.tensor(s, dtype=torch.float64))
    # Slower pairs first: the order of frequencies, and so of wavelengths, stays.
    assert torch.all((rope.inv_freq / scaling.factors).diff() < 0)
    # Neighbours within the ramp change against each other by one ratio.
    steps = scaling.factors.log().diff()[(periods[:-1] < fast) & (periods[1:] > 1)]
    if len(steps) > 1:
        assert torch.allclose(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=1e-6)
    assert scaling.attention_scaling == pytest.approx(math.sqrt(math.log(target) / math.log(length)))


@pytest.mark.parametrize(
    "options",
    [
        {"fast_periods": 1},
        {"slow_periods": 0},
        {"slow_periods": 32},  # of LLaMA2, whose fast periods are as many
        {"attention_factor": 0},
        {"fast_periods": math.inf},
        {"fast_periods": "64"},
    ],
)
def test_auto_refuses(options):
    with pytest.raises(ValueError, match="auto"):
        get_strategy("auto")(LLAMA2, 8192, **options)


@pytest.mark.parametrize("value", [1e308, 1e-308, 5e-324, -1e308, 1e30, 2**70, 0])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name, function in STRATEGIES.items()
        for setting in list(inspect.signature(function).parameters)[2:]
        if name != "refined"
    ],
)
def test_a_setting_out_of_range_is_named(name, setting, value):
    """Or a plan of finite numbers is made: nothing overflows on the way."""
    try:
        made = rope_dist.plan("llama2-7b", target_length=8192, strategy=name, settings={setting: value})
    except ValueError as error:
        message = str(error)
        assert setting in message or name in message
    else:
        assert all(math.isfinite(f) and f > 0 for f in (*made.factors, made.attention_scaling))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            ("formulas.pi", {"factor": defaults.NUMBER}),
            r"is pi\(rope, target_length, \*, factor\) .* is pi\(rope",
        ),
        (("formulas.dynamic_ntk", {}), r"is dynamic_ntk\(rope, target_length\) .* factor: "),
        (("base.check_number", {"value": defaults.NUMBER}), r"is check_number\(.* is check_number\(value"),
    ],
)
def test_an_entry_is_compared_with_its_function(monkeypatch, entry, message):
    """What the command line knows without torch cannot drift from the functions: importing compares them."""
    monkeypatch.setitem(defaults.STRATEGIES, "pi", entry)
    with pytest.raises(TypeError, match=rf"the strategy pi in rope_dist/defaults\.py {message}"):
        strategies._load("pi")


def test_a_setting_needs_a_default(monkeypatch):
    def required(rope, target_length, *, factor):
        raise NotImplementedError

    monkeypatch.setattr(strategies.formulas, "pi", required)
    monkeypatch.setitem(defaults.STRATEGIES, "pi", ("formulas.pi", {"factor": defaults.NUMBER}))
    with pytest.raises(TypeError, match="with a default for each setting"):
        strategies._load("pi")
