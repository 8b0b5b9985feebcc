"""Ranked groups become pairs: hand-computed ones, ties, margins, scores that are missing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpref.data.pairing import pairs_of

SCORES = [2.0, 5.0, 1.0, 4.0]


def test_all_by_hand():
    assert pairs_of(SCORES, "all") == [(1, 3, 1.0), (1, 0, 3.0), (1, 2, 4.0), (3, 0, 2.0), (3, 2, 3.0), (0, 2, 1.0)]


def test_best_and_worst_by_hand():
    assert pairs_of(SCORES, "best-worst") == [(1, 2, 4.0)]


def test_adjacent_by_hand():
    assert pairs_of(SCORES, "adjacent") == [(1, 3, 1.0), (3, 0, 2.0), (0, 2, 1.0)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("all", [(0, 1, 2.0), (0, 3, 2.0)]),
        ("best-worst", [(0, 3, 2.0)]),
        ("adjacent", [(0, 1, 2.0)]),
    ],
)
def test_equal_and_missing_scores_give_no_pair(how, expected):
    assert pairs_of([3.0, 1.0, math.nan, 1.0], how) == expected


def test_a_pair_at_the_least_margin_stays():
    assert pairs_of(SCORES, "all", 3.0) == [(1, 0, 3.0), (1, 2, 4.0), (3, 2, 3.0)]
    assert pairs_of(SCORES, "adjacent", 1.5) == [(3, 0, 2.0)]
    assert pairs_of(SCORES, "best-worst", 4.5) == []


@pytest.mark.parametrize("how", ["all", "best-worst", "adjacent"])
@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 1.0], [math.nan, math.inf]])
def test_groups_without_a_winner(how, scores):
    assert pairs_of(scores, how) == []


@given(st.lists(st.integers(-3, 3)), st.integers(0, 4))
def test_all_against_a_double_loop(scores, least):
    loop = {(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b and a - b >= least}
    found = pairs_of(scores, "all", least)
    assert {(winner, loser) for winner, loser, _ in found} == loop
    assert len(found) == len(loop)
    assert set(pairs_of(scores, "adjacent", least)) | set(pairs_of(scores, "best-worst", least)) <= set(found)
