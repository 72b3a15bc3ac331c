"""Plots of plans, perplexity and passkeys: what is drawn, in which colours, and that nothing covers it."""

import math

import pytest

from rope_dist.comparison import compare
from rope_dist.evaluation import Bucket
from rope_dist.evaluation.tables import Score

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'rope-dist[plot]'")

from rope_dist import plots

PERPLEXITY = {"stock": (10.0, 10.0, 40.0), "yarn": (10.0, 10.5, 11.0), "auto": (9.9, 10.5, 9.9)}


@pytest.fixture
def figure(monkeypatch):
    """The figure that a plot function would save."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, note="": saved.append(figure))

    def draw(function, *arguments, **options):
        function(*arguments, "a.svg", **options)
        saved[-1].draw_without_rendering()
        return saved[-1]

    return draw


def curves(*labels):
    return {n: [Bucket(i * 256, i * 256 + 256, p) for i, p in enumerate(PERPLEXITY[n])] for n in labels}


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_perplexity_is_drawn_relative_to_yarn(figure):
    above, below = figure(plots.plot_perplexity, curves("stock", "yarn", "auto"), 512, "title").axes
    assert above.get_yscale() == "log"
    assert below.get_yscale() == "linear"
    assert "relative to yarn, %" in below.get_ylabel()
    assert [text.get_text() for text in below.texts] == ["above 20 % not drawn"]
    drawn = {label: list(line.get_ydata()) for label, line in lines(below).items()}
    assert drawn["yarn"] == [0, 0, 0]
    assert drawn["auto"] == pytest.approx([-1, 0, -10])
    # 264 % above YaRN: drawn, it would leave no room for a difference of 1 %.
    assert drawn["stock"] == pytest.approx([0, 100 * (10 / 10.5 - 1), math.nan], nan_ok=True)
    assert list(lines(below)["auto"].get_xdata()) == [128, 384, 640]
    assert list(lines(below)["trained length"].get_xdata()) == [512, 512]


@pytest.mark.parametrize(
    ("trained", "ends", "ticks"),
    [
        (8192, (256, 512, 600), [0, 256, 512]),
        (8192, (8192, 11264), [0, 4096, 8192]),
        (8192, (8192, 16384), [0, 4096, 8192, 12288, 16384]),
        (8192, (8192, 24576, 32768), [0, 8192, 16384, 24576, 32768]),
        (64, (64, 100), [0, 32, 64, 96]),
        (100, (300, 1100), [0, 400, 800]),
    ],
)
def test_positions_are_labelled_around_the_trained_length(figure, trained, ends, ticks):
    """A text shorter than half of the trained length had only a 0."""
    buckets = [Bucket(start, end, 9.0) for start, end in zip((0, *ends), ends, strict=False)]
    for axis in figure(plots.plot_perplexity, {"yarn": buckets, "auto": buckets}, trained, "title").axes:
        assert axis.get_xticks().tolist() == ticks


def test_perplexity_without_yarn_is_relative_to_stock_and_alone_to_nothing(figure):
    _, below = figure(plots.plot_perplexity, curves("stock", "auto"), 512, "title").axes
    assert list(lines(below)["auto"].get_ydata()) == pytest.approx([-1, 5, 100 * (9.9 / 40 - 1)])
    for alone in ("auto", "stock"):
        assert len(figure(plots.plot_perplexity, curves(alone), 512, "title").axes) == 1


def test_one_panel_per_target_length_with_one_scale(figure):
    panels = {"2x": curves("yarn", "auto"), "4x": curves("stock", "yarn", "auto")}
    drawn = figure(plots.plot_relative_perplexity, panels, 512, "title")
    assert [axis.get_title() for axis in drawn.axes] == ["2x", "4x"]
    assert drawn.axes[0].get_ylim() == drawn.axes[1].get_ylim()
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["yarn", "auto", "stock", "trained length"]
    with pytest.raises(ValueError, match="4x has no curve of the baseline yarn"):
        plots.plot_relative_perplexity({"2x": curves("yarn"), "4x": curves("auto")}, 512, "title", "a.svg")


def test_scaling_factors_are_drawn_pair_by_pair(figure):
    plans = compare("llama2-7b", target_lengths=[8192, 16384], strategies=["pi", "dprope", "auto"])
    drawn = figure(plots.plot_plans, plans)
    above, below = drawn.axes[:2], drawn.axes[2:]
    for i, length in enumerate((8192, 16384)):
        by_strategy = {p.strategy: p for p in plans if p.target_length == length}
        found = lines(below[i])
        assert found.keys() == by_strategy.keys()
        for strategy, line in found.items():
            assert list(line.get_ydata()) == pytest.approx(by_strategy[strategy].factors)
            assert line.get_linestyle() == "None"  # a line between pairs would be a factor of no pair
            assert line.get_color() == plots.COLOURS[strategy]
        # Equal factors of several strategies show as rings in rings.
        sizes = [line.get_markersize() for line in found.values()]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == 3
        assert f"dprope: {by_strategy['dprope'].disturbance * 1e3:.2f}" in lines(above[i])
        assert "nats" in above[i].get_ylabel()


def test_a_pair_that_does_not_rotate_has_no_factor_to_draw(figure):
    drawn = figure(plots.plot_plans, compare("llama2-7b", target_lengths=[8192], strategies=["clip"]))
    factors = lines(drawn.axes[1])["clip"].get_ydata()
    assert [value != value for value in factors] == [False] * 46 + [True] * 18
    assert max(factors[:46]) <= 2


@pytest.mark.parametrize("kind", ["plans", "perplexity", "relative"])
def test_the_legend_covers_no_curve(figure, kind):
    if kind == "plans":
        drawn = figure(plots.plot_plans, compare("llama2-7b", target_lengths=[8192]))
        legend = drawn.axes[1].get_legend()
    elif kind == "perplexity":
        drawn = figure(plots.plot_perplexity, curves(*PERPLEXITY), 512, "title")
        (legend,) = drawn.legends
    else:
        drawn = figure(plots.plot_relative_perplexity, {"2x": curves(*PERPLEXITY)}, 512, "title")
        (legend,) = drawn.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in drawn.axes)
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= drawn.bbox.x1


def test_settings_of_one_strategy_have_shades_of_its_colour():
    found = plots._colours(["yarn", "yarn:beta_fast=16", "auto"])
    assert (found["yarn"], found["auto"]) == (plots.COLOURS["yarn"], plots.COLOURS["auto"])
    assert found["yarn:beta_fast=16"] == plots.mixed_with_white(plots.COLOURS["yarn"], 1 / 3)


def test_passkey_scores_are_readable_on_their_cells(figure):
    grid = {"stock": {(512, 0.0): Score(3, 3), (512, 1.0): Score(0, 3), (1024, 0.0): Score(2, 3)}}
    axis = figure(plots.plot_passkey, grid, 512, "title").axes[0]
    drawn = {text.get_text(): text for text in axis.texts}
    assert {name: text.get_color() for name, text in drawn.items()} == {
        "3/3": "white",
        "0/3": "black",
        "2/3": "white",
    }
    assert [label.get_text() for label in axis.get_xticklabels()] == ["512", "1024*"]
    accuracies = axis.images[0].get_array()
    assert accuracies.tolist()[0] == pytest.approx([1, 2 / 3])
    assert accuracies.tolist()[1][0] == 0
    assert not math.isfinite(accuracies.filled(math.nan)[1][1])  # not measured


def test_a_training_looks_the_same_in_every_panel(figure):
    def curve(label, *perplexity):
        return plots.TrainingCurve(label, (0, 10), perplexity, perplexity, perplexity)

    first = curve("dprope", 30.0, 10.1), curve("auto", 20.0, 10.0), curve("dprope:threshold=0", 90.0, 10.2)
    second = curve("auto", 20.0, 10.0), curve("dprope:threshold=0", 21.0, 9.9)
    drawn = figure(plots.plot_training, {"2x": (256, first), "4x": (256, second)}, "title")
    above, above_4x, below, below_4x = (axis.get_lines() for axis in drawn.axes)
    looks = [
        [(line.get_color(), line.get_marker()) for line in of] for of in (above, above_4x, below, below_4x)
    ]
    assert looks[0] == looks[2]
    assert looks[1] == looks[3] == looks[0][1:]
    assert len(set(looks[0])) == 3
    assert list(below[0].get_ydata()) == pytest.approx([50, 1])  # percent above auto's
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [c.label for c in first]
