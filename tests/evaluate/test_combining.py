"""Scores of several scorers become one, by hand-computed numbers."""

import numpy as np
import pytest

from diffpref.errors import UserError
from diffpref.evaluate.combining import Combination, combine, parse_combination, ranks, standardised

A = np.array([1.0, 3.0, 2.0, 2.0])
B = np.array([10.0, 10.0, 30.0, 20.0])
PROMPTS = ["x", "x", "y", "y"]


def test_a_combination_is_read_and_written():
    combination = parse_combination("pickscore:0.5, hpsv2.1:-2,clip-h", "rank")
    assert combination == Combination((("pickscore", 0.5), ("hpsv2.1", -2.0), ("clip-h", 1.0)), "rank")
    assert str(combination) == "rank(pickscore:0.5,hpsv2.1:-2,clip-h:1)"


@pytest.mark.parametrize(
    ("text", "by", "message"),
    [
        ("a:half", "sum", r"'a:half' is not of the form SCORER:WEIGHT"),
        ("a:nan", "sum", "is not of the form"),
        (":1", "sum", "is not of the form"),
        ("a:", "sum", "is not of the form"),
        ("a:1,a:2", "sum", "a is named twice"),
        (" , ", "sum", "names no scorer"),
        ("a", "ranks", "combined by 'ranks': did you mean 'rank'"),
    ],
)
def test_what_is_no_combination(text: str, by: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_combination(text, by)


def test_the_weighted_sum():
    combined = combine(parse_combination("a:0.5,b:-2"), {"a": A, "b": B, "c": A}, PROMPTS)
    assert combined.tolist() == [-19.5, -18.5, -59.0, -39.0]


def test_z_scores_are_over_all_images():
    spread = np.sqrt(0.5)  # of A: its mean is 2, its deviations -1, 1, 0, 0
    combined = combine(parse_combination("a:3", "zscore"), {"a": A}, PROMPTS)
    assert combined == pytest.approx(np.array([-1, 1, 0, 0]) / spread * 3)
    both = combine(parse_combination("a,b", "zscore"), {"a": A, "b": B}, PROMPTS)
    assert both == pytest.approx(combined / 3 + (B - 17.5) / B.std())
    assert combine(parse_combination("a:3", "zscore"), {"a": 100 * A + 7}, PROMPTS) == pytest.approx(combined)


def test_ranks_are_within_a_prompt():
    combined = combine(parse_combination("a:1,b:10", "rank"), {"a": A, "b": B}, PROMPTS)
    assert combined.tolist() == [0 + 5, 1 + 5, 0.5 + 10, 0.5 + 0]
    values = np.array([5.0, 1.0, 3.0, 3.0, 9.0])
    assert ranks(values, ["x"] * 5).tolist() == [0.75, 0.0, 0.375, 0.375, 1.0]
    assert ranks(values, ["x", "x", "x", "x", "alone"]).tolist() == pytest.approx([1, 0, 0.5, 0.5, 0.5])
    assert ranks(values**3, ["x"] * 5).tolist() == ranks(values, ["x"] * 5).tolist()


def test_equal_scores_say_nothing():
    assert standardised(np.full(3, 0.1 + 0.2)).tolist() == [0.0, 0.0, 0.0]
    assert standardised(np.array([])).tolist() == []
    assert ranks(np.full(3, 7.0), ["x"] * 3).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("by", ["sum", "zscore", "rank"])
def test_an_image_without_a_score_stays_without_and_does_not_move_others(by: str):
    holed = np.array([1.0, 3.0, np.nan, 2.0, 2.0])
    combined = combine(parse_combination("a", by), {"a": holed}, ["x", "x", "x", "y", "y"])
    assert np.isnan(combined).tolist() == [False, False, True, False, False]
    whole = combine(parse_combination("a", by), {"a": A}, PROMPTS)
    assert combined[~np.isnan(combined)] == pytest.approx(whole)


def test_a_scorer_without_scores_is_named():
    with pytest.raises(UserError, match=r"no scores by 'hpsv2': did you mean 'hpsv2\.1'"):
        combine(parse_combination("hpsv2"), {"hpsv2.1": A}, PROMPTS)
