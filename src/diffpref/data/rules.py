"""What several scorers together say of pairs: a label and a margin for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["mean", "majority", "agree"]
UNSCORED, DISAGREE = "without a score", "scorers disagree"


@dataclass(frozen=True, eq=False)
class Verdicts:
    """One entry a pair. labels: 1 where chosen is better, 0 where rejected is, 0.5 for a tie; NaN where there is no
    label, and `reasons` says why. margins: by how much the better one is better, 0 or more. scales: one a scorer.
    """

    labels: np.ndarray
    margins: np.ndarray
    reasons: list[str]
    scales: np.ndarray


def verdicts(differences: np.ndarray, rule: Rule) -> Verdicts:
    """Judge pairs by their score differences, chosen minus rejected: float64 (pairs, scorers), NaN where unknown.

    mean: each scorer's differences are divided by their root mean square over all pairs that all scorers scored (they
    are not centred: exchanging the two images must turn the verdict round); the label is the sign of the mean over the
    scorers, the margin its size. majority: each scorer votes for the image with its higher score, or for neither; more
    votes win, as many for each are a tie; the margin is the surplus of votes over the number of scorers. agree: as
    mean, and only pairs on which all votes are the same. A pair that a scorer could not score has no label.
    """
    whole = np.asarray(np.isfinite(differences).all(axis=1))
    known = np.where(whole[:, None], differences, 0.0)
    scales = np.sqrt((known**2).sum(axis=0) / max(int(whole.sum()), 1))
    votes = np.asarray(np.sign(known))
    mean = (known / np.where(scales > 0, scales, 1.0)).mean(axis=1)
    values = votes.mean(axis=1) if rule == "majority" else mean
    agreed = (votes == votes[:, :1]).all(axis=1)
    kept = whole & agreed if rule == "agree" else whole
    reasons = np.where(kept, "", np.where(whole, DISAGREE, UNSCORED)).tolist()
    return Verdicts(np.where(kept, (1 + np.sign(values)) / 2, np.nan), np.abs(values), reasons, scales)
