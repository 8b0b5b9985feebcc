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
    """For each pair 1 where b's score is higher than a's, 0 where it is lower and one half where they are equal.

    Their mean is b's win rate over a.
    """
    return (1 + np.sign(b - a)) / 2


def bootstrap_mean(
    values: np.ndarray, prompts: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """The mean of values (N,) with a 95% percentile interval from resampling prompts with all their values.

    With few prompts, or where all values are equal, the interval is narrower than it should be.
    """
    return bootstrap_means(values[:, None], prompts, seed, resamples)[0]


def bootstrap_means(
    columns: np.ndarray, prompts: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """As `bootstrap_mean` for each column of values (N, K), all over the same resampled prompts."""
    sums, counts = _by_prompt(columns, prompts)
    rng = np.random.default_rng(seed)
    size = len(sums)
    means = np.empty((resamples, columns.shape[1]))
    rows = max(1, BLOCK // size)
    for start in range(0, resamples, rows):
        drawn = rng.integers(size, size=(min(rows, resamples - start), size))
        places = drawn + size * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(
            drawn.shape
        )  # how often each prompt was drawn
        means[start : start + rows] = (times @ sums) / (times @ counts)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return [Estimate(*map(float, each)) for each in zip(columns.mean(axis=0), low, high, strict=True)]


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


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number: below 0.05, any of these claims is false with a chance of 5% at most.

    Holm (1979): the k-th smallest of m times m - k + 1, and never below a smaller one's. It holds however the tests
    depend on one another.
    """
    corrected, floor = [0.0] * len(p_values), 0.0
    for place, which in enumerate(_ascending(p_values)):
        floor = corrected[which] = max(floor, min(1.0, (len(p_values) - place) * p_values[which]))
    return corrected


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number: of the claims below 0.05, 5% are expected to be false.

    Benjamini and Hochberg (1995): the k-th smallest of m times m / k, and never above a larger one's.
    """
    corrected, ceiling = [0.0] * len(p_values), 1.0
    for place, which in reversed(list(enumerate(_ascending(p_values), start=1))):
        ceiling = corrected[which] = min(ceiling, len(p_values) / place * p_values[which])
    return corrected


def _ascending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=values.__getitem__)


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
    """The sum and the count of the values (N,) or (N, K) of each prompt, in order of first appearance."""
    if len(values) != len(prompts) or not len(values):
        raise ValueError(f"{len(values)} values for {len(prompts)} prompts")
    places: dict[Hashable, int] = {}
    codes = np.array([places.setdefault(prompt, len(places)) for prompt in prompts])
    sums = np.zeros((len(places), *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums, np.bincount(codes)
