"""Diversity and drift: what a tuned model's images do besides scoring, so that a reward bought with sameness shows.

Diversity is how far the images of one prompt lie apart in the mean, over all pairs of them. Where no prompt has two
images, it is how far the images of different prompts lie apart. Drift is how far a tuned image lies from the base's of
the same prompt and seed. Distances are Euclidean, between features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffpref.evaluate.statistics import Estimate, bootstrap_mean, bootstrap_means

BLOCK = 1024  # images whose distances to all others are taken at a time


@dataclass(frozen=True)
class Spread:
    """Diversity and drift of one tuned folder (b) against the base (a); intervals are 95%, by prompt.

    `among` says which images' distances are the diversity: those of each `prompt`, or those of different `prompts`.
    `diversity_difference` is b's less a's, `diversity_change` the same as a share of a's. Diversity is None where there
    is a single image.
    """

    features: str
    version: str
    among: str
    diversity_a: float | None
    diversity_b: float | None
    diversity_change: float | None
    diversity_difference: Estimate | None
    drift: Estimate
    drifts: np.ndarray

    def summary(self) -> dict[str, object]:
        """All but the single images' drifts, ready for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "drifts"}
        return {name: vars(value) if isinstance(value, Estimate) else value for name, value in found.items()}


def spread(name: str, version: str, a: np.ndarray, b: np.ndarray, prompts: Sequence[str]) -> Spread:
    """Measure b's features (N, width) against a's; a row each image, with the prompt of each."""
    drifts = np.linalg.norm(b.astype(np.float64) - a, axis=1)
    drift = bootstrap_mean(drifts, prompts)
    rows = _rows_of(prompts)
    several = {prompt: places for prompt, places in rows.items() if len(places) > 1}
    if several:
        of_a, of_b = ([_to_others(each[places]).mean() for places in several.values()] for each in (a, b))
        among, unit, stretch = "prompt", list(several), 1.0
    elif len(rows) > 1:
        # Each value is one image's mean distance to the others. A mean over pairs varies twice as much as the mean of
        # these values would, for every image stands in its own and in all others' (Hoeffding's first-order term).
        of_a, of_b = _to_others(a), _to_others(b)
        among, unit, stretch = "prompts", list(rows), 2.0
    else:
        return Spread(name, version, "prompts", None, None, None, None, drift, drifts)
    both = np.stack([of_a, of_b, np.subtract(of_b, of_a)], axis=1)
    first, second, change = bootstrap_means(both, unit)
    low, high = (change.value + stretch * (end - change.value) for end in (change.low, change.high))
    share = change.value / first.value if first.value else None
    difference = Estimate(change.value, low, high)
    return Spread(name, version, among, first.value, second.value, share, difference, drift, drifts)


def _rows_of(prompts: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(place)
    return rows


def _to_others(features: np.ndarray) -> np.ndarray:
    """For each row of (n, width) the mean distance to the other rows, (n,)."""
    points = features.astype(np.float64)
    points -= points.mean(axis=0)  # else near points far from zero would lose their digits
    squares = (points**2).sum(axis=1)
    sums = np.empty(len(points))
    for start in range(0, len(points), BLOCK):
        part = slice(start, start + BLOCK)
        distances = np.sqrt(np.maximum(squares[part, None] + squares - 2 * points[part] @ points.T, 0))
        own = np.arange(len(distances))
        distances[own, start + own] = 0
        sums[part] = distances.sum(axis=1)
    return sums / (len(points) - 1)
