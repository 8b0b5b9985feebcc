"""Statistics against hand values, closed forms and a slow bootstrap written otherwise."""

import itertools
import math
import random
import statistics as python_statistics

import numpy as np
import pytest

from diffpref.evaluate import statistics
from diffpref.evaluate.statistics import (
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_means,
    effect_size,
    holm,
    outcomes,
    prompt_sign_test,
    sign_test,
    standard_error,
)

A = np.array([1.0, 2.0, 3.0, 4.0])
B = np.array([2.0, 2.0, 2.0, 5.0])
FOUR = list("abcd")


def test_win_rate_is_that_of_the_second_with_ties_counting_half():
    assert outcomes(A, B).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert bootstrap_mean(outcomes(A, B), FOUR).value == 0.625
    assert bootstrap_mean(outcomes(B, A), FOUR).value == 0.375
    assert bootstrap_mean(outcomes(A, A), FOUR).value == 0.5


def test_the_interval_surrounds_the_value_and_is_seeded():
    first, again = bootstrap_mean(outcomes(A, B), FOUR, seed=3), bootstrap_mean(outcomes(A, B), FOUR, seed=3)
    assert first == again
    assert first.low < first.value < first.high
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, range(50), seed=1) != bootstrap_mean(values, range(50), seed=2)


def test_the_interval_has_the_closed_forms_width():
    """The bootstrap's standard deviation of a mean of P independent values is their population deviation / sqrt(P)."""
    values = np.random.default_rng(1).normal(size=400)
    estimate = bootstrap_mean(values, range(400))
    expected = 1.96 * values.std() / math.sqrt(400)
    assert estimate.high - estimate.value == pytest.approx(expected, rel=0.05)
    assert estimate.value - estimate.low == pytest.approx(expected, rel=0.05)


def test_copies_of_an_image_add_no_evidence():
    values = np.random.default_rng(2).random(60)
    once = bootstrap_mean(values, range(60))
    copied = bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(60), 4).tolist())
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)
    believed_independent = bootstrap_mean(np.repeat(values, 4), range(240))
    assert copied.high - copied.low == pytest.approx(
        2 * (believed_independent.high - believed_independent.low), rel=0.1
    )


def test_a_slow_bootstrap_agrees_on_uneven_prompts():
    rng = np.random.default_rng(3)
    prompts = [f"p{place}" for place in range(40) for _ in range(1 + place % 4)]
    effect = {prompt: rng.normal(3.0) for prompt in dict.fromkeys(prompts)}
    values = np.array([effect[prompt] + 0.3 * rng.normal() for prompt in prompts])
    grouped: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        grouped.setdefault(prompt, []).append(float(value))
    slow, means = random.Random(4), []
    for _ in range(8000):
        drawn = [value for prompt in slow.choices(list(grouped), k=len(grouped)) for value in grouped[prompt]]
        means.append(python_statistics.fmean(drawn))
    means.sort()
    estimate = bootstrap_mean(values, prompts)
    width = estimate.high - estimate.low
    assert estimate.low == pytest.approx(means[200], abs=0.04 * width)
    assert estimate.high == pytest.approx(means[7800], abs=0.04 * width)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        values = np.repeat(rng.normal(size=80), 2) + 0.5 * rng.normal(size=160)
        estimate = bootstrap_mean(values, np.repeat(np.arange(80), 2).tolist(), resamples=600)
        covered += estimate.low <= 0 <= estimate.high
    assert 0.90 <= covered / 300 <= 0.985


