"""The statistics of a paired comparison, with the prompt as the unit.

Images of one prompt resemble one another, so they are no independent evidence: intervals resample whole prompts, and
the test counts prompts. Everything is NumPy and a function of its seed.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
BLOCK = 2_000_000  # prompts drawn at a time, so that memory stays small


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


def outcomes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each pair 1 where b's score is higher than a's, 0 where it is lower and one half where they are equal."""
    return (1 + np.sign(b - a)) / 2


def win_rate(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The share of pairs that b wins over a, ties counting half. Scores (N,), (N,), and the prompt of each pair."""
    return bootstrap_mean(outcomes(a, b), prompts, seed)


def mean_difference(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable], seed: int = 0) -> Estimate:
    """How much higher b's scores are than a's in the mean. Scores (N,), (N,), and the prompt of each pair."""
    return bootstrap_mean(b - a, prompts, seed)


def bootstrap_mean(
    values: np.ndarray, prompts: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of values (N,) with a 95% percentile interval from resampling prompts with all their values.

    With few prompts, or where all values are equal, the interval is narrower than it should be.
    """
    sums, counts = _by_prompt(values, prompts)
    rng = np.random.default_rng(seed)
    size = len(sums)
    means = np.empty(resamples)
    rows = max(1, BLOCK // size)
    for start in range(0, resamples, rows):
        drawn = rng.integers(size, size=(min(rows, resamples - start), size))
        means[start : start + rows] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def standard_error(values: np.ndarray, prompts: Sequence[Hashable]) -> float | None:
    """The standard error of the mean of values (N,), clustered by prompt; None with a single prompt.

    Where every prompt has equally many values, it is the standard deviation of the prompts' means over the root of
    their number.
    """
    sums, counts = _by_prompt(values, prompts)
    size = len(sums)
    if size < 2:
        return None
    residuals = sums - counts * values.mean()
    return float(np.sqrt(size / (size - 1) * (residuals**2).sum()) / len(values))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of that many wins and losses if either were as likely as the other; ties left out.

    Whole numbers throughout, so it is exact for any size.
    """
    decided = wins + losses
    term = tail = 1  # the binomial coefficient of `decided` over k, and the sum of those so far
    for k in range(min(wins, losses)):
        term = term * (decided - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**decided)


def prompt_sign_test(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable]) -> float:
    """The sign test over prompts: b wins a prompt if it wins more of the prompt's pairs than it loses."""
    sums, _ = _by_prompt(2 * outcomes(a, b) - 1, prompts)
    return sign_test(int((sums > 0).sum()), int((sums < 0).sum()))


def effect_size(a: np.ndarray, b: np.ndarray, prompts: Sequence[Hashable]) -> float | None:
    """Cohen's d for pairs: the mean of the prompts' mean differences over their standard deviation.

    None where it is undefined: a single prompt, or differences that are all equal but not zero.
    """
    sums, counts = _by_prompt(b - a, prompts)
    differences = sums / counts
    if not differences.any():
        return 0.0
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if spread < 1e-12 * float(np.abs(differences).max()):
        return None
    return float(differences.mean()) / spread


def _by_prompt(values: np.ndarray, prompts: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the count of the values of each prompt, in order of first appearance."""
    if len(values) != len(prompts) or not len(values):
        raise ValueError(f"{len(values)} values for {len(prompts)} prompts")
    places: dict[Hashable, int] = {}
    codes = np.array([places.setdefault(prompt, len(places)) for prompt in prompts])
    return np.bincount(codes, weights=values), np.bincount(codes)
