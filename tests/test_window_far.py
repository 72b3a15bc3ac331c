"""What is beyond a window: factors and groups by which the end of a text keeps trained angles (docs/window.md)."""

import copy
import math

import pytest
from helpers.model_families import model_of

import rope_dist
from rope_dist.hf import Window

LENGTH, WINDOW = 64, 20
"""Tokens that the models were trained to read, and a window."""


class TestFarPlans:
    """What is beyond a window is for so many tokens that no angle is past the trained ones."""

    @pytest.mark.parametrize("strategy", ["pi", "auto", "yarn", "dprope"])
    @pytest.mark.parametrize("window", [1, 20, 48])
    def test_a_plan_reaches_the_target_with_the_window_before_it(self, strategy, window):
        stock, target = model_of("Llama"), 4 * LENGTH
        enabled = copy.deepcopy(stock)
        options = {"strategy": strategy, "target_length": target, "window": window}
        plan = rope_dist.enable(enabled, dynamic=False, **options).plan
        scale = (target - window) / (LENGTH - window)
        longer = rope_dist.plan(stock.config, target_length=math.ceil(scale * LENGTH), strategy=strategy)
        assert plan.factors == longer.factors
        assert plan.attention_scaling == longer.attention_scaling
        assert plan.target_length == target
        reached = window + (target - window) / max(plan.factors)
        assert LENGTH - 1 < reached <= LENGTH + 1e-9

    def test_so_does_every_stage(self):
        stock = model_of("Llama")
        plan = rope_dist.enable(copy.deepcopy(stock), factor=4, window=WINDOW).plan
        assert plan.stages[0].factors == (1.0,) * len(plan.stages[0].factors)
        for stage in plan.stages[1:]:
            length = math.ceil(LENGTH * (stage.target_length - WINDOW) / (LENGTH - WINDOW))
            assert stage.factors == rope_dist.plan(stock.config, target_length=length).factors
        assert plan.target_length == 4 * LENGTH

    def test_a_factor_beside_a_target_is_of_the_strategy(self):
        options = {"strategy": "llama3", "target_length": 4 * LENGTH, "factor": 3}
        plan = rope_dist.enable(model_of("Llama"), dynamic=False, window=WINDOW, **options).plan
        assert max(plan.factors) == 3

    def test_a_given_plan_is_taken_as_it_is(self):
        stock = model_of("Llama")
        plan = rope_dist.plan(stock.config, factor=4)
        assert rope_dist.enable(stock, plan=plan, window=WINDOW).plan == plan

    @pytest.mark.parametrize("window", [LENGTH, 2 * LENGTH])
    def test_a_window_of_the_trained_length_leaves_none(self, window):
        stock = model_of("Llama")
        plan = rope_dist.plan(stock.config, factor=4)
        assert rope_dist.enable(stock, factor=4, window=window, dynamic=False).plan == plan


class TestGroups:
    """Sizes by Self-Extend's rule, of which (L - w) G + w tokens are the largest text, and by Jet-Long's."""

    @pytest.mark.parametrize("window", [1, 2048, 4096, 8191])
    def test_no_angle_is_past_the_trained_ones_and_no_size_is_larger_than_needed(self, window):
        trained, chosen = 8192, Window(window, "grouped")
        for tokens in (1, trained, trained + 1, 2 * trained - window, 2 * trained - window + 1, 32768, 10**6):
            size = chosen.group_size(tokens, trained)
            largest = (trained - window) * size + window
            assert tokens <= largest
            assert size == 1 or tokens > largest - (trained - window)

    @pytest.mark.parametrize(("tokens", "size"), [(1, 1), (8192, 1), (8193, 2), (16384, 2), (32768, 4)])
    def test_jet_longs(self, tokens, size):
        assert Window(2048, "jet-long").group_size(tokens, 8192) == size