def test_drawing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(6).random(30)
    whole = bootstrap_mean(values, range(30), resamples=1001)
    monkeypatch.setattr(statistics, "BLOCK", 100)
    assert bootstrap_mean(values, range(30), resamples=1001) == whole


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [(8, 2, 0.109375), (10, 0, 2 / 1024), (1, 6, 0.125), (5, 5, 1.0), (3, 2, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_sign_test_has_the_binomials_values(wins: int, losses: int, expected: float):
    assert sign_test(wins, losses) == expected
    assert sign_test(losses, wins) == expected


def test_sign_test_of_many_agrees_with_the_normal_limit():
    z = (5200 - 0.5 - 5000) / 50  # with the continuity correction
    assert sign_test(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0 <= sign_test(3000, 0) < 1e-300


def test_the_sign_test_of_pairs_counts_prompts():
    a = np.zeros(8)
    b = np.array([1, 1, -1, 1, 1, 0, 1, -1.0])  # the prompts' sums: x 1, y 2, z 0
    assert prompt_sign_test(a, b, list("xxxyyzzz")) == sign_test(2, 0)
    assert prompt_sign_test(a, b, range(8)) == sign_test(5, 2)


def test_effect_size_is_cohens_d_of_the_prompts():
    zero = np.zeros(3)
    assert effect_size(zero, np.array([1.0, 2.0, 3.0]), "abc") == pytest.approx(2.0)
    assert effect_size(np.array([1.0, 2.0, 3.0]), zero, "abc") == pytest.approx(-2.0)
    twice = np.array([0.0, 2.0, 2.0, 2.0, 3.0, 3.0])  # the prompts' means: 1, 2, 3
    assert effect_size(np.zeros(6), twice, "aabbcc") == pytest.approx(2.0)


def test_effect_size_is_undefined_without_spread():
    assert effect_size(np.zeros(3), np.full(3, 0.1), "abc") is None
    assert effect_size(np.zeros(1), np.ones(1), "a") is None
    assert effect_size(np.zeros(3), np.zeros(3), "abc") == 0.0


def test_standard_error_is_that_of_the_prompts_means():
    values = np.array([1.0, 3.0, 4.0, 6.0, 0.0, 2.0])  # the prompts' means: 2, 5, 1
    expected = python_statistics.stdev([2, 5, 1]) / math.sqrt(3)
    assert standard_error(values, "aabbcc") == pytest.approx(expected)
    assert standard_error(values, "aaaaaa") is None


def test_columns_share_their_draws_and_say_what_each_says_alone():
    rng = np.random.default_rng(7)
    columns, prompts = rng.normal(size=(60, 3)), np.repeat(np.arange(20), 3).tolist()
    for column, estimate in zip(columns.T, bootstrap_means(columns, prompts, seed=5), strict=True):
        alone = bootstrap_mean(column, prompts, seed=5)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((alone.value, alone.low, alone.high))
        assert estimate.value == pytest.approx(column.mean())


P_VALUES = [0.041, 0.001, 0.008, 0.039, 0.042, 0.06, 0.6, 0.205, 0.212, 0.008, 0.0005]


def test_corrections_agree_with_statsmodels():
    """Golden: statsmodels 0.15.0, `multipletests` with the methods holm and fdr_bh."""
    of_holm = [0.273, 0.01, 0.072, 0.273, 0.273, 0.273, 0.615, 0.615, 0.615, 0.072, 0.0055]
    of_rate = [0.066, 0.0055, 0.022, 0.066, 0.066, 0.0825, 0.6, 0.2332, 0.2332, 0.022, 0.0055]
    assert holm(P_VALUES) == pytest.approx(of_holm, abs=1e-12)
    assert benjamini_hochberg(P_VALUES) == pytest.approx(of_rate, abs=1e-12)


def test_corrections_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, and no less for 0.04
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])  # 3 x 0.01, 3/3 x 0.04 for both
    for correct in (holm, benjamini_hochberg):
        assert correct([0.2]) == [0.2]
        assert correct([]) == []
        assert correct([1.0, 1.0]) == [1.0, 1.0]


def test_holm_rejects_what_the_closed_test_rejects():
    """By definition: a claim stands at a level if Bonferroni refuses every set of hypotheses that holds it."""
    p_values = [0.004, 0.011, 0.02, 0.03, 0.2]
    sets = [which for size in range(1, 6) for which in itertools.combinations(range(5), size)]
    for level in (0.01, 0.02, 0.05, 0.06, 0.1):
        refused = {which for which in sets if min(p_values[place] for place in which) * len(which) < level}
        closed = [all(which in refused for which in sets if place in which) for place in range(5)]
        assert [value < level for value in holm(p_values)] == closed


def test_values_and_prompts_must_be_as_many():
    for values, prompts in ((A, "abc"), (np.array([]), "")):
        with pytest.raises(ValueError, match="prompts"):
            bootstrap_mean(values, prompts)
