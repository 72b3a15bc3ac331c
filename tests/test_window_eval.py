"""Windows among the variants that ``rope-dist eval`` measures."""

import pytest
import torch
from helpers.growing import text
from helpers.model_families import model_of
from typer import BadParameter

import rope_dist
from rope_dist.cli.values import variant
from rope_dist.evaluation import Variant, make_variants
from rope_dist.hf import Window
from rope_dist.variant_names import VariantName, split_variant


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("auto", VariantName("auto", False, 0, "none", "")),
        ("auto+dynamic:fast_periods=32", VariantName("auto", True, 0, "none", "fast_periods=32")),
        ("auto+window=1024", VariantName("auto", False, 1024, "none", "")),
        (
            "yarn+dynamic+window=9+scaling=far:beta_fast=16",
            VariantName("yarn", True, 9, "far", "beta_fast=16"),
        ),
        ("grouped+window=2048", VariantName("grouped", False, 2048, "none", "")),
        ("jet-long+dynamic+window=2048", VariantName("jet-long", True, 2048, "none", "")),
    ],
)
def test_names(name, parts):
    assert split_variant(name) == parts
    assert variant(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto+window=", "must be a positive whole number of tokens"),
        ("auto+window=0", "must be a positive whole number of tokens"),
        ("auto+window=1e3", "must be a positive whole number of tokens"),
        ("auto+window=9+scaling=near", "must be far or all, got 'near'"),
        ("grouped", "must be grouped"),
        ("grouped+window=9:factor=4", "without settings"),
        ("jet-long+dynamic", "must be jet-long"),
        ("outo+window=9", "outo"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(BadParameter, match=message):
        variant(name)


def test_variants_are_applied_and_told_apart():
    model, ids = model_of("Llama", initializer_range=0.15), text(150)
    names = [
        "stock",
        "auto",
        "auto+window=20",
        "auto+window=30",
        "auto+dynamic+window=20",
        "grouped+window=20",
        "jet-long+dynamic+window=20",
    ]
    names += ["auto+window=20+scaling=far", "auto+window=20+scaling=all"]
    variants = make_variants(model, names, 256)
    assert [one.label for one in variants] == names
    assert [one.window for one in variants[:4]] == [None, None, Window(20), Window(30)]
    assert len({one.fingerprint for one in variants}) == len(names)
    with torch.no_grad():
        before = model(ids).logits
        logits = []
        for one in variants:
            with one.applied(model):
                logits.append(model(ids).logits)
        assert torch.equal(model(ids).logits, before)
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:i])


def test_the_stock_model_has_nothing_to_add_to():
    with pytest.raises(ValueError, match="the stock model has no plan"):
        make_variants(model_of("Llama"), ["stock+window=16"], 256)


def test_groups_of_another_size_are_another_measurement():
    """The factors of a plan say nothing of them: here they are the trained ones for both targets."""
    model = model_of("Llama")
    plans = [rope_dist.plan(model, target_length=n, strategy="extrapolation") for n in (128, 256)]
    assert plans[0].factors == plans[1].factors
    assert len({Variant("grouped", plan, Window(20, "grouped")).fingerprint for plan in plans}) == 2
