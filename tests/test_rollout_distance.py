"""The table of docs/integrations.md: its result is what the code computes, and the page says it."""

import json

import pytest

from benchmarks import report, rollout_distance

NAMES = ("transformers", "rope_dist", 'rope_dist, tables="model"')


@pytest.mark.parametrize("start", rollout_distance.STARTS)
def test_equal_to_the_engine_whose_tables_are_used(start):
    stock, default, rounded = (rollout_distance.distances(start)[name] for name in NAMES)
    assert default["SGLang"] == rounded["vLLM"] == 0
    # Tables of 8 bits are off by up to 2^-9, uniformly: 2^-9 / sqrt(3) of each, in both members of a pair.
    for far in (default["vLLM"], rounded["SGLang"], *stock.values()):
        assert 1e-3 < far < 5e-3


def test_the_result_file_is_what_it_computes():
    saved = json.loads(rollout_distance.PATH.read_text(encoding="utf-8"))
    for start in rollout_distance.STARTS:
        for trainer, found in rollout_distance.distances(start).items():
            assert found == pytest.approx(saved["distances"][str(start)][trainer], rel=1e-3)


def test_the_page():
    page = report.ROOT / "docs/integrations.md"
    assert page in report.PAGES
    text = page.read_text(encoding="utf-8")
    assert report.fill(text) == text
