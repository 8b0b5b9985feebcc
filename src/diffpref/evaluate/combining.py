"""One score of several scorers' scores: a weighted sum of them as they are, standardised, or as ranks.

Scorers have scales of their own: as they are, PickScore's differences of 0.3 vanish beside HPSv2.1's of 1.5. `zscore`
gives each the same spread over all the images given, `rank` only looks at the order of one prompt's images.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffpref.errors import UserError, nearest

By = Literal["sum", "zscore", "rank"]


@dataclass(frozen=True)
class Combination:
    """Scorers' names with their weights, and what is done to scores before they are weighted and added."""

    weights: tuple[tuple[str, float], ...]
    by: By = "sum"

    @property
    def name(self) -> str:
        """What its scores are called."""
        return f"{self.by}({','.join(f'{name}:{weight:g}' for name, weight in self.weights)})"

    def __str__(self) -> str:
        return self.name


def parse_combination(text: str, by: str = "sum") -> Combination:
    """Read `pickscore:0.5,hpsv2.1:0.5`; a scorer without a weight has 1.

    Raises UserError for a weight that is no number, a scorer named twice, none at all, and an unknown `by`.
    """
    kinds: dict[str, By] = {kind: kind for kind in get_args(By)}
    if by not in kinds:
        raise UserError(f"scores cannot be combined by {by!r}: {nearest(by, kinds)}")
    found: dict[str, float] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, colon, weight = (each.strip() for each in part.partition(":"))
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = float("nan")
        if not np.isfinite(value) or not name:
            raise UserError(f"combination: {part!r} is not of the form SCORER:WEIGHT, as pickscore:0.5 is")
        if name in found:
            raise UserError(f"combination: {name} is named twice in {text!r}")
        found[name] = value
    if not found:
        raise UserError(f"combination: {text!r} names no scorer")
    return Combination(tuple(found.items()), kinds[by])


def combine(combination: Combination, scores: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> np.ndarray:
    """The combined scores (N,) of N images, from each scorer's (N,) and the images' prompts.

    All images to be compared with one another belong into one call, for both z-scores and ranks depend on the others.
    An image without a score by one of the scorers (NaN) has none combined either. Raises UserError for a scorer of the
    combination that has no scores.
    """
    total = np.zeros(len(prompts))
    for name, weight in combination.weights:
        if name not in scores:
            raise UserError(f"combination: there are no scores by {name!r}: {nearest(name, scores)}")
        values = np.asarray(scores[name], dtype=np.float64)
        if combination.by == "zscore":
            values = standardised(values)
        elif combination.by == "rank":
            values = ranks(values, prompts)
        total += weight * values
    return total


def standardised(values: np.ndarray) -> np.ndarray:
    """Values (N,) less their mean over their standard deviation, NaN left out of both; equal ones become 0."""
    known = ~np.isnan(values)
    spread = values[known].std() if known.any() else 0.0
    if spread <= 1e-12 * np.abs(values[known]).max(initial=0.0):  # what rounding leaves of equal values
        return np.where(known, 0.0, np.nan)
    return (values - values[known].mean()) / spread


def ranks(values: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """The share of its prompt's other images (N,) that an image beats, equal ones counting half; 0.5 where alone."""
    places: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if not np.isnan(values[place]):
            places.setdefault(prompt, []).append(place)
    found = np.full(len(values), np.nan)
    for group in places.values():
        own = values[group]
        ordered = np.sort(own)
        beaten = np.searchsorted(ordered, own, side="left")
        equal = np.searchsorted(ordered, own, side="right") - beaten - 1
        found[group] = (beaten + equal / 2) / (len(group) - 1) if len(group) > 1 else 0.5
    return found
