# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What the ratios of a benchmark's turns say"""

import pytest

from netqueue.bench.frame.comparison import interval, ratio, rotated, summarise, take_turns
from netqueue.bench.overhead import verdict


def test_interval_of_nine():
    """The second and the last but one: 1 - 2 * (1 + 9) / 512"""
    assert interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8, pytest.approx(0.9609, abs=1e-4))


@pytest.mark.parametrize("count, sure", [(1, 0), (2, 0.5), (5, 0.9375), (6, 0.96875)])
def test_interval_of_few(count, sure):
    assert interval(list(range(count))) == (0, count - 1, sure)


def test_ratio():
    """Of each turn: it does not matter that the machine became ten times as slow"""
    assert ratio([2.02, 20.2, 2.02], [2, 20, 2])[0] == pytest.approx(1.01)


def test_rotated():
    assert ["".join(rotated("abc", turn)) for turn in range(6)] == ["abc", "bca", "cab", "cba", "acb", "bac"]


@pytest.mark.parametrize("low, high, says", [(0.98, 1.01, "not slower"), (1.011, 1.02, "slower"), (0.99, 1.02, "1 % is not resolved")])
def test_verdict(low, high, says):
    assert verdict(low, high).startswith(says)


def test_turns():
    order = []
    runs = take_turns("abc", 3, lambda variant: order.append(variant) or len(order))
    assert "".join(order[3:]) == "abcbcacab"
    # The turn before is not counted
    assert runs == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_summary():
    runs = {"stock": [{"seconds": 2}, {"seconds": 4}], "patched": [{"seconds": 1}, {"seconds": 3}]}
    row = summarise(runs, "stock")["patched"]
    assert (row["seconds"], row["seconds_min"], row["runs"]) == (2, 1, runs["patched"])
    assert row["ratios"]["seconds"] == (0.625, 0.5, 0.75, 0.5)
    assert row["ratios"]["seconds"].interval_text(2) == "0.50 to 0.75, sure to 50.0 %"
